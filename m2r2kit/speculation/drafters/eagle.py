"""EAGLE: one block that continues the model's last states."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...model.backbone import Backbone
from ...model.mlxlm import create_attention_mask
from ...stream.distil import DistilConfig, TeacherBatch, cosine, divergence
from .base import Draft, Drafter, as_row
from .parts import OwnPass, new_block


@dataclass(frozen=True)
class EagleConfig:
    """Settings of an EAGLE block.

    Attributes:
        unroll: passes in training, each on the states predicted by the previous one, as in drafting.
        align_weight: weight of 1 - cos(prediction, h_N) in the loss.
    """

    unroll: int = 3
    align_weight: float = 0.1

    @classmethod
    def for_model(cls, backbone: Backbone, exit: int | None = None) -> "EagleConfig":
        return cls()


class EagleBlock(nn.Module):
    """(token i + 1, h_N of token i) -> prediction of h_N of token i + 1; at initialisation it returns the
    given state.
    """

    def __init__(self, backbone: Backbone, config: EagleConfig):
        super().__init__()
        D = backbone.width
        self.config, self._backbone = config, backbone
        self.norm_token, self.norm_state = nn.RMSNorm(D), nn.RMSNorm(D)
        self.fuse = mx.concatenate([mx.zeros((D, D)), mx.eye(D)])  # (2D, D)
        self.block = new_block(backbone)

    @property
    def depths(self) -> set[int]:
        """Depths of the model's states that the loss reads."""
        return {self._backbone.depth}

    def __call__(self, tokens, states, mask="causal", cache=None) -> mx.array:
        """tokens (B, T) and states (B, T, D) -> predictions (B, T, D)."""
        x = [self.norm_token(self._backbone.embed(tokens)), self.norm_state(states)]
        return self.block(mx.concatenate(x, axis=-1) @ self.fuse, mask, cache)

    def loss(self, batch: TeacherBatch, settings: DistilConfig, rng: np.random.Generator) -> mx.array:
        """KL from the model's distribution plus weighted 1 - cos to its state, from the model's states
        and from the block's own predictions.
        """
        final = states = batch.states[self._backbone.depth]
        total = 0.0
        for ahead in range(1, self.config.unroll + 1):
            states, target = self(batch.tokens[:, ahead:], states[:, :-1]), final[:, ahead:]
            total = total + divergence(self._backbone, states, target, settings, rng)
            total = total + self.config.align_weight * (1 - cosine(states, target)).mean()
        return total / self.config.unroll


class Eagle(Drafter):
    """Drafts from the last state of each verified token, then from its own predictions of the next states.

    EAGLE's authors report 3x with Vicuna-13B (arXiv 2401.15077), and 4x and 5.6x for its later versions
    (2406.16858, 2503.01840). We implement the block on states and tokens, the loss on states, and training
    on its own predictions as in EAGLE-3; not its states of several depths, and a chain instead of trees.
    """

    def __init__(self, backbone: Backbone, module: EagleBlock):
        self.learns = backbone.depth

        def body(layer_cache, states, tokens):
            h = module(tokens, states, create_attention_mask(states, layer_cache), layer_cache)[:, -1:]
            return h, backbone.head(h)

        self.own = OwnPass(module, module.block.self_attn, body)

    def begin(self, prompt, capacity):
        self.own.begin(capacity)
        self.states = None  # h_N of the tokens verified last

    def learn(self, states):
        self.states = states

    def __call__(self, text, drafts, sampler, cache):
        draft = Draft()
        if self.states is None:  # a text of one token: the model has no states yet
            return draft
        known = len(text) - 1 - self.states.shape[1]  # positions read with the model's states
        self.own.crop(known)  # the others were read with predicted states
        h, logits = self.own(self.states, mx.array([text[known + 1 :]]))
        while True:
            token = draft.take(logits, sampler)
            if len(draft.tokens) == drafts:
                return draft
            h, logits = self.own(h, as_row(token))
