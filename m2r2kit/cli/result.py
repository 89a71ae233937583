"""What a command says of itself in a record, and how its result is written to a file."""

import json
import shlex
import sys
from pathlib import Path

from ..common import write_whole


def command() -> str:
    """The command that is running, as a person would type it."""
    return shlex.join(["m2r2kit", *sys.argv[1:]])


def model_name(model: str | Path) -> str:
    """The last part of a model's folder or repository."""
    return str(model).rstrip("/").rsplit("/", 1)[-1]


def write_json(file: Path, settings: dict, figures: dict) -> None:
    """A result as one JSON object; the file is whole or absent."""
    write_whole(file, json.dumps({"settings": settings, **figures}, indent=1) + "\n")
