"""What a command measured: named for a record, written where it was asked for, and never lost."""

import json
import shlex
import sys
import tempfile
from pathlib import Path

from ..bench import records
from ..common import UserError, check_writable, write_whole
from ..text.prompts import sha256


def command() -> str:
    """The command that is running, as a person would type it."""
    return shlex.join(["m2r2kit", *sys.argv[1:]])


def model_name(model: str | Path) -> str:
    """The last part of a model's folder or repository."""
    return str(model).rstrip("/").rsplit("/", 1)[-1]


def check_result(args, *subjects: str) -> None:
    """Ask before long work whether its result can be kept where `--json` and `--record` want it."""
    if file := getattr(args, "json", None):
        if not file.absolute().parent.exists():
            raise UserError(f"There is no folder {file.parent}; make it first, or give another file.")
        check_writable(file)
    for subject in subjects if args.record else ():
        records.read(subject)
        check_writable(records.path(subject))


def keep(args, subject: str, settings: dict, figures: dict, prompts: list | None = None) -> None:
    """Write a result with `--json`, and add it to the records with `--record`.

    Raises:
        UserError: it cannot be kept there; the sentence says where it lies instead.
    """
    asked = None if prompts is None else sha256(prompts)
    try:
        if file := getattr(args, "json", None):
            write_whole(file, _text(settings, figures))
        if args.record:
            records.append(
                subject, command=command(), settings=settings, figures=figures, prompts_sha256=asked
            )
    except (UserError, ValueError) as error:  # a record refuses what is no number
        sentence = str(error).removesuffix(".")
        raise UserError(f"{sentence}. The result {_elsewhere(_text(settings, figures))}.") from error


def _text(settings: dict, figures: dict) -> str:
    found = {"settings": settings, **figures}
    return json.dumps(found, indent=1, default=lambda scalar: scalar.item()) + "\n"


def _elsewhere(text: str) -> str:
    """Save a result in the working folder or that of temporary files, else print it; says which."""
    for folder in (".", None):
        try:
            with tempfile.NamedTemporaryFile(
                "w", prefix="m2r2kit-result-", suffix=".json", dir=folder, delete=False
            ) as file:
                file.write(text)
            return f"is kept in {file.name}"
        except OSError:
            continue
    print(text)
    return "is printed above"
