"""The same mixture of experts with wider experts: what it says is the same, what it reads is more.

Each neuron of an expert is there k times and gives a k-th of what it gave (Net2WiderNet, arXiv 1511.05641):

    gate, up (F, D) -> (k F, D)     each row k times
    down     (D, F) -> (D, k F)     each column k times, divided by k

Routers and everything else stay as they are. So the same experts are chosen for the same text, and predictors
that were trained for the model name them as well as before; but a record has k times the bytes. How much is
read for a token decides whether reading ahead pays; this changes it, and nothing else, in a trained model.
"""

import json
from pathlib import Path

import mlx.core as mx

from ..common import UserError
from ..experts import trained
from ..model.backbone import Backbone
from ..model.load import weights_sha256
from ..stream import checkpoints
from .new_model import new_model

WEIGHTS = "model.safetensors"


def write(model: Path, out: Path, k: int) -> int:
    """Write the wider model, and beside it the predictors that were trained for the narrow one; returns the
    bytes of one expert, in float32.

    Raises:
        UserError: the model has no experts of this kind, or `out` cannot be written.
    """
    config, weights = read(model)
    wide = widened(weights, k)
    with new_model(out, sum(w.nbytes for w in wide.values()), model) as partial:
        mx.save_safetensors(str(partial / WEIGHTS), wide, metadata={"format": "mlx"})
        config["intermediate_size"] *= k
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        hand_over(model, partial)
    return 3 * 4 * config["hidden_size"] * config["intermediate_size"]


def read(model: Path) -> tuple[dict, dict[str, mx.array]]:
    """The config and the weights of a model that can be widened.

    Raises:
        UserError: it is none, or cannot be read.
    """
    try:
        config = json.loads((model / "config.json").read_text())
        weights = mx.load(str(model / WEIGHTS))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{model} cannot be read as a model ({error}); give the folder of one.") from error
    plain = not any(name.endswith(".scales") for name in weights)
    if config.get("model_type") != "olmoe" or not plain or not any(map(is_expert, weights)):
        raise UserError(f"{model} cannot be widened; give an `olmoe` model of `m2r2kit train backbone`.")
    return config, weights


def is_expert(name: str) -> bool:
    """Whether a tensor belongs to the experts of a block."""
    return ".switch_mlp." in name


def widened(weights: dict[str, mx.array], k: int) -> dict[str, mx.array]:
    """The tensors with experts k times as wide."""

    def wider(name: str, w: mx.array) -> mx.array:
        if not is_expert(name):
            return w
        if "down_proj" in name:
            return mx.repeat(w.astype(mx.float32) / k, k, axis=-1).astype(w.dtype)
        return mx.repeat(w, k, axis=-2)

    return {name: wider(name, w) for name, w in weights.items()}


def hand_over(model: Path, wide: Path) -> None:
    """Copy the predictors that lie beside a model, bound to the wide one: they see states, and know nothing
    of how wide an expert is.

    Raises:
        UserError: one of them is damaged, or belongs to another model.
    """
    backbone, sha256 = Backbone.load(model), weights_sha256(wide)
    for kind in (*trained.STREAMS, trained.DIRECT):
        folder, name = trained.folder_of(model, kind), trained.file_of(kind)
        if not (folder / f"{name}.json").exists():
            continue
        made = (
            trained.direct(backbone, folder) if kind == trained.DIRECT else trained.stream(backbone, folder)
        )
        facts = checkpoints.read_settings(folder, name, type(made.config))[1]
        facts = {key: facts[key] for key in ("steps", "train_seconds") if key in facts}
        checkpoints.save(made, made.config, sha256, trained.folder_of(wide, kind), name, **facts)
