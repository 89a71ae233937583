"""Trained predictors on disk: streams and direct maps, each in its own folder."""

from pathlib import Path

from ..common import UserError
from ..model.backbone import Backbone
from ..model.folder import trained_folder
from ..model.hashes import weights_sha256
from ..stream import checkpoints
from ..stream.stream import AcceleratedStream, load_stream
from .state_predictors import DirectConfig, DirectMap, StreamPredictor

FOLDER = "predictors"  # inside the model's
STREAMS = {"m2r2": "stream", "m2r2-r1": "stream-r1"}  # rate 2, and the control without velocity
OPENING = "m2r2-r1"  # also the opening of the stream of rate 2 (`StreamPredictor`)
DIRECT = "direct"


def folder_of(model: str | Path, name: str) -> Path:
    """The folder of a model's trained predictor."""
    return trained_folder(model, FOLDER) / (STREAMS.get(name) or DIRECT)


def file_of(name: str) -> str:
    """The name of its files, without suffix."""
    return DIRECT if name == DIRECT else "stream"


def predictor(
    backbone: Backbone,
    model: str | Path,
    name: str,
    width: int | None = None,
    folder: str | Path | None = None,
) -> StreamPredictor | DirectMap:
    """A trained predictor of a model by name; a stream has its opening if that is trained too.

    Args:
        model: the model's folder.
        width: experts to predict per block; by default as many as run.
        folder: the predictor's folder, if not inside the model's.

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
    made = checkpoints.build(DirectMap, backbone, config, folder, DIRECT, width)
    checkpoints.load_weights(made, text, backbone.sha256, folder, DIRECT)
    return made


def stream(backbone: Backbone, folder: str | Path) -> AcceleratedStream:
    """A stream trained to predict experts; raises UserError as `direct` does."""
    there(folder, "stream")
    return load_stream(backbone, folder)


def there(folder: str | Path, name: str) -> None:
    """Raise UserError if the folder has no trained part `name`."""
    if not (Path(folder) / f"{name}.json").exists():
        raise UserError(f"There is no trained {name} in {folder}; create it with `m2r2kit train predictor`.")


def hand_over(model: str | Path, other: str | Path, bits: int = 16) -> None:
    """Copy the trained predictors of a model into the folder of another with the same hidden states, and bind
    them to it.

    Args:
        bits: per weight of their matrices (`checkpoints.save`).

    Raises:
        UserError: one of them is damaged, or belongs to another model.
    """
    backbone, sha256 = Backbone.load(model), weights_sha256(Path(other))
    for kind in (*STREAMS, DIRECT):
        folder, name = folder_of(model, kind), file_of(kind)
        if not (folder / f"{name}.json").exists():
            continue
        made = direct(backbone, folder) if kind == DIRECT else stream(backbone, folder)
        facts = checkpoints.read_settings(folder, name, type(made.config))[1]
        facts = {key: facts[key] for key in ("steps", "train_seconds") if key in facts}
        checkpoints.save(made, made.config, sha256, folder_of(other, kind), name, bits, **facts)
