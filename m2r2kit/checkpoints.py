"""Trained small modules on disk: `NAME.safetensors` with `NAME.json` beside it.

The JSON holds the settings and the SHA-256 of the model that the module belongs to; loading
it with another model is refused. Nothing in either file is code.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .errors import UserError

FORMAT = 1


def save(module: nn.Module, config, base_sha256: str, folder: str | Path, name: str, **facts) -> None:
    """Write a module's trainable weights (float16) and its settings; both or neither appear.

    Args:
        config: a dataclass of plain values.
        facts: what else should be kept beside it (steps, seconds, the command).

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    weights = {k: v.astype(mx.float16) for k, v in tree_flatten(module.trainable_parameters())}
    text = {"format": FORMAT, "kind": type(module).__name__, "base_sha256": base_sha256}
    text |= {"config": asdict(config), **facts}
    new = [folder / f"{name}.safetensors.new.safetensors", folder / f"{name}.json.new"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(new[0]), weights)
        new[1].write_text(json.dumps(text, indent=1) + "\n")
        new[0].replace(folder / f"{name}.safetensors")
        new[1].replace(folder / f"{name}.json")
    except (OSError, RuntimeError) as error:
        for path in new:
            path.unlink(missing_ok=True)
        raise UserError(f"{name} could not be saved in {folder} ({error}); free some space.") from error


def read_settings(folder: str | Path, name: str, config_type: type):
    """The settings of a saved module: (config, everything in the JSON).

    Raises:
        UserError: there is none, or its JSON cannot be used.
    """
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        raise UserError(f"There is no trained {name} in {folder}; train one with `m2r2kit train {name}`.")
    try:
        text = json.loads(path.read_text())
        known = {f.name for f in fields(config_type)}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in text["config"].items()}
        if unknown := values.keys() - known:
            raise UserError(f"{path} has a setting that this version does not know: {sorted(unknown)[0]}.")
        return config_type(**values), text
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again or train anew.") from error


def load_weights(module: nn.Module, text: dict, base_sha256: str, folder: str | Path, name: str) -> None:
    """Fill a module with saved weights, in float32 on a CPU.

    Raises:
        UserError: they belong to another model, or do not fit.
    """
    if text["base_sha256"] != base_sha256:
        raise UserError(
            f"The {name} in {folder} was trained for another model "
            f"({text['base_sha256'][:12]}, this one is {base_sha256[:12]}); train one for this model."
        )
    path = Path(folder) / f"{name}.safetensors"
    try:
        weights = {k: v.astype(mx.float32) for k, v in mx.load(str(path)).items()}
        module.load_weights(list(weights.items()))
        mx.eval(module.parameters())
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is damaged or missing; copy it again or train anew.") from error
