"""Loads a model by name: its folder (`folder.py`), config (`config.py`), weights, tokenizer and hash
(`hashes.py`)."""

import os
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn

from ..common import UserError, in_short
from .config import WINDOW, translate
from .cpu import threads
from .folder import ADAPTER, model_folder, read_config, read_json, tensor_names, weight_files
from .hashes import parameters_sha256, weights_sha256

DECODED = 2 << 30  # the most bytes in float32 of a model that is dequantised on a CPU


def load(
    path_or_repo: str | Path,
    dtype: mx.Dtype | None = None,
    take_out: Callable | None = None,
    sha256: Callable | None = None,
    decode: bool | None = None,
    adapter: str | Path | None = None,
) -> tuple[nn.Module, object, dict, str]:
    """Load a Hugging Face folder or repository with mlx-lm: (model, tokenizer, config, sha256).

    Args:
        path_or_repo: a folder or repository, or the folder of an adapter, whose model is loaded with it.
        dtype: of the weights; by default float32 on a CPU, and as stored elsewhere.
        take_out: called with the model before its weights are read; weights that it removes are never read.
        sha256: folder -> the hash of its weights; by default `weights_sha256`, which reads all files.
        decode: whether to dequantise the weights (`decoded`). Default: on a CPU, where quantised products are
            not faster, for a model of at most `DECODED` bytes in float32 without an adapter.
        adapter: folder of a LoRA adapter that `mlx_lm.lora` wrote; the hash is then `parameters_sha256` of
            the model with the adapter.

    Raises:
        UserError: the folder is missing, incomplete or damaged, the model needs custom code, or its family or
            variant is not supported.
    """
    if adapter is None and (Path(path_or_repo) / ADAPTER[0]).exists():
        adapter, path_or_repo = path_or_repo, base_of(path_or_repo)
    folder = model_folder(path_or_repo)
    if adapter:
        check_adapter(adapter)
    threads.prepare()  # before MLX starts threads of its own
    from .mlxlm import utils  # here, because it imports transformers, which takes seconds

    model, config = read_model(folder)
    tokenizer = read_tokenizer(folder, config)
    if adapter:
        put_adapter(model, adapter)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if decode is None:  # by the complete model's size, so that it is computed alike with experts on disk
        decode = on_cpu and not adapter and 4 * utils.get_total_parameters(model) <= DECODED
    if dtype is None and on_cpu:
        dtype = mx.float32
    with _reading(folder):
        if decode:
            decoded(model, dtype)
        elif dtype is not None:
            model.set_dtype(dtype)
        if take_out:
            take_out(model)  # weights are lazy: the next line reads and converts them
        mx.eval(model.parameters())
    if adapter:
        return model, tokenizer, config, parameters_sha256(model)
    return model, tokenizer, config, (sha256 or weights_sha256)(folder)


# --- models ---------------------------------------------------------------------------------


def read_model(folder: Path) -> tuple[nn.Module, dict]:
    """A folder's model with lazy weights, and its translated config.

    Raises:
        UserError: the config is not of a supported model, or the weights do not fit it.
    """
    from .mlxlm import utils

    tensor_names(folder)  # refuses damaged headers and duplicate tensors
    config = read_config(folder)
    translated = _building(folder, translate)(config)
    changes = {name: value for name, value in translated.items() if config.get(name) != value}
    changes["tie_word_embeddings"] = config["tie_word_embeddings"]

    def classes(config: dict):
        model, arguments = utils._get_classes(config)
        return _building(folder, model), SimpleNamespace(from_dict=_building(folder, arguments.from_dict))

    with _reading(folder), _exactly(folder) as source:
        model, made = utils.load_model(source, lazy=True, model_config=changes, get_model_classes=classes)
    rest = {name: value for name, value in made.items() if name not in WINDOW}
    return model, rest | {name: config[name] for name in WINDOW if name in config}


