"""From a name to a loaded model: its folder or repository, its weights, and their hash."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..common import UserError
from .families import check_served

DECODED = 2 << 30  # bytes of the largest model in float32 whose quantised weights a CPU decodes


def load(
    path_or_repo: str | Path,
    dtype: mx.Dtype | None = None,
    take_out: Callable | None = None,
    sha256: Callable | None = None,
    decode: bool | None = None,
) -> tuple[nn.Module, object, dict, str]:
    """Load a Hugging Face folder or repository with mlx-lm: (model, tokenizer, config, sha256).

    Args:
        dtype: arithmetic of the weights; by default float32 on a CPU, as stored elsewhere.
        take_out: called with the model before its weights are read; what it takes out of the
            model is never read.
        sha256: folder -> the hash of its weights; by default `weights_sha256`, which reads them all.
        decode: whether quantised weights become ordinary ones (`decoded`); by default on a CPU, where
            quantised products are no faster, if the model takes at most `DECODED` bytes in float32.

    Raises:
        UserError: the folder is missing, incomplete, or of a family that is not served.
    """
    folder = model_folder(path_or_repo)
    from mlx_lm import utils  # imports transformers: seconds that `--help` should not cost

    try:
        model, config = utils.load_model(folder, lazy=True)
        tokenizer = utils.load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        if decode is None:  # of the whole model: with and without its experts it computes the same
            decode = on_cpu and 4 * utils.get_total_parameters(model) <= DECODED
        if dtype is None and on_cpu:
            dtype = mx.float32
        if decode:
            decoded(model, dtype)
        elif dtype is not None:
            model.set_dtype(dtype)
        if take_out:
            take_out(model)  # nothing is read or converted before the next line
        mx.eval(model.parameters())
    except Exception as error:  # mlx-lm raises whatever its parts raise; the user needs one sentence
        reason = str(error).splitlines()[0].rstrip(":. ") if str(error) else type(error).__name__
        raise UserError(
            f"{path_or_repo} cannot be loaded ({reason}); copy the folder again, whole."
        ) from error
    return model, tokenizer, config, (sha256 or weights_sha256)(folder)


def decoded(model: nn.Module, dtype: mx.Dtype | None = None) -> nn.Module:
    """The model in place, with ordinary weights where it had quantised ones: the numbers that the quantised
    products multiply by. Lazy.

    Args:
        dtype: of all weights; by default that of the scales.
    """
    from mlx_lm.utils import dequantize_model

    if dtype is not None:
        model.set_dtype(dtype)  # scales and biases too, so that nothing is rounded a second time
    dequantize_model(model)
    if dtype is not None:
        model.set_dtype(dtype)  # formats whose scales are integers decode to bfloat16, exactly
    return model


# --- hashes -------------------------------------------------------------------------------


def weights_sha256(folder: Path) -> str:
    """One hash of a model's weight files: what a trained stream is bound to."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def parameters_sha256(model: nn.Module) -> str:
    """One hash of a model's parameters: names, shapes and values, whatever the files they came from.

    Floats are widened to float32 first, which changes no value: a model in bfloat16 and the same model
    in float32 have one hash.
    """
    digest = hashlib.sha256()
    for name, w in sorted(tree_flatten(model.parameters())):
        w = w.astype(mx.float32) if mx.issubdtype(w.dtype, mx.floating) else w
        digest.update(f"{name} {w.dtype} {w.shape}\n".encode())
        digest.update(memoryview(np.ascontiguousarray(w)).cast("B") if w.size else b"")
    return digest.hexdigest()


# --- model objects --------------------------------------------------------------------------


def object_sha256(model: nn.Module, tokenizer) -> str:
    """The hash of a model that `mlx_lm.load` returned.

    If the folder that the tokenizer came from holds exactly these weights (in any float type that they were
    converted to), it is `weights_sha256` of that folder, so what was trained for the folder fits the object.
    Otherwise (a changed or fused model, an adapter) it is `parameters_sha256`. Both read all weights.
    """
    folder = _source(tokenizer)
    if folder and _holds(folder, model):
        return weights_sha256(folder)
    return parameters_sha256(model)


def object_config(model: nn.Module, tokenizer) -> dict:
    """The config of a model object: its `args`, and from its folder's config.json what they leave out."""
    args = getattr(model, "args", None)
    if args is None:
        raise UserError("This is not a language model of mlx-lm; give what `mlx_lm.load` returns.")
    folder, config = _source(tokenizer), {}
    if folder and (folder / "config.json").exists():
        config = _json(folder / "config.json")
        if config.get("model_type") != args.model_type:
            config = {}  # the tokenizer of another model
    return config | {k: v for k, v in asdict(args).items() if v is not None}


def _source(tokenizer) -> Path | None:
    """The folder that a tokenizer was read from."""
    name = getattr(tokenizer, "name_or_path", None)
    return Path(name) if name and Path(name).is_dir() else None


def _holds(folder: Path, model: nn.Module) -> bool:
    """Whether a folder's weights are exactly those of a model object."""
    from mlx_lm import utils

    try:
        stored, _ = utils.load_model(folder, lazy=True)
    except Exception:
        return False  # no model there, or another one
    wanted, found = dict(tree_flatten(model.parameters())), dict(tree_flatten(stored.parameters()))
    if wanted.keys() != found.keys():  # `load` may have decoded the model
        found = dict(tree_flatten(decoded(stored, mx.float32).parameters()))
    del stored
    if {k: w.shape for k, w in wanted.items()} != {k: w.shape for k, w in found.items()}:
        return False
    # one tensor after the other, so that two whole models are never in memory
    return all(
        mx.array_equal(w, found.pop(name).astype(w.dtype), equal_nan=True) for name, w in wanted.items()
    )


# --- folders --------------------------------------------------------------------------------


def model_folder(path_or_repo: str | Path) -> Path:
    """The folder of a model, complete as far as can be seen without loading it."""
    folder = Path(path_or_repo)
    if not folder.exists():
        name = str(path_or_repo)
        if name.count("/") != 1 or name.startswith((".", "/", "~", "data/")):
            raise UserError(f"There is no model folder {name}; give a folder or a Hugging Face repository.")
        from mlx_lm.utils import _download

        try:
            folder = Path(_download(name))
        except Exception as error:
            raise UserError(f"There is no folder {name}, and fetching it as a repository failed.") from error
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json; copy the model's folder again, whole.")
    check_served(_json(folder / "config.json"))  # before gigabytes are read
    if not list(folder.glob("model*.safetensors")):
        raise UserError(f"{folder} has no model*.safetensors; copy the model's folder again, whole.")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = set(_json(index).get("weight_map", {}).values())
        if missing := sorted(n for n in named if not (folder / n).exists()):
            raise UserError(f"{folder} lacks {missing[0]}; copy the model's folder again, whole.")
    return folder


def _json(path: Path) -> dict:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):  # no JSON, or not even text
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not valid JSON; copy the model's folder again, whole.")
    return value
