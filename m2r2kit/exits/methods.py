"""The ways of spending fewer blocks on easy tokens, by the names of the command line."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..backbone import Backbone
from . import depths, work
from .fill import Fill
from .forced import ForcedPass, Outcome, Texts
from .gates import Chance, Confidence, Gate, Oracle, Saturation, Schedule, Static
from .readers import BareReader

WHO = {
    "m2r2": "the accelerated residual, and ARLA on its trajectory",
    "m2r2-confidence": "the same, but the head's own confidence decides",
    "calm": "a lens at each exit, and the head's confidence: CALM (Schuster et al. 2022)",
    "calm-saturation": "a lens, and how little it changed since the exit before: CALM",
    "skipdecode": "a lens, and the earlier the later in the text: SkipDecode (Del Corro et al. 2023)",
    "layerskip": "the bare residual at one exit: LayerSkip (Elhoushi et al. 2024), no training of the model",
    "static": "a lens at one exit",
    "m2r2-static": "the accelerated residual at one exit",
    "mixture-of-depths": "a router before every second block (Raposo et al. 2024)",
    "shallow": "the first blocks alone, trained to be the model",
    "random": "the accelerated residual, and a coin",
    "oracle": "the accelerated residual, and who knows the answer",
}
READER = dict.fromkeys(("m2r2", "m2r2-confidence", "m2r2-static", "random", "oracle"), "m2r2")
READER |= dict.fromkeys(("calm", "calm-saturation", "skipdecode", "static"), "lens")
PROBABLE = (0.999, 0.995, 0.99, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.3)


@dataclass
class Point:
    """One setting of a method: threshold, and what came of it on texts.

    Attributes:
        right, tokens, nats: by text, (n,): tokens given as the whole model gives them, all tokens, and their
            cross-entropy; `blocks`, blocks run for them, a reader's products counted as shares of a block.
        macs: products of an average token.
        share: of the tokens that left at each exit, the last that of all blocks.
    """

    threshold: float
    right: np.ndarray
    tokens: np.ndarray
    nats: np.ndarray
    blocks: np.ndarray
    macs: work.Work
    share: list[float]

    @property
    def agreement(self) -> float:
        return float(self.right.sum() / self.tokens.sum())


@dataclass
class Method:
    """A way to spend fewer blocks: what it needs, and the settings that make its curve.

    Attributes:
        gate, fill, reader: for a method with exits.
        model: for `shallow` and `mixture-of-depths`.
    """

    name: str
    thresholds: Sequence[float]
    reader: object = None
    gate: Gate | None = None
    fill: Fill | None = None
    model: object = None


def methods(backbone: Backbone, trained: dict, names: Sequence[str]) -> list[Method]:
    """The methods by name; a static exit or a shallow model is one method for each of its depths.

    Args:
        trained: kind -> module (`trained.Exits`, `MixtureOfDepths`), and `shallow` -> list of them.
    """
    out = []
    for name in names:
        if name == "mixture-of-depths":
            out.append(Method(name, (0.9, 0.7, 0.5, 0.3, 0.1, 0.03, 0.01), model=trained[name]))
        elif name == "shallow":
            out += [Method(name, (0.5,), model=m) for m in trained[name]]
        elif name == "layerskip":
            exits = tuple(range(4, backbone.depth, 4))
            reader = BareReader(backbone, exits)
            out += [Method(name, (0.5,), reader, Static(j), Fill("copy")) for j in range(len(exits))]
        else:
            module = trained[READER[name]]
            reader, fill, exits = module.reader, module.fill, module.reader.exits
            if name.endswith("static"):
                out += [Method(name, (0.5,), reader, Static(j), fill) for j in range(len(exits))]
                continue
            gate, thresholds = {
                "m2r2": (module.gate, PROBABLE),
                "m2r2-confidence": (Confidence(), PROBABLE),
                "calm": (Confidence(), PROBABLE),
                "calm-saturation": (Saturation(), (0.99, 0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6)),
                "skipdecode": (Schedule(backbone.depth, exits), (8, 4, 2.5, 1.8, 1.4, 1.1, 0.8, 0.5)),
                "random": (Chance(), (0.98, 0.95, 0.9, 0.8, 0.7, 0.5)),
                "oracle": (Oracle(), (0.5,)),
            }[name]
            out.append(Method(name, thresholds, reader, gate, fill))
    return out


def point(backbone: Backbone, method: Method, outcome: Outcome, blocks: np.ndarray, macs, share, threshold):
    """A `Point` from an outcome; `blocks` by token."""
    gated = outcome.gated
    return Point(
        threshold, *((x * gated).sum(1) for x in (outcome.right, gated, outcome.nats, blocks)), macs, share
    )


def curve(backbone: Backbone, method: Method, texts: Texts, report: Callable | None = None) -> list[Point]:
    """A method's points, one a threshold, the safest first."""
    block = work.block_macs(backbone)
    out = []
    if method.model is not None:
        whole = work.whole(backbone)
        for threshold in method.thresholds:
            outcome = depths.along(backbone, method.model, texts, threshold)
            run = float(outcome.blocks[outcome.gated].mean())
            passed = 0 if isinstance(method.model, depths.Shallow) else backbone.depth - run
            each = work.Work(run * block, 0, 0, whole.heads, passed * work.key_value_macs(backbone))
            out.append(point(backbone, method, outcome, outcome.blocks, each, [], threshold))
            if report:
                report(1)
        return out
    forced = ForcedPass(backbone, method.reader, method.gate, method.fill)
    works = work.by_exit(
        backbone, method.reader, method.gate, method.fill, isinstance(method.gate, (Schedule, Static))
    )
    blocks = np.array([(w.blocks + w.readers) / block for w in works])
    for threshold in method.thresholds:
        outcome = forced(texts, threshold)
        taken = outcome.exit[outcome.gated]
        share = (np.bincount(taken, minlength=len(works)) / len(taken)).tolist()
        out.append(
            point(backbone, method, outcome, blocks[outcome.exit], work.mean(works, taken), share, threshold)
        )
        if report:
            report(1)
    return out
