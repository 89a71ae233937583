"""A KV cache of fixed size, so that decoding can be compiled.

A decoding step of a small model is mostly the cost of starting some hundred small operations
from Python. `mx.compile` starts them all at once, but only where no shape changes from step to
step. mlx-lm's cache grows with each token; here the arrays have room for the whole text from
the beginning, the position is a number that is passed in, and a mask hides what lies behind it.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

from .compiled import lean_pass

FEW = 16  # passes of up to so many tokens are compiled: one trace for each number and each room
CHUNK = 512  # positions of a prompt that are computed at once
FIRST_ROOM = 64  # of an answer at first, as every step reads all of it; it grows with a longer one
STEP = 64  # positions are allocated in multiples of this


class FixedKV:
    """Keys and values of one block, (B, heads, room, head width) each, of which `offset` are filled.

    Takes the place of mlx-lm's `KVCache`. Inside a compiled function `offset` is an array
    without axes (with one, rotary embeddings would take it for one position a sequence).
    """

    def __init__(self, keys: mx.array, values: mx.array, offset=0):
        self.keys, self.values, self.offset = keys, values, offset

    @property
    def traced(self) -> bool:
        """Whether this stands for a cache inside a function that is being compiled."""
        return isinstance(self.offset, mx.array)

    def reserve(self, rows: int) -> None:
        """Make room for `rows` more positions; not inside a compiled function."""
        room = self.keys.shape[2]
        if self.offset + rows > room:
            more = [(0, 0), (0, 0), (0, round_up(self.offset + rows) - room), (0, 0)]
            self.keys, self.values = mx.pad(self.keys, more), mx.pad(self.values, more)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write new positions; returns `keys_and_values`, which the caller must mask (`make_mask`)."""
        rows = keys.shape[2]
        if not self.traced:
            self.reserve(rows)
        start = mx.array(self.offset).reshape(1)
        self.keys = mx.slice_update(self.keys, keys, start, axes=(2,))
        self.values = mx.slice_update(self.values, values, start, axes=(2,))
        self.offset = self.offset + rows
        return self.keys_and_values()

    def make_mask(self, rows: int, **_) -> mx.array:
        """What `rows` new tokens may look at, before they are written: bool (rows, positions), of the
        positions that `update_and_fetch` returns."""
        positions = self.keys.shape[2] if self.traced else self.offset + rows
        return mx.arange(positions) <= self.offset + mx.arange(rows)[:, None]

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What is filled; inside a compiled function the whole arrays."""
        if self.traced:
            return self.keys, self.values
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def trim(self, count: int) -> None:
        """Forget the newest `count` positions."""
        self.offset -= min(count, self.offset)


def is_fixed(cache: Sequence | None, block: int) -> bool:
    """Whether a block's entry is a `FixedKV` to be used through `Traced`."""
    return cache is not None and isinstance(cache[block], FixedKV) and not cache[block].traced


def round_up(positions: int) -> int:
    """The next multiple of `STEP`."""
    return -(-positions // STEP) * STEP


def chunks(x: mx.array) -> list[mx.array]:
    """A prompt (B, T, ..) in parts of at most `CHUNK` positions."""
    return mx.split(x, range(CHUNK, x.shape[1], CHUNK), axis=1) if x.shape[1] > CHUNK else [x]


class Traced:
    """A compiled function over the entries of a fixed cache.

    Args:
        body: (entries, tokens or states (B, T, ..), *more) -> arrays; it may call anything that
            takes a cache. `entries` has one `FixedKV` for each block in `writes` and `reads`.
        depth: blocks of the model.
        writes: blocks whose entries grow by T; they stand at the same position.
        reads: other blocks whose entries are looked at.
    """

    def __init__(self, body: Callable, depth: int, writes: Sequence[int], reads: Sequence[int] = ()):
        self.body, self.depth, self.writes = body, depth, writes
        self.blocks = [*writes, *sorted(set(reads) - set(writes))]
        self.function = mx.compile(self._function)

    def _function(self, keys, values, offset, *inputs):
        entries: list[FixedKV | None] = [None] * self.depth
        for l, k, v in zip(self.blocks, keys, values, strict=True):
            entries[l] = FixedKV(k, v, offset)
        with lean_pass():
            out = self.body(entries, *inputs)
        written = [entries[l] for l in self.writes]
        return out, [e.keys for e in written], [e.values for e in written]

    def __call__(self, cache: list, x: mx.array, *more: mx.array):
        rows, offset = x.shape[1], cache[self.blocks[0]].offset if self.blocks else 0
        room = max([offset + rows, *(cache[l].keys.shape[2] for l in self.writes)])
        for l in self.writes:  # all to the same room, as they share one mask
            cache[l].reserve(room - cache[l].offset)
        used = [cache[l] for l in self.blocks]
        keys, values = [e.keys for e in used], [e.values for e in used]
        out, keys, values = self.function(keys, values, mx.array(offset), x, *more)
        for l, k, v in zip(self.writes, keys, values, strict=True):
            entry = cache[l]
            entry.keys, entry.values, entry.offset = k, v, offset + rows
        return out
