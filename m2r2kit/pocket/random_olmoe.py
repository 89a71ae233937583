"""An `olmoe` with random weights of any size, to measure the memory and time of a real model of that size.

It is written one tensor or expert at a time, with little memory. Its text is noise; its expert load is
realistically uneven. All hidden states share a direction c: embeddings contain it, the residual stream keeps
it, and each expert's row of a router has a component along it:

    w_e = n_e + (skew ln p_e / x.c) c        n_e  random, orthogonal to c: depends on the token
                                             p_e  1 / rank, with shuffled ranks in each block
                                             x.c  the component of a normalised state along c

An expert's logit is a random part that depends on the token, plus skew ln p_e.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common import UserError
from .new_model import new_model

BRANCH = 0.12  # mean square that a block's attention, and its experts, each add to the hidden state, about


@dataclass(frozen=True)
class LargeConfig:
    """Settings. `width` is also the width of an expert. With `skew` 0.3 the busier half of a block's experts
    serves about 80 % of the accesses (75 % are reported for OLMoE-1B-7B)."""

    width: int = 512
    experts: int = 128
    blocks: int = 12
    heads: int = 8
    top: int = 4
    vocabulary: int = 4096
    context: int = 512
    skew: float = 0.3
    seed: int = 0

    @property
    def expert_bytes(self) -> int:
        return 3 * self.width * self.width * 4

    @property
    def total_bytes(self) -> int:
        return sum(4 * math.prod(shape) for _, shape in shapes(self))


def sized(nbytes: int, **settings) -> LargeConfig:
    """The settings of a model with just enough experts for `nbytes` bytes.

    Raises:
        UserError: this needs fewer experts than run per token, or more than 1024 per block.
    """
    none = LargeConfig(**settings, experts=0)
    each = none.blocks * (none.expert_bytes + 4 * none.width)  # with its row of the router
    experts = -(-(nbytes - none.total_bytes) // each)
    if not none.top <= experts <= 1024:
        least, most = (none.total_bytes + n * each for n in (none.top, 1024))
        raise UserError(
            f"With width {none.width} a model has {least / 1e6:.0f} to {most / 1e6:.0f} MB, not "
            f"{nbytes / 1e6:.0f}; change --size or --width."
        )
    return LargeConfig(**settings, experts=experts)


def hf_config(config: LargeConfig) -> dict:
    """The `config.json` of the model."""
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_size": config.width,
        "num_hidden_layers": config.blocks,
        "intermediate_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "num_experts": config.experts,
        "num_experts_per_tok": config.top,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }


def shapes(config: LargeConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors, in file order."""
    D, E, V = config.width, config.experts, config.vocabulary
    yield "model.embed_tokens.weight", (V, D)
    for l in range(config.blocks):
        at = f"model.layers.{l}."
        for name in ("q_norm", "k_norm"):
            yield f"{at}self_attn.{name}.weight", (D,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{name}.weight", (D,)
        for name in "qkvo":
            yield f"{at}self_attn.{name}_proj.weight", (D, D)
        yield f"{at}mlp.gate.weight", (E, D)
        for name in ("gate", "up", "down"):
            yield f"{at}mlp.switch_mlp.{name}_proj.weight", (E, D, D)
    yield "model.norm.weight", (D,)
    yield "lm_head.weight", (V, D)


def parts(name: str, shape: tuple[int, ...], config: LargeConfig, number: int) -> Iterator[np.ndarray]:
    """A tensor in pieces, float32: expert stacks one expert at a time, others whole."""
    rng, D = np.random.default_rng([config.seed, number]), config.width
    c = np.random.default_rng(config.seed).standard_normal(D).astype(np.float32)
    c *= math.sqrt(D) / np.linalg.norm(c)  # the norm of the random part of an embedding
    if len(shape) == 3:  # a larger `down` compensates for SwiGLU's small outputs
        scale = (2 if "down" in name else 1) / math.sqrt(D)
        for _ in range(shape[0]):
            yield rng.standard_normal(shape[1:], np.float32) * np.float32(scale)
        return
    if len(shape) == 1:
        yield np.ones(shape, np.float32)
        return
    w = rng.standard_normal(shape, np.float32)
    if "embed" in name:
        yield w + c
        return
    if "o_proj" not in name:
        w -= np.outer(w @ c, c) / np.float32(D)
    if "mlp.gate" in name:
        l = int(name.split(".")[2])
        energy = 2 + (2 * l + 1) * BRANCH  # mean square of the state before normalization
        bias = config.skew * np.log(1 / (1 + rng.permutation(shape[0])))
        yield w / np.float32(math.sqrt(D)) + (bias[:, None] * c * math.sqrt(energy) / D).astype(np.float32)
    else:
        yield w / np.float32(math.sqrt(D))


def write(config: LargeConfig, out: Path, tokenizer: Path, report: Callable | None = None) -> None:
    """Write the model to `out`, whole or not at all.

    Args:
        tokenizer: a model's folder, whose tokenizer is copied.
        report: called with the number of bytes of each piece after it is written.

    Raises:
        UserError: `out` exists, there is no such tokenizer, or the disk is too small or fails.
    """
    with new_model(out, config.total_bytes, tokenizer) as folder:
        (folder / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n")
        with (folder / "model.safetensors").open("wb") as file:
            file.write(_header(config))
            for number, (name, shape) in enumerate(shapes(config), 1):
                for piece in parts(name, shape, config, number):
                    file.write(piece.tobytes())
                    if report:
                        report(piece.nbytes)


def _header(config: LargeConfig) -> bytes:
    """The header of the safetensors file: its length and the offsets of each tensor."""
    found, offset = {"__metadata__": {"format": "mlx"}}, 0
    for name, shape in shapes(config):
        end = offset + 4 * math.prod(shape)
        found[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(found).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
