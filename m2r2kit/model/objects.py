"""The config and the hash of a model that `mlx_lm.load` returned."""

from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..common import UserError
from .config import translate
from .families import check_supported
from .folder import read_config, read_json
from .hashes import parameters_sha256, weights_sha256
from .load import decoded, read_model


def object_sha256(model: nn.Module, tokenizer) -> str:
    """The hash of a model that `mlx_lm.load` returned.

    If the tokenizer's folder has exactly these weights (possibly converted to another float type), it is
    `weights_sha256` of the folder, so modules trained for the folder fit the object. Otherwise (a changed or
    fused model, an adapter) it is `parameters_sha256`. Both read all weights.
    """
    folder = _source(tokenizer)
    if folder and _holds(folder, model):
        return weights_sha256(folder)
    return parameters_sha256(model)


def object_config(model: nn.Module, tokenizer) -> dict:
    """The config of a model object: its `args`, and its folder's config.json for the keys that they lack.

    Raises:
        UserError: it is not a model of mlx-lm, or mlx-lm has misread its config.json.
    """
    args = getattr(model, "args", None)
    if args is None:
        raise UserError("This is not an mlx-lm language model; give what `mlx_lm.load` returns.")
    folder, config, own = _source(tokenizer), {}, asdict(args)
    if folder and (folder / "config.json").exists():
        config = read_json(folder / "config.json")
        if config.get("model_type") != args.model_type:
            config = {}  # the tokenizer of another model
        else:
            _check_read(own, read_config(folder))
    return own | config | {k: v for k, v in own.items() if v is not None}


def _check_read(own: dict, config: dict) -> None:
    """Refuse a model object whose rotary positions or head differ from its config.json."""
    right, found = translate(config), translate(own)
    for name in ("rope_theta", "rope_scaling", "partial_rotary_factor", "tie_word_embeddings"):
        if name in own and right.get(name) != found.get(name):
            raise UserError(
                f"mlx-lm reads {name} of this model as {found.get(name)}, but its config.json means "
                f"{right.get(name)}; load it with `m2r2kit.load`, which reads it correctly."
            )


def _source(tokenizer) -> Path | None:
    """The folder that a tokenizer was loaded from, or None."""
    name = getattr(tokenizer, "name_or_path", None)
    return Path(name) if name and Path(name).is_dir() else None


def _holds(folder: Path, model: nn.Module) -> bool:
    """Whether a folder's weights are exactly those of a model object."""
    try:
        check_supported(read_json(folder / "config.json"))
        stored, _ = read_model(folder)
    except UserError:
        return False  # no model, or another one
    wanted, found = dict(tree_flatten(model.parameters())), dict(tree_flatten(stored.parameters()))
    if wanted.keys() != found.keys():  # `load` may have dequantised the model
        found = dict(tree_flatten(decoded(stored, mx.float32).parameters()))
    del stored
    if {k: w.shape for k, w in wanted.items()} != {k: w.shape for k, w in found.items()}:
        return False
    # one tensor at a time, so that two complete models are never in memory
    return all(
        mx.array_equal(w, found.pop(name).astype(w.dtype), equal_nan=True) for name, w in wanted.items()
    )
