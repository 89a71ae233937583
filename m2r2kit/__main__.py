"""The command line: `m2r2kit doctor | notebooks | generate | bench | train | tune | report`.

Exit codes: 0 done, 1 a check failed, 2 bad arguments or input, 130 interrupted. This file only
reads arguments; what a command needs is imported when it runs, so that `--help` answers at once.
"""

import argparse
import errno
import importlib
import os
import sys
from pathlib import Path

from . import __version__
from .errors import UserError
from .records import ROOT

MODEL = ROOT / "data" / "pocket-dense"
PEERS = ("draft-model", "eagle", "medusa", "kangaroo", "deed")  # those that are trained
METHODS = ("plain", "mlx_lm", "early-exit", "m2r2", "m2r2-tree", "prompt-lookup", "lookahead", *PEERS)
FORMS = ("block", "attention", "adapter")


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


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


def _model(parser):
    parser.add_argument(
        "--model",
        default=str(MODEL),
        metavar="DIR_OR_REPO",
        help="a model that mlx_lm loads: a folder, or a Hugging Face repository (default: data/pocket-dense)",
    )


def _stream(parser):
    parser.add_argument(
        "--stream",
        type=Path,
        metavar="DIR",
        help="the trained accelerated stream (default: the folder 'stream' inside the model's folder)",
    )


def _drafters(parser):
    parser.add_argument(
        "--drafters",
        type=Path,
        metavar="DIR",
        help="the trained peers (default: the folder 'drafters' inside the model's folder)",
    )


def _drafting(parser):
    _stream(parser)
    _drafters(parser)
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


def _generate(parser):
    _model(parser)
    parser.add_argument("--method", choices=METHODS, default="m2r2", help="how to decode (default: m2r2)")
    _drafting(parser)
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


def _bench_speculation(parser):
    _model(parser)
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
    _drafting(parser)
    parser.add_argument(
        "--repeats", type=count, default=5, metavar="N", help="timed rounds of all methods (default: 5)"
    )
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N prompts of each kind")
    parser.add_argument("--record", action="store_true", help="add the result to data/results")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file as well")


def _bench_map(parser):
    _model(parser)
    _stream(parser)
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


def _train_backbone(parser):
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
    _processes(parser)


def _processes(parser):
    parser.add_argument(
        "--processes",
        type=count,
        default=1,
        metavar="N",
        help="on a CPU: share each batch among N processes, best with a core each (default: 1)",
    )


def _lessons(parser):
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


def _train_stream(parser):
    _model(parser)
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
    _lessons(parser)
    parser.add_argument(
        "--start",
        type=Path,
        metavar="DIR",
        help="begin with this trained stream, of this model or of one much like it, instead of anew",
    )
    _processes(parser)


def _train_drafter(parser):
    _model(parser)
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
    _lessons(parser)


def parser() -> Parser:
    """Every command and its arguments."""
    main = Parser(
        prog="m2r2kit",
        description="Multi-rate residuals (M2R2, arXiv 2502.02040): learn them, reproduce them, use them.",
    )
    main.add_argument("--version", action="version", version=f"m2r2kit {__version__}")
    commands = main.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(group, name, run, about):
        command = group.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        command.set_defaults(run=run)
        return command

    doctor = add(commands, "doctor", _run_doctor, "say what this machine can do, and what to repair")
    doctor.add_argument("--json", action="store_true", help="print JSON")

    notebooks = add(commands, "notebooks", _run_notebooks, "execute the notebooks, check or rebuild them")
    notebooks.add_argument(
        "action",
        choices=("run", "check", "build"),
        help="run: execute copies; check: what CI asks; build: execute, clean and write back",
    )
    notebooks.add_argument(
        "names", nargs="*", metavar="NAME", help="number (04), name or file of a notebook (default: all)"
    )
    notebooks.add_argument(
        "--full", action="store_true", help="check with the notebook's own parameters, not CI's small ones"
    )

    generate = add(commands, "generate", _runs("generate"), "answer prompts; drafted tokens are told apart")
    _generate(generate)

    bench = commands.add_parser("bench", help="measure how fast the methods are, and whether they agree")
    bench = bench.add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    about = "compare ways of decoding on the same prompts, interleaved, output checked first"
    _bench_speculation(add(bench, "speculation", _runs("bench"), about))
    about = "predict the speed-up of each exit with each number of drafts, from what is measured there"
    _bench_map(add(bench, "map", _runs("bench_map"), about))

    train = commands.add_parser("train", help="train a pocket model, or what drafts for a model")
    train = train.add_subparsers(dest="subject", metavar="WHAT", required=True)
    about = "train a pocket language model from nothing; saves, and goes on where it stopped"
    _train_backbone(add(train, "backbone", _run_train_backbone, about))
    about = "train the accelerated stream of a model, which stays as it is"
    _train_stream(add(train, "stream", _runs("train_stream"), about))
    about = "train a peer of the stream, another way of drafting for the same model"
    _train_drafter(add(train, "drafter", _runs("train_drafter"), about))

    about = (
        "choose how long drafts are on this machine, of a stream and its peers, and write it into their JSON"
    )
    tune = add(commands, "tune", _runs("tune"), about)
    _model(tune)
    _stream(tune)
    _drafters(tune)

    report = add(commands, "report", _run_report, "print the paper's figures beside ours, from records")
    form = report.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown")
    return main


# --- commands -----------------------------------------------------------------------------


def _run_doctor(args):
    from . import doctor

    return doctor.run(args.json)


def _run_notebooks(args):
    from . import notebooks

    if args.action == "check":
        return notebooks.check(args.names, full=args.full)
    return notebooks.run(args.names) if args.action == "run" else notebooks.build(args.names)


def _runs(name: str):
    """What runs a command of `commands/`."""
    return lambda args: importlib.import_module(f".commands.{name}", __package__).run(args)


def _run_train_backbone(args):
    from .commands import train

    return train.backbone(args)


def _run_report(args):
    from . import report

    return report.run(args.json, args.markdown)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        args = parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its sentence, or the help
        return int(stop.code or 0)
    args.words = sys.argv[1:] if argv is None else argv  # for the processes that a command starts
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"m2r2kit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("m2r2kit: interrupted; nothing half-written is left", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print("m2r2kit: the disk is full; make room and start again", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
