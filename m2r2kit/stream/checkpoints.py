"""Trained small modules on disk: `NAME.safetensors` with `NAME.json` beside it.

The JSON holds the settings, the SHA-256 of the model that the module belongs to (loading it
with another model is refused), and the SHA-256 of its own safetensors: two files cannot be
replaced in one act, so a crash between the two is found when they are loaded. Nothing in
either file is code.
"""

import hashlib
import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..common import UserError, parse_json, whole, write_whole

FORMAT = 1
GROUP = 32  # neighbouring weights that share a scale where a module is stored in few bits


def save(
    module: nn.Module, config, base_sha256: str, folder: str | Path, name: str, bits: int = 16, **facts
) -> None:
    """Write a module's trainable weights (float16) and its settings; both or neither appear.

    Args:
        config: a dataclass of plain values.
        bits: below 16, matrices are stored as integers of so many bits (`mx.quantize`, affine); loading
            decodes them.
        facts: what else should be kept beside it (steps, seconds, the command).

    Raises:
        UserError: the folder cannot be written, and why.
    """
    folder = Path(folder)
    weights = {k: v.astype(mx.float16) for k, v in tree_flatten(module.trainable_parameters())}
    weights = _quantized(weights, bits) if bits < 16 else weights
    text = {"format": FORMAT, "kind": type(module).__name__, "base_sha256": base_sha256}
    text |= {"config": asdict(config), **facts}
    with whole(folder / f"{name}.json") as new_settings, whole(folder / f"{name}.safetensors") as new_weights:
        mx.save_safetensors(str(new_weights), weights)
        text["weights_sha256"] = _sha256(new_weights)
        new_settings.write_text(json.dumps(text, indent=1) + "\n")


def read_settings(folder: str | Path, name: str, config_type: type):
    """The settings of a saved module: (config, everything in the JSON).

    Raises:
        UserError: there is none, or its JSON cannot be used.
    """
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        raise UserError(f"There is no trained {name} in {folder}; train one with `m2r2kit train {name}`.")
    try:
        text = parse_json(path.read_text(), parse_constant=_finite, parse_float=_finite)
        if text["format"] != FORMAT:
            raise UserError(f"{path} was written by another version of this kit; train anew.")
        known = {f.name for f in fields(config_type)}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in text["config"].items()}
        if unknown := values.keys() - known:
            raise UserError(f"{path} has a setting that this version does not know: {sorted(unknown)[0]}.")
        config = config_type(**values)
        defaults = asdict(config_type()) | {"base_sha256": "", "weights_sha256": ""}
        for key, value in (values | {k: text[k] for k in ("base_sha256", "weights_sha256")}).items():
            if not _fits(value, defaults[key]):
                raise TypeError(f"{key} is {value!r}")
        _check_facts(text)
        return config, text
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again or train anew.") from error


def note(folder: str | Path, name: str, **facts) -> None:
    """Add facts to the JSON of a saved module, or put others in their place.

    Raises:
        UserError: the folder cannot be written, and why.
    """
    path = Path(folder) / f"{name}.json"
    write_whole(path, json.dumps(parse_json(path.read_text()) | facts, indent=1) + "\n")


def trained(folder: str | Path, name: str, config_type: type) -> dict:
    """What training a saved module took: `parameters` (how many), `train_steps` and
    `train_seconds`, each None where nobody noted it.

    Raises:
        UserError: there is no such module, or it is damaged.
    """
    text = read_settings(folder, name, config_type)[1]
    path = Path(folder) / f"{name}.safetensors"
    try:
        parameters = sum(weight.size for weight in _weights(path).values())  # lazy: reads no weights
    except (OSError, RuntimeError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(f"{path} is missing or damaged; copy it again or train anew.") from error
    return {
        "parameters": parameters,
        "train_steps": text.get("steps"),
        "train_seconds": text.get("train_seconds"),
    }


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
        if _sha256(path) != text["weights_sha256"]:
            raise ValueError("not the file that the JSON was written for")
        module.load_weights(list(_weights(path).items()))
        mx.eval(module.parameters())
    except (OSError, RuntimeError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(
            f"{path} is missing, damaged or not of one piece with its JSON; copy both again or train anew."
        ) from error


def _quantized(weights: dict[str, mx.array], bits: int) -> dict[str, mx.array]:
    """Matrices as packed integers beside their scales and biases; other tensors as they are."""
    stored = dict(weights)
    for name, w in weights.items():
        if w.ndim == 2 and w.shape[-1] % GROUP == 0:
            stored[name], stored[f"{name}.scales"], stored[f"{name}.biases"] = mx.quantize(w, GROUP, bits)
    return stored


def _weights(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file in float32, quantised ones decoded; lazy."""
    stored = {k: v if v.dtype == mx.uint32 else v.astype(mx.float32) for k, v in mx.load(str(path)).items()}
    for name in [name for name, w in stored.items() if w.dtype == mx.uint32]:
        scales, biases = stored.pop(f"{name}.scales"), stored.pop(f"{name}.biases")
        bits = stored[name].shape[-1] // scales.shape[-1]  # words of 32 bits for GROUP = 32 weights
        stored[name] = mx.dequantize(stored[name], scales, biases, GROUP, bits)
    return stored


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finite(number: str) -> float:
    """A number of a JSON; raises ValueError for NaN and infinity, which Python's JSON allows."""
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is no number that it can hold")
    return value


def _check_facts(text: dict) -> None:
    """Check what commands note beside the settings. Raises ValueError for what they never write."""
    for name, is_right in FACTS.items():
        if name in text and not is_right(text[name]):
            raise ValueError(f"{name} is {text[name]!r:.60}")


def _count(value, most: float = math.inf) -> bool:
    return type(value) is int and 0 <= value <= most


def _share(value) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _seconds(value) -> bool:
    return type(value) in (int, float) and value >= 0


def _tree(value) -> bool:
    known = {"drafts": _drafts, "threshold": _share, "leaves": _drafts}
    return isinstance(value, dict) and all(is_right(value.get(name, 0)) for name, is_right in known.items())


def _drafts(value) -> bool:
    return _count(value, MOST_DRAFTS)


def _use(value) -> bool:
    """Exits in use by method, as indices; None is all of them."""
    return isinstance(value, dict) and all(
        exits is None or (isinstance(exits, list) and exits and all(map(_count, exits)))
        for exits in value.values()
    )


def _calibration(value) -> bool:
    """What each threshold risks after the same words, and if measured how much of freely decoded answers
    differs; by way of filling skipped blocks."""
    return isinstance(value, dict) and all(
        isinstance(known, dict)
        and _count(known["texts"])
        and len(known["thresholds"]) == len(known["means"]) == len(known.get("free", known["means"]))
        and all(map(_share, [*known["thresholds"], *known["means"], *known.get("free", [])]))
        and _count(known.get("free_tokens", 0))
        for known in value.values()
    )


MOST_DRAFTS = 1024
FACTS = {  # what commands note in a JSON, and whether a value can be that
    "steps": _count,
    "train_seconds": _seconds,
    "asked": lambda value: isinstance(value, dict),
    "router_steps": _count,
    "router_train_seconds": _seconds,
    "drafts": _drafts,
    "threshold": _share,
    "tree": _tree,
    "use": _use,
    "calibration": _calibration,
}


def _fits(value, default) -> bool:
    """Whether a setting from JSON has the type of its default (None: a number or nothing)."""
    if default is None or isinstance(default, float):
        return type(value) in (int, float) or (value is None and default is None)
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(type(v) is type(default[0]) for v in value)
    return type(value) is type(default)
