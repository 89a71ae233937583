"""Train a stream or a baseline on teacher batches, and evaluate it; used by `m2r2kit train stream` and
notebook 02.

The loss and the training loop are in `distil.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from ..common import UserError
from ..model.backbone import Backbone
from ..model.cpu import parallel
from . import evaluate as alignment
from .distil import DistilConfig, TeacherBatch, distance, distil, stream_loss, teacher_batch
from .readouts import Bare, ExtraBlock, WideHead
from .stream import AcceleratedStream, StreamConfig

ROWS = 8  # default rows of a teacher batch


def teacher_batches(
    backbone: Backbone, text: np.ndarray, depths: set[int], blocks: set[int], batch: int = ROWS
) -> list[TeacherBatch]:
    """Run the teacher on rows of text (rows, WINDOW), in batches of `batch` rows. With several training
    processes a batch is divided among them.

    Raises:
        UserError: the text does not fill one batch.
    """
    rows = max(1, batch // parallel.group().size())
    if len(text) < rows:
        raise UserError(f"{len(text)} rows of text do not fill one batch; ask for at least {batch}.")
    steps = range(0, len(text) - rows + 1, rows)
    return [
        teacher_batch(backbone, text[i : i + rows], depths, blocks)
        for i in tqdm(steps, desc="teacher forward", leave=False)
    ]


@dataclass
class Trained:
    """A trained module and its metrics on held-out rows."""

    module: object
    parameters: int
    seconds: float
    figures: dict
    losses: list[float]


def train_stream(
    backbone: Backbone,
    config: StreamConfig,
    train: list[TeacherBatch],
    held_out: list[TeacherBatch],
    settings: DistilConfig,
    seconds: float = math.inf,
    report: Callable | None = None,
    module: AcceleratedStream | None = None,
) -> Trained:
    """Train a new stream, or continue with `module`, and evaluate it on held-out rows if there are any."""
    stream = module or AcceleratedStream(backbone, config)
    history = distil(stream, stream_loss, train, settings, report, seconds)
    figures = alignment.of_stream(backbone, stream, held_out) if held_out else {}
    return Trained(stream, stream.parameter_count(), history.seconds, figures, history.losses)


def train_readout(
    backbone: Backbone,
    readout,
    train: list[TeacherBatch],
    held_out: list[TeacherBatch],
    settings: DistilConfig,
    seconds: float = math.inf,
    report: Callable | None = None,
) -> Trained:
    """Train and evaluate a readout of `readouts.py` in the same way; `Bare` is only evaluated."""
    from mlx.utils import tree_flatten

    def loss(m, batch, *_):
        student, teacher = (backbone.head(x) for x in (m(batch), batch.states[backbone.depth]))
        V = student.shape[-1]
        return distance(student.reshape(-1, V), teacher.reshape(-1, V)).mean()

    took, losses = 0.0, []
    if not isinstance(readout, Bare):
        history = distil(readout, loss, train, settings, report, seconds)
        took, losses = history.seconds, history.losses
    parameters = sum(v.size for _, v in tree_flatten(readout.trainable_parameters()))
    return Trained(readout, parameters, took, alignment.of_readout(backbone, readout, held_out), losses)


def comparison(backbone: Backbone, exit: int, base: StreamConfig) -> list[tuple[str, object]]:
    """The variants compared at one exit: (name, stream settings or a function that makes a readout). The
    `adapter`, `attention` and `block, own cache depth` streams get an FFN that brings them to the size of
    `base`.
    """
    size = AcceleratedStream(backbone, base).parameter_count()

    def widened(config: StreamConfig) -> StreamConfig:
        small = AcceleratedStream(backbone, replace(config, ffn_width=1)).parameter_count()
        each = AcceleratedStream(backbone, replace(config, ffn_width=2)).parameter_count() - small
        return replace(config, ffn_width=max(1, 1 + round((size - small) / each)))

    bare = replace(base, deep=0, carry=False)
    return [
        ("bare", lambda: Bare(exit)),
        ("low-rank head", lambda: WideHead(backbone, exit, size)),
        ("adapter", widened(replace(bare, form="adapter"))),
        ("attention", widened(replace(bare, form="attention"))),
        ("block, own cache depth", widened(bare)),
        ("block, nothing carried", widened(replace(base, carry=False))),
        ("block", base),
        ("block, own keys too", replace(base, near=True)),
        ("R=1 block", replace(base, rate=1.0)),
        ("extra block", lambda: ExtraBlock(backbone, exit, size)),
    ]
