"""Training a small `llama`: settings, loss, and growth in depth."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_map

from ..model import small_llama
from ..model.cpu.fast_math import cross_entropy
from ..model.small_llama import check, divides, hidden_states

hf_config = small_llama.hf_config  # each family of `pretrain.py` has one


@dataclass
class PretrainConfig:
    """Settings of `train backbone`. The record `pretrain` has those of `data/pocket-dense`."""

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
    window: int = 256  # tokens per training sequence, after growth
    grow_from: int = 8  # initial number of blocks; equal to `blocks` disables growth
    grow_at: int = 7_500_000  # tokens after which the depth grows
    first_window: int = 128  # window before growth, and until `long_from`
    long_from: int = 0  # tokens after which `window` applies (short windows are a quarter faster)
    muon_rate: float = 0.012
    adam_rate: float = 3e-3
    warmup_tokens: int = 400_000
    decay_share: float = 0.2
    seed: int = 0

    def __post_init__(self):
        check(self)
        for part in ("window", "first_window"):
            divides(self, "batch_tokens", part)
        divides(self, "blocks", "grow_from")


def mean_loss(parameters: dict, windows: mx.array, bias: mx.array, config: PretrainConfig) -> mx.array:
    """Mean cross-entropy of predicting each next token, in nats; windows: (B, T + 1)."""
    x = hidden_states(parameters, windows[:, :-1], bias, config)
    embedding = parameters["model"]["embed_tokens"]["weight"]
    return cross_entropy(x.reshape(-1, x.shape[-1]), embedding, windows[:, 1:].reshape(-1)).mean()


def loss(config: PretrainConfig) -> Callable:
    """The loss of `Run`: (parameters, windows (B, T + 1), bias) -> scalar, in nats."""
    return lambda parameters, windows, bias: mean_loss(parameters, windows, bias, config)


def new_parameters(config: PretrainConfig, blocks: int) -> dict:
    """Random weights in mlx-lm's parameter tree, seeded by `config.seed`."""
    return small_llama.new_parameters(config, blocks, config.seed)


def grow(parameters: dict, blocks: int) -> dict:
    """Stack copies of the blocks until there are `blocks` (G_stack of arXiv 2405.15319)."""
    layers = parameters["model"]["layers"]
    stacked = [tree_map(mx.array, layers[i % len(layers)]) for i in range(blocks)]
    return {"model": {**parameters["model"], "layers": stacked}}
