"""Kangaroo: an early exit with one trained block, which stops when its confidence is low."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...model.backbone import Backbone
from ...model.mlxlm import create_attention_mask
from ...stream.distil import DistilConfig, TeacherBatch, divergence
from .base import Draft, Drafter, as_row, check_exit, confidence
from .parts import OwnPass, new_block


@dataclass(frozen=True)
class KangarooConfig:
    """Settings of a Kangaroo drafter.

    Attributes:
        exit: number of the model's blocks that run on each drafted token.
        threshold: the draft ends before a token whose first choice has a lower probability; the first token
            is always drafted.
    """

    exit: int = 2
    threshold: float = 0.6

    @classmethod
    def for_model(cls, backbone: Backbone, exit: int | None = None) -> "KangarooConfig":
        return cls(exit or cls.exit)


class KangarooBlock(nn.Module):
    """One block on h_E with its own keys and values; at initialisation it changes nothing."""

    def __init__(self, backbone: Backbone, config: KangarooConfig):
        super().__init__()
        check_exit(backbone, config.exit)
        self.config, self._backbone = config, backbone
        self.block = new_block(backbone)
        self.scale = mx.ones(backbone.width)  # of the norm before the head

    @property
    def depths(self) -> set[int]:
        """Depths of the model's states that the loss reads."""
        return {self.config.exit, self._backbone.depth}

    def __call__(self, h, mask="causal", cache=None) -> mx.array:
        """h_E (B, T, D) -> the normalised state that the head reads, (B, T, D)."""
        return self._backbone.norm(self.block(h, mask, cache)) * self.scale

    def loss(self, batch: TeacherBatch, settings: DistilConfig, rng: np.random.Generator) -> mx.array:
        """KL from the model's next-token distribution."""
        backbone, guess = self._backbone, self(batch.states[self.config.exit])
        return divergence(backbone, guess, batch.states[backbone.depth], settings, rng, backbone.unembed)


class Kangaroo(Drafter):
    """Drafts with the block at the exit while its first choice is likely enough; verification resumes at
    h_E.

    Kangaroo (arXiv 2404.18911) reports up to 1.68x on Spec-Bench with a chain. We implement the shared first
    blocks, the adapter with its own cache (here a whole block; the paper's has no FFN) and the confidence
    threshold.
    """

    def __init__(self, backbone: Backbone, module: KangarooBlock):
        self.backbone, self.threshold = backbone, module.config.threshold
        self.exit = self.learns = module.config.exit

        def body(layer_cache, h):
            logits = backbone.unembed(module(h, create_attention_mask(h, layer_cache), layer_cache)[:, -1:])
            return logits, confidence(logits)

        self.own = OwnPass(module, module.block.self_attn, body)

    def begin(self, prompt, capacity):
        self.own.begin(capacity)
        self.states = None  # h_E of the tokens verified last

    def learn(self, states):
        self.states = states

    def __call__(self, text, drafts, sampler, cache):
        self.own.crop(len(text) - 1)
        # accepted drafts are already in the block's cache; missing are the prompt and, if all drafts
        # were accepted, the last one
        missing = len(text) - 1 - self.own.offset
        unread = [self.states[:, -missing:]] if missing else []
        draft, token = Draft(), as_row(text[-1])
        while len(draft.tokens) < drafts:
            h = self.backbone.run(self.backbone.embed(token), cache, 0, self.exit)
            draft.states.append(h)
            logits, sure = self.own(mx.concatenate([*unread, h], axis=1))
            if draft.tokens and sure.item() < self.threshold:
                break
            token, unread = draft.take(logits, sampler), []
        return draft
