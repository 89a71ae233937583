"""Predictors that were trained for a model, on disk: streams and direct maps, each in a folder of its own."""

from pathlib import Path

from .. import checkpoints
from ..backbone import Backbone
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
    config, text = checkpoints.read_settings(folder, DIRECT, DirectConfig)
    made = DirectMap(backbone, config)
    checkpoints.load_weights(made, text, backbone.sha256, folder, DIRECT)
    return made
