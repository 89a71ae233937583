"""Several chains of drafts at once: verified in one masked pass, of which the best is accepted.

The drafts are certain (no dice chose them), so sampling accepts by the rule for such candidates
(SpecInfer, arXiv 2305.09781; EAGLE-2 likewise): a candidate with its probability in p; if it is
refused, p goes on without it.
"""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..backbone import Backbone
from ..masked_pass import keep_rows, masked_logits
from .accept import Sampler


@dataclass
class Branches:
    """Chains of drafts, and rows that the drafter wants to see but nobody accepts.

    Attributes:
        chains: each a list of tokens that may follow the pending one.
        extra: tokens of the further rows; all see the text and the pending token.
        distance: of each extra row from the pending token.
        among: bool (n, n), which extra rows each extra row sees, itself among them.
    """

    chains: list[list[int]]
    extra: list[int] = field(default_factory=list)
    distance: list[int] = field(default_factory=list)
    among: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=bool))

    @property
    def tokens(self) -> list[int]:
        """The longest chain: as many drafts can be accepted at most."""
        return max(self.chains, key=len, default=[])

    def row(self, chain: int, depth: int) -> int:
        """The row of a chain's token; row 0 is the pending token, at depth 0."""
        return sum(map(len, self.chains[:chain])) + depth if depth else 0

    def rows(self, pending: int, position: int) -> tuple[list[int], list[int], np.ndarray]:
        """What the masked pass takes: tokens, positions and mask of all rows."""
        tokens, distance = [pending], [0]
        for chain in self.chains:
            tokens += chain
            distance += range(1, len(chain) + 1)
        T = len(tokens) + len(self.extra)
        mask = np.zeros((T, T), dtype=bool)
        mask[:, 0] = True
        for c, chain in enumerate(self.chains):
            first, end = self.row(c, 1), self.row(c, len(chain)) + 1
            mask[first:end, first:end] = np.tri(len(chain), dtype=bool)
        mask[len(tokens) :, len(tokens) :] = self.among
        return tokens + self.extra, [position + d for d in distance + self.distance], mask


def verify_branches(backbone: Backbone, branches: Branches, pending: int, cache: list) -> mx.array:
    """Logits of all rows (T, V); the cache grows by T positions."""
    tokens, positions, mask = branches.rows(pending, cache[0].offset)
    return masked_logits(backbone, mx.array([tokens]), mx.array(positions), mx.array(mask), cache)


def accept_branches(
    branches: Branches, logits: mx.array, sampler: Sampler, cache: list, start: int
) -> tuple[list[int], list[int]]:
    """Accept the best chain, and leave its rows in the cache, behind `start` verified positions.

    Returns:
        the tokens that the step emits, and the model's first choice after each extra row.
    """
    first = len(logits) - len(branches.extra)
    choices = mx.argmax(logits, axis=-1).tolist()
    if sampler.greedy:
        emitted, chain = best_chain(branches, choices)
    else:
        emitted, chain = sampled_chain(branches, sampler.probabilities(logits[:first]), sampler)
    keep_rows(cache, start, [branches.row(chain, depth) for depth in range(len(emitted))])
    return emitted, choices[first:]


def best_chain(branches: Branches, choices: list[int]) -> tuple[list[int], int]:
    """What greedy decoding emits: (the chain that agrees longest and the model's next token, its number)."""
    best, number = [choices[0]], 0
    for c, chain in enumerate(branches.chains):
        n = 0
        while n < len(chain) and chain[n] == choices[branches.row(c, n)]:
            n += 1
        if n >= len(best):
            best, number = [*chain[:n], choices[branches.row(c, n)]], c
    return best, number


def sampled_chain(branches: Branches, p: np.ndarray, sampler: Sampler) -> tuple[list[int], int]:
    """What sampling emits: (tokens, the number of a chain that they follow but for the last).

    Args:
        p: (rows, V), the model's probabilities after the pending token and each draft.
    """
    alive, emitted = list(range(len(branches.chains))), []
    while True:
        number = alive[0] if alive else 0
        rest = p[branches.row(number, len(emitted))].copy()
        alive = [c for c in alive if len(branches.chains[c]) > len(emitted)]
        for token in dict.fromkeys(branches.chains[c][len(emitted)] for c in alive):
            if sampler.random.random() * rest.sum() < rest[token]:
                alive = [c for c in alive if branches.chains[c][len(emitted)] == token]
                emitted.append(token)
                break
            rest[token] = 0.0
        else:
            return [*emitted, sampler.draw(rest)], number
