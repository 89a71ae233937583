"""A model's folder in the making: whole or absent."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..common import UserError

SPARE = 16 << 20  # bytes that are left free on the disk
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@contextmanager
def new_model(out: Path, nbytes: int, like: Path) -> Iterator[Path]:
    """A folder to write a model into; it takes the name `out` when all went well, or else is deleted.

    Args:
        nbytes: what the model takes on the disk.
        like: a model's folder, whose tokenizer is copied.

    Raises:
        UserError: `out` exists, there is no such tokenizer, or the disk is too small or fails.
    """
    if out.exists():
        raise UserError(f"{out} exists already; delete it, or give another folder.")
    partial = out.with_name(out.name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(partial).free) < nbytes + SPARE:
            raise UserError(
                f"The model takes {nbytes / 1e9:.2f} GB on the disk of {out} and {free / 1e9:.2f} GB are "
                "free; make room, or ask for a smaller one."
            )
        for name in TOKENIZER:
            shutil.copy(like / name, partial)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out} could not be written ({error.strerror or error}); make room.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
