"""Shared by the `train` commands: early checks, settings, progress and records."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from ..common import UserError, check_writable
from ..model.backbone import Backbone
from ..stream.distil import DistilConfig
from .result import model_name

UNTUNED = 4  # draft length until `m2r2kit tune` chooses one


def check(args, files: Iterable[Path]) -> None:
    """Check, before any computation, what would fail after the training.

    Args:
        files: files that the command will write.

    Raises:
        UserError: fewer rows than a batch, one folder for several kinds, or a file that cannot be written.
    """
    if args.rows < args.batch:
        raise UserError(f"{args.rows} rows of text do not fill one batch; use at least {args.batch}.")
    if getattr(args, "out", None) and len(getattr(args, "kind", [])) > 1:
        raise UserError("--out is the folder of one kind; leave it out, or train one kind at a time.")
    for file in files:
        check_writable(file)


def settings(args, steps: int | None = None) -> DistilConfig:
    """The training settings from the arguments; `steps` is the default number of steps."""
    asked = {"steps": args.steps or steps, "seed": args.seed}
    return replace(DistilConfig(), **{name: value for name, value in asked.items() if value is not None})


def limit(args) -> float:
    """Time limit in seconds."""
    return 60 * args.minutes if args.minutes else math.inf


@contextmanager
def progress(steps: int, name: str | None = None, first: int = 0, silent: bool = False) -> Iterator[Callable]:
    """A progress bar; yields a function (step, loss) to call after each step."""
    with tqdm(total=steps, initial=first, unit="step", desc=name, disable=silent) as bar:

        def report(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(step + 1 - bar.n)

        yield report


def described(args, backbone: Backbone, *configs, **more) -> dict:
    """The training settings, for a record."""
    facts = {
        "model": model_name(args.model),
        "model_sha256": backbone.sha256,
        "rows": args.rows,
        "batch": args.batch,
    }
    for config in configs:
        facts |= asdict(config)
    return facts | more
