"""`m2r2kit train drafter`: train baseline drafters, on the same rows and in the same way as the stream."""

from pathlib import Path

from mlx.utils import tree_flatten

from ..bench.tune import tune_baseline
from ..model.backbone import Backbone
from ..speculation import trained as baselines
from ..speculation.registry import METHODS, drafters_folder
from ..speculation.registry import TRAINED as DRAFTERS
from ..stream import train as distillation
from ..text.rows import for_training, text
from . import shared, training
from .result import check_result, keep
from .values import count, some_of


def arguments(parser):
    shared.model(parser)
    parser.add_argument(
        "--kind",
        type=some_of(DRAFTERS),
        required=True,
        metavar="A,B,..",
        help=f"drafters to train on the same rows, among {', '.join(DRAFTERS)}, or all",
    )
    shared.trained(parser, "--out", "where to save the drafter", "drafters/KIND")
    parser.add_argument(
        "--exit", type=count, metavar="E", help="block after which kangaroo and deed draft (default: 2)"
    )
    shared.training_rows(parser)
    shared.tuning(parser)
    shared.record(parser)
    shared.explain(parser, kinds={kind: METHODS[kind] for kind in DRAFTERS})


def run(args) -> int:
    """Train, save, tune and record each requested kind."""
    check_result(args, "drafters")
    training.check(args, [folder_of(kind, args) / "drafter.json" for kind in args.kind])
    backbone = for_training(args.model)
    modules = {kind: baselines.new(backbone, kind, args.exit, args.seed) for kind in args.kind}
    depths = set().union(*(module.depths for module in modules.values()))
    train, held_out = text(backbone, args.corpus, args.rows, args.seed)
    batches = distillation.teacher_batches(backbone, train, depths, set(), args.batch)
    validation = distillation.teacher_batches(backbone, held_out, depths, set())
    for kind, module in modules.items():
        train_one(backbone, kind, module, batches, validation, folder_of(kind, args), args)
    return 0


def folder_of(kind: str, args) -> Path:
    """The folder of a kind."""
    return Path(args.out) if args.out else drafters_folder(args.model, None) / kind


def train_one(backbone: Backbone, kind: str, module, batches, validation, out: Path, args) -> None:
    """Train, save, tune and record one kind."""
    distil = training.settings(args)
    before = baselines.mean_loss(module, validation, distil)
    with training.progress(distil.steps, kind) as report:
        history = baselines.train(module, batches, distil, report, training.limit(args))
    after = baselines.mean_loss(module, validation, distil)
    steps = len(history.losses)
    print(f"{kind}: held-out loss {before:.3f} before, {after:.3f} after {steps} steps.")
    facts = {"steps": steps, "train_seconds": round(history.seconds), "drafts": training.UNTUNED}
    baselines.save(module, backbone, out, **facts)  # tuning may be interrupted
    parameters = sum(w.size for _, w in tree_flatten(module.trainable_parameters()))
    figures = {"parameters": parameters, "held_out_loss": after, "held_out_loss_before": before}
    if args.tune:
        tuned = tune_baseline(backbone, kind, module)  # may change the module's threshold too
        print(tuned)
        facts["drafts"] = tuned.drafts
        baselines.save(module, backbone, out, **facts)
        figures["predicted_speedup"] = tuned.estimate
    settings = training.described(args, backbone, module.config, distil, kind=kind)
    keep(args, "drafters", settings, figures | facts)
    print(f"Saved in {out}.", flush=True)
