"""A pass whose rows are no chain: each has a position of its own, and a mask says what it sees.

Several continuations of a text can so be read at once, each as if it stood alone. All rows are
written to the cache, one after another; `keep_rows` then leaves those that became text.
"""

import mlx.core as mx

from ..common import UserError
from .backbone import Backbone
from .cache import FixedKV, Traced, is_fixed


def check_rows(backbone: Backbone) -> None:
    """Refuse a model whose positions cannot be given row by row."""
    ropes = {type(getattr(b[backbone.parts.attention], "rope", None)).__name__ for b in backbone.blocks}
    if "DynamicNTKScalingRoPE" in ropes:
        raise UserError(
            "This model's positions depend on the length of the whole text, so rows beside it cannot be "
            "placed; choose a method that drafts one chain, such as m2r2."
        )


class RowsKV:
    """What a block takes for its cache: positions and mask are given, rows go behind the text.

    Args:
        entry: the block's cache.
        positions: (T,), one for each row.
        among: bool (T, T), which rows each row sees; all see the whole text before.
    """

    def __init__(self, entry, positions: mx.array, among: mx.array):
        self.entry, self.offset, self.among = entry, positions, among

    def make_mask(self, rows: int, **_) -> mx.array:
        start = self.entry.offset
        if not isinstance(self.entry, FixedKV):
            return mx.concatenate([mx.ones((rows, start), dtype=mx.bool_), self.among], axis=1)
        room = self.entry.keys.shape[2]
        text = mx.broadcast_to(mx.arange(room) < start, (rows, room))
        return mx.slice_update(text, self.among, mx.array(start).reshape(1), axes=(1,))

    def update_and_fetch(self, keys, values):
        return self.entry.update_and_fetch(keys, values)


def masked_states(
    backbone: Backbone, tokens: mx.array, positions: mx.array, among: mx.array, cache: list
) -> tuple[mx.array, mx.array]:
    """Last states and logits of rows that each see the text in the cache and some of one another.

    Args:
        tokens: (1, T); the cache grows by T positions.
        positions: (T,), where each row stands in its text.
        among: bool (T, T), which rows each row sees, itself among them.

    Returns:
        h_N (1, T, D), logits (T, V).
    """
    if not is_fixed(cache, 0):
        return _states(backbone, cache, tokens, positions, among)
    key = ("masked", 0, backbone.depth)
    if key not in backbone._traced:

        def body(entries, *inputs):
            return _states(backbone, entries, *inputs)

        backbone._traced[key] = Traced(body, backbone.depth, range(backbone.depth))
    return backbone._traced[key](cache, tokens, positions, among)


def _states(backbone, entries, tokens, positions, among):
    rows = [RowsKV(entry, positions, among) for entry in entries]
    h, mask = backbone.embed(tokens), rows[0].make_mask(tokens.shape[1])
    for block, entry in zip(backbone.blocks, rows, strict=True):
        h = block(h, mask, cache=entry)
    return h, backbone.head(h)[0]


def keep_rows(cache: list, start: int, rows: list[int]) -> None:
    """Of what a masked pass has written behind `start` positions, keep these rows, in this order."""
    if rows != list(range(len(rows))):
        arrays = [[e.keys for e in cache], [e.values for e in cache]]
        keys, values = _moved(*arrays, mx.array([start]), mx.array(rows))
        for entry, k, v in zip(cache, keys, values, strict=True):
            entry.keys, entry.values = k, v
    for entry in cache:
        entry.offset = start + len(rows)


@mx.compile
def _moved(keys, values, start, rows):
    def move(x):
        return mx.slice_update(x, mx.take(x, start + rows, axis=2), start, axes=(2,))

    return [move(k) for k in keys], [move(v) for v in values]
