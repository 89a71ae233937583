"""Medusa: heads that each predict one position further ahead, from one state."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...model.backbone import Backbone
from ...model.compiled import lean_pass
from ...stream.distil import DistilConfig, TeacherBatch, divergence
from .base import Draft, Drafter


@dataclass(frozen=True)
class MedusaConfig:
    """Settings of Medusa heads.

    Attributes:
        heads: number of tokens that can be drafted.
        decay: weight of each head's loss relative to the previous head's.
    """

    heads: int = 5
    decay: float = 0.8

    @classmethod
    def for_model(cls, backbone: Backbone, exit: int | None = None) -> "MedusaConfig":
        return cls()


class MedusaHeads(nn.Module):
    """Head k predicts the token k + 1 positions after the next one from h_N: H(x + silu(x W_k + b_k))
    with x = nu(h_N). At initialisation every head predicts the model's next token.
    """

    def __init__(self, backbone: Backbone, config: MedusaConfig):
        super().__init__()
        D = backbone.width
        self.config, self._backbone = config, backbone
        self.matrices = mx.zeros((config.heads, D, D))
        self.biases = mx.zeros((config.heads, 1, D))

    @property
    def depths(self) -> set[int]:
        """Depths of the model's states that the loss reads."""
        return {self._backbone.depth}

    def __call__(self, h: mx.array) -> mx.array:
        """The states of all heads after one token: (1, 1, D) -> normalised, (1, K, D)."""
        x = self._backbone.norm(h)
        return (x + nn.silu(x @ self.matrices + self.biases)).reshape(1, -1, x.shape[-1])

    def loss(self, batch: TeacherBatch, settings: DistilConfig, rng: np.random.Generator) -> mx.array:
        """Weighted mean over the heads of the KL from the model's distribution at the head's position."""
        h = batch.states[self._backbone.depth]
        x, total, weights = self._backbone.norm(h), 0.0, 0.0
        for k in range(self.config.heads):
            here, weight = x[:, : -k - 1], self.config.decay**k
            y = here + nn.silu(here @ self.matrices[k] + self.biases[k])
            off = divergence(self._backbone, y, h[:, k + 1 :], settings, rng, self._backbone.unembed)
            total = total + weight * off
            weights += weight
        return total / weights


class Medusa(Drafter):
    """Drafts all tokens at once from the last verified token's state.

    Medusa (arXiv 2401.10774) reports over 2.2x with frozen models (Medusa-1) and 2.3-3.6x with trained ones.
    We implement Medusa-1, with heads of one residual layer that share the model's matrix H, and a chain of
    each head's first choice instead of a tree. Its typical acceptance is left out, because it changes the
    output.
    """

    def __init__(self, backbone: Backbone, module: MedusaHeads):
        mx.eval(module.parameters())
        self.learns = backbone.depth

        def logits(h):
            with lean_pass():
                return backbone.unembed(module(h))  # (1, K, V)

        self.logits = mx.compile(logits)

    def begin(self, prompt, capacity):
        self.last = None

    def learn(self, states):
        self.last = states[:, -1:]

    def __call__(self, text, drafts, sampler, cache):
        draft = Draft()
        if self.last is not None:  # a text of one token: the model has no states yet
            logits = self.logits(self.last)
            for k in range(min(drafts, logits.shape[1])):
                draft.take(logits[:, k : k + 1], sampler)
        return draft
