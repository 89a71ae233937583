"""Predictors of experts that use only ids, so they also run in a replay.

Predictors from hidden states are in `state_predictors.py`. A prediction only starts reads.
"""

from collections.abc import Sequence

import numpy as np

from ..common import UserError
from .trace import Predicted, Trace


class Predictor:
    """Base class of the predictors; predicts nothing. Predictions list the best expert first."""

    def new_text(self) -> None:
        """A new text begins."""

    def before(self, number: int) -> Predicted:
        """Predictions before the first block of a token's pass; `number` counts the passes of the run."""
        return []

    def of(self, token: int) -> Predicted:
        """Predictions from the token alone, before its pass."""
        return []

    def at(self, number: int, l: int, wanted: Sequence[int]) -> Predicted:
        """Predictions when block l's router has chosen the experts `wanted`."""
        return []


class Distant(Predictor):
    """Predicts a block's experts `distance` blocks before it, and those of the first blocks before the pass.

    Args:
        blocks: the blocks that have experts.
    """

    def __init__(self, blocks: Sequence[int], distance: int):
        self.blocks, self.distance = tuple(blocks), distance
        self.later = dict(zip(self.blocks, self.blocks[distance:]))

    def guess(self, number: int, m: int) -> list[int]:
        """The experts of block m in this pass."""
        raise NotImplementedError

    def before(self, number):
        return [(m, self.guess(number, m)) for m in self.blocks[: self.distance]]

    def at(self, number, l, wanted):
        m = self.later.get(l)
        return [] if m is None else [(m, self.guess(number, m))]


class PreviousToken(Distant):
    """Predicts the experts of the previous token."""

    def __init__(self, blocks, distance):
        super().__init__(blocks, distance)
        self.new_text()

    def new_text(self):
        self.last: dict[int, list[int]] = {}

    def guess(self, number, m):
        return self.last.get(m, [])

    def at(self, number, l, wanted):
        predicted = super().at(number, l, wanted)
        self.last[l] = list(wanted)
        return predicted


class Static(Distant):
    """Predicts the `width` experts that ran most often in an earlier trace."""

    def __init__(self, trace: Trace, distance: int, width: int):
        super().__init__(trace.blocks, distance)
        counts = trace.tables().sum(axis=0)  # (blocks, E)
        self.best = {l: np.argsort(-counts[l], kind="stable")[:width].tolist() for l in trace.blocks}

    def guess(self, number, m):
        return self.best[m]


class Random(Distant):
    """Predicts `width` random experts, the same in each run: a lower bound."""

    def __init__(self, blocks, distance, experts: int, width: int, seed: int = 0):
        super().__init__(blocks, distance)
        self.experts, self.width, self.seed = experts, width, seed

    def guess(self, number, m):
        rng = np.random.default_rng([self.seed, number, m])
        return rng.choice(self.experts, self.width, replace=False).tolist()


class Oracle(Distant):
    """Predicts the experts of this run from its own trace: an upper bound.

    Raises:
        UserError: the run differs from the trace. Not after `follow`, whose caller compares the texts.
    """

    def __init__(self, trace: Trace, distance: int):
        super().__init__(trace.blocks, distance)
        self.follow(trace, 0)
        self.strict = True

    def follow(self, trace: Trace, first: int) -> None:
        """From pass `first` on, the run is that of `trace`."""
        self.wanted, self.first = [dict(zip(trace.blocks, p.wanted)) for p in trace.passes], first
        self.strict = False

    def guess(self, number, m):
        if 0 <= number - self.first < len(self.wanted):
            return self.wanted[number - self.first][m]
        return self._left()

    def at(self, number, l, wanted):
        if self.strict and set(self.guess(number, l)) != set(wanted):
            self._left()
        return super().at(number, l, wanted)

    def _left(self) -> list[int]:
        if self.strict:
            raise UserError(OTHER_RUN)
        return []


OTHER_RUN = "The oracle's trace is of another text; record this run with `--trace` and use that trace."


class Recorded(Predictor):
    """Repeats the predictions recorded in a trace."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.moment = {l: i + 1 for i, l in enumerate(trace.blocks)}

    def before(self, number):
        return self.trace.passes[number].predicted[0]

    def at(self, number, l, wanted):
        return self.trace.passes[number].predicted[self.moment[l]]
