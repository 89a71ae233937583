"""ARLA, the exit router of M2R2, which scores the trajectory of the accelerated residual.

The paper names it without details; we read it as *accelerated residual latent attention*
(`data/paper/choices.toml`). Each state on the trajectory (the slow state at the start of an interval and the
state read at its exit) is projected to a small latent vector. The newest latent attends to all of them, and
a small layer predicts from both how likely the head is right at this exit.

The router has two scores (the first and second look in notebook 03). The first needs no head; for the
pocket model (vocabulary 4,096) the head costs almost as much as three blocks, and the first score a fifth
to a third of one. If the first score is high enough, the head is evaluated, which an exiting token needs in
any case, and the second score combines its logits with the trajectory. The head is wasted only when the
second score rejects what the first accepted.
"""

import copy
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .gates import Gate, Seen

SEES = ("starts", "states")
FAR = 10.0  # nats; larger margins and smaller log probabilities are clipped


@dataclass(frozen=True)
class ArlaConfig:
    """Settings of the router.

    Attributes:
        exits: number of exits.
        latent: width of a latent vector.
        sees: which residuals it reads: `states` (read at the exits) and `starts` (the slow states they are
            computed from).
        first_share: fraction of the threshold that the first score must reach; set by hand, not tuned.
    """

    exits: int = 4
    latent: int = 64
    sees: tuple[str, ...] = SEES
    first_share: float = 0.6


class Arla(Gate):
    """The router: (exit index j, what is seen) -> probability that the head is right, (B, T, 1)."""

    is_confidence = two_scores = True

    def __init__(self, width: int, config: ArlaConfig):
        super().__init__()
        self.config, self._width, self.first_share = config, width, config.first_share
        L, kinds = config.latent, len(config.sees)
        self.norms = [nn.RMSNorm(width) for _ in config.sees]
        self.down = [mx.random.normal((config.exits, width, L)) * width**-0.5 for _ in config.sees]
        self.place = mx.random.normal((config.exits, kinds, L)) * 0.1
        self.query = mx.random.normal((L, L)) * L**-0.5
        self.key = mx.random.normal((L, L)) * L**-0.5
        self.hidden = nn.Linear(2 * L, 2 * L)
        self.out = mx.zeros((config.exits, 2 * L))
        self.bias = mx.zeros((config.exits,))
        self.sure = mx.zeros((config.exits, 2 * L))
        self.said = mx.zeros((config.exits, 3))  # weights of two features of the logits, and a bias

    def latents(self, j: int, seen: Seen) -> list[mx.array]:
        """The latent vectors of exit j, one (B, T, L) for each kind of residual."""
        return [
            norm(getattr(seen, kind)[j]) @ down[j] + self.place[j, i]
            for i, (kind, norm, down) in enumerate(zip(self.config.sees, self.norms, self.down, strict=True))
        ]

    def view(self, j: int, seen: Seen) -> mx.array:
        """The features of the trajectory at exit j that both scores use, (B, T, 2 L)."""
        known, there = [], []
        for i, used in [*seen.before(j), (j, True)]:
            latents = self.latents(i, seen)
            known += latents
            there += [used] * len(latents)
        newest, all_of_them = known[-1], mx.stack(known, axis=-2)  # (B, T, n, L)
        scores = ((newest @ self.query)[..., None, :] * (all_of_them @ self.key)).sum(-1)
        scores = mx.where(mx.stack([mx.array(each) for each in there]), scores, -mx.inf)
        weights = mx.softmax(scores * self.config.latent**-0.5, axis=-1)
        attended = (weights[..., None] * all_of_them).sum(-2)
        return nn.silu(self.hidden(mx.concatenate([newest, attended], axis=-1)))

    def first(self, j: int, view: mx.array) -> mx.array:
        """First score: log odds that the head is right, before the head is evaluated, (B, T, 1)."""
        return (view * self.out[j]).sum(-1, keepdims=True) + self.bias[j]

    def second(self, j: int, view: mx.array, logits: mx.array) -> mx.array:
        """Second score: the log odds given the head's logits (B, T, V); (B, T, 1)."""
        best = logits.max(-1, keepdims=True)
        next_best = mx.where(logits == best, -mx.inf, logits).max(-1, keepdims=True)
        share = best - mx.logsumexp(logits, axis=-1, keepdims=True)
        said = mx.concatenate([mx.minimum(best - next_best, FAR), mx.maximum(share, -FAR)], axis=-1)
        weights = self.said[j]
        return (
            (view * self.sure[j]).sum(-1, keepdims=True)
            + (said * weights[:2]).sum(-1, keepdims=True)
            + weights[2]
        )

    def __call__(self, j, seen):
        view = self.view(j, seen)
        if not self.two_scores:
            return mx.sigmoid(self.first(j, view))
        return mx.sigmoid(self.second(j, view, seen.head(seen.states[j])))

    def ask(self, j, seen, level):
        if not self.two_scores:
            return super().ask(j, seen, level)
        view = self.view(j, seen)
        looked = mx.sigmoid(self.first(j, view)) >= self.first_share * level
        return looked & (mx.sigmoid(self.second(j, view, seen.head(seen.states[j]))) >= level), looked

    def blind(self) -> "Arla":
        """A copy of the router with its first score only: a control."""
        one = copy.copy(self)
        one.two_scores, one.first_share = False, 1.0
        return one

    def macs(self, j):
        L, n = self.config.latent, len(self.config.sees) * (j + 1)  # counts all earlier exits as in use
        return len(self.config.sees) * self._width * L + L * L * (1 + n) + 4 * L * L + 3 * n * L
