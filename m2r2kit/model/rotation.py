"""Rotary embeddings that share their angles between blocks, and that take one offset for each position.

On a CPU `mx.fast.rope` is a chain of some thirty small operations, called twice in each block: two fifths of
a decoding step. All blocks rotate by the same angles, so a compiled pass computes them once (RoFormer, arXiv
2104.09864, eq. 34).
"""

from functools import cache

import mlx.core as mx
import mlx.nn as nn

from .compiled import is_lean, shared


@cache
def by_position(kind: type) -> type:
    """A subclass of a rotary embedding that also takes one offset for each position.

    MLX takes an array of offsets as one for each sequence. Here, for one sequence x (1, heads, T, d) and
    offsets (T,), each position is rotated by its own offset.
    """

    class Rotary(kind):
        def __call__(self, x, offset=0, **options):
            if not isinstance(offset, mx.array) or offset.size == 1 or x.shape[0] != 1:
                return super().__call__(x, offset=offset, **options)
            return super().__call__(x.swapaxes(0, 2), offset=offset, **options).swapaxes(0, 2)

    Rotary.__name__ = kind.__name__
    return Rotary


class SharedRoPE(by_position(nn.RoPE)):
    """`nn.RoPE` that computes its angles once for all blocks of a lean pass."""

    def __call__(self, x: mx.array, offset=0) -> mx.array:
        plain = not self.traditional and self.dims == x.shape[-1] and isinstance(offset, mx.array)
        if not plain or not is_lean() or (offset.size > 1 and x.shape[0] > 1):
            return super().__call__(x, offset=offset)
        key = "angles", self.dims, self.base, self.scale, x.shape[-2], id(offset)
        if key not in shared():
            # the offset is kept too: its id is unique only while it exists
            shared()[key] = (*_table(self, x.shape[-2], offset), offset)
        cos, sin, _ = shared()[key]
        half = self.dims // 2
        swapped = mx.concatenate([x[..., half:], x[..., :half]], axis=-1)
        return (x * cos + swapped * sin).astype(x.dtype)


def _table(rope: nn.RoPE, count: int, offset: mx.array) -> tuple[mx.array, mx.array]:
    """cos and signed sin of the angles of `count` positions, (count, dims) each.

    Args:
        offset: the first position, or all positions (count,).
    """
    inverse = rope.base ** (-mx.arange(0, rope.dims, 2) / rope.dims) * rope.scale
    inverse = mx.concatenate([inverse, inverse])
    sign = mx.concatenate([-mx.ones(rope.dims // 2), mx.ones(rope.dims // 2)])
    positions = mx.arange(count)[:, None]
    mx.eval(inverse, sign, positions)  # constants of the compiled pass, not operations in it
    angles = (offset[:, None] if offset.size > 1 else positions + offset) * inverse
    return mx.cos(angles), mx.sin(angles) * sign
