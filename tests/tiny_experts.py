"""Tiny mixtures of experts, dense and in 4 bit, and stores packed from them; kept until the tests end."""

import json
import tempfile
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import tiny
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from m2r2kit.experts.packing import pack
from m2r2kit.experts.store import Store
from m2r2kit.model.backbone import Backbone

FAMILIES = ("olmoe", "qwen3_moe", "mixtral")
E, K = 8, 2
SIZES = {
    "num_experts": E, "num_local_experts": E, "num_experts_per_tok": K,
    "intermediate_size": 64, "moe_intermediate_size": 64,
}  # fmt: skip
_FOLDERS = tempfile.TemporaryDirectory(prefix="m2r2kit-experts-")


@cache
def model(family: str = "olmoe", bits: int = 0) -> Path:
    """A folder of a tiny model; `bits` 0 is float32, as it comes."""
    dense = tiny.folder(family, **SIZES)
    if not bits:
        return dense
    folder = Path(_FOLDERS.name) / f"{family}-{bits}"
    if folder.exists():
        return folder
    folder.mkdir()
    net, config = load_model(dense)
    nn.quantize(net, group_size=32, bits=bits)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(net.parameters())))
    config["quantization"] = {"group_size": 32, "bits": bits}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((dense / name).read_bytes())
    return folder


@cache
def resident(family: str = "olmoe", bits: int = 0, decode: bool = False) -> Backbone:
    """The same model with all its experts in memory; quantised weights stay so without `decode`."""
    return Backbone.load(model(family, bits), decode=decode)


@cache
def store(family: str = "olmoe", bits: int = 0, decode: bool = False) -> Store:
    """Its packed experts, likewise; not to be changed."""
    folder = Path(_FOLDERS.name) / f"{family}-{bits}-{decode}-store"
    if not folder.exists():
        pack(model(family, bits), folder, decode=decode)
    return Store(folder)
