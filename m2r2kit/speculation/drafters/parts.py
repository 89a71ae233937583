"""Building blocks for trained drafters: a transformer block, and a compiled pass with its own KV cache."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ...model.backbone import Backbone, crop
from ...model.cache import FEW, FixedKV, Traced, chunks, round_up
from ...model.mlxlm import llama
from ...model.view import private
from ...stream.fast_block import head_dim


def new_block(backbone: Backbone) -> llama.TransformerBlock:
    """A llama block with the shapes of the model's blocks; before training it changes nothing."""
    config = backbone.config
    heads = config["num_attention_heads"]
    block = llama.TransformerBlock(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=backbone.width,
            num_hidden_layers=1,
            intermediate_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads", heads),
            head_dim=head_dim(backbone),
            rms_norm_eps=config.get("rms_norm_eps", 1e-5),
            rope_theta=config.get("rope_theta", 10000.0),
            vocab_size=config["vocab_size"],
        )
    )
    for last in (block.self_attn.o_proj, block.mlp.down_proj):
        last.weight = mx.zeros_like(last.weight)
    return private(block)


class OwnPass:
    """A pass of a trained module through one attention with its own keys and values.

    Like the model's passes it is compiled for few positions. It uses the weights at construction: make a new
    one after more training.

    Args:
        module: the module whose weights the pass reads.
        attention: the module's attention, as in mlx-lm's llama.
        body: (layer_cache, x (1, T, ..), *more) -> arrays of the newest position; `more` has T positions too.
    """

    def __init__(self, module: nn.Module, attention: nn.Module, body: Callable):
        mx.eval(module.parameters())  # lazy weights would be recomputed in each pass
        self.shape = attention.n_kv_heads, attention.head_dim
        self.body = body
        self.traced = Traced(lambda caches, *x: body(caches[0], *x), 1, range(1))
        self.cache: list[FixedKV] = []

    def begin(self, capacity: int) -> None:
        """Start a new text with an empty cache."""
        heads, width = self.shape
        keys, values = (mx.zeros((1, heads, round_up(capacity), width)) for _ in range(2))
        self.cache = [FixedKV(keys, values)]

    @property
    def offset(self) -> int:
        """Number of positions in the cache."""
        return self.cache[0].offset

    def crop(self, length: int) -> None:
        """Drop the positions from `length` on."""
        crop(self.cache, length)

    def __call__(self, x: mx.array, *more: mx.array):
        if x.shape[1] <= FEW:
            return self.traced(self.cache, x, *more)
        for part in zip(*map(chunks, (x, *more)), strict=True):
            out = self.body(self.cache[0], *part)
            mx.eval(out, self.cache[0].keys, self.cache[0].values)
        return out  # of the newest positions
