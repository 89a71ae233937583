"""A small `llama` for training: its settings, weights and loss, and growth in depth.

It computes what `mlx_lm.models.llama` computes, from weights of the same names (a test holds the
two together); it is written again on `numerics.py`, which makes training on a CPU 3-5x faster.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models import llama

from ..common import UserError
from ..model.cpu.fast_math import attention_weights, cross_entropy, swiglu


@dataclass
class PretrainConfig:
    """Settings of `train backbone`. Those that made `data/pocket-dense` are in its record (`pretrain`)."""

    type: str = "llama"  # mlx-lm's model type
    blocks: int = 24
    width: int = 160
    heads: int = 4
    kv_heads: int = 2
    ffn_width: int = 320
    vocabulary: int = 4096
    context: int = 512
    tokens: int = 15_000_000
    batch_tokens: int = 4096
    window: int = 256  # tokens of one training window, once grown
    grow_from: int = 8  # blocks at the start; equal to `blocks` switches growth off
    grow_at: int = 7_500_000  # tokens after which the blocks are stacked
    first_window: int = 128  # window before growing, and until `long_from`
    long_from: int = 0  # tokens after which the windows are long (short ones are a quarter faster)
    muon_rate: float = 0.012
    adam_rate: float = 3e-3
    warmup_tokens: int = 400_000
    decay_share: float = 0.2
    seed: int = 0

    def __post_init__(self):
        for whole, part in (
            ("width", "heads"),
            ("heads", "kv_heads"),
            ("batch_tokens", "window"),
            ("batch_tokens", "first_window"),
            ("blocks", "grow_from"),
        ):
            if getattr(self, part) < 1 or getattr(self, whole) % getattr(self, part):
                raise UserError(f"{whole} must be a multiple of {part}; change one of the two settings")
        if self.width // self.heads % 2:
            raise UserError("width / heads must be even, because positions turn pairs of numbers")


def attend(p: dict, x: mx.array, bias: mx.array, config: PretrainConfig) -> mx.array:
    """A block's attention, with its residual: (B, T, D) -> (B, T, D)."""
    B, T, D = x.shape
    H, K = config.heads, config.kv_heads
    hd = D // H
    attention = p["self_attn"]
    rope = partial(mx.fast.rope, dims=hd, traditional=False, base=10000.0, scale=1.0, offset=0)

    def heads(y, name, n):
        y = y @ attention[f"{name}_proj"]["weight"].T
        if f"{name}_norm" in attention:  # `olmoe` has them, over all heads together
            y = mx.fast.rms_norm(y, attention[f"{name}_norm"]["weight"], 1e-5)
        return y.reshape(B, T, n, hd).transpose(0, 2, 1, 3)  # (B, n, T, hd)

    y = mx.fast.rms_norm(x, p["input_layernorm"]["weight"], 1e-5)
    q = rope(heads(y, "q", H)) * hd**-0.5
    k = rope(heads(y, "k", K))
    v = heads(y, "v", K)
    # query heads of one key head side by side: (B, K, H/K * T, hd)
    e = attention_weights(q.reshape(B, K, H // K * T, hd) @ k.swapaxes(-1, -2), bias)
    # a column of ones beside v sums the weights in the same product
    o = e @ mx.concatenate([v, mx.ones((B, K, T, 1))], -1)
    o = (o[..., :hd] / o[..., hd:]).reshape(B, H, T, hd).transpose(0, 2, 1, 3).reshape(B, T, D)
    return x + o @ attention["o_proj"]["weight"].T


def _block(p: dict, x: mx.array, bias: mx.array, config: PretrainConfig) -> mx.array:
    """One transformer block: (B, T, D) -> (B, T, D)."""
    x, mlp = attend(p, x, bias, config), p["mlp"]
    y = mx.fast.rms_norm(x, p["post_attention_layernorm"]["weight"], 1e-5)
    y = swiglu(y @ mlp["gate_proj"]["weight"].T, y @ mlp["up_proj"]["weight"].T)
    return x + y @ mlp["down_proj"]["weight"].T


def causal_bias(rows: int, length: int, config: PretrainConfig) -> mx.array:
    """0 at and below the diagonal, -1e9 above: (rows, kv heads, H/K * length, length).

    In full, because the compiled kernels read it faster than they broadcast it.
    """
    group = config.heads // config.kv_heads
    bias = mx.where(mx.tri(length) > 0, 0.0, -1e9)
    shape = (rows, config.kv_heads, group, length, length)
    return mx.contiguous(mx.broadcast_to(bias, shape).reshape(rows, config.kv_heads, group * length, length))


def block_states(
    parameters: dict, tokens: mx.array, bias: mx.array, config: PretrainConfig
) -> list[mx.array]:
    """States of a pocket model after each block: (B, T) -> N of (B, T, D)."""
    x, states = parameters["model"]["embed_tokens"]["weight"][tokens], []
    for layer in parameters["model"]["layers"]:
        x = _block(layer, x, bias, config)
        states.append(x)
    return states


def hidden_states(parameters: dict, tokens: mx.array, bias: mx.array, config: PretrainConfig) -> mx.array:
    """Final normalised states of a pocket model: (B, T) -> (B, T, D)."""
    x = block_states(parameters, tokens, bias, config)[-1]
    return mx.fast.rms_norm(x, parameters["model"]["norm"]["weight"], 1e-5)


def mean_loss(parameters: dict, windows: mx.array, bias: mx.array, config: PretrainConfig) -> mx.array:
    """Mean cross-entropy of predicting each next token, in nats; windows: (B, T + 1)."""
    x = hidden_states(parameters, windows[:, :-1], bias, config)
    embedding = parameters["model"]["embed_tokens"]["weight"]
    return cross_entropy(x.reshape(-1, x.shape[-1]), embedding, windows[:, 1:].reshape(-1)).mean()


def loss(config: PretrainConfig) -> Callable:
    """What `Run` minimises: (parameters, windows (B, T + 1), bias) -> a number, in nats."""
    return lambda parameters, windows, bias: mean_loss(parameters, windows, bias, config)


def hf_config(config: PretrainConfig, blocks: int) -> dict:
    """The `config.json` of a pocket model: a standard `llama`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.width,
        "num_hidden_layers": blocks,
        "intermediate_size": config.ffn_width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.width // config.heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def new_parameters(config: PretrainConfig, blocks: int) -> dict:
    """Random weights in mlx-lm's own tree."""
    mx.random.seed(config.seed)
    model = llama.Model(llama.ModelArgs.from_dict(hf_config(config, blocks)))
    p = model.parameters()
    embedding = p["model"]["embed_tokens"]["weight"]
    p["model"]["embed_tokens"]["weight"] = mx.random.normal(embedding.shape) * 0.02
    for layer in p["model"]["layers"]:  # residual branches start at zero: each block starts as identity
        for part, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
            layer[part][name]["weight"] = mx.zeros_like(layer[part][name]["weight"])
    return p


def grow(parameters: dict, blocks: int) -> dict:
    """Stack copies of the blocks until there are `blocks` (G_stack of arXiv 2405.15319)."""
    layers = parameters["model"]["layers"]
    stacked = [tree_map(mx.array, layers[i % len(layers)]) for i in range(blocks)]
    return {"model": {**parameters["model"], "layers": stacked}}
