"""A KV cache of fixed capacity, so that decoding can be compiled.

A decoding step of a small model mostly costs the launch of some hundred small operations from Python.
`mx.compile` launches them at once, but only if no shape changes from step to step. mlx-lm's cache grows with
each token. Here the arrays are allocated in advance, the position is an input of the compiled function, and
a mask hides the unused positions.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

from .compiled import lean_pass

FEW = 16  # the most positions of a compiled pass; each number and each capacity is traced once
CHUNK = 512  # the most positions of a prompt computed at once
FIRST_CAPACITY = 64  # initial answer capacity; small, because every step reads the whole buffer
STEP = 64  # capacities are multiples of this


class FixedKV:
    """The layer cache of one block, in place of mlx-lm's `KVCache`.

    Attributes:
        keys, values: (B, KV heads, capacity, head width), of which `offset` positions are filled.
        offset: an int; inside a compiled function an array of shape () (rotary embeddings would take one of
            shape (1,) for one offset a sequence).
    """

    def __init__(self, keys: mx.array, values: mx.array, offset=0):
        self.keys, self.values, self.offset = keys, values, offset

    @property
    def traced(self) -> bool:
        """Whether this cache is an argument of a function that is being compiled."""
        return isinstance(self.offset, mx.array)

    def reserve(self, count: int) -> None:
        """Grow the capacity for `count` more positions; not inside a compiled function."""
        capacity = self.keys.shape[2]
        if self.offset + count > capacity:
            more = [(0, 0), (0, 0), (0, round_up(self.offset + count) - capacity), (0, 0)]
            self.keys, self.values = mx.pad(self.keys, more), mx.pad(self.values, more)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values, (B, KV heads, T, head width); returns `keys_and_values`.

        Attention must mask these with `make_mask`.
        """
        count = keys.shape[2]
        if not self.traced:
            self.reserve(count)
        start = mx.array(self.offset).reshape(1)
        self.keys = mx.slice_update(self.keys, keys, start, axes=(2,))
        self.values = mx.slice_update(self.values, values, start, axes=(2,))
        self.offset = self.offset + count
        return self.keys_and_values()

    def make_mask(self, count: int, **_) -> mx.array:
        """The causal mask of `count` positions that are not written yet, bool (count, P): P are the positions
        that `update_and_fetch` will return."""
        positions = self.keys.shape[2] if self.traced else self.offset + count
        return mx.arange(positions) <= self.offset + mx.arange(count)[:, None]

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The filled positions; inside a compiled function the whole arrays."""
        if self.traced:
            return self.keys, self.values
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def trim(self, count: int) -> None:
        """Drop the newest `count` positions."""
        self.offset -= min(count, self.offset)


def is_fixed(cache: Sequence | None, block: int) -> bool:
    """Whether a block's layer cache is a `FixedKV` outside a compiled function, to be used with `Traced`."""
    return cache is not None and isinstance(cache[block], FixedKV) and not cache[block].traced


def round_up(positions: int) -> int:
    """The next multiple of `STEP`."""
    return -(-positions // STEP) * STEP


def chunks(x: mx.array) -> list[mx.array]:
    """A prompt (B, T, ..) split into parts of at most `CHUNK` positions."""
    return mx.split(x, range(CHUNK, x.shape[1], CHUNK), axis=1) if x.shape[1] > CHUNK else [x]


class Traced:
    """A compiled function of a fixed-capacity cache.

    Args:
        body: (cache, tokens or states (B, T, ..), *more) -> arrays; it may call anything that takes a cache.
            `cache` has a `FixedKV` for each block in `writes` and `reads`, and None for the others.
        depth: number of blocks of the model.
        writes: blocks whose layer caches grow by T; they must have the same offset.
        reads: other blocks whose layer caches are read.
    """

    def __init__(self, body: Callable, depth: int, writes: Sequence[int], reads: Sequence[int] = ()):
        self.body, self.depth, self.writes = body, depth, writes
        self.blocks = [*writes, *sorted(set(reads) - set(writes))]
        self.function = mx.compile(self._function)

    def _function(self, keys, values, offset, *inputs):
        cache: list[FixedKV | None] = [None] * self.depth
        for l, k, v in zip(self.blocks, keys, values, strict=True):
            cache[l] = FixedKV(k, v, offset)
        with lean_pass():
            out = self.body(cache, *inputs)
        written = [cache[l] for l in self.writes]
        return out, [c.keys for c in written], [c.values for c in written]

    def __call__(self, cache: list, x: mx.array, *more: mx.array):
        count, offset = x.shape[1], cache[self.blocks[0]].offset if self.blocks else 0
        capacity = max([offset + count, *(cache[l].keys.shape[2] for l in self.writes)])
        for l in self.writes:  # all to the same capacity, because they share one mask
            cache[l].reserve(capacity - cache[l].offset)
        used = [cache[l] for l in self.blocks]
        keys, values = [c.keys for c in used], [c.values for c in used]
        out, keys, values = self.function(keys, values, mx.array(offset), x, *more)
        for l, k, v in zip(self.writes, keys, values, strict=True):
            c = cache[l]
            c.keys, c.values, c.offset = k, v, offset + count
        return out
