"""Rotary positions for all blocks of a compiled pass at once.

On a CPU `mx.fast.rope` is a chain of some thirty small operations, and a model calls it twice in
each block: two fifths of a decoding step. All blocks turn by the same angles, so inside a
compiled pass they are computed once (RoFormer, arXiv 2104.09864, eq. 34).
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

alone = nn.RoPE.__call__


def shared_angles() -> Callable:
    """What stands in for `nn.RoPE` in one pass: every plain one in it shares one table of angles."""
    tables: dict[tuple, tuple] = {}

    def together(rope: nn.RoPE, x: mx.array, offset=0) -> mx.array:
        if rope.traditional or rope.dims != x.shape[-1] or not isinstance(offset, mx.array):
            return alone(rope, x, offset)
        key = (rope.dims, rope.base, rope.scale, x.shape[-2], id(offset))
        if key not in tables:
            # the offset is kept too: its id stands for it as long as it lives
            tables[key] = (*_table(rope, x.shape[-2], offset), offset)
        cos, sin, _ = tables[key]
        half = rope.dims // 2
        swapped = mx.concatenate([x[..., half:], x[..., :half]], axis=-1)
        return (x * cos + swapped * sin).astype(x.dtype)

    return together


def _table(rope: nn.RoPE, rows: int, offset: mx.array) -> tuple[mx.array, mx.array]:
    """cos and signed sin of the angles of `rows` positions from `offset` on, or at the positions in
    `offset` if there is one for each row: (rows, dims) each."""
    inverse = rope.base ** (-mx.arange(0, rope.dims, 2) / rope.dims) * rope.scale
    inverse = mx.concatenate([inverse, inverse])
    sign = mx.concatenate([-mx.ones(rope.dims // 2), mx.ones(rope.dims // 2)])
    positions = mx.arange(rows)[:, None]
    mx.eval(inverse, sign, positions)  # constants of the compiled pass, not parts of it
    angles = (offset[:, None] if offset.size > 1 else positions + offset) * inverse
    return mx.cos(angles), mx.sin(angles) * sign
