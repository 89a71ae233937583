"""`m2r2kit train exits`: what lets tokens leave early, M2R2's and its peers', on the same rows."""

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .. import distillation, download, records
from ..backbone import Backbone
from ..bench_exits import measure
from ..corpus import documents
from ..errors import UserError
from ..exits import trained
from ..exits.calibrate import CONFIDENCE, RISK, calibrate, holds
from ..exits.forced import Texts, texts_of
from ..exits.methods import with_gate
from ..residuals import load_stream
from ..training import DistilConfig
from .train_stream import command, for_training, text, tokens_of

CALIBRATION_TEXTS, CALIBRATION_TOKENS = 240, 64
WAYS = ("wait", "linear")  # of filling skipped blocks, calibrated each by itself


def run(args) -> int:
    """Train, save and record each kind that is asked for."""
    if args.rows < args.batch:
        raise UserError(f"{args.rows} rows of text are no lesson; ask for at least {args.batch}.")
    if args.out and len(args.kind) > 1:
        raise UserError("--out names the folder of one kind; leave it out, or ask for one kind at a time.")
    backbone = for_training(args.model)
    modules = {kind: trained.new(backbone, kind, args.exits, args.seed) for kind in args.kind}
    if args.start:
        if args.kind != ["m2r2"]:
            raise UserError("Only m2r2 begins with a stream; leave --start out, or ask for --kind m2r2.")
        modules["m2r2"].begin_with(load_stream(backbone, args.start))
    rows, _ = text(backbone, args.corpus, args.rows, args.seed)
    fresh = held_out_texts(backbone, args) if {"m2r2", "lens"} & set(args.kind) else None
    for kind, module in modules.items():
        out = Path(args.out) if args.out else trained.folder(args.model, None) / kind
        one(backbone, kind, module, rows, fresh, out, args)
    return 0


def held_out_texts(backbone: Backbone, args) -> Texts:
    """The model's answers to questions from documents that no training has seen, the kinds in equal parts."""
    corpus = Path(args.corpus) if args.corpus else download.corpus_folder()
    tokens = tokens_of(backbone, documents(corpus), True, CALIBRATION_TEXTS, args.seed)
    rng = np.random.default_rng(args.seed)
    each = -(-CALIBRATION_TEXTS // len(tokens))
    asked = [q for ids in tokens.values() if len(ids) for q in distillation.asked(backbone, ids, each, rng)]
    return texts_of(backbone, [q.tolist() for q in asked], CALIBRATION_TOKENS)


def calibration(backbone: Backbone, module: trained.Exits, texts: Texts) -> dict:
    """What each threshold loses on each of the texts, with a fill and where tokens wait: `generate` chooses
    from it by the risk that it is asked for (`exits/calibrate.py`)."""
    out: dict = {}
    for way in WAYS:
        m = with_gate("m2r2", backbone, module, "arla", way)
        losses = measure(m, texts).losses()
        out[way] = {"thresholds": list(m.thresholds), "losses": losses.round(4).tolist()}
    return out


def one(backbone: Backbone, kind: str, module, rows, fresh, out: Path, args) -> None:
    """Train, save and record one kind."""
    distil = DistilConfig(steps=args.steps or trained.STEPS, seed=args.seed)
    losses: list[float] = []
    with tqdm(total=distil.steps, unit="step", desc=kind) as bar:

        def report(step, loss):
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        limit = 60 * args.minutes if args.minutes else math.inf
        seconds = trained.train(backbone, module, rows, distil, args.batch, report, limit)
    facts = {"steps": len(losses), "train_seconds": round(seconds)}
    known = calibration(backbone, module, fresh) if kind in ("m2r2", "lens") else {}
    trained.save(module, backbone, out, **facts, **({"calibration": known} if known else {}))
    for way, found in known.items():
        losses_of, thresholds = np.array(found["losses"]), found["thresholds"]
        share, lost = holds(thresholds, losses_of, RISK, CONFIDENCE)
        facts[f"promise_{way}"] = {
            "risk": RISK,
            "confidence": CONFIDENCE,
            "texts": losses_of.shape[1],
            "threshold": calibrate(thresholds, losses_of, RISK, CONFIDENCE),
            "kept": share,
            "lost": lost,
        }
    figures = facts | {"parameters": trained.numbers(module), "loss": sum(losses[-20:]) / len(losses[-20:])}
    settings = {
        "kind": kind,
        "model": str(args.model).rstrip("/").rsplit("/", 1)[-1],
        "model_sha256": backbone.sha256,
        "rows": args.rows,
        "batch": args.batch,
        **asdict(module.config),
        **asdict(distil),
        "start": str(args.start) if args.start else None,
    }
    records.append("exits-training", command=command(), settings=settings, figures=figures)
    print(f"{kind}: {len(losses)} steps. Saved in {out}.", flush=True)
