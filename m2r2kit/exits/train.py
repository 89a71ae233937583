"""Losses for exits: readers at all exits at once, and ARLA, both on texts with holes.

In decoding, tokens that left early have no true keys in deeper blocks and no last state; the fill provides
replacements. A reader trained without them reads them badly. In training, too, random tokens therefore leave
at random exits, and the others read what the fill provides.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model.backbone import Backbone
from ..stream.distil import DistilConfig, KeptKV, TeacherBatch, divergence, shifted
from .arla import Arla
from .fill import LinearFill
from .gates import Seen

LEFT = 0.6  # fraction of the tokens that leave early in training


class CaughtKV:
    """A layer cache that keeps the keys and values a block computes for whole rows."""

    offset = 0

    def update_and_fetch(self, keys, values):
        self.keys, self.values = keys, values
        return keys, values


def keys_of(backbone: Backbone, l: int, states: mx.array) -> KeptKV:
    """Keys and values of block l for states (B, T, D) at positions 0..T-1; the rest of the block is never
    evaluated.
    """
    caught = CaughtKV()
    backbone.blocks[l](states, None, cache=caught)
    return KeptKV(caught.keys, caught.values)


@dataclass
class Holes:
    """A teacher batch in which some tokens have left early.

    Attributes:
        number: index of the exit at which each token left, J for none; int (B, T, 1).
        cache: keys and values by block, true or filled.
        before: the state read for the token before each, (B, T, D).
        states: block -> the fill's states (B, T, D), for tokens that left before it.
    """

    number: mx.array
    cache: dict
    before: mx.array
    states: Callable

    def gone(self, l: int, starts) -> mx.array:
        """Which tokens have left before block l, bool (B, T, 1)."""
        return mx.any(mx.stack([(self.number == j) & (s <= l) for j, s in enumerate(starts)]), axis=0)


def holes(reader, batch: TeacherBatch, fill, rng: np.random.Generator, share: float = LEFT) -> Holes:
    """Let a random fraction `share` of the tokens leave at random exits, and replace their keys and
    states with the fill's.
    """
    backbone = reader_backbone(reader)
    B, T = batch.tokens.shape
    J = len(reader.exits)
    number = mx.array(np.where(rng.random((B, T, 1)) < share, rng.integers(0, J, (B, T, 1)), J))
    true = shifted(batch.states[backbone.depth])
    read = [mx.stop_gradient(reader.over(j, batch, None, true)) for j in range(J)]
    last = batch.states[backbone.depth]
    for j in range(J):
        last = mx.where(number == j, read[j], last)
    before = mx.stop_gradient(shifted(last))

    filled = [fill(j, batch.states[start], read[j], before) for j, start in enumerate(reader.starts)]

    def states(l):
        found = None
        for j, start in enumerate(reader.starts):
            if start <= l:
                found = filled[j](l) if found is None else mx.where(number == j, filled[j](l), found)
        return found

    out = Holes(number, {}, before, states)
    for l in reader.reads:
        kept, new = batch.cache[l], keys_of(backbone, l, states(l))
        gone = out.gone(l, reader.starts)[:, None]  # (B, 1, T, 1), as keys and values have heads
        pairs = ((new.keys, kept.keys), (new.values, kept.values))
        out.cache[l] = KeptKV(*(mx.stop_gradient(mx.where(gone, n, k)) for n, k in pairs))
    return out


def exits_loss(reader, batch: TeacherBatch, settings: DistilConfig, rng, fill=None) -> mx.array:
    """Sum over the exits of the KL from the whole model; with a fill, on a batch with holes. A scalar."""
    backbone = reader_backbone(reader)
    final = batch.states[backbone.depth]
    cut = holes(reader, batch, fill, rng) if fill is not None else None
    cache, before = (cut.cache, cut.before) if cut else (None, shifted(final))
    total = 0.0
    for j in range(len(reader.exits)):
        state = reader.over(j, batch, cache, before)
        total = total + divergence(backbone, state, final, settings, rng)
    if isinstance(fill, LinearFill):
        total = total + deep_loss(reader, batch, settings, fill, cut, rng)
    return total


def deep_loss(reader, batch: TeacherBatch, settings: DistilConfig, fill, cut: Holes, rng) -> mx.array:
    """KL at the model's last block for tokens that pass all blocks and read the holes: the loss that a
    fill minimises. The gradient passes through the frozen blocks into the fill.
    """
    backbone = reader_backbone(reader)
    final, h = batch.states[backbone.depth], batch.states[reader.starts[0]]
    for l in range(reader.starts[0], backbone.depth):
        h = mx.where(cut.gone(l, reader.starts), cut.states(l), h)
        h = backbone.blocks[l](h, backbone.mask(h))
    through = np.flatnonzero(np.array(cut.number == len(reader.exits)).reshape(-1))
    return divergence(backbone, h, final, settings, rng, among=through)


def reader_backbone(reader) -> Backbone:
    """The model of a reader."""
    return reader.stream._backbone if "stream" in reader else reader._backbone


def seen_in(reader, batch: TeacherBatch, cache, before, head) -> Seen:
    """What a gate sees at all exits of whole rows."""
    seen = Seen(head, progress=None)
    for j, start in enumerate(reader.starts):
        seen.starts[j] = mx.stop_gradient(batch.states[start])
        seen.states[j] = mx.stop_gradient(reader.over(j, batch, cache, before))
    return seen


def gate_loss(gate: Arla, reader, batch: TeacherBatch, settings: DistilConfig, rng, fill) -> mx.array:
    """Binary cross-entropy of both scores of `Arla` against "the head is right here", summed over the
    exits, at some positions; a scalar. Each call draws the positions, the fraction of tokens that have
    left (small when tokens are deferred), and the exits in use, so that decoding may leave any of them
    out.
    """
    backbone, T = reader_backbone(reader), batch.tokens.shape[1]
    cut = holes(reader, batch, fill, rng, LEFT * rng.random())
    seen = seen_in(reader, batch, cut.cache, cut.before, backbone.head)
    some = mx.array(rng.choice(T, min(T, settings.positions), replace=False))
    for known in (seen.starts, seen.states):
        known.update({j: state[:, some] for j, state in known.items()})
    answer = mx.argmax(backbone.head(batch.states[backbone.depth][:, some]), axis=-1)
    seen.used = mx.array(rng.random(len(seen.states)) < 0.5)
    total = 0.0
    for j, state in seen.states.items():
        logits = mx.stop_gradient(backbone.head(state))
        right = (mx.argmax(logits, axis=-1) == answer).astype(mx.float32)[..., None]
        view = gate.view(j, seen)
        for look in (gate.first(j, view), gate.second(j, view, logits)):
            total = total + nn.losses.binary_cross_entropy(look, right).mean()
    return total