def read_tokenizer(folder: Path, config: dict):
    """A folder's tokenizer, in mlx-lm's wrapper.

    Raises:
        UserError: it is missing or damaged, or needs a package that is not installed.
    """
    from .mlxlm import utils

    try:
        return utils.load_tokenizer(
            folder, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id")
        )
    except ImportError as error:
        raise UserError(
            f"The tokenizer of {folder} needs a package that is not installed ({in_short(error)}); "
            "install it, or use a model with a tokenizer.json."
        ) from error
    except Exception as error:  # tokenizers and transformers raise many types, even plain Exception
        raise UserError(
            f"The tokenizer of {folder} cannot be read ({in_short(error)}); copy tokenizer.json and "
            "tokenizer_config.json again."
        ) from error


def _building(folder: Path, make: Callable) -> Callable:
    """`make`, with its exceptions as UserErrors about config.json."""

    def made(argument):
        try:
            return make(argument)
        except UserError:
            raise
        except Exception as error:  # a missing or impossible value can raise anything
            raise UserError(
                f"{folder / 'config.json'} does not describe a model ({in_short(error)}); copy it again."
            ) from error

    return made


@contextmanager
def _reading(folder: Path):
    """Turn exceptions of reading weights into UserErrors with their cause."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}.") from error
    except (MemoryError, RuntimeError) as error:
        reason = in_short(error)
        if isinstance(error, MemoryError) or "alloc" in reason:
            raise UserError(f"{folder} does not fit into memory ({reason}); use a smaller model.") from error
        raise UserError(
            f"The weights of {folder} are damaged or cut short ({reason}); copy them again."
        ) from error
    except Exception as error:  # a tensor is missing in `sanitize`, quantisation or `load_weights`
        raise UserError(
            f"The weights of {folder} do not fit its config.json ({in_short(error)}); copy both from the "
            "same place."
        ) from error


def decoded(model: nn.Module, dtype: mx.Dtype | None = None) -> nn.Module:
    """Dequantise a model in place; the new weights are exactly those that quantised products use. Lazy.

    Args:
        dtype: of all weights; by default that of the scales.
    """
    from .mlxlm import dequantize_model

    if dtype is not None:
        model.set_dtype(dtype)  # scales and biases first, so that the weights are not rounded
    dequantize_model(model)
    if dtype is not None:
        model.set_dtype(dtype)  # formats with integer scales are dequantised to bfloat16, exactly
    return model


@contextmanager
def _exactly(folder: Path):
    """A folder with only `weight_files` as its `model*.safetensors`, all of which mlx-lm reads."""
    wanted = weight_files(folder)
    if wanted == sorted(folder.glob("model*.safetensors")):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="m2r2kit-") as made:  # MLX keeps the files open
        for file in folder.glob("*.json"):
            os.symlink(file.resolve(), Path(made, file.name))
        for number, file in enumerate(wanted):
            os.symlink(file.resolve(), Path(made, f"model-{number:05d}.safetensors"))
        yield Path(made)


# --- adapters -------------------------------------------------------------------------------


def check_adapter(adapter: str | Path) -> None:
    """Refuse a folder without an adapter of mlx-lm."""
    for name in ADAPTER:
        if not (Path(adapter) / name).exists():
            raise UserError(f"{adapter} has no {name}; give a folder that `mlx_lm.lora` wrote.")
    read_json(Path(adapter) / ADAPTER[0])


def base_of(adapter: str | Path) -> str:
    """The folder or repository of the model that an adapter was trained for."""
    name = read_json(Path(adapter) / ADAPTER[0]).get("model")
    if not isinstance(name, str) or not name:
        raise UserError(f"{adapter} does not name its model; give the model, and this folder as its adapter.")
    return name


def put_adapter(model: nn.Module, adapter: str | Path) -> None:
    """Add an adapter to a model, as `mlx_lm.load(.., adapter_path=)` does."""
    from .mlxlm import utils

    try:
        utils.load_adapters(model, str(adapter))
        model.eval()
        mx.eval(model.trainable_parameters())
    except Exception as error:  # an adapter of another model, or a damaged one, can raise anything
        raise UserError(
            f"The adapter in {adapter} does not fit this model ({in_short(error)}); use the model that it "
            "was trained for."
        ) from error
