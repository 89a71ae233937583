"""ARLA, the exit router of M2R2: it looks at the trajectory of the accelerated residual.

The paper names it and gives no more; our reading is *accelerated residual latent attention*
(`data/paper/choices.toml`). Every state on the way, those where an interval began and those read at its
end, is projected to a small latent vector; the newest attends to all of them; a small layer reads from
both how likely it is that the head is right here.

Two looks. The first is cheap: no head is evaluated for it (with a vocabulary of 4,096 that has as many
products as three blocks of the pocket model, the router a tenth of one). Where it finds a token likely
enough, the head is read, as it has to be where a token leaves, and what the head says is weighed with the
trajectory. So the head is wasted only when the second score rejects what the first accepted.
"""

import copy
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .gates import Gate, Seen

SEES = ("starts", "states")
FAR = 10.0  # nats beyond which what the head says is as good as certain


@dataclass(frozen=True)
class ArlaConfig:
    """Settings of the router.

    Attributes:
        exits: how many exits it knows.
        latent: width of a state's latent vector.
        sees: which residuals: `states`, what is read at the exits, and `starts`, the slow ones from
            which that was made.
        hope: share of the threshold that the first look asks for, where a second one follows; set by hand,
            not tuned.
    """

    exits: int = 4
    latent: int = 64
    sees: tuple[str, ...] = SEES
    hope: float = 0.6


class Arla(Gate):
    """The router: (exit's index j, what is seen) -> probability of being right, (B, T, 1)."""

    weighs = looks = True

    def __init__(self, width: int, config: ArlaConfig):
        super().__init__()
        self.config, self._width, self.hope = config, width, config.hope
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
        self.said = mx.zeros((config.exits, 3))  # weights of what the head says, and a constant

    def latents(self, j: int, seen: Seen) -> list[mx.array]:
        """The latent vectors of exit j, one (B, T, L) for each kind of residual that is seen."""
        return [
            norm(getattr(seen, kind)[j]) @ down[j] + self.place[j, i]
            for i, (kind, norm, down) in enumerate(zip(self.config.sees, self.norms, self.down, strict=True))
        ]

    def view(self, j: int, seen: Seen) -> mx.array:
        """The trajectory at exit j as both looks read it, (B, T, 2 L)."""
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
        """Log odds of being right, before the head is read, (B, T, 1)."""
        return (view * self.out[j]).sum(-1, keepdims=True) + self.bias[j]

    def second(self, j: int, view: mx.array, logits: mx.array) -> mx.array:
        """The same when the head has said logits (B, T, V)."""
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
        if not self.looks:
            return mx.sigmoid(self.first(j, view))
        return mx.sigmoid(self.second(j, view, seen.head(seen.states[j])))

    def ask(self, j, seen, level):
        if not self.looks:
            return super().ask(j, seen, level)
        view = self.view(j, seen)
        looked = mx.sigmoid(self.first(j, view)) >= self.hope * level
        return looked & (mx.sigmoid(self.second(j, view, seen.head(seen.states[j]))) >= level), looked

    def blind(self) -> "Arla":
        """The same router with its first look only: a control."""
        one = copy.copy(self)
        one.looks, one.hope = False, 1.0
        return one

    def macs(self, j):
        L, n = self.config.latent, len(self.config.sees) * (j + 1)  # as if all exits before were in use
        return len(self.config.sees) * self._width * L + L * L * (1 + n) + 4 * L * L + 3 * n * L
