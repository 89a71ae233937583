"""`m2r2kit tune`: how long the drafts of a stream should be on this machine, and how its tree branches."""

from .. import checkpoints
from ..backbone import Backbone
from ..residuals import load_stream
from ..speculation.methods import stream_folder
from ..tuning import tune_stream


def run(args) -> int:
    """Tune on the tuning prompts, and write the answer into the stream's JSON."""
    folder = stream_folder(args.model, args.stream)
    backbone = Backbone.load(args.model)
    facts, _ = tune_stream(backbone, load_stream(backbone, folder))
    checkpoints.note(folder, "stream", **facts)
    return 0
