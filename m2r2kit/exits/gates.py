"""Who decides that a token may leave at an exit: a score, and a threshold that it has to reach.

| gate | score at exit E_j | source |
|---|---|---|
| `Static` | 1 | - |
| `Confidence` | difference of the two largest probabilities | CALM, Schuster et al. 2022 |
| `Saturation` | cosine of what is read here and at the exit before | CALM |
| `Schedule` | how late in the text the token stands | SkipDecode, Del Corro et al. 2023 |
| `Chance` | a random number | control |
| `Oracle` | 1 if the head would be right, which nobody knows beforehand | bound |

ARLA, which looks at the trajectory of the accelerated residual, is in `arla.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..stream.distil import cosine


@dataclass
class Seen:
    """What is known of one token of each of B sequences when it stands at an exit.

    Attributes:
        starts: the slow states from which it was read, by exit index, (B, 1, D) each.
        states: what was read there, by exit index, (B, 1, D) each.
        used: which of the exits anyone may leave at, bool (J,); None: those that have a state.
        head: state -> logits (B, 1, V).
        progress: share of the longest text that lies before the token, (B, 1, 1).
        chance: a random number of 0..1, (B, 1, 1).
        answer: the token that the whole model gives, (B, 1), for who may know it.
    """

    head: Callable
    progress: Any
    chance: Any = None
    answer: Any = None
    starts: dict[int, Any] = field(default_factory=dict)
    states: dict[int, Any] = field(default_factory=dict)
    used: Any = None

    def before(self, j: int) -> list[tuple[int, Any]]:
        """The exits before j: (number, whether it is used), the latter True or an array without axes."""
        return [(i, True if self.used is None else self.used[i]) for i in sorted(self.states) if i < j]


def rising(threshold: float, starts: tuple[int, ...]) -> list[float]:
    """A threshold for each exit: the earlier a token leaves, the surer it has to be, as it leaves more blocks
    without true keys for later tokens. What is missing to 1 grows with the blocks that have been run."""
    return [1 - (1 - threshold) * (start + 1) / (starts[-1] + 1) for start in starts]


class Gate(nn.Module):
    """(exit's index, what is seen) -> score (B, 1, 1); a token leaves where it reaches the threshold."""

    probes = False  # whether it needs the head's logits at each exit that it looks at
    monotone = False  # whether no token goes deeper than one before it: nobody looks into the blocks it skips
    weighs = False  # whether its score says how sure it is, so that more can be asked of an earlier exit
    looks = False  # whether it needs the head's logits only where a first look, without them, gives it hope
    hope = 1.0  # share of the threshold that this first look asks for

    def __call__(self, j: int, seen: Seen) -> mx.array:
        raise NotImplementedError

    def ask(self, j: int, seen: Seen, level) -> tuple[mx.array, mx.array]:
        """(whether the token leaves at exit j, whether the head was read for that), bool (B, 1, 1) each, if a
        score of `level` is asked for."""
        score = self(j, seen)
        return score >= level, mx.full(score.shape, self.probes)

    def macs(self, j: int) -> int:
        """Products and sums of one look at exit j, without the head's."""
        return 0


class Static(Gate):
    """Always; so the only exit in use is the one that all tokens take."""

    monotone = True

    def __call__(self, j, seen):
        return mx.ones_like(seen.progress)


class Confidence(Gate):
    """Difference of the two largest probabilities (CALM's softmax response)."""

    probes = weighs = True

    def __call__(self, j, seen):
        logits = seen.head(seen.states[j])
        first = logits.max(-1, keepdims=True)
        second = mx.where(logits == first, -mx.inf, logits).max(-1, keepdims=True)
        total = mx.exp(logits - first).sum(-1, keepdims=True)
        return (1 - mx.exp(second - first)) / total


class Saturation(Gate):
    """How little the state still changes; at the first exit in use there is nothing to compare with."""

    weighs = True

    def __call__(self, j, seen):
        last, any_used = seen.states[j], mx.array(False)
        for i, used in seen.before(j):
            last, any_used = mx.where(used, seen.states[i], last), mx.logical_or(any_used, used)
        return mx.where(any_used, cosine(seen.states[j], last), -1.0)[..., None]


class Schedule(Gate):
    """The later in the text, the earlier the exit: E_j from the share (N - E_j) / (N - E_1) of the text on,
    times the threshold. Depth never rises, so no block's keys are ever missing."""

    monotone = True

    def __init__(self, depth: int, exits: tuple[int, ...]):
        super().__init__()
        self.shares = [(depth - exit) / (depth - exits[0]) for exit in exits]

    def __call__(self, j, seen):
        return seen.progress / self.shares[j]


class Chance(Gate):
    """A coin."""

    def __call__(self, j, seen):
        return seen.chance


class Oracle(Gate):
    """Knows the whole model's answer; leaves where the head would give it."""

    probes = True

    def __call__(self, j, seen):
        right = mx.argmax(seen.head(seen.states[j]), axis=-1) == seen.answer
        return right.astype(mx.float32)[..., None]
