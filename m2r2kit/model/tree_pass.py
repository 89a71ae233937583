"""A pass over a tree of tokens: each token has its own position, and a mask of the tokens that it sees.

It computes several continuations of a text at once, each as if it were alone. All tokens are appended to the
cache; `keep_positions` then keeps the accepted ones.
"""

import mlx.core as mx

from ..common import UserError
from .backbone import Backbone
from .cache import FixedKV, Traced, is_fixed


def check_positions(backbone: Backbone) -> None:
    """Refuse a model that cannot take one position for each token of a pass."""
    ropes = {type(getattr(b[backbone.parts.attention], "rope", None)).__name__ for b in backbone.blocks}
    if "DynamicNTKScalingRoPE" in ropes:
        raise UserError(
            "This model's rotary positions depend on the length of the text, so it cannot verify a tree of "
            "drafts; choose a method that drafts one chain, such as m2r2."
        )


class TreeKV:
    """A layer cache with given positions and mask; new tokens are appended after the text.

    Args:
        cache: the block's layer cache.
        positions: (T,), the position of each token.
        among: bool (T, T), which tokens of the pass each token sees; each also sees the text before.
    """

    def __init__(self, cache, positions: mx.array, among: mx.array):
        self.cache, self.offset, self.among = cache, positions, among

    def make_mask(self, count: int, **_) -> mx.array:
        start = self.cache.offset
        if not isinstance(self.cache, FixedKV):
            return mx.concatenate([mx.ones((count, start), dtype=mx.bool_), self.among], axis=1)
        capacity = self.cache.keys.shape[2]
        text = mx.broadcast_to(mx.arange(capacity) < start, (count, capacity))
        return mx.slice_update(text, self.among, mx.array(start).reshape(1), axes=(1,))

    def update_and_fetch(self, keys, values):
        return self.cache.update_and_fetch(keys, values)


def masked_states(
    backbone: Backbone, tokens: mx.array, positions: mx.array, among: mx.array, cache: list
) -> tuple[mx.array, mx.array]:
    """Last states and logits of tokens that each see the text in the cache and some of each other.

    Args:
        tokens: (1, T); the cache grows by T positions.
        positions: (T,), the position of each token in its continuation.
        among: bool (T, T), which tokens each token sees, itself included.

    Returns:
        h_N (1, T, D), logits (T, V).
    """
    if not is_fixed(cache, 0):
        return _states(backbone, cache, tokens, positions, among)
    key = ("masked", 0, backbone.depth)
    if key not in backbone._traced:

        def body(cache, *inputs):
            return _states(backbone, cache, *inputs)

        backbone._traced[key] = Traced(body, backbone.depth, range(backbone.depth))
    return backbone._traced[key](cache, tokens, positions, among)


def _states(backbone, cache, tokens, positions, among):
    cache = [TreeKV(c, positions, among) for c in cache]
    h, mask = backbone.embed(tokens), cache[0].make_mask(tokens.shape[1])
    for block, c in zip(backbone.blocks, cache, strict=True):
        h = block(h, mask, cache=c)
    return h, backbone.head(h)[0]


def keep_positions(cache: list, start: int, kept: list[int]) -> None:
    """Keep some of the tokens that a tree pass has appended to a cache.

    Args:
        start: positions in the cache before the pass.
        kept: indices of the tokens to keep, in their new order.
    """
    if kept != list(range(len(kept))):
        arrays = [[c.keys for c in cache], [c.values for c in cache]]
        keys, values = _moved(*arrays, mx.array([start]), mx.array(kept))
        for c, k, v in zip(cache, keys, values, strict=True):
            c.keys, c.values = k, v
    for c in cache:
        c.offset = start + len(kept)


@mx.compile
def _moved(keys, values, start, kept):
    def move(x):
        return mx.slice_update(x, mx.take(x, start + kept, axis=2), start, axes=(2,))

    return [move(k) for k in keys], [move(v) for v in values]
