"""Writes the result of a command to `--json` and `--record`; a failed write does not lose it."""

import json
import shlex
import sys
import tempfile
from pathlib import Path

from ..bench import records
from ..common import UserError, check_writable, write_whole
from ..text.prompts import sha256


def command() -> str:
    """The running command, as typed."""
    return shlex.join(["m2r2kit", *sys.argv[1:]])


def model_name(model: str | Path) -> str:
    """The last part of a model's folder or repository."""
    return str(model).rstrip("/").rsplit("/", 1)[-1]


def check_result(args, *subjects: str) -> None:
    """Check before long work that `--json` and `--record` can be written."""
    if file := getattr(args, "json", None):
        if not file.absolute().parent.exists():
            raise UserError(f"There is no folder {file.parent}; make it first, or give another file.")
        check_writable(file)
        prompts = getattr(args, "prompts", None)
        if prompts and file.exists() and Path(prompts).exists() and file.samefile(prompts):
            raise UserError(f"--json would replace the prompts in {prompts}; give another file.")
    for subject in subjects if args.record else ():
        records.read(subject)
        check_writable(records.path(subject))


def keep(args, subject: str, settings: dict, figures: dict, prompts: list | None = None) -> None:
    """Write a result with `--json`, and add it to the records with `--record`.

    Raises:
        UserError: it cannot be written; the message says where the result is instead.
    """
    asked = None if prompts is None else sha256(prompts)
    try:
        if file := getattr(args, "json", None):
            write_whole(file, _text(settings, figures))
        if args.record:
            records.append(
                subject, command=command(), settings=settings, figures=figures, prompts_sha256=asked
            )
    except (UserError, ValueError) as error:  # a record rejects values that are not numbers
        sentence = str(error).removesuffix(".")
        raise UserError(f"{sentence}. The result {_save_elsewhere(_text(settings, figures))}.") from error


def _text(settings: dict, figures: dict) -> str:
    found = {"settings": settings, **figures}
    return json.dumps(found, indent=1, default=lambda scalar: scalar.item()) + "\n"


def _save_elsewhere(text: str) -> str:
    """Save a result in the working or the temporary folder, or else print it; returns where it is."""
    for folder in (".", None):
        try:
            with tempfile.NamedTemporaryFile(
                "w", prefix="m2r2kit-result-", suffix=".json", dir=folder, delete=False
            ) as file:
                file.write(text)
            return f"is saved in {file.name}"
        except OSError:
            continue
    print(text)
    return "is printed above"
