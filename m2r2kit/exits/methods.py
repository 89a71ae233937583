"""Early-exit methods, ready to run on a model, and their quality-depth curves."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common import UserError
from ..model.backbone import Backbone
from . import macs as work
from . import trained
from .depths import DepthsConfig, along
from .fill import Fill
from .gates import Chance, Confidence, Oracle, Saturation, Schedule, Static, rising
from .registry import DEPTHS, EQUAL, METHODS, split
from .teacher_forced import ForcedPass, Outcome, Texts

PROBABLE = (0.3, 0.5, 0.6, 0.7, 0.77, 0.83, 0.88, 0.92, 0.95, 0.97, 0.985, 0.995)
THRESHOLDS = {  # points of each gate's curve
    "arla": PROBABLE,
    "blind": PROBABLE,
    "confidence": PROBABLE,
    "saturation": (0.3, 0.5, 0.6, 0.7, 0.8, 0.87, 0.93, 0.97, 0.99),
    "schedule": (0.3, 0.5, 0.7, 0.9, 1.2, 1.6, 2.4, 4.0),
    "chance": (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98),
    "oracle": (0.5,),
    "routers": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
}


@dataclass
class Point:
    """A method at one threshold along texts: its outcome, and blocks and MACs of each token (B, T - 1)."""

    threshold: float
    outcome: Outcome
    blocks: np.ndarray
    macs: np.ndarray


@dataclass
class Method:
    """A method that is ready to run on a model.

    Attributes:
        module: its trained module.
        reader, gate, fill: of `readouts.py`, `gates.py` and `fill.py`; None for a method without exits.
        waits: whether skipped tokens are deferred to the next deep pass.
        thresholds: one for each point of its curve; for a static exit, the exits' indices.
        use: indices of the exits to try; None for all.
    """

    name: str
    backbone: Backbone
    module: object
    reader: object = None
    gate: object = None
    fill: Fill | None = None
    waits: bool = False
    thresholds: tuple = ()
    use: tuple[int, ...] | None = None

    @property
    def parts(self):
        """Reader, gate, fill and `waits`, as `ForcedPass` and `ExitDecoder` take them."""
        return self.reader, self.gate, self.fill, self.waits

    def levels(self, threshold: float) -> list[float]:
        """The score at which a token leaves each exit; infinite for exits not in use. Deferred tokens
        leave no keys missing, so with them all exits have the same level.
        """
        J = len(self.reader.exits)
        asked = (
            rising(threshold, self.reader.starts)
            if self.gate.is_confidence and not self.waits
            else [threshold] * J
        )
        if isinstance(self.gate, Static):
            asked = [0.5] * J
        return [a if j in self.used(threshold) else math.inf for j, a in enumerate(asked)]

    def used(self, threshold: float) -> tuple[int, ...]:
        """Indices of the exits to try; for a static exit, the one whose index is the threshold."""
        if isinstance(self.gate, Static):
            return (int(threshold),)
        return tuple(range(len(self.reader.exits))) if self.use is None else self.use

    def works(self, threshold: float) -> list[work.Work]:
        """The work of a token for each exit taken, and for none."""
        return work.by_exit(self.backbone, *self.parts, self.used(threshold))

    def curve(self, texts: Texts, report=None) -> Iterator[Point]:
        """Yield the points of the curve along texts.

        `Point.blocks` is the sequential depth of each token: deferred tokens pass a block together with
        another one, and count for nothing there. A reader counts in proportion to its MACs, so an
        accelerated block is one.
        """
        block = work.block_macs(self.backbone)
        forced = None if self.reader is None else ForcedPass(self.backbone, *self.parts, use=self.use)
        for threshold in self.thresholds:
            if forced is None:
                out = along(self.backbone, self.module, texts, threshold)
                macs, blocks = self.module.macs(out.blocks), out.blocks
            else:
                out = forced(texts, self.levels(threshold))
                works = self.works(threshold)
                macs = np.array([w.total for w in works])[out.exit]
                if self.gate.two_scores:
                    macs = macs + out.wasted * work.head_macs(self.backbone)
                readers = np.array([w.readers for w in works])[out.exit] / block
                blocks = np.array([*self.reader.starts, self.backbone.depth])[out.exit] + readers
            if report:
                report()
            yield Point(threshold, out, blocks, macs)


def method(name: str, backbone: Backbone, folder: Path) -> Method:
    """A method by name, with its trained module.

    Args:
        folder: holds the trained kinds, a folder each (`trained.folder`).

    Raises:
        UserError: the method does not exist, or its module is not trained.
    """
    if name in DEPTHS:
        module = trained.load(backbone, folder / name, name)[0]
        thresholds = THRESHOLDS["routers"] if isinstance(module.config, DepthsConfig) else (0.5,)
        return Method(name, backbone, module, thresholds=thresholds)
    if name not in METHODS:
        raise UserError(f"There is no method {name}; choose one of {', '.join(METHODS)}.")
    kind, fill = METHODS[name].kind, split(name)[1]
    module, facts = trained.load(backbone, folder / kind, kind.removesuffix(EQUAL))
    use = facts.get("use", {}).get(name.replace(EQUAL, ""))
    return with_gate(name, backbone, module, METHODS[name].gate, fill, use)


def with_gate(
    name: str,
    backbone: Backbone,
    module: trained.Exits,
    gate: str,
    fill: str = "wait",
    use: tuple[int, ...] | None = None,
) -> Method:
    """A trained reader with a gate and a fill.

    Args:
        gate: a key of `THRESHOLDS`, or `static`.
        fill: `copy`, `p`, `linear`, or `wait` to defer skipped tokens.
    """
    reader = module.reader
    gates = {
        "arla": lambda: module.gate,
        "blind": lambda: module.gate.blind(),
        "confidence": Confidence,
        "saturation": Saturation,
        "schedule": lambda: Schedule(backbone.depth, reader.exits),
        "chance": Chance,
        "oracle": Oracle,
        "static": Static,
    }
    thresholds = tuple(range(len(reader.exits))) if gate == "static" else THRESHOLDS[gate]
    state = Fill(fill) if fill in ("copy", "p") else module.fill
    gate = gates[gate]()
    return Method(
        name, backbone, module, reader, gate, state, fill == "wait" and not gate.monotone, thresholds, use
    )
