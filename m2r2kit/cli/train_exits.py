"""`m2r2kit train exits`: train the exits of M2R2 and its baselines, on the same rows."""

import argparse
from pathlib import Path

from ..common import UserError
from ..exits import trained
from ..exits.registry import KINDS as EXIT_KINDS
from ..model.backbone import Backbone
from ..stream import checkpoints
from ..stream.stream import load_stream
from ..text.rows import for_training, text
from . import calibrate, shared, training
from .result import check_result, keep
from .values import counts, some_of

ROUTED = ("m2r2", "lens")  # kinds that have a router


def arguments(parser):
    shared.model(parser)
    parser.add_argument(
        "--kind",
        type=some_of(EXIT_KINDS),
        default=["m2r2"],
        metavar="A,B,..",
        help=f"modules to train on the same rows, among {', '.join(EXIT_KINDS)}, or all (default: m2r2)",
    )
    shared.trained(parser, "--out", "where to save the module", "exits/KIND")
    parser.add_argument(
        "--exits",
        type=counts,
        metavar="E,F,..",
        help="blocks after which tokens may exit; for shallow, its number of blocks",
    )
    parser.add_argument(
        "--start",
        type=Path,
        metavar="DIR",
        help="for m2r2: initialise the first exit from this trained stream (`m2r2kit train stream`)",
    )
    parser.add_argument(
        "--calibrate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="then choose exits and measure risks; --no-calibrate leaves it to `m2r2kit calibrate`",
    )
    parser.add_argument(
        "--router-only",
        action="store_true",
        help="retrain only the router of saved exits",
    )
    shared.training_rows(parser)
    shared.record(parser)
    shared.explain(parser, kinds=EXIT_KINDS)


def run(args) -> int:
    """Train, save and record each requested kind."""
    check_result(args, "exits-training", "exits-calibration")
    training.check(args, [folder_of(kind, args) / "exits.json" for kind in args.kind])
    if args.start and args.kind != ["m2r2"]:
        raise UserError("--start is for --kind m2r2 alone; leave out one of them.")
    backbone = for_training(args.model)
    if args.router_only:
        modules = {kind: saved(backbone, kind, args) for kind in args.kind}
    else:
        modules = {kind: trained.new(backbone, kind, args.exits, args.seed) for kind in args.kind}
    if args.start:
        modules["m2r2"].begin_with(load_stream(backbone, args.start))
    rows, _ = text(backbone, args.corpus, args.rows, args.seed)
    fresh = calibrate.held_out_texts(backbone, args.corpus, args.seed) if args.calibrate else None
    for kind, module in modules.items():
        train_one(backbone, kind, module, rows, fresh, folder_of(kind, args), args)
    return 0


def folder_of(kind: str, args) -> Path:
    """The folder of a kind."""
    return Path(args.out) if args.out else trained.folder(args.model, None) / kind


def saved(backbone: Backbone, kind: str, args):
    """A trained module, for retraining its router only.

    Raises:
        UserError: this kind has no router, or the arguments ask for other exits or a stream.
    """
    if kind not in ROUTED:
        raise UserError(f"{kind} has no router; --router-only is for {' and '.join(ROUTED)}.")
    if args.exits or args.start:
        raise UserError("--router-only keeps exits and stream; leave out --exits and --start.")
    return trained.load(backbone, folder_of(kind, args), kind)[0]


def train_one(backbone: Backbone, kind: str, module, rows, fresh, out: Path, args) -> None:
    """Train, save and record one kind."""
    distil = training.settings(args, trained.STEPS)
    with training.progress(distil.steps, kind) as report:
        history = trained.train(
            backbone, module, rows, distil, args.batch, report, training.limit(args), args.router_only
        )
    losses = history.losses
    facts = {"steps": len(losses), "train_seconds": round(history.seconds)}
    if args.router_only:  # keep the facts of the first training
        before = checkpoints.read_settings(out, "exits", type(module.config))[1]
        facts = {f"router_{name}": value for name, value in facts.items()}
        facts |= {name: before[name] for name in ("steps", "train_seconds") if name in before}
    trained.save(module, backbone, out, **facts)
    counts = trained.parameter_counts(module)
    figures = facts | {"parameters": counts, "loss": sum(losses[-20:]) / len(losses[-20:])}
    start = str(args.start) if args.start else None
    settings = training.described(
        args, backbone, module.config, distil, kind=kind, start=start, router_only=args.router_only
    )
    keep(args, "exits-training", settings, figures)
    print(f"{kind}: {len(losses)} steps. Saved in {out}.", flush=True)
    if fresh is not None and isinstance(module, trained.Exits):
        calibrate.calibrate_one(backbone, kind, out, fresh, args)
