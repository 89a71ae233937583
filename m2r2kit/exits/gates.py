"""Gates: a score for each token at an exit; the token leaves if the score reaches a threshold.

| gate | score at exit E_j | source |
|---|---|---|
| `Static` | 1 | - |
| `Confidence` | difference of the two largest probabilities | CALM, Schuster et al. 2022 |
| `Saturation` | cosine of the states read at this exit and the previous one | CALM |
| `Schedule` | progress in the text | SkipDecode, Del Corro et al. 2023 |
| `Chance` | a random number | control |
| `Oracle` | 1 if the head is right, which needs the answer | upper bound |

ARLA, which scores the trajectory of the accelerated residual, is in `arla.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..stream.distil import cosine


@dataclass
class Seen:
    """What a gate may read at an exit, for one token of each of B sequences.

    Attributes:
        starts: the slow states at the start of each exit's interval, by exit index, (B, 1, D) each.
        states: the states read at the exits, by exit index, (B, 1, D) each.
        used: which exits are in use, bool (J,); None: all that have a state.
        head: state -> logits (B, 1, V).
        progress: fraction of the maximum length that lies before the token, (B, 1, 1).
        chance: a random number in 0..1, (B, 1, 1).
        answer: the whole model's token, (B, 1); only the oracle reads it.
    """

    head: Callable
    progress: Any
    chance: Any = None
    answer: Any = None
    starts: dict[int, Any] = field(default_factory=dict)
    states: dict[int, Any] = field(default_factory=dict)
    used: Any = None

    def before(self, j: int) -> list[tuple[int, Any]]:
        """The exits before j: (index, whether it is in use), the latter True or a scalar array."""
        return [(i, True if self.used is None else self.used[i]) for i in sorted(self.states) if i < j]


def rising(threshold: float, starts: tuple[int, ...]) -> list[float]:
    """A threshold for each exit. Earlier exits ask for more, because a token that leaves there skips more
    blocks and leaves more of them without true keys: 1 - threshold is scaled by the fraction of blocks
    run.
    """
    return [1 - (1 - threshold) * (start + 1) / (starts[-1] + 1) for start in starts]


class Gate(nn.Module):
    """(exit index, what is seen) -> score (B, 1, 1); a token leaves if it reaches the threshold.

    Attributes:
        needs_head: it evaluates the head at every exit.
        monotone: no token goes deeper than an earlier one, so skipped blocks are never read.
        is_confidence: the score measures confidence, so that earlier exits may ask for more (`rising`).
        two_scores: it evaluates the head only if a first score, without the head, is high enough.
        first_share: fraction of the threshold that the first score must reach.
    """

    needs_head = False
    monotone = False
    is_confidence = False
    two_scores = False
    first_share = 1.0

    def __call__(self, j: int, seen: Seen) -> mx.array:
        raise NotImplementedError

    def ask(self, j: int, seen: Seen, level) -> tuple[mx.array, mx.array]:
        """(whether the token leaves at exit j, whether the head was evaluated), bool (B, 1, 1) each, for
        a threshold `level`.
        """
        score = self(j, seen)
        return score >= level, mx.full(score.shape, self.needs_head)

    def macs(self, j: int) -> int:
        """Multiply-accumulates of the score at exit j, without the head's."""
        return 0


class Static(Gate):
    """Always leave, so that all tokens take the only exit in use."""

    monotone = True

    def __call__(self, j, seen):
        return mx.ones_like(seen.progress)


class Confidence(Gate):
    """Difference of the two largest probabilities (CALM's softmax response)."""

    needs_head = is_confidence = True

    def __call__(self, j, seen):
        logits = seen.head(seen.states[j])
        first = logits.max(-1, keepdims=True)
        second = mx.where(logits == first, -mx.inf, logits).max(-1, keepdims=True)
        total = mx.exp(logits - first).sum(-1, keepdims=True)
        return (1 - mx.exp(second - first)) / total


class Saturation(Gate):
    """How little the state changes: the cosine to the state at the previous exit in use; -1 at the first
    one.
    """

    is_confidence = True

    def __call__(self, j, seen):
        last, any_used = seen.states[j], mx.array(False)
        for i, used in seen.before(j):
            last, any_used = mx.where(used, seen.states[i], last), mx.logical_or(any_used, used)
        return mx.where(any_used, cosine(seen.states[j], last), -1.0)[..., None]


class Schedule(Gate):
    """Exit earlier the later the token is in the text: E_j after a fraction (N - E_j) / (N - E_1) of the
    text, times the threshold. The depth never increases, so no keys are missing.
    """

    monotone = True

    def __init__(self, depth: int, exits: tuple[int, ...]):
        super().__init__()
        self.shares = [(depth - exit) / (depth - exits[0]) for exit in exits]

    def __call__(self, j, seen):
        return seen.progress / self.shares[j]


class Chance(Gate):
    """A random number."""

    def __call__(self, j, seen):
        return seen.chance


class Oracle(Gate):
    """Knows the whole model's token and leaves if the head predicts it."""

    needs_head = True

    def __call__(self, j, seen):
        right = mx.argmax(seen.head(seen.states[j]), axis=-1) == seen.answer
        return right.astype(mx.float32)[..., None]
