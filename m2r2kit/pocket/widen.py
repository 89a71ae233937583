"""Widen the experts of a mixture: the same function with larger experts.

Each neuron of an expert is copied k times, and each copy contributes 1/k (Net2WiderNet, arXiv 1511.05641):

    gate, up (F, D) -> (k F, D)     all rows k times
    down     (D, F) -> (D, k F)     all columns k times, divided by k

Everything else, routers included, is unchanged, so the same experts run for the same text and trained
predictors stay valid, but an expert's record has k times the bytes. This isolates the effect of the bytes
read per token on prefetching, in a trained model.
"""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from ..common import UserError, parse_json
from .new_model import new_model

WEIGHTS = "model.safetensors"


def write(model: Path, out: Path, k: int, also: Callable[[Path], None] | None = None) -> int:
    """Write the widened model and return the bytes of one expert in float32.

    Args:
        model: folder of the model. k: factor.
        also: called with the temporary folder, to write more files into it before it is renamed to `out`.

    Raises:
        UserError: the model has no experts of this kind, or `out` cannot be written.
    """
    config, weights = read(model)
    wide = widened(weights, k)
    with new_model(out, sum(w.nbytes for w in wide.values()), model) as partial:
        mx.save_safetensors(str(partial / WEIGHTS), wide, metadata={"format": "mlx"})
        config["intermediate_size"] *= k
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if also:
            also(partial)
    return 3 * 4 * config["hidden_size"] * config["intermediate_size"]


def read(model: Path) -> tuple[dict, dict[str, mx.array]]:
    """The config and weights of a model that can be widened.

    Raises:
        UserError: the model cannot be read or cannot be widened.
    """
    try:
        config = parse_json((model / "config.json").read_text())
        weights = mx.load(str(model / WEIGHTS))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{model} cannot be read as a model ({error}); give the folder of one.") from error
    floats = all(w.dtype != mx.uint8 for w in weights.values())  # integer scales cannot be divided
    if config.get("model_type") != "olmoe" or not floats or not any(map(is_expert, weights)):
        raise UserError(f"{model} cannot be widened; give an `olmoe` model of `m2r2kit train backbone`.")
    return config, weights


def is_expert(name: str) -> bool:
    """Whether a tensor belongs to the experts of a block."""
    return ".switch_mlp." in name


def widened(weights: dict[str, mx.array], k: int) -> dict[str, mx.array]:
    """The tensors with experts k times as wide. Quantized weights stay quantized: whole groups are repeated,
    and their scales and biases are divided."""

    def wider(name: str, w: mx.array) -> mx.array:
        if not is_expert(name):
            return w
        if "down_proj" in name:
            share = w if w.dtype == mx.uint32 else (w.astype(mx.float32) / k).astype(w.dtype)
            return mx.concatenate([share] * k, axis=-1)
        return mx.concatenate([w] * k, axis=-2)

    return {name: wider(name, w) for name, w in weights.items()}
