"""The arguments of the command line: kinds of values, and what each command takes."""

import argparse
from pathlib import Path

from .records import ROOT

MODEL = ROOT / "data" / "pocket-dense"
PEERS = ("draft-model", "eagle", "medusa", "kangaroo", "deed")  # those that are trained
METHODS = ("plain", "mlx_lm", "early-exit", "m2r2", "m2r2-tree", "prompt-lookup", "lookahead", *PEERS)
EXIT_KINDS = ("m2r2", "lens", "bare", "mixture-of-depths", "shallow")  # trained for exits
EXIT_METHODS = (
    *("m2r2", "m2r2-confidence", "m2r2-random", "m2r2-oracle", "m2r2-static", "lens-arla", "static", "calm"),
    *("saturation", "skipdecode", "layerskip", "m2r2-linear", "m2r2-copy", "m2r2-p", "calm-linear"),
    *("calm-copy", "mixture-of-depths", "shallow"),
)
POLICIES = (
    "none", "lru", "lfu", "lfru", "clock", "s3-fifo", "least-stale", "trace-guided", "belady",
)  # fmt: skip
PREDICTORS = (
    "nothing", "previous", "static", "next-router", "direct", "m2r2", "random", "shuffled", "oracle", "self",
)  # fmt: skip
TRAINED = ("m2r2", "m2r2-r1", "direct")  # predictors of experts
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


SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def budget(text):
    """A type for argparse: bytes (int, `64MB`), or a share of the whole (float up to 1, `25%`)."""
    written = text.strip().upper()
    digits = written.rstrip("BGIKM%")
    unit = written[len(digits) :]
    try:
        value = float(digits)
        if unit == "%":
            value /= 100
        elif unit or value > 1:
            value = int(value * SIZES[unit])
    except (ValueError, KeyError):
        value = 0
    if not value > 0 or (isinstance(value, float) and value > 1):
        raise argparse.ArgumentTypeError(f"'{text}' is no size such as 64MB and no share such as 25%")
    return value


def shares(text):
    """A type for argparse: shares of the whole, separated by commas."""
    found = [budget(each) for each in text.split(",")]
    if not all(isinstance(share, float) for share in found):
        raise argparse.ArgumentTypeError(f"'{text}' are no shares such as 12.5%,25%")
    return found


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
    parser.add_argument(
        "--method", choices=(*METHODS, "exits"), default="m2r2", help="how to decode (default: m2r2)"
    )
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
    leaving(parser.add_argument_group("method exits", "tokens leave early, greedily, and some may differ"))
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
    experts(parser)


def streaming(parser):
    """Where experts come from when they are not all in memory."""
    parser.add_argument(
        "--reads",
        choices=("direct", "buffered"),
        default="direct",
        help="past the page cache (default), or through it",
    )
    parser.add_argument(
        "--threads", type=number(int, 1, 64), default=2, metavar="N", help="that read at once (default: 2)"
    )
    parser.add_argument(
        "--link",
        type=budget,
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


def leaving(parser):
    """How `generate --method exits` decides."""
    exits(parser)
    parser.add_argument(
        "--risk",
        type=float,
        default=0.05,
        metavar="R",
        help="share of tokens that may differ from the model's (default: 0.05)",
    )
    parser.add_argument(
        "--confidence", type=float, default=0.95, metavar="C", help="that the risk is kept (default: 0.95)"
    )
    parser.add_argument(
        "--threshold", type=float, metavar="T", help="leave from this probability on, whatever the risk"
    )
    parser.add_argument(
        "--exits", type=lambda text: tuple(counts(text)), metavar="E,F,..", help="leave at these exits only"
    )
    parser.add_argument(
        "--skipped",
        choices=("wait", "linear"),
        default="wait",
        help="skipped blocks are made up for with the next token that goes deep, or filled (default: wait)",
    )


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


def exits(parser):
    parser.add_argument(
        "--trained",
        type=Path,
        metavar="DIR",
        help="what was trained for exits (default: the folder 'exits' inside the model's folder)",
    )


def bench_exits(parser):
    model(parser)
    exits(parser)
    parser.add_argument(
        "--methods",
        type=some_of(EXIT_METHODS),
        default=["m2r2", "m2r2-oracle", "calm"],
        metavar="A,B,..",
        help=f"what to compare, of {', '.join(EXIT_METHODS)}, or all",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one JSON object a line (default: all of data/prompts)"
    )
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N prompts of each kind")
    parser.add_argument("--max-tokens", type=count, default=64, metavar="N", help="stop here (default: 64)")
    parser.add_argument(
        "--timed",
        type=natural,
        default=8,
        metavar="N",
        help="prompts of each kind that are decoded by the clock; 0 for none (default: 8)",
    )
    parser.add_argument(
        "--repeats", type=count, default=3, metavar="N", help="timed rounds of all methods (default: 3)"
    )
    parser.add_argument("--record", action="store_true", help="add the result to data/results")


def bench_experts(parser):
    model(parser)
    parser.add_argument("--experts", type=Path, metavar="STORE", help="the packed experts of the model")
    parser.add_argument(
        "--budgets",
        type=shares,
        default=[0.125, 0.25, 0.5],
        metavar="A,B,..",
        help="shares of all experts that fit the memory (default: 12.5%%,25%%,50%%)",
    )
    streaming(parser)
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one JSON object a line (default: all of data/prompts)"
    )
    parser.add_argument(
        "--limit", type=count, default=2, metavar="N", help="only the first N of each kind (default: 2)"
    )
    parser.add_argument("--max-tokens", type=count, default=64, metavar="N", help="stop here (default: 64)")
    parser.add_argument(
        "--repeats", type=count, default=5, metavar="N", help="timed rounds of all arms (default: 5)"
    )
    parser.add_argument(
        "--resident",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with the model wholly in memory; --no-resident where it does not fit",
    )
    parser.add_argument("--record", action="store_true", help="add the result to data/results")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file as well")
    parser.add_argument(
        "--plan",
        nargs="?",
        const="all",
        metavar="MODEL",
        help="compute what streaming would give a known model (default: all of them), without running it",
    )


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
    parser.add_argument("--tokens", type=count, metavar="N", help="tokens to train on, all in all")
    parser.add_argument(
        "--minutes", type=number(float, 0, above=True), metavar="M", help="save and stop after so long"
    )
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="write the model here as a Hugging Face folder"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="JSON with settings of a run (PretrainConfig)"
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
    """What a trained part learns from, and for how long."""


