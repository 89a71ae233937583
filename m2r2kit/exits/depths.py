"""Two baselines that change the depth without exits: fewer blocks for all tokens, and blocks that skip
tokens.

| baseline | what runs |
|---|---|
| `Shallow` | the first blocks, with trained changes of their matrices, and the head |
| `MixtureOfDepths` | all blocks, but a router before every second one lets tokens skip it |

The model stays frozen; the changes train like the stream, on the same rows. In training, mixture-of-depths
(Raposo et al. 2024, arXiv 2404.02258) picks a fraction of each batch's tokens, which depends on later tokens
and saves nothing in decoding. Here each token is routed by itself, as in that paper's decoding. A token that
skips a block still computes its keys and values there: without them a frozen model loses far more quality.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..common import UserError
from ..model.backbone import Backbone
from ..stream.distil import DistilConfig, TeacherBatch, divergence
from ..stream.fast_block import Changed, Merged, changed, is_small, new_deltas
from . import macs as work
from .teacher_forced import Outcome, Texts


class ChangedBlock(nn.Module):
    """A frozen block with trained changes of its matrices, of rank `rank` (None: full)."""

    def __init__(self, block: nn.Module, rank: int | None):
        super().__init__()
        self._block, self.deltas = block, new_deltas(block, rank)
        self._base = changed(
            block, lambda m, name: Changed(m, self.deltas[name]) if name in self.deltas else m
        )

    def merged(self) -> nn.Module:
        """The block merged with its current changes if it is small enough, else with the changes beside
        it.
        """
        if not is_small(self._block):
            return self._base
        return changed(self._block, lambda m, name: Merged(m, self.deltas.get(name)))

    def __call__(self, h, mask=None, cache=None):
        return self._base(h, mask, cache=cache)


@dataclass(frozen=True)
class ShallowConfig:
    """Settings of `Shallow`: the number of blocks, and the rank of their changes (None: full)."""

    blocks: int = 4
    rank: int | None = None


class Shallow(nn.Module):
    """The first blocks of a model, trained to match the whole model's output."""

    def __init__(self, backbone: Backbone, config: ShallowConfig):
        super().__init__()
        if not 0 < config.blocks < backbone.depth:
            raise UserError(f"A shallow model has 1 to {backbone.depth - 1} blocks; got {config.blocks}.")
        self._backbone, self.config = backbone, config
        self.blocks = [ChangedBlock(b, config.rank) for b in backbone.blocks[: config.blocks]]

    def __call__(self, tokens: mx.array, threshold: float = 0.5):
        """(last states (B, T, D), number of blocks run for each token (B, T))."""
        h = self._backbone.embed(tokens)
        for block in self.blocks:
            h = block(h, self._backbone.mask(h))
        return h, mx.full(tokens.shape, len(self.blocks))

    def macs(self, run: np.ndarray) -> np.ndarray:
        """Multiply-accumulates of tokens that ran this many blocks, the head's included."""
        return run * work.block_macs(self._backbone) + work.head_macs(self._backbone)

    def loss(self, batch: TeacherBatch, settings: DistilConfig, rng) -> mx.array:
        return of_end(self._backbone, self(batch.tokens)[0], batch, settings, rng)


@dataclass(frozen=True)
class DepthsConfig:
    """Settings of `MixtureOfDepths`.

    Attributes:
        every: block l has a router if l % every == every - 1.
        capacity: target fraction of the tokens that a routed block processes.
        rank: of the changes of every block.
        weight: weight in the loss of the squared distance from that fraction.
    """

    every: int = 2
    capacity: float = 0.25
    rank: int = 16
    weight: float = 20.0


class MixtureOfDepths(nn.Module):
    """A model whose tokens skip some blocks; a linear router for each of these blocks decides."""

    def __init__(self, backbone: Backbone, config: DepthsConfig):
        super().__init__()
        self._backbone, self.config = backbone, config
        self.blocks = [ChangedBlock(b, config.rank) for b in backbone.blocks]
        routed = [l for l in range(backbone.depth) if l % config.every == config.every - 1]
        self._routed = {l: i for i, l in enumerate(routed)}
        self.norm = nn.RMSNorm(backbone.width)
        self.routers = mx.zeros((len(routed), backbone.width))
        self.bias = mx.zeros((len(routed),)) + 1.0

    def score(self, l: int, h: mx.array) -> mx.array | None:
        """Router score of block l, 0..1, (B, T, 1); None for blocks without a router."""
        if l not in self._routed:
            return None
        i = self._routed[l]
        return mx.sigmoid((self.norm(h) * self.routers[i]).sum(-1, keepdims=True) + self.bias[i])

    def __call__(self, tokens: mx.array, threshold: float = 0.5, shares: list | None = None):
        """(last states (B, T, D), number of blocks run for each token (B, T)); each router's mean score
        is appended to `shares`.
        """
        h, run = self._backbone.embed(tokens), mx.zeros(tokens.shape)
        for l, block in enumerate(self.blocks):
            score, new = self.score(l, h), block(h, self._backbone.mask(h))
            if score is None:
                h, run = new, run + 1
                continue
            hard = (score > threshold).astype(h.dtype)
            run = run + hard[..., 0]
            take = hard + score - mx.stop_gradient(score)  # straight-through gradient
            h = h + take * (new - h)
            if shares is not None:
                shares.append(score.mean())
        return h, run

    def macs(self, run: np.ndarray) -> np.ndarray:
        """Multiply-accumulates of tokens that ran this many blocks: the blocks, keys and values of the
        skipped ones, routers and head (the changes are merged in decoding).
        """
        passed = (self._backbone.depth - run) * work.key_value_macs(self._backbone)
        return (
            run * work.block_macs(self._backbone)
            + passed
            + self.routers.size
            + work.head_macs(self._backbone)
        )

    def loss(self, batch: TeacherBatch, settings: DistilConfig, rng) -> mx.array:
        shares: list = []
        h, _ = self(batch.tokens, shares=shares)
        off = mx.stack(shares).mean() - self.config.capacity
        return of_end(self._backbone, h, batch, settings, rng) + self.config.weight * off * off


def of_end(backbone: Backbone, h, batch: TeacherBatch, settings: DistilConfig, rng) -> mx.array:
    """KL from the whole model's final distribution, at some positions."""
    return divergence(backbone, h, batch.states[backbone.depth], settings, rng)


def along(backbone: Backbone, model, texts: Texts, threshold: float = 0.5) -> Outcome:
    """Teacher-forced predictions of such a model along texts; `Outcome.blocks` counts the blocks run for
    each token.
    """
    tokens = mx.array(texts.tokens)
    h, run = model(tokens[:, :-1], threshold)
    logits, answer = backbone.head(h), tokens[:, 1:]
    right = mx.argmax(logits, axis=-1) == answer
    nats = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, answer[..., None], -1)[..., 0]
    gated = texts.gated
    return Outcome(gated, np.zeros(gated.shape, int), np.array(right), np.array(nats), np.array(run))
