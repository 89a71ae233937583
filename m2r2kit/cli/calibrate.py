"""`m2r2kit calibrate`: choose which trained exits to use, and measure the risk of each threshold.

Both are written into the JSON of the trained module, where `generate` and `bench exits` read them. The exits
are chosen on the tuning prompts. The risk is measured on the model's answers to questions from held-out
documents and bounded by learn then test (`exits/calibrate.py`). The bound counts tokens after the same words;
the share of tokens that differ in freely decoded answers is measured as well.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..bench.exits import best_exits, measure, measure_free
from ..common import check_writable
from ..exits import trained
from ..exits.calibrate import CONFIDENCE, RISK, holds, promised
from ..exits.methods import PROBABLE, with_gate
from ..exits.registry import CALIBRATED, METHODS, split
from ..exits.teacher_forced import Texts, texts_of
from ..model.backbone import Backbone
from ..stream import checkpoints
from ..text import download, prompts
from ..text.corpus import documents
from ..text.rows import for_training, questions_or_beginnings, tokens_of
from . import shared
from .result import check_result, keep, model_name
from .values import some_of

TEXTS, TOKENS = 240, 40  # for the risk: texts, and tokens of each
TUNING = 4  # prompts of each kind for choosing exits
WAYS = ("wait", "linear")  # of filling skipped blocks; each has its own calibration
RESAMPLINGS = 100  # of the bound, each on half of the texts
PROMISED = ("m2r2",)  # kinds that `generate` decodes with


def arguments(parser):
    shared.model(parser)
    parser.add_argument(
        "--kind",
        type=some_of(CALIBRATED),
        default=["m2r2"],
        metavar="A,B,..",
        help=f"exits to calibrate, among {', '.join(CALIBRATED)}, or all (default: m2r2)",
    )
    shared.trained(parser, "--out", "folder of the trained exits, which receives the result", "exits/KIND")
    shared.corpus(parser)
    shared.seed(parser)
    shared.record(parser)


def run(args) -> int:
    """Calibrate each requested kind."""
    check_result(args, "exits-calibration")
    for kind in args.kind:
        check_writable(folder_of(kind, args) / "exits.json")
    backbone = for_training(args.model)
    fresh = held_out_texts(backbone, args.corpus, args.seed)
    for kind in args.kind:
        calibrate_one(backbone, kind, folder_of(kind, args), fresh, args)
    return 0


def folder_of(kind: str, args) -> Path:
    """The folder of a trained kind."""
    return Path(args.out) if args.out else trained.folder(args.model, None) / kind


def calibrate_one(backbone: Backbone, kind: str, folder: Path, fresh: Texts, args) -> None:
    """Choose the exits of a kind, measure its risks, and save and record both."""
    module, _ = trained.load(backbone, folder, kind)
    few = prompts.first_of_each_kind(prompts.read(prompts.TUNING), TUNING)
    tuning = texts_of(backbone, [backbone.encode(p.prompt) for p in few], TOKENS)
    names = [name for name, entry in METHODS.items() if entry.kind == kind]
    use = {}
    for name in tqdm(names, desc=f"{kind}: which exits", unit="method"):
        gate, fill = METHODS[name].gate, split(name)[1]
        use[name] = best_exits(with_gate(name, backbone, module, gate, fill), tuning)
    known, losses, promises, free = {}, {}, {}, {}
    for way in WAYS if kind in PROMISED else ():
        name = kind if way == "wait" else f"{kind}-{way}"
        method = with_gate(name, backbone, module, "arla", way, use.get(name))
        lost = measure(method, fresh).losses()
        losses[way] = lost.round(4).tolist()
        free[way] = measure_free(method, fresh).mean(1).tolist()
        known[way] = {
            "thresholds": list(method.thresholds),
            "means": lost.mean(1).tolist(),
            "texts": lost.shape[1],
            "free": free[way],
            "free_tokens": TOKENS,
        }
        kept, mean = holds(method.thresholds, lost, RISK, CONFIDENCE, RESAMPLINGS)
        promise = promised(known[way], RISK, CONFIDENCE)
        promises[way] = {"threshold": promise.threshold, "kept": kept, "lost": mean, "free": promise.free}
        print(f"{name}: {promise}.", flush=True)
    checkpoints.note(folder, "exits", use=use, calibration=known)
    exits = {name: [module.config.exits[j] for j in numbers] for name, numbers in use.items() if numbers}
    print(f"{kind}: exits in use: " + ", ".join(f"{n} {e}" for n, e in exits.items()), flush=True)
    keep(
        args,
        "exits-calibration",
        {
            "kind": folder.name,  # tells `m2r2-equal` from `m2r2`, both of kind m2r2
            "model": model_name(args.model),
            "model_sha256": backbone.sha256,
            "texts": len(fresh.first),
            "tokens": TOKENS,
            "risk": RISK,
            "confidence": CONFIDENCE,
            "resamplings": RESAMPLINGS,
        },
        {"exits": exits, "promise": promises, "thresholds": PROBABLE, "losses": losses, "free": free},
    )


def held_out_texts(backbone: Backbone, corpus, seed: int) -> Texts:
    """The model's answers to questions from held-out documents, equally many of each kind of text."""
    folder = Path(corpus) if corpus else download.corpus_folder()
    tokens = tokens_of(backbone, documents(folder), True, TEXTS, seed)
    rng = np.random.default_rng(seed)
    each = -(-TEXTS // len(tokens))
    asked = [
        q for ids in tokens.values() if len(ids) for q in questions_or_beginnings(backbone, ids, each, rng)
    ]
    return texts_of(backbone, [q.tolist() for q in asked], TOKENS)
