"""Predictors that were trained for a model, on disk: streams and direct maps, each in a folder of its own."""

from pathlib import Path

from .. import checkpoints
from ..backbone import Backbone
from ..errors import UserError
from ..residuals import AcceleratedStream, load_stream
from .state_predictors import DirectConfig, DirectMap

FOLDER = "predictors"  # inside the model's
STREAMS = {"m2r2": "stream", "m2r2-r1": "stream-r1"}  # rate 2, and the control without velocity
DIRECT = "direct"


def folder_of(model: str | Path, name: str) -> Path:
    """Where a model's trained predictor lies."""
    return Path(model) / FOLDER / (STREAMS.get(name) or DIRECT)


def direct(backbone: Backbone, folder: str | Path) -> DirectMap:
    """A direct map.

    Raises:
        UserError: there is none, it is damaged, or it belongs to another model.
    """
    there(folder, DIRECT)
    config, text = checkpoints.read_settings(folder, DIRECT, DirectConfig)
    made = DirectMap(backbone, config)
    checkpoints.load_weights(made, text, backbone.sha256, folder, DIRECT)
    return made


def stream(backbone: Backbone, folder: str | Path) -> AcceleratedStream:
    """A stream that was trained to name experts; raises UserError likewise."""
    there(folder, "stream")
    return load_stream(backbone, folder)


def there(folder: str | Path, name: str) -> None:
    """Refuse a folder without the trained part, in a sentence that names the command."""
    if not (Path(folder) / f"{name}.json").exists():
        raise UserError(f"There is no trained {name} in {folder}; make it with `m2r2kit train predictor`.")
