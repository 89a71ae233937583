"""`m2r2kit train drafter`: a peer of the accelerated stream, trained on the same rows in the same way."""

import math
from dataclasses import asdict
from pathlib import Path

from mlx.utils import tree_flatten
from tqdm import tqdm

from ..bench.tune import Tuned, tune_peer
from ..common import UserError, check_writable
from ..model.backbone import Backbone
from ..speculation import trained as peers
from ..speculation.registry import TRAINED as DRAFTERS
from ..speculation.registry import drafters_folder
from ..stream import train as distillation
from ..stream.distil import DistilConfig
from ..text.rows import for_training, text
from . import shared
from .result import check_result, keep, model_name
from .train_stream import UNTUNED
from .values import count, some_of


def arguments(parser):
    shared.model(parser)
    parser.add_argument(
        "--kind",
        type=some_of(DRAFTERS),
        required=True,
        metavar="A,B,..",
        help=f"which ways of drafting, of {', '.join(DRAFTERS)}, or all; they learn from the same rows",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to save it "
        "(default: 'drafters/KIND' in the model's folder; of a repository, in the cache)",
    )
    parser.add_argument(
        "--exit", type=count, metavar="E", help="block after which kangaroo and deed draft (default: 2)"
    )
    shared.training_rows(parser)
    shared.tuning(parser)
    shared.record(parser)


def run(args) -> int:
    """Train, tune, save and record each kind that is asked for, on the same rows."""
    check_result(args, "drafters")
    if args.rows < args.batch:
        raise UserError(f"{args.rows} rows of text do not fill one batch; ask for at least {args.batch}.")
    if args.out and len(args.kind) > 1:
        raise UserError("--out names the folder of one kind; leave it out, or ask for one kind at a time.")
    for kind in args.kind:
        check_writable(folder_of(kind, args) / "drafter.json")
    backbone = for_training(args.model)
    modules = {kind: peers.new(backbone, kind, args.exit, args.seed) for kind in args.kind}
    depths = set().union(*(module.depths for module in modules.values()))
    train, held_out = text(backbone, args.corpus, args.rows, args.seed)
    batches = distillation.teacher_batches(backbone, train, depths, set(), args.batch)
    judges = distillation.teacher_batches(backbone, held_out, depths, set())
    for kind, module in modules.items():
        one(backbone, kind, module, batches, judges, folder_of(kind, args), args)
    return 0


def folder_of(kind: str, args) -> Path:
    """Where a kind is saved."""
    return Path(args.out) if args.out else drafters_folder(args.model, None) / kind


def one(backbone: Backbone, kind: str, module, batches, judges, out: Path, args) -> None:
    """Train one kind, tune the number of its drafts, save and record it."""
    distil = DistilConfig(steps=args.steps or DistilConfig.steps, seed=args.seed)
    before = peers.mean_loss(module, judges, distil)
    with tqdm(total=distil.steps, unit="step", desc=kind) as bar:

        def report(step, loss):
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        seconds = 60 * args.minutes if args.minutes else math.inf
        history = peers.train(module, batches, distil, report, seconds)
    after = peers.mean_loss(module, judges, distil)
    tuned = tune_peer(backbone, kind, module) if args.tune else Tuned(UNTUNED)
    print(f"{kind}: held-out loss {before:.3f} before, {after:.3f} after {len(history.losses)} steps.")
    if args.tune:
        print(tuned)
    facts = {"steps": len(history.losses), "train_seconds": round(history.seconds), "drafts": tuned.drafts}
    peers.save(module, backbone, out, **facts)
    parameters = sum(w.size for _, w in tree_flatten(module.trainable_parameters()))
    figures = facts | {"parameters": parameters}
    figures |= {"predicted_speedup": tuned.estimate} if args.tune else {}
    figures |= {"held_out_loss": after, "held_out_loss_before": before}
    model = model_name(args.model)
    settings = {
        "kind": kind,
        "model": model,
        "model_sha256": backbone.sha256,
        "rows": args.rows,
        "batch": args.batch,
    }
    settings |= asdict(module.config) | asdict(distil)
    keep(args, "drafters", settings, figures)
    print(f"Saved in {out}.", flush=True)
