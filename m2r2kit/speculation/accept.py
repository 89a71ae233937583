"""Sampling, and the acceptance rule for drafts.

The rule (Leviathan et al. 2023, arXiv 2211.17192) makes the accepted tokens samples of the model's
distribution p, whatever the draft's distribution q. Greedy decoding is the limit at temperature 0: a draft
is accepted if it is the model's own first choice.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..common import UserError


@dataclass
class Sampler:
    """Sampling settings and their random generator, with mlx-lm's meaning.

    Top-p, min-p and top-k filter the tokens in this order, by the model's own probabilities; the temperature
    then applies to the tokens that are left.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep this many tokens; 0 keeps all.
        top_p: keep the fewest tokens that reach this probability; 1 keeps all.
        seed: of the random generator.
        min_p: keep tokens with at least this fraction of the largest probability; 0 keeps all.

    Raises:
        UserError: a setting out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    random: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError("Temperature and top-k must be at least 0 and finite, and top-p in (0, 1].")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"Min-p must lie between 0 and 1; got {self.min_p}.")
        if self.seed < 0:
            raise UserError(f"The seed must be at least 0; got {self.seed}.")
        self.random = np.random.default_rng(self.seed)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: mx.array) -> np.ndarray:
        """The distribution that tokens are drawn from: logits (positions, V) -> float64 (positions, V), each
        row sums to 1.

        Raises:
            UserError: the logits are not finite.
        """
        x = np.asarray(logits.astype(mx.float32), dtype=np.float64)
        top = x.max(-1, keepdims=True)
        if not np.isfinite(top).all():  # single tokens may be minus infinity; the maximum must be finite
            raise UserError("The model's logits are not finite, so no token can be drawn; check its weights.")
        x = x - top
        kept = self._kept(x)
        with np.errstate(over="ignore"):  # a tiny temperature keeps only the largest
            p = np.where(kept, np.exp(x / self.temperature), 0.0)
        return p / p.sum(-1, keepdims=True)

    def _kept(self, x: np.ndarray) -> np.ndarray:
        """Which tokens the filters keep, from logits (positions, V) minus their maximum."""
        kept = np.ones(x.shape, bool)
        if self.top_p < 1:
            p = np.exp(x)
            p /= p.sum(-1, keepdims=True)
            order = np.argsort(-p, axis=-1, kind="stable")  # of ties the first comes first, as in argmax
            ordered = np.take_along_axis(p, order, -1)
            before = np.cumsum(ordered, -1) - ordered  # mass of the likelier tokens
            np.put_along_axis(kept, order, before < self.top_p, -1)
        if self.min_p:
            kept &= x >= math.log(self.min_p)
        if 0 < self.top_k < x.shape[-1]:
            left = np.where(kept, x, -np.inf)
            least = np.partition(left, -self.top_k, axis=-1)[:, [-self.top_k]]
            equal = left == least  # keeps the first ties, as argmax does
            free = self.top_k - (left > least).sum(-1, keepdims=True)
            kept &= (left > least) | (equal & (np.cumsum(equal, -1) <= free))
        return kept

    def draw(self, p: np.ndarray) -> int:
        """Draw one token from probabilities (V,)."""
        edges = p.cumsum()
        at = min(self.random.random() * edges[-1], np.nextafter(edges[-1], 0))
        return int(edges.searchsorted(at, side="right"))

    def choose(self, logits: mx.array) -> int:
        """Draw one token from logits (V,)."""
        return self.draw(self.probabilities(logits[None])[0])

    def of_mlx_lm(self, vocabulary: int) -> Callable | None:
        """mlx-lm's sampler of the same distribution, seeded; None if greedy."""
        if self.greedy:
            return None
        from ..model.mlxlm import make_sampler

        mx.random.seed(self.seed % 2**64)  # MLX seeds have 64 bits
        coldest = max(self.temperature, 1e-30)  # its inverse must be a float32
        top_k = self.top_k if self.top_k < vocabulary else 0
        top_p = self.top_p if self.top_p < 1 else 0.0  # mlx-lm keeps all at 0
        return make_sampler(coldest, top_p=top_p, min_p=self.min_p, top_k=top_k)


def accept_greedy(drafts: list[int], choices: list[int]) -> list[int]:
    """The tokens that greedy decoding emits: the drafts that agree, then the model's next token.

    Args:
        drafts: K drafted tokens.
        choices: K + 1 tokens: the model's first choice after the prefix, after draft 1, .. draft K.
    """
    n = 0
    while n < len(drafts) and drafts[n] == choices[n]:
        n += 1
    return choices[: n + 1]


def accept_sampled(drafts: list[int], q: list[np.ndarray], p: np.ndarray, sampler: Sampler) -> list[int]:
    """The tokens that sampling emits: each draft with probability min(1, p/q), else one from max(p - q, 0).

    Args:
        drafts: K drafted tokens, drawn from q.
        q: K arrays (V,), the draft's probabilities.
        p: (K + 1, V), the model's probabilities, filtered like q.
    """
    for i, (token, qi) in enumerate(zip(drafts, q, strict=True)):
        if sampler.random.random() * qi[token] < p[i][token]:
            continue
        rest = np.maximum(p[i] - qi, 0.0)
        if rest.sum() == 0:  # p equals q
            rest = p[i]
        return [*drafts[:i], sampler.draw(rest)]
    return [*drafts, sampler.draw(p[len(drafts)])]
