"""What several commands take: a model and what was trained for it, text to learn from."""

import argparse
from pathlib import Path

from ..common import ROOT
from ..experts.registry import POLICIES, PREDICTORS
from .values import budget, count, natural, number, size

MODEL = ROOT / "data" / "pocket-dense"
MOE = ROOT / "data" / "pocket-moe"


def model(parser):
    parser.add_argument(
        "--model",
        default=str(MODEL),
        metavar="DIR_OR_REPO",
        help="a model that mlx_lm loads: a folder, a LoRA adapter's folder, or a Hugging Face repository "
        "(default: data/pocket-dense)",
    )


def stream(parser):
    parser.add_argument(
        "--stream",
        type=Path,
        metavar="DIR",
        help="the trained accelerated stream "
        "(default: 'stream' in the model's folder; of a repository, in the cache)",
    )


def drafters(parser):
    parser.add_argument(
        "--drafters",
        type=Path,
        metavar="DIR",
        help="trained drafters (default: 'drafters' in the model's folder; of a repository, in the cache)",
    )


def drafting(parser):
    stream(parser)
    drafters(parser)
    parser.add_argument(
        "--draft",
        type=natural,
        metavar="K",
        help="tokens drafted before each verification (default: as tuned)",
    )
    parser.add_argument(
        "--exit",
        type=count,
        metavar="E",
        help="block after which the method early-exit drafts (default: the stream's exit)",
    )
    parser.add_argument("--max-tokens", type=count, default=128, metavar="N", help="stop here (default: 128)")


def exits(parser):
    parser.add_argument(
        "--trained",
        type=Path,
        metavar="DIR",
        help="what was trained for exits "
        "(default: 'exits' in the model's folder; of a repository, in the cache)",
    )


def disk(parser):
    """How records are read."""
    parser.add_argument(
        "--reads",
        choices=("direct", "buffered"),
        default="direct",
        help="past the page cache (default), or through it",
    )
    parser.add_argument(
        "--threads", type=number(int, 1, 64), default=2, metavar="N", help="that read at once (default: 2)"
    )


def streaming(parser):
    """Where experts come from when they are not all in memory."""
    disk(parser)
    parser.add_argument(
        "--link",
        type=size,
        metavar="BYTES",
        help="simulate a disk of so many bytes a second, such as 200MB",
    )
    parser.add_argument(
        "--distance", type=count, default=2, metavar="G", help="blocks to look ahead (default: 2)"
    )
    parser.add_argument(
        "--width", type=count, metavar="K", help="experts to name (default: as many as the model runs)"
    )


def experts(parser):
    group = parser.add_argument_group("a mixture of experts whose experts stay on disk")
    group.add_argument(
        "--experts",
        type=Path,
        metavar="STORE",
        help="decode plainly, with experts from this store (see pack)",
    )
    group.add_argument(
        "--budget",
        type=budget,
        default=0.5,
        metavar="SIZE",
        help="memory for experts: 64MB, 25%% (default: 50%%)",
    )
    group.add_argument(
        "--policy", choices=POLICIES, default="lru", help="who goes when a slot is needed (default: lru)"
    )
    group.add_argument(
        "--predictor",
        choices=PREDICTORS,
        default="next-router",
        help="who names experts ahead of time (default: next-router)",
    )
    group.add_argument(
        "--known", type=Path, metavar="TRACE", help="routing of earlier texts, for those that learn from it"
    )
    group.add_argument("--trace", type=Path, metavar="FILE", help="write this run's routing here (.npz)")
    streaming(group)


def processes(parser):
    parser.add_argument(
        "--processes",
        type=count,
        default=1,
        metavar="N",
        help="on a CPU: share each batch among N processes, best with a core each (default: 1)",
    )


def corpus(parser):
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="folder with the text (default: download)")


def minutes(parser):
    parser.add_argument(
        "--minutes", type=number(float, 0, above=True), metavar="M", help="save and stop after so long"
    )


def seed(parser):
    parser.add_argument("--seed", type=natural, default=0, metavar="S", help="seed (default: 0)")


def training_rows(parser):
    """What a trained part learns from, and for how long."""
    parser.add_argument(
        "--rows", type=count, default=2400, metavar="N", help="rows of 192 tokens to learn from"
    )
    parser.add_argument("--batch", type=count, default=8, metavar="B", help="rows of a step (default: 8)")
    parser.add_argument("--steps", type=count, metavar="N", help="training steps")
    minutes(parser)
    corpus(parser)
    seed(parser)


def tuning(parser):
    """Whether the length of drafts is chosen after a training."""
    parser.add_argument(
        "--tune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="choose the number of drafts for this machine; --no-tune leaves it to `m2r2kit tune`",
    )


def record(parser):
    parser.add_argument("--record", action="store_true", help="add the result to data/results")


def result(parser):
    """Where the result of a measurement goes beside the terminal."""
    record(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file as well")
