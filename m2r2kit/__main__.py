"""The command line: `m2r2kit COMMAND ..`, such as doctor, notebooks, generate, bench, train or report.

Exit codes: 0 done, 1 a check failed, 2 bad arguments or input, 130 interrupted (128 + the number of another
signal that asks to stop). This file names the commands (`arguments.py` has what each takes); what one needs
is imported when it runs, so that `--help` answers at once.
"""

import argparse
import errno
import importlib
import os
import sys
from contextlib import suppress

from . import __version__
from .cli import arguments
from .cli.stops import exit_code, stoppable
from .common import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


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
    arguments.generate(generate)

    bench = commands.add_parser("bench", help="measure how fast the methods are, and whether they agree")
    bench = bench.add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    about = "compare ways of decoding on the same prompts, interleaved, output checked first"
    arguments.bench_speculation(add(bench, "speculation", _runs("bench"), about))
    about = "predict the speed-up of each exit with each number of drafts, from what is measured there"
    arguments.bench_map(add(bench, "map", _runs("bench_map"), about))
    about = "draw quality against depth for ways of leaving early, and time some of them"
    arguments.bench_exits(add(bench, "exits", _runs("bench_exits"), about))
    about = "compare ways of reading experts from disk, interleaved, output checked first; or plan on paper"
    arguments.bench_experts(add(bench, "experts", _runs("bench_experts"), about))
    about = "decode with experts on disk in a fresh process, and say the most memory that it had"
    arguments.bench_memory(add(bench, "memory", _runs("bench_memory"), about))

    train = commands.add_parser("train", help="train a pocket model, or what drafts for a model")
    train = train.add_subparsers(dest="subject", metavar="WHAT", required=True)
    about = "train a pocket language model from nothing; saves, and goes on where it stopped"
    arguments.train_backbone(add(train, "backbone", _run_train_backbone, about))
    about = "train the accelerated stream of a model, which stays as it is"
    arguments.train_stream(add(train, "stream", _runs("train_stream"), about))
    about = "train a peer of the stream, another way of drafting for the same model"
    arguments.train_drafter(add(train, "drafter", _runs("train_drafter"), about))

    about = "train what lets tokens leave early: the stream at several exits, or a peer of it"
    arguments.train_exits(add(train, "exits", _runs("train_exits"), about))
    about = "train what names a mixture's experts ahead of time: streams, and a direct map of equal size"
    arguments.train_predictor(add(train, "predictor", _runs("train_predictor"), about))

    about = (
        "choose how long drafts are on this machine, of a stream and its peers, and write it into their JSON"
    )
    tune = add(commands, "tune", _runs("tune"), about)
    arguments.model(tune)
    arguments.stream(tune)
    arguments.drafters(tune)

    about = "choose the exits of what was trained for them, and measure what each threshold risks"
    arguments.calibrate(add(commands, "calibrate", _runs("calibrate"), about))
    about = "write a mixture of experts to measure on: random and as large as asked, or trained and widened"
    arguments.make_moe(add(commands, "make-moe", _runs("make_moe"), about))
    about = "write the experts of a model as records that can be read one at a time, or check them"
    arguments.pack(add(commands, "pack", _runs("pack"), about))

    report = add(commands, "report", _run_report, "print the paper's figures beside ours, from records")
    form = report.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown")
    return main


# --- commands -----------------------------------------------------------------------------


def _run_doctor(args):
    from .cli import doctor

    return doctor.run(args.json)


def _run_notebooks(args):
    from .cli import notebooks

    if args.action == "check":
        return notebooks.check(args.names, full=args.full)
    return notebooks.run(args.names) if args.action == "run" else notebooks.build(args.names)


def _runs(name: str):
    """What runs a command of `commands/`."""
    return lambda args: importlib.import_module(f".cli.commands.{name}", __package__).run(args)


def _run_train_backbone(args):
    from .cli.commands import train

    return train.backbone(args)


def _run_report(args):
    from .bench import report

    return report.run(args.json, args.markdown)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        args = parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its sentence, or the help
        return int(stop.code or 0)
    args.words = sys.argv[1:] if argv is None else argv  # for the processes that a command starts
    try:
        with stoppable():
            code = args.run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"m2r2kit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        with suppress(OSError):  # the terminal may be closed
            print("m2r2kit: interrupted; nothing half-written is left", file=sys.stderr)
        return exit_code(interrupt)
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
