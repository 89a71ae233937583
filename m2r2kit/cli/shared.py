"""Options that several commands share."""

import argparse
import textwrap
from pathlib import Path

from ..common import ROOT, Entry
from ..experts.registry import POLICIES, PREDICTORS
from ..model.families import FAMILIES
from .values import budget, count, natural, number, size

MODEL = ROOT / "data" / "pocket-dense"
MOE = ROOT / "data" / "pocket-moe"


def explain(parser, **registries: dict[str, Entry]):
    """List the names in registries after the options, with a sentence each."""
    parts = []
    for title, entries in registries.items():
        parts += [f"{title}:", *(f"  {name:22}{entry.about}" for name, entry in entries.items()), ""]
    parser.epilog = "\n".join(parts)
    parser.description = textwrap.fill(parser.description, 79)  # the formatter below keeps all lines
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


# --- models and trained modules -------------------------------------------------------------


def model(parser, default: Path = MODEL):
    parser.add_argument(
        "--model",
        default=str(default),
        metavar="DIR_OR_REPO",
        help="model that mlx_lm loads: a folder, a LoRA adapter's folder or a Hugging Face repository "
        f"(default: data/{default.name}); families: {', '.join(FAMILIES)}",
    )


def trained(parser, option: str, what: str, name: str):
    """A folder of trained modules; by default `name`, beside the weights of `--model`."""
    parser.add_argument(
        option,
        type=Path,
        metavar="DIR",
        help=f"{what} (default: '{name}' in the model's folder; for a repository, in the cache folder)",
    )


def stream(parser):
    trained(parser, "--stream", "trained accelerated stream", "stream")


def drafters(parser):
    trained(parser, "--drafters", "trained baseline drafters", "drafters")


def exits(parser):
    trained(parser, "--trained", "trained exits", "exits")


# --- decoding -------------------------------------------------------------------------------


def drafting(parser):
    stream(parser)
    drafters(parser)
    parser.add_argument(
        "--draft", type=natural, metavar="K", help="tokens drafted in each step (default: as tuned)"
    )
    parser.add_argument(
        "--exit",
        type=count,
        metavar="E",
        help="block after which m2r2, m2r2-tree and early-exit draft (default: the stream's first exit)",
    )
    max_tokens(parser, 128)


def max_tokens(parser, default: int):
    parser.add_argument(
        "--max-tokens",
        type=count,
        default=default,
        metavar="N",
        help=f"maximum number of new tokens per answer (default: {default})",
    )


def disk(parser):
    """How experts are read."""
    parser.add_argument(
        "--reads",
        choices=("direct", "buffered"),
        default="direct",
        help="direct bypasses the page cache, buffered uses it (default: direct)",
    )
    parser.add_argument(
        "--threads", type=number(int, 1, 64), default=2, metavar="N", help="reader threads (default: 2)"
    )


def streaming(parser):
    """How experts are read, and how early."""
    disk(parser)
    parser.add_argument(
        "--link",
        type=size,
        metavar="BYTES",
        help="simulate a disk of this bandwidth, in bytes per second, such as 200MB",
    )
    parser.add_argument(
        "--distance", type=count, default=2, metavar="G", help="blocks to predict ahead (default: 2)"
    )
    parser.add_argument(
        "--width",
        type=count,
        metavar="K",
        help="experts to predict per block (default: as many as the model runs)",
    )


def store(parser, **options):
    parser.add_argument(
        "--experts",
        type=Path,
        metavar="STORE",
        help="the model's experts, as written by `m2r2kit pack`",
        **options,
    )


def memory(parser, default: float):
    parser.add_argument(
        "--budget",
        type=budget,
        default=default,
        metavar="SIZE",
        help=f"memory for experts, in bytes or as a share of all: 64MB, 25%% (default: {100 * default:g}%%)",
    )


def experts(parser):
    group = parser.add_argument_group(
        "experts on disk", "Decode a mixture of experts without drafts; its experts stay on disk."
    )
    store(group)
    memory(group, 0.5)
    group.add_argument("--policy", choices=POLICIES, default="lru", help="eviction policy (default: lru)")
    group.add_argument(
        "--predictor",
        choices=PREDICTORS,
        default="next-router",
        help="predicts the experts to prefetch (default: next-router)",
    )
    group.add_argument(
        "--known",
        type=Path,
        metavar="TRACE",
        help="routing trace of earlier texts, for policies and predictors that need one",
    )
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="write the routing trace of this run here (.npz)"
    )
    streaming(group)


# --- benchmarks -----------------------------------------------------------------------------


def prompts(parser, limit: int | None = None):
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts, one JSON object per line with 'id' and 'prompt', or MT-Bench, Koala or Self-Instruct "
        "as published (default: data/prompts)",
    )
    parser.add_argument(
        "--limit",
        type=count,
        default=limit,
        metavar="N",
        help=f"use the first N prompts of each kind (default: {limit or 'all'})",
    )


def repeats(parser, default: int):
    parser.add_argument(
        "--repeats", type=count, default=default, metavar="N", help=f"timed rounds (default: {default})"
    )


def record(parser):
    parser.add_argument("--record", action="store_true", help="append the result to data/results")


def result(parser):
    """Where the result goes, besides the terminal."""
    record(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")


# --- training -------------------------------------------------------------------------------


def processes(parser):
    parser.add_argument(
        "--processes",
        type=count,
        default=1,
        metavar="N",
        help="on a CPU: split each batch among N processes, ideally one per core (default: 1)",
    )


def corpus(parser):
    parser.add_argument(
        "--corpus", type=Path, metavar="DIR", help="folder of training text (default: download it)"
    )


def minutes(parser):
    parser.add_argument(
        "--minutes", type=number(float, 0, above=True), metavar="M", help="stop and save after M minutes"
    )


def seed(parser):
    parser.add_argument("--seed", type=natural, default=0, metavar="S", help="random seed (default: 0)")


def training_rows(parser, rows: int = 2400):
    """The training text, and how long to train on it."""
    parser.add_argument(
        "--rows",
        type=count,
        default=rows,
        metavar="N",
        help=f"training rows of 192 tokens (default: {rows})",
    )
    parser.add_argument(
        "--batch", type=count, default=8, metavar="B", help="rows per training step (default: 8)"
    )
    parser.add_argument("--steps", type=count, metavar="N", help="training steps")
    minutes(parser)
    corpus(parser)
    seed(parser)


def tuning(parser):
    parser.add_argument(
        "--tune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="then choose the draft length for this machine; --no-tune leaves it to `m2r2kit tune`",
    )
