"""M2R2 with a tree: its chain of drafts, and beside it the tokens that p_E held second best."""

import mlx.core as mx
import numpy as np

from ...common import UserError
from ...model.backbone import Backbone, crop
from ...model.tree_pass import check_rows
from ...stream.stream import AcceleratedStream
from ..accept import Sampler
from ..tree import Tree
from .base import M2R2

LEAVES = 2  # where the stream was not tuned


class M2R2Tree(M2R2):
    """Drafts M2R2's greedy chain, and as leaves on it the likeliest of p_E's further choices.

    The tree goes from the embeddings through all blocks in one masked pass: the states of the chain
    below the exit are computed again, as a leaf needs them beside it. Choosing leaves needs the
    draft's numbers, so this drafter waits for them where the chain is verified without a stop.

    A leaf adds one token at most, in place of the chain's first error, and costs its row in each
    pass and, where it is accepted, a move of its row in every block's cache. On the two CPU cores
    that this kit was made on, the pocket model's leaves added tokens to a step and no speed: the
    chain was as fast or faster. Where rows cost less, as on a GPU, that may turn; `m2r2kit tune`
    chooses among numbers of leaves (0 is a chain).

    Args:
        threshold: as for `M2R2`; when sampling too, the chance is of p_E's own first choices.
        leaves: further drafts beside the chain, those with the greatest chance of being on the
            path by p_E's probabilities; fewer where the context ends.
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
        check_rows(backbone)
        self.leaves = leaves

    def _read(self, token, cache, verified, position):
        h, logits = super()._read(token, cache, verified, position)
        self._logits.append(logits[0])
        return h, logits

    def __call__(self, text, drafts, sampler, cache):
        self._logits: list[mx.array] = []
        # the candidates of a tree are certain, so the chain is greedy whatever the sampler is
        depth = super().__call__(text, drafts, Sampler(), cache).depth
        crop(cache[: self.exit], len(text) - 1)  # the tree writes its own rows
        logits = np.asarray(mx.concatenate(self._logits[:depth]).astype(mx.float32))  # (K, V)
        capacity = self.backbone.context - len(text) - len(logits)
        return with_leaves(logits, max(0, min(self.leaves, capacity)))


def with_leaves(logits: np.ndarray, leaves: int) -> Tree:
    """The first choices of p_E as a chain, and of all others the likeliest as leaves on it.

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
        chance += (np.cumsum(first) - first)[:, None]  # that of the path so far; logarithms all
        chance[np.arange(K), chain] = -np.inf
        leaves = min(leaves, K * (V - 1))
        best = np.argpartition(chance, -leaves, axis=None)[-leaves:]
        for place in best[np.argsort(-chance.ravel()[best], kind="stable")]:
            parents.append(int(place) // V)
            tokens.append(int(place) % V)
    return Tree(tokens, parents)
