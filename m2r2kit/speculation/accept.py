"""How tokens are chosen, and the rule by which drafted ones are accepted.

The rule (Leviathan et al. 2023, arXiv 2211.17192) makes the accepted tokens samples of the
model's own distribution p, whatever the draft's distribution q was. Greedy decoding is its
limit at temperature 0: a draft is accepted if it is the model's own first choice.
"""

import math
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..common import UserError


@dataclass
class Sampler:
    """Temperature, top-k and top-p, in this order, and the random numbers.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep this many tokens; 0 keeps all.
        top_p: keep the fewest tokens that reach this probability; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    random: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError("Temperature and top-k must be at least 0 and finite, and top-p in (0, 1].")
        if self.seed < 0:
            raise UserError(f"The seed must be at least 0; got {self.seed}.")
        self.random = np.random.default_rng(self.seed)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: mx.array) -> np.ndarray:
        """What a token is drawn from: logits (rows, V) -> float64 (rows, V), each row sums to 1."""
        x = np.asarray(logits.astype(mx.float32), dtype=np.float64) / self.temperature
        p = np.exp(x - x.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        if self.top_k and self.top_k < p.shape[-1]:
            least = np.partition(p, -self.top_k, axis=-1)[:, [-self.top_k]]
            equal = p == least  # of equals the first stay, as argmax takes the first
            room = self.top_k - (p > least).sum(-1, keepdims=True)
            p = np.where((p > least) | (equal & (np.cumsum(equal, -1) <= room)), p, 0.0)
            p /= p.sum(-1, keepdims=True)
        if self.top_p < 1:
            order = np.argsort(-p, axis=-1, kind="stable")
            ordered = np.take_along_axis(p, order, -1)
            before = np.cumsum(ordered, -1) - ordered  # mass of the tokens ahead of each
            np.put_along_axis(p, order, np.where(before < self.top_p, ordered, 0.0), -1)
            p /= p.sum(-1, keepdims=True)
        return p

    def draw(self, p: np.ndarray) -> int:
        """One token from probabilities (V,)."""
        edges = p.cumsum()
        return int(edges.searchsorted(self.random.random() * edges[-1], side="right"))


def accept_greedy(drafts: list[int], choices: list[int]) -> list[int]:
    """What greedy decoding emits: the drafts that agree, then the model's own next token.

    Args:
        drafts: K drafted tokens.
        choices: K + 1, the model's first choice after the prefix, after draft 1, .. draft K.
    """
    n = 0
    while n < len(drafts) and drafts[n] == choices[n]:
        n += 1
    return choices[: n + 1]


def accept_sampled(drafts: list[int], q: list[np.ndarray], p: np.ndarray, sampler: Sampler) -> list[int]:
    """What sampling emits: each draft with probability min(1, p/q), else one from max(p - q, 0).

    Args:
        drafts: K drafted tokens, drawn from q.
        q: K rows (V,), the draft's probabilities.
        p: (K + 1, V), the model's probabilities; both after temperature, top-k and top-p.
    """
    for i, (token, qi) in enumerate(zip(drafts, q, strict=True)):
        if sampler.random.random() * qi[token] < p[i][token]:
            continue
        rest = np.maximum(p[i] - qi, 0.0)
        if rest.sum() == 0:  # p and q agree to the last bit: the draft was as good as the model
            rest = p[i]
        return [*drafts[:i], sampler.draw(rest)]
    return [*drafts, sampler.draw(p[len(drafts)])]
