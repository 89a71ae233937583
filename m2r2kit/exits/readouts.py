"""Readers: the state that the head reads at an exit, from the accelerated stream or the slow residual.

| reader | state at exit E_j | slow blocks it needs |
|---|---|---|
| `StreamReader` | p_E, the accelerated residual | below a_j, the start of its interval |
| `LensReader` | h_E + Up silu(Down norm(h_E)), a tuned lens for each exit | below E_j |
| `BareReader` | h_E | below E_j |

`reader.starts[j]` is that number of blocks.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..model.backbone import Backbone
from ..stream.distil import TeacherBatch, needs
from ..stream.fast_block import SmallFFN
from ..stream.stream import AcceleratedStream, intervals, reads_near


class BareReader(nn.Module):
    """The unchanged slow residual (LayerSkip's exit, on a model that was not trained for it)."""

    def __init__(self, backbone: Backbone, exits: tuple[int, ...]):
        super().__init__()
        self._backbone = backbone
        self.exits = self.starts = tuple(exits)
        self.reads: tuple[int, ...] = ()  # blocks whose keys it reads

    def prepare(self) -> None:
        """Prepare for compiled passes with the current weights."""
        mx.eval(self.parameters())  # lazy weights would be recomputed in each pass

    def at(self, j: int, h: mx.array, cache, position, before) -> mx.array:
        """The state that the head reads at exit j, for one token of each sequence: h at `starts[j]`, (B, 1,
        D) -> same.

        Args:
            cache: layer caches, filled up to the previous token.
            position: of the token.
            before: the state that the head read for the previous token, (B, 1, D).
        """
        return h

    def over(self, j: int, batch: TeacherBatch, cache=None, before=None) -> mx.array:
        """The same for whole sequences, (B, T, D); `cache` and `before` replace the model's own."""
        return batch.states[self.exits[j]]

    def needs(self) -> tuple[set[int], set[int]]:
        """The depths whose states and the blocks whose keys and values `over` reads from a teacher batch."""
        return {self._backbone.depth, *self.exits}, set()

    def macs(self, j: int) -> int:
        """Multiply-accumulates of the reader at exit j, without the head."""
        return 0


@dataclass(frozen=True)
class LensConfig:
    """Settings of a `LensReader`: its exits, and the hidden width of each lens."""

    exits: tuple[int, ...] = (1,)
    width: int = 64


class LensReader(BareReader):
    """The slow residual and a trained layer for each exit (tuned lens, Belrose et al. 2023)."""

    def __init__(self, backbone: Backbone, config: LensConfig):
        super().__init__(backbone, config.exits)
        self.config = config
        self.lenses = [SmallFFN(backbone.width, config.width) for _ in config.exits]

    def at(self, j, h, cache, position, before):
        return h + self.lenses[j](h).astype(h.dtype)

    def over(self, j, batch, cache=None, before=None):
        return self.at(j, batch.states[self.exits[j]], None, None, None)

    def macs(self, j):
        return 2 * self._backbone.width * self.config.width


class StreamReader(nn.Module):
    """The accelerated residual at each of the stream's exits.

    Raises:
        ValueError: the stream reads the slow keys of its own blocks (`StreamConfig.near`), which would have
            to be computed before the exit is decided.
    """

    def __init__(self, stream: AcceleratedStream):
        super().__init__()
        if reads_near(stream.config):
            raise ValueError("exits need a stream that reads deep keys only")
        self.stream = stream
        self.exits = tuple(stream.config.exits)
        self.starts = tuple(a for a, _ in intervals(stream.config))
        self.reads = tuple(sorted({block.read for block in stream.fast if block.read is not None}))
        object.__setattr__(self, "_merged", None)  # a plain attribute, not a parameter

    def prepare(self):
        mx.eval(self.parameters())
        blocks = {l for a, b in intervals(self.stream.config) for l in range(a, b)}
        object.__setattr__(self, "_merged", {l: self.stream.block(l).merged() for l in blocks})

    def at(self, j, h, cache, position, before):
        before = before if self.stream.config.carry else None
        exit, merged = self.exits[j], self._merged
        return self.stream.accelerate(h, cache, position, position, exit, before, merged)[1]

    def over(self, j, batch, cache=None, before=None):
        return self.stream(batch.states, cache or batch.cache, exit=self.exits[j], before=before)[-1]

    def needs(self):
        return needs(self.stream)

    def macs(self, j):
        carry = self.stream.carry.matrix.size if self.stream.config.carry and self.starts[j] == 0 else 0
        return carry + sum(self.stream.block(l).macs() for l in range(self.starts[j], self.exits[j]))
