"""`m2r2kit tune`: choose the draft length on this machine, for a stream, its tree and its baselines."""

from dataclasses import asdict

from ..bench.tune import tune_baseline, tune_stream
from ..common import check_writable
from ..model.backbone import Backbone
from ..speculation import trained as baselines
from ..speculation.registry import drafters_folder, stream_folder
from ..stream import checkpoints
from ..stream.stream import load_stream
from . import shared


def arguments(parser):
    shared.model(parser)
    shared.stream(parser)
    shared.drafters(parser)


def run(args) -> int:
    """Tune all trained drafters on the tuning prompts, and write the results into their JSON."""
    folder = stream_folder(args.model, args.stream)
    check_writable(folder / "stream.json")
    backbone = Backbone.load(args.model)
    facts, _ = tune_stream(backbone, load_stream(backbone, folder))
    checkpoints.note(folder, "stream", **facts)
    for kind in baselines.KINDS:
        folder = drafters_folder(args.model, args.drafters) / kind
        if (folder / "drafter.json").exists():
            module, _ = baselines.load(backbone, kind, folder)
            tuned = tune_baseline(backbone, kind, module)
            print(f"{kind}: {tuned}", flush=True)
            checkpoints.note(folder, "drafter", drafts=tuned.drafts, config=asdict(module.config))
    return 0
