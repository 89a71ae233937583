"""DEED: exits at several depths, each with an adapter; a token with low confidence goes on to the next
exit.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...common import UserError
from ...model.backbone import Backbone, crop
from ...model.compiled import lean_pass
from ...stream.distil import DistilConfig, TeacherBatch, divergence
from ...stream.fast_block import SmallFFN
from .base import Draft, Drafter, as_row, check_exit, confidence


@dataclass(frozen=True)
class DeedConfig:
    """Settings of a DEED drafter.

    Attributes:
        exits: depths at which a token may be drafted.
        hidden: hidden width of each adapter.
        threshold: probability of the first choice at which a token is drafted; the last exit always drafts.
    """

    exits: tuple[int, ...] = (2, 4, 6)
    hidden: int = 320
    threshold: float = 0.6

    @classmethod
    def for_model(cls, backbone: Backbone, exit: int | None = None) -> "DeedConfig":
        E = exit or cls.exits[0]
        exits = tuple(e for e in (E, 2 * E, 3 * E) if e < backbone.depth) or (E,)
        return cls(exits, 2 * backbone.width)


class DeedExits(nn.Module):
    """A small residual layer at each exit; at initialisation they change nothing."""

    def __init__(self, backbone: Backbone, config: DeedConfig):
        super().__init__()
        if not config.exits or list(config.exits) != sorted(set(config.exits)):
            raise UserError(f"Exits must increase; got {config.exits}.")
        for exit in config.exits:
            check_exit(backbone, exit)
        self.config, self._backbone = config, backbone
        self.adapters = [SmallFFN(backbone.width, config.hidden) for _ in config.exits]

    @property
    def depths(self) -> set[int]:
        """Depths of the model's states that the loss reads."""
        return {*self.config.exits, self._backbone.depth}

    def __call__(self, h: mx.array, j: int) -> mx.array:
        """The state that the head reads at exit j: h_E (B, T, D) -> (B, T, D)."""
        return h + self.adapters[j](h)

    def loss(self, batch: TeacherBatch, settings: DistilConfig, rng: np.random.Generator) -> mx.array:
        """KL from the model's next-token distribution, averaged over the exits (deep supervision)."""
        backbone, exits = self._backbone, self.config.exits
        final = batch.states[backbone.depth]
        guesses = [self(batch.states[exit], j) for j, exit in enumerate(exits)]
        return sum(divergence(backbone, each, final, settings, rng) for each in guesses) / len(exits)


class Deed(Drafter):
    """Drafts each token at the first exit that is confident.

    DEED (arXiv 2311.08623) reports 30-60 % less latency for encoder-decoder models that exit early and
    change their output. We infer from the name that the M2R2 paper means this method. We implement its
    adapters before a shared head, its deep supervision, its confidence rule and its just-in-time computation
    of earlier tokens' deeper states. New here is the verification, which keeps the output unchanged.
    """

    def __init__(self, backbone: Backbone, module: DeedExits):
        mx.eval(module.parameters())
        self.backbone, self.exits, self.leaves = backbone, module.config.exits, module.config.threshold
        self.exit = self.exits[0]

        def reader(j):
            def read(h):
                with lean_pass():
                    logits = backbone.head(module(h, j))
                    return logits, confidence(logits)

            return mx.compile(read)

        self.readers = [reader(j) for j in range(len(self.exits))]

    def __call__(self, text, drafts, sampler, cache):
        draft, token = Draft(), as_row(text[-1])
        waiting: list[list[mx.array]] = [[] for _ in self.exits]  # states of tokens that left at each exit
        for _ in range(drafts):
            h = self.backbone.run(self.backbone.embed(token), cache, 0, self.exit)
            draft.states.append(h)
            waiting[0].append(h)
            logits, sure = self.readers[0](h)
            for j in range(1, len(self.exits)):
                if sure.item() >= self.leaves:
                    break
                # earlier tokens that left here run along, because this token attends to them
                h = mx.concatenate(waiting[j - 1], axis=1)
                waiting[j - 1] = []
                h = self.backbone.run(h, cache, self.exits[j - 1], self.exits[j])
                waiting[j].append(h)
                logits, sure = self.readers[j](h[:, -1:])
            token = draft.take(logits, sampler)
        crop(cache[self.exit :], len(text) - 1)  # verification resumes at the first exit
        return draft