def tuning(parser):
    """Whether the length of drafts is chosen after a training."""
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
    tuning(parser)
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
    tuning(parser)


def train_exits(parser):
    model(parser)
    parser.add_argument(
        "--kind",
        type=some_of(EXIT_KINDS),
        default=["m2r2"],
        metavar="A,B,..",
        help=f"what to train, of {', '.join(EXIT_KINDS)}, or all, from the same rows (default: m2r2)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to save it (default: 'exits/KIND' inside the model's folder)",
    )
    parser.add_argument(
        "--exits",
        type=lambda text: tuple(counts(text)),
        metavar="E,F,..",
        help="after so many blocks a token may leave; for shallow, the number of its blocks",
    )
    parser.add_argument(
        "--start",
        type=Path,
        metavar="DIR",
        help="for m2r2: begin the first exit with this trained stream (`m2r2kit train stream`)",
    )
    parser.add_argument(
        "--calibrate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="then choose exits and measure risks; --no-calibrate leaves it to `m2r2kit calibrate`",
    )
    lessons(parser)


def calibrate(parser):
    model(parser)
    parser.add_argument(
        "--kind",
        type=some_of(EXIT_KINDS[:3]),
        default=["m2r2"],
        metavar="A,B,..",
        help=f"what to calibrate, of {', '.join(EXIT_KINDS[:3])}, or all (default: m2r2)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where it was trained (default: 'exits/KIND' inside the model's folder)",
    )
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="folder with the text (default: download)")
    parser.add_argument("--seed", type=natural, default=0, metavar="S", help="seed (default: 0)")


def pack(parser):
    parser.add_argument("model", metavar="MODEL", help="a mixture of experts that mlx_lm loads")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the store")
    parser.add_argument(
        "--verify", action="store_true", help="read all of a store that is there, and compare checksums"
    )


def train_predictor(parser):
    model(parser)
    parser.add_argument(
        "--kind",
        type=some_of(TRAINED),
        default=list(TRAINED),
        metavar="A,B,..",
        help=f"which, of {', '.join(TRAINED)} (default: all); they learn from the same rows",
    )
    parser.add_argument(
        "--exits",
        type=counts,
        metavar="E,F,..",
        help="where the stream's intervals end (default: four)",
    )
    parser.add_argument(
        "--rate",
        type=number(float, 1),
        default=2.0,
        metavar="R",
        help="how fast the stream m2r2 runs ahead, and the blocks that the direct map names (default: 2)",
    )
    parser.add_argument("--rank", type=natural, default=8, metavar="R", help="of its changes (default: 8)")
    parser.add_argument(
        "--ffn-width", type=count, default=64, metavar="W", help="of its own FFN in each block (default: 64)"
    )
    lessons(parser)
    parser.set_defaults(rows=480)  # all states of all blocks are kept: 6 MB a row of the pocket model
