"""M2R2 with a tree: its chain of drafts, and the next likeliest tokens of p_E as leaves."""

import mlx.core as mx
import numpy as np

from ...common import UserError
from ...model.backbone import Backbone, crop
from ...model.tree_pass import check_positions
from ...stream.stream import AcceleratedStream
from ..accept import Sampler
from ..tree import Tree
from .base import M2R2

LEAVES = 2  # default of an untuned stream


class M2R2Tree(M2R2):
    """Drafts M2R2's greedy chain, with the likeliest of p_E's other choices as leaves.

    The tree runs from the embeddings through all blocks in one masked pass, so the chain's states below the
    exit are computed again. Choosing leaves needs the draft's logits, so this drafter synchronises before
    verification; a chain does not.

    A leaf adds at most one token, in place of the chain's first error. It costs one row in each pass and, if
    it is accepted, a move of its row in every block's cache. On the two CPU cores used for our measurements,
    leaves added tokens to a step but no speed: the chain was as fast or faster. If rows cost less, as on a
    GPU, this may change; `m2r2kit tune` chooses the number of leaves (0 is a chain).

    Args:
        threshold: as for `M2R2`, but always by the probabilities of p_E's first choices, in sampling too.
        leaves: number of drafts beside the chain, those most likely to be on the accepted path by p_E's
            probabilities; fewer at the end of the context.
    """

    def __init__(
        self,
        backbone: Backbone,
        stream: AcceleratedStream,
        exit: int | None = None,
        threshold: float = 0.0,
        leaves: int = LEAVES,
    ):
        super().__init__(backbone, stream, exit, threshold)
        if leaves < 0:
            raise UserError(f"The number of leaves must be at least 0; got {leaves}.")
        check_positions(backbone)
        self.leaves = leaves

    def _read(self, token, cache, verified, position):
        h, logits = super()._read(token, cache, verified, position)
        self._logits.append(logits[0])
        return h, logits

    def __call__(self, text, drafts, sampler, cache):
        self._logits: list[mx.array] = []
        # a tree's drafts are deterministic, so the chain is greedy for every sampler
        depth = super().__call__(text, drafts, Sampler(), cache).depth
        crop(cache[: self.exit], len(text) - 1)  # the tree writes its own rows
        logits = np.asarray(mx.concatenate(self._logits[:depth]).astype(mx.float32))  # (K, V)
        capacity = self.backbone.context - len(text) - len(logits)
        return with_leaves(logits, max(0, min(self.leaves, capacity)))


def with_leaves(logits: np.ndarray, leaves: int) -> Tree:
    """The first choices of p_E as a chain, and the likeliest of all other choices as leaves.

    A token's chance is the product of p_E's probabilities along its path.

    Args:
        logits: (K, V), after the pending token and each draft but the last.
    """
    K, V = logits.shape
    chain = logits.argmax(-1)
    tokens, parents = chain.tolist(), list(range(K))
    if leaves:
        chance = logits - logits.max(-1, keepdims=True)
        chance -= np.log(np.exp(chance).sum(-1, keepdims=True))
        first = chance[np.arange(K), chain]
        chance += (np.cumsum(first) - first)[:, None]  # log probability of the path
        chance[np.arange(K), chain] = -np.inf
        leaves = min(leaves, K * (V - 1))
        best = np.argpartition(chance, -leaves, axis=None)[-leaves:]
        for place in best[np.argsort(-chance.ravel()[best], kind="stable")]:
            parents.append(int(place) // V)
            tokens.append(int(place) % V)
    return Tree(tokens, parents)
