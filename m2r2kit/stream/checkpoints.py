"""Trained small modules on disk: `NAME.safetensors` and `NAME.json`.

The JSON holds the settings, the SHA-256 of the base model, and the SHA-256 of the safetensors file. Loading
a module with another model is refused. Two files cannot be replaced atomically, so a crash between the two
writes is detected when they are loaded. Neither file contains code.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..common import UserError, in_short, parse_json, whole, write_whole

FORMAT = 1
GROUP = 32  # quantisation group: neighbouring weights that share a scale


def save(
    module: nn.Module, config, base_sha256: str, folder: str | Path, name: str, bits: int = 16, **facts
) -> None:
    """Write a module's trainable weights (float16) and its settings. Both files appear, or neither.

    Args:
        config: a dataclass of plain values.
        bits: below 16, matrices are quantised to this many bits (`mx.quantize`, affine); loading dequantises
            them.
        facts: further values for the JSON (steps, seconds, the command).

    Raises:
        UserError: the folder cannot be written.
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
    """Read the settings of a saved module: (config, the whole JSON).

    Raises:
        UserError: the module does not exist, or its JSON is invalid.
    """
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        raise UserError(f"There is no trained {name} in {folder}; train one with `m2r2kit train {name}`.")
    try:
        text = parse_json(path.read_text(), parse_constant=_finite, parse_float=_finite)
        if text["format"] != FORMAT:
            raise UserError(f"{path} was written by another version of m2r2kit; train again.")
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
        raise UserError(f"{path} is damaged ({error}); copy it again or train again.") from error


def build(module_type: Callable, backbone, config, folder: str | Path, name: str, *more) -> nn.Module:
    """Build a module from the settings that `read_settings` returned.

    Raises:
        UserError: no module can have these settings, such as a negative width.
    """
    try:
        return module_type(backbone, config, *more)
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        path = Path(folder) / f"{name}.json"
        raise UserError(f"{path} is damaged ({in_short(error)}); copy it again or train again.") from error


def note(folder: str | Path, name: str, **facts) -> None:
    """Add facts to the JSON of a saved module, or replace them.

    Raises:
        UserError: the folder cannot be written.
    """
    path = Path(folder) / f"{name}.json"
    write_whole(path, json.dumps(parse_json(path.read_text()) | facts, indent=1) + "\n")


def trained(folder: str | Path, name: str, config_type: type) -> dict:
    """The cost of training a saved module: `parameters` (their number), `train_steps` and `train_seconds`.
    Each of the last two is None if the JSON does not hold it.

    Raises:
        UserError: the module does not exist, or it is damaged.
    """
    text = read_settings(folder, name, config_type)[1]
    path = Path(folder) / f"{name}.safetensors"
    try:
        parameters = sum(weight.size for weight in _weights(path).values())  # lazy: reads no weights
    except (OSError, RuntimeError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(f"{path} is missing or damaged; copy it again or train again.") from error
    return {
        "parameters": parameters,
        "train_steps": text.get("steps"),
        "train_seconds": text.get("train_seconds"),
    }


def load_weights(module: nn.Module, text: dict, base_sha256: str, folder: str | Path, name: str) -> None:
    """Load saved weights into a module, as float32.

    Raises:
        UserError: the weights belong to another model, or they do not fit.
    """
    if text["base_sha256"] != base_sha256:
        raise UserError(
            f"The {name} in {folder} was trained for another model "
            f"({text['base_sha256'][:12]}, this one is {base_sha256[:12]}); train one for this model."
        )
    path = Path(folder) / f"{name}.safetensors"
    try:
        if _sha256(path) != text["weights_sha256"]:
            raise ValueError("its SHA-256 is not that in the JSON")
        module.load_weights(list(_weights(path).items()))
        mx.eval(module.parameters())
    except (OSError, RuntimeError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(
            f"{path} is missing, damaged or does not match its JSON; copy both again or train again."
        ) from error


def _quantized(weights: dict[str, mx.array], bits: int) -> dict[str, mx.array]:
    """Replace matrices by packed integers, scales and biases; keep other tensors."""
    stored = dict(weights)
    for name, w in weights.items():
        if w.ndim == 2 and w.shape[-1] % GROUP == 0:
            stored[name], stored[f"{name}.scales"], stored[f"{name}.biases"] = mx.quantize(w, GROUP, bits)
    return stored


def _weights(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file in float32, dequantised; lazy."""
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
    """Parse a JSON number; raise ValueError for NaN and infinity, which Python's JSON accepts."""
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is not a finite number")
    return value


def _check_facts(text: dict) -> None:
    """Check the facts that commands write beside the settings; raise ValueError for invalid ones."""
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
    """Exits in use by method, as indices; None means all of them."""
    return isinstance(value, dict) and all(
        exits is None or (isinstance(exits, list) and exits and all(map(_count, exits)))
        for exits in value.values()
    )


def _calibration(value) -> bool:
    """By fill: the thresholds, the mean loss at each, and, if measured, the fraction of differing tokens in
    freely decoded answers.
    """
    return isinstance(value, dict) and all(
        isinstance(known, dict)
        and _count(known["texts"])
        and len(known["thresholds"]) == len(known["means"]) == len(known.get("free", known["means"]))
        and all(map(_share, [*known["thresholds"], *known["means"], *known.get("free", [])]))
        and _count(known.get("free_tokens", 0))
        for known in value.values()
    )


MOST_DRAFTS = 1024
FACTS = {  # facts that commands write into a JSON, and a check for each
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
    """True if a setting from JSON has the type of its default (None: a number or None)."""
    if default is None or isinstance(default, float):
        return type(value) in (int, float) or (value is None and default is None)
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(type(v) is type(default[0]) for v in value)
    return type(value) is type(default)
