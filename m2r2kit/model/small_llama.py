"""A small `llama` for training: its parameters and forward pass.

It computes the same as `mlx_lm.models.llama`, with the same parameter names (a test compares the two). Its
functions from `cpu/fast_math.py` make training on a CPU 3-5x faster.

A `shape` is any settings object with `blocks`, `width`, `heads`, `kv_heads`, `ffn_width`, `vocabulary` and
`context`.
"""

from functools import partial

import mlx.core as mx

from ..common import UserError
from .cpu.fast_math import attention_weights, swiglu
from .mlxlm import llama


def divides(shape, whole: str, part: str) -> None:
    """Refuse a shape in which setting `part` does not divide setting `whole`."""
    if getattr(shape, part) < 1 or getattr(shape, whole) % getattr(shape, part):
        raise UserError(f"{whole} must be a multiple of {part}; change one of the two settings")


def check(shape) -> None:
    """Refuse a shape that is impossible for attention."""
    divides(shape, "width", "heads")
    divides(shape, "heads", "kv_heads")
    if shape.width // shape.heads % 2:
        raise UserError("width / heads must be even, because positions rotate pairs of dimensions")


def attend(p: dict, x: mx.array, bias: mx.array, shape) -> mx.array:
    """A block's attention sub-layer with its residual connection: (B, T, D) -> (B, T, D)."""
    B, T, D = x.shape
    H, K = shape.heads, shape.kv_heads
    hd = D // H
    attention = p["self_attn"]
    rope = partial(mx.fast.rope, dims=hd, traditional=False, base=10000.0, scale=1.0, offset=0)

    def heads(y, name, n):
        y = y @ attention[f"{name}_proj"]["weight"].T
        if f"{name}_norm" in attention:  # in `olmoe`, over all heads together
            y = mx.fast.rms_norm(y, attention[f"{name}_norm"]["weight"], 1e-5)
        return y.reshape(B, T, n, hd).transpose(0, 2, 1, 3)  # (B, n, T, hd)

    y = mx.fast.rms_norm(x, p["input_layernorm"]["weight"], 1e-5)
    q = rope(heads(y, "q", H)) * hd**-0.5
    k = rope(heads(y, "k", K))
    v = heads(y, "v", K)
    # group the query heads that share a key head: (B, K, H/K * T, hd)
    e = attention_weights(q.reshape(B, K, H // K * T, hd) @ k.swapaxes(-1, -2), bias)
    # a column of ones in v sums the weights in the same product
    o = e @ mx.concatenate([v, mx.ones((B, K, T, 1))], -1)
    o = (o[..., :hd] / o[..., hd:]).reshape(B, H, T, hd).transpose(0, 2, 1, 3).reshape(B, T, D)
    return x + o @ attention["o_proj"]["weight"].T


def _block(p: dict, x: mx.array, bias: mx.array, shape) -> mx.array:
    """One transformer block: (B, T, D) -> (B, T, D)."""
    x, mlp = attend(p, x, bias, shape), p["mlp"]
    y = mx.fast.rms_norm(x, p["post_attention_layernorm"]["weight"], 1e-5)
    y = swiglu(y @ mlp["gate_proj"]["weight"].T, y @ mlp["up_proj"]["weight"].T)
    return x + y @ mlp["down_proj"]["weight"].T


def causal_bias(rows: int, length: int, shape) -> mx.array:
    """The causal mask as a bias of 0 and -1e9: (rows, KV heads, H/K * length, length).

    It is not broadcast, because compiled kernels read a full array faster.

    Args:
        rows: sequences of a batch.
    """
    group = shape.heads // shape.kv_heads
    bias = mx.where(mx.tri(length) > 0, 0.0, -1e9)
    bias = mx.broadcast_to(bias, (rows, shape.kv_heads, group, length, length))
    return mx.contiguous(bias.reshape(rows, shape.kv_heads, group * length, length))


def block_states(parameters: dict, tokens: mx.array, bias: mx.array, shape) -> list[mx.array]:
    """The hidden states after each block: (B, T) -> N arrays (B, T, D)."""
    x, states = parameters["model"]["embed_tokens"]["weight"][tokens], []
    for layer in parameters["model"]["layers"]:
        x = _block(layer, x, bias, shape)
        states.append(x)
    return states


def hidden_states(parameters: dict, tokens: mx.array, bias: mx.array, shape) -> mx.array:
    """The final hidden states after the norm: (B, T) -> (B, T, D)."""
    x = block_states(parameters, tokens, bias, shape)[-1]
    return mx.fast.rms_norm(x, parameters["model"]["norm"]["weight"], 1e-5)


def hf_config(shape, blocks: int) -> dict:
    """The config.json of the model, a standard `llama`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.width,
        "num_hidden_layers": blocks,
        "intermediate_size": shape.ffn_width,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.width // shape.heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def new_parameters(shape, blocks: int, seed: int = 0) -> dict:
    """Random parameters in mlx-lm's tree."""
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(hf_config(shape, blocks)))
    p = model.parameters()
    embedding = p["model"]["embed_tokens"]["weight"]
    p["model"]["embed_tokens"]["weight"] = mx.random.normal(embedding.shape) * 0.02
    for layer in p["model"]["layers"]:  # zero residual branches: each block starts as the identity
        for part, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
            layer[part][name]["weight"] = mx.zeros_like(layer[part][name]["weight"])
    return p
