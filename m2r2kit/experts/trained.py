"""Predictors that were trained for a model, on disk: streams and direct maps, each in a folder of its own."""

from pathlib import Path

from ..common import UserError
from ..model.backbone import Backbone
from ..stream import checkpoints
from ..stream.stream import AcceleratedStream, load_stream
from .state_predictors import DirectConfig, DirectMap, StreamPredictor

FOLDER = "predictors"  # inside the model's
STREAMS = {"m2r2": "stream", "m2r2-r1": "stream-r1"}  # rate 2, and the control without velocity
OPENING = "m2r2-r1"  # also what names, for the stream of rate 2, the block that comes before it is ahead
DIRECT = "direct"


def folder_of(model: str | Path, name: str) -> Path:
    """Where a model's trained predictor lies."""
    return Path(model) / FOLDER / (STREAMS.get(name) or DIRECT)


def file_of(name: str) -> str:
    """How the files in that folder are called."""
    return DIRECT if name == DIRECT else "stream"


def predictor(
    backbone: Backbone,
    model: str | Path,
    name: str,
    width: int | None = None,
    folder: str | Path | None = None,
) -> StreamPredictor | DirectMap:
    """A trained predictor of a model by its name; the stream with its opening, if that was trained too.

    Args:
        model: the model's folder.
        width: experts that it names; by default as many as run.
        folder: where it lies, if not in the model's.

    Raises:
        UserError: there is none, it is damaged, or it belongs to another model.
    """
    folder = Path(folder) if folder else folder_of(model, name)
    if name == DIRECT:
        return direct(backbone, folder, width)
    made, opening = stream(backbone, folder), folder_of(model, OPENING)
    begins = name != OPENING and (opening / "stream.json").exists()
    return StreamPredictor(made, width, stream(backbone, opening) if begins else None)


def direct(backbone: Backbone, folder: str | Path, width: int | None = None) -> DirectMap:
    """A direct map.

    Raises:
        UserError: there is none, it is damaged, or it belongs to another model.
    """
    there(folder, DIRECT)
    config, text = checkpoints.read_settings(folder, DIRECT, DirectConfig)
    made = DirectMap(backbone, config, width)
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
