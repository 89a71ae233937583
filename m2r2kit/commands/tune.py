"""`m2r2kit tune`: how long the drafts of a stream should be on this machine."""

from .. import checkpoints
from ..backbone import Backbone
from ..residuals import load_stream
from ..speculation import M2R2
from ..speculation.methods import stream_folder
from ..tuning import THRESHOLDS, tune


def run(args) -> int:
    """Tune on the tuning prompts, and write the answer into the stream's JSON."""
    folder = stream_folder(args.model, args.stream)
    backbone = Backbone.load(args.model)
    tuned = tune(backbone, M2R2(backbone, load_stream(backbone, folder)), THRESHOLDS)
    checkpoints.note(folder, "stream", drafts=tuned.drafts, threshold=tuned.threshold)
    print(tuned)
    return 0
