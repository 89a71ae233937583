"""The arguments of the command line: kinds of values, and what each command takes."""

import argparse
from pathlib import Path

from .records import ROOT

MODEL = ROOT / "data" / "pocket-dense"
PEERS = ("draft-model", "eagle", "medusa", "kangaroo", "deed")  # those that are trained
METHODS = ("plain", "mlx_lm", "early-exit", "m2r2", "m2r2-tree", "prompt-lookup", "lookahead", *PEERS)
FORMS = ("block", "attention", "adapter")


# --- kinds of values ----------------------------------------------------------------------


def number(kind, least, most=None, above=False):
    """A type for argparse: an int or float from `least` (or above it) to `most`."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or value != value or value < least or (above and value == least):
            value = None
        if value is None or (most is not None and value > most):
            what = "a whole number" if kind is int else "a number"
            limits = f"{'above' if above else 'from'} {least}" + (f" to {most}" if most is not None else "")
            raise argparse.ArgumentTypeError(f"'{text}' is not {what} {limits}")
        return value

    return convert


def some_of(known):
    """A type for argparse: names out of `known`, separated by commas; `all` are all of them."""

    def names(text):
        asked = [name.strip() for name in text.split(",") if name.strip()]
        if asked == ["all"]:
            return list(known)
        if not asked or (unknown := [name for name in asked if name not in known]):
            wrong = f"there is no {', '.join(unknown)}" if asked else "an empty list names none"
            raise argparse.ArgumentTypeError(f"{wrong}; choose of {', '.join(known)}, or all")
        return list(dict.fromkeys(asked))

    return names


count, natural = number(int, 1), number(int, 0)


def counts(text):
    """A type for argparse: whole numbers from 1, separated by commas."""
    return [count(each.strip()) for each in text.split(",")]


# --- arguments ----------------------------------------------------------------------------


def model(parser):
    parser.add_argument(
        "--model",
        default=str(MODEL),
        metavar="DIR_OR_REPO",
        help="a model that mlx_lm loads: a folder, or a Hugging Face repository (default: data/pocket-dense)",
    )


def stream(parser):
    parser.add_argument(
        "--stream",
        type=Path,
        metavar="DIR",
        help="the trained accelerated stream (default: the folder 'stream' inside the model's folder)",
    )


def drafters(parser):
    parser.add_argument(
        "--drafters",
        type=Path,
        metavar="DIR",
        help="the trained peers (default: the folder 'drafters' inside the model's folder)",
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


def generate(parser):
    model(parser)
    parser.add_argument("--method", choices=METHODS, default="m2r2", help="how to decode (default: m2r2)")
    drafting(parser)
    parser.add_argument(
        "--temp",
        type=number(float, 0),
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token (default)",
    )
    parser.add_argument("--top-k", type=natural, default=0, metavar="K", help="sample among the K likeliest")
    parser.add_argument(
        "--top-p",
        type=number(float, 0, 1, above=True),
        default=1.0,
        metavar="P",
        help="sample among the likeliest that hold this share of the probability",
    )
    parser.add_argument("--seed", type=natural, default=0, metavar="S", help="seed of sampling (default: 0)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="what to answer")
    source.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one JSON object a line, as for bench; of several turns the first",
    )
    parser.add_argument("--raw", action="store_true", help="continue the text, without the chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")


def bench_speculation(parser):
    model(parser)
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one JSON object a line with 'id' and 'prompt', or MT-Bench, Koala or Self-Instruct as "
        "published (default: all of data/prompts)",
    )
    parser.add_argument(
        "--methods",
        type=some_of(METHODS),
        default=list(METHODS[:4]),
        metavar="A,B,..",
        help=f"what to compare, of {', '.join(METHODS)}, or all (default: the first four)",
    )
    drafting(parser)
    parser.add_argument(
        "--repeats", type=count, default=5, metavar="N", help="timed rounds of all methods (default: 5)"
    )
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N prompts of each kind")
    parser.add_argument("--record", action="store_true", help="add the result to data/results")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file as well")


def bench_map(parser):
    model(parser)
    stream(parser)
    parser.add_argument(
        "--method",
        choices=("early-exit", "m2r2"),
        default="early-exit",
        help="who drafts: the bare residual at any exit (default), or the stream at its own",
    )
    parser.add_argument(
        "--exits", type=counts, metavar="E,F,..", help="after so many blocks (default: some, or the stream's)"
    )
    parser.add_argument(
        "--drafts", type=number(int, 2, 16), default=8, metavar="K", help="up to so many drafts (default: 8)"
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one JSON object a line (default: all of data/prompts)"
    )
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N prompts of each kind")
    parser.add_argument("--max-tokens", type=count, default=64, metavar="N", help="stop here (default: 64)")
    parser.add_argument("--record", action="store_true", help="add the result to data/results")


def train_backbone(parser):
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the run; if it exists, go on there"
    )
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="folder with the text (default: download)")
    parser.add_argument(
        "--type", choices=("llama", "olmoe"), help="dense, or a mixture of experts (default: llama)"
    )
    parser.add_argument(
        "--start", type=Path, metavar="DIR", help="for olmoe: the dense model to start from and learn from"
    )
    parser.add_argument("--tokens", type=count, metavar="N", help="tokens to train on, all in all")
    parser.add_argument(
        "--minutes", type=number(float, 0, above=True), metavar="M", help="save and stop after so long"
    )
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="write the model here as a Hugging Face folder"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON with settings of a run (PretrainConfig, OlmoeConfig)",
    )
    processes(parser)


def processes(parser):
    parser.add_argument(
        "--processes",
        type=count,
        default=1,
        metavar="N",
        help="on a CPU: share each batch among N processes, best with a core each (default: 1)",
    )


def lessons(parser):
    """What the stream and its peers learn from, and for how long."""
    parser.add_argument(
        "--rows", type=count, default=2400, metavar="N", help="rows of 192 tokens to learn from"
    )
    parser.add_argument("--batch", type=count, default=8, metavar="B", help="rows of a step (default: 8)")
    parser.add_argument("--steps", type=count, metavar="N", help="training steps")
    parser.add_argument(
        "--minutes", type=number(float, 0, above=True), metavar="M", help="save and stop after so long"
    )
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="folder with the text (default: download)")
    parser.add_argument("--seed", type=natural, default=0, metavar="S", help="seed (default: 0)")
    parser.add_argument(
        "--tune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="choose the number of drafts for this machine; --no-tune leaves it to `m2r2kit tune`",
    )


def train_stream(parser):
    model(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to save it (default: 'stream' inside the model's folder)",
    )
    parser.add_argument(
        "--form", choices=FORMS, default="block", help="what an accelerated block computes (default: block)"
    )
    parser.add_argument("--exit", type=count, metavar="E", help="block after which the stream is read")
    parser.add_argument(
        "--rate",
        type=number(float, 0, above=True),
        metavar="R",
        help="how fast the stream runs ahead (default: to reach the final state at its exit)",
    )
    parser.add_argument(
        "--rank",
        type=natural,
        metavar="R",
        help="rank of its changes of the base matrices; 0 for none (default: full)",
    )
    parser.add_argument(
        "--deep",
        type=number(float, 0),
        metavar="SHARE",
        help="read the slow keys of the block at this share of the depth; 0 for none (default: 0.25)",
    )
    parser.add_argument(
        "--near",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also read those of its own blocks, which drafts then have to compute (default: no)",
    )
    parser.add_argument(
        "--carry",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also begin with the last state of the token before, as in EAGLE (default: yes)",
    )
    parser.add_argument(
        "--ffn-width", type=natural, metavar="W", help="width of an FFN of its own; 0 for none"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="train other readouts of the same size for as long, and record them all; saves none",
    )
    lessons(parser)
    parser.add_argument(
        "--start",
        type=Path,
        metavar="DIR",
        help="begin with this trained stream, of this model or of one much like it, instead of anew",
    )
    processes(parser)


def train_drafter(parser):
    model(parser)
    parser.add_argument(
        "--kind",
        type=some_of(PEERS),
        required=True,
        metavar="A,B,..",
        help=f"which ways of drafting, of {', '.join(PEERS)}, or all; they learn from the same rows",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to save it (default: 'drafters/KIND' inside the model's folder)",
    )
    parser.add_argument(
        "--exit", type=count, metavar="E", help="block after which kangaroo and deed draft (default: 2)"
    )
    lessons(parser)
