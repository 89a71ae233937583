"""What the `train` commands share: what is refused before the long part, settings, progress and records."""

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

UNTUNED = 4  # drafts in a step where --no-tune leaves it to `m2r2kit tune`


def check(args, files: Iterable[Path]) -> None:
    """Refuse before anything is computed what would fail after the training.

    Args:
        files: that will be written.

    Raises:
        UserError: too few rows for a batch, one folder for several kinds, or a file that cannot be written.
    """
    if args.rows < args.batch:
        raise UserError(f"{args.rows} rows of text do not fill one batch; ask for at least {args.batch}.")
    if getattr(args, "out", None) and len(getattr(args, "kind", [])) > 1:
        raise UserError("--out names the folder of one kind; leave it out, or ask for one kind at a time.")
    for file in files:
        check_writable(file)


def settings(args, steps: int | None = None) -> DistilConfig:
    """The settings that the arguments ask for; `steps` if they do not say how many."""
    asked = {"steps": args.steps or steps, "seed": args.seed}
    return replace(DistilConfig(), **{name: value for name, value in asked.items() if value is not None})


def limit(args) -> float:
    """Seconds after which the training stops."""
    return 60 * args.minutes if args.minutes else math.inf


@contextmanager
def progress(steps: int, name: str | None = None, first: int = 0, silent: bool = False) -> Iterator[Callable]:
    """A bar of training steps; yields the function (step, loss) to be called after each."""
    with tqdm(total=steps, initial=first, unit="step", desc=name, disable=silent) as bar:

        def report(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(step + 1 - bar.n)

        yield report


def described(args, backbone: Backbone, *configs, **more) -> dict:
    """What a record says of how something was trained."""
    facts = {
        "model": model_name(args.model),
        "model_sha256": backbone.sha256,
        "rows": args.rows,
        "batch": args.batch,
    }
    for config in configs:
        facts |= asdict(config)
    return facts | more
