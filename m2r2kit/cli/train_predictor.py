"""`m2r2kit train predictor`: train expert predictors on the same rows, and compare them."""

import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from ..common import UserError
from ..experts import train as learn
from ..experts import trained
from ..experts.registry import PREDICTORS, TRAINED
from ..experts.state_predictors import DirectMap
from ..model.backbone import Backbone
from ..stream import checkpoints
from ..text.rows import for_training, text
from . import shared, training
from .result import check_result, keep
from .values import count, counts, natural, number, some_of


def arguments(parser):
    shared.model(parser, shared.MOE)
    parser.add_argument(
        "--kind",
        type=some_of(TRAINED),
        default=list(TRAINED),
        metavar="A,B,..",
        help=f"predictors to train on the same rows, among {', '.join(TRAINED)} (default: all)",
    )
    parser.add_argument(
        "--exits",
        type=counts,
        metavar="E,F,..",
        help="blocks that end the stream's intervals (default: every block)",
    )
    parser.add_argument(
        "--rate",
        type=number(float, 1),
        default=2.0,
        metavar="R",
        help="rate of the stream m2r2; direct predicts for the same blocks (default: 2)",
    )
    parser.add_argument(
        "--rank",
        type=natural,
        default=0,
        metavar="R",
        help="rank of the stream's changes to the base matrices; 0 for none (default: 0)",
    )
    parser.add_argument(
        "--ffn-width",
        type=count,
        default=320,
        metavar="W",
        help="width of the stream's own FFN in each block (default: 320)",
    )
    shared.training_rows(parser, 480)  # the states of all blocks are kept: 6 MB per row of the pocket model
    shared.record(parser)
    shared.explain(parser, kinds={kind: PREDICTORS[kind] for kind in TRAINED})


def run(args) -> int:
    """Train, save and record each requested kind."""
    check_result(args, "predictors")
    files = [trained.folder_of(args.model, kind) / f"{trained.file_of(kind)}.json" for kind in args.kind]
    training.check(args, files)
    backbone = for_training(args.model)
    if not backbone.is_moe:
        raise UserError(f"{args.model} is not a mixture of experts; use one, such as data/pocket-moe.")
    modules = {kind: new(kind, backbone, args) for kind in args.kind}
    train, held_out = text(backbone, args.corpus, args.rows, args.seed)
    batches, validation = (teacher_batches(backbone, rows, args.batch) for rows in (train, held_out))
    for kind, module in modules.items():
        train_one(kind, module, backbone, batches, validation, args)
    return 0


def new(kind: str, backbone: Backbone, args):
    """An untrained predictor; the direct map has the size of the stream of the same rate."""
    rate = 1.0 if kind == "m2r2-r1" else args.rate
    exits = tuple(args.exits) if args.exits else None
    stream = learn.new_stream(backbone, rate, exits, args.rank, args.ffn_width)
    return DirectMap.like(stream) if kind == "direct" else stream


def teacher_batches(backbone: Backbone, rows: np.ndarray, batch: int) -> list[learn.RouterTeacherBatch]:
    """The teacher's states and routing for the rows, in batches of `batch` rows."""
    starts = range(0, len(rows) - batch + 1, batch) if len(rows) >= batch else [0]
    starts = tqdm(starts, desc="teacher forward", leave=False)
    return [learn.teacher_batch(backbone, rows[i : i + batch]) for i in starts]


def train_one(kind: str, module, backbone: Backbone, batches, validation, args) -> None:
    """Train, save and record one kind."""
    predictor = learn.predictor_of(module)
    settings = training.settings(args)
    before = learn.by_distance(learn.recall(predictor, validation))
    with training.progress(settings.steps, kind) as report:
        history = learn.train(module, batches, settings, report, training.limit(args))
    after = learn.by_distance(learn.recall(predictor, validation))
    folder, name = trained.folder_of(args.model, kind), trained.file_of(kind)
    facts = {"steps": len(history.losses), "train_seconds": round(history.seconds)}
    checkpoints.save(module, module.config, backbone.sha256, folder, name, **facts)
    recalls = ", ".join(f"{apart} ahead {before[apart]:.3f} -> {r:.3f}" for apart, r in after.items())
    print(f"{kind}: held-out slot recall, by distance in blocks: {recalls}. Saved in {folder}.", flush=True)
    parameters = sum(w.size for _, w in tree_flatten(module.trainable_parameters()))
    figures = facts | {"parameters": parameters, "recall": after, "recall_before": before}
    described = training.described(args, backbone, module.config, settings, kind=kind)
    keep(args, "predictors", described, figures)
