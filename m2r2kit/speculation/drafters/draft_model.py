"""A separate draft model: a small llama drafts for the large model."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ...common import UserError
from ...model.backbone import Backbone, crop
from ...model.cache import FEW
from ...model.mlxlm import llama
from ...model.small_llama import causal_bias, check, hf_config, hidden_states, new_parameters
from ...stream.distil import DistilConfig, TeacherBatch, divergence
from .base import Draft, Drafter


@dataclass(frozen=True)
class DraftModelConfig:
    """Shape of a draft model."""

    blocks: int = 2
    width: int = 104
    heads: int = 4
    kv_heads: int = 2
    ffn_width: int = 208
    vocabulary: int = 4096
    context: int = 512

    @classmethod
    def for_model(cls, backbone: Backbone, exit: int | None = None) -> "DraftModelConfig":
        """About a tenth of the model's parameters, in few wide blocks, because each block costs
        operations.
        """
        tenth = sum(w.size for _, w in tree_flatten(backbone.model.parameters())) / 10
        V, blocks = backbone.config["vocab_size"], max(2, backbone.depth // 12)
        width = 8
        while V * (width + 8) + blocks * 9 * (width + 8) ** 2 <= tenth:  # parameters of these shapes
            width += 8
        return cls(blocks, width, 4, 2, 2 * width, V, backbone.context)


class DraftModel(nn.Module):
    """A small llama, distilled from the large model."""

    def __init__(self, backbone: Backbone, config: DraftModelConfig):
        super().__init__()
        if config.vocabulary != backbone.config["vocab_size"]:
            raise UserError(
                f"The draft model has {config.vocabulary} tokens and the model "
                f"{backbone.config['vocab_size']}; both must use the same tokenizer."
            )
        self.config, self._backbone = config, backbone
        check(config)
        self._hf = hf_config(config, config.blocks)
        self.llama = llama.Model(llama.ModelArgs.from_dict(self._hf))
        self.llama.update(new_parameters(config, config.blocks))

    @property
    def depths(self) -> set[int]:
        """Depths of the model's states that the loss reads."""
        return {self._backbone.depth}

    def loss(self, batch: TeacherBatch, settings: DistilConfig, rng: np.random.Generator) -> mx.array:
        """KL from the model's next-token distribution."""
        bias = causal_bias(*batch.tokens.shape, self.config)
        p = self.llama.parameters()
        x = hidden_states(p, batch.tokens, bias, self.config)
        final = batch.states[self._backbone.depth]
        return divergence(
            self._backbone, x, final, settings, rng, lambda x: x @ p["model"]["embed_tokens"]["weight"].T
        )


class TwoModels(Drafter):
    """Drafts with the small model, token by token.

    Speculative decoding with two models (arXiv 2211.17192, 2302.01318) is the usual baseline; Spec-Bench
    (arXiv 2401.07851) measured 1.66x on MT-Bench for a 7B model with a 68M draft model. We implement all of
    it, with a draft model distilled from the large one.
    """

    def __init__(self, backbone: Backbone, module: DraftModel):
        mx.eval(module.parameters())
        self.small = Backbone(module.llama, backbone.tokenizer, module._hf, backbone.sha256)

    def begin(self, prompt, capacity):
        self.cache = self.small.new_cache(capacity)

    def __call__(self, text, drafts, sampler, cache):
        crop(self.cache, len(text) - 1)
        # unread: at first the prompt, later the pending token and, if all were accepted, the last draft
        draft, token = Draft(), mx.array([text[self.cache[0].offset :]])
        if token.shape[1] > FEW:  # a prompt: logits of its last token only
            self.small.run(self.small.embed(token[:, :-1]), self.cache)
            token = token[:, -1:]
        for _ in range(drafts):
            token = draft.take(self.small.logits(token, self.cache)[:, -1:], sampler)
        return draft
