"""Write a model's folder, whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..common import UserError, whole

SPARE = 16 << 20  # bytes to leave free on the disk
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@contextmanager
def new_model(out: Path, nbytes: int, like: Path) -> Iterator[Path]:
    """A folder to write a model into; it is renamed to `out` at the end, or deleted on an error.

    Args:
        nbytes: size of the model on disk.
        like: a model's folder, whose tokenizer is copied.

    Raises:
        UserError: `out` exists, there is no such tokenizer, or the disk is too small or fails.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists already; delete it, or give another folder.")
    if missing := [name for name in TOKENIZER if not (like / name).is_file()]:
        raise UserError(f"{like} has no {missing[0]} to copy; give the folder of a whole model.")
    with whole(out) as folder:
        folder.mkdir()
        if (free := shutil.disk_usage(folder).free) < nbytes + SPARE:
            raise UserError(
                f"The model takes {nbytes / 1e9:.2f} GB on the disk of {out} and {free / 1e9:.2f} GB are "
                "free; free some space, or ask for a smaller one."
            )
        for name in TOKENIZER:
            shutil.copy(like / name, folder)
        yield folder
