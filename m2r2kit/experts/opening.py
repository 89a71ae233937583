"""A ready decoder for a model whose experts are on disk: model, store, reader, memory and predictor."""

from pathlib import Path

from ..common import size_or_share
from . import registry, trained
from .decode import ExpertDecoder, StreamedModel
from .predictors import Predictor
from .reader import Reader
from .slots import budget_of_share, slots_of_budget
from .trace import Trace


def open_experts(
    model: str | Path,
    store: str | Path,
    budget: int | float | str = 0.5,
    policy: str = "lru",
    predictor: str = "next-router",
    distance: int = 2,
    width: int | None = None,
    stream: str | Path | None = None,
    known: str | Path | None = None,
    trace: bool = False,
    reads: str = "direct",
    threads: int = 2,
    link: float | None = None,
) -> ExpertDecoder:
    """A decoder of a streamed model. Its `reader.close()` ends the threads and closes the files.

    Args:
        model: a folder or repository.
        store: the folder that `pack` wrote.
        budget: memory for experts and the readers' buffers: bytes, or a share of all experts.
        policy: eviction policy, a name in `registry.POLICIES`.
        predictor: a name in `registry.PREDICTORS`.
        distance: blocks to look ahead; that of a stream follows from its rate.
        width: experts to predict per block; by default as many as run.
        stream: folder of the trained stream of predictor `m2r2`; by default beside the model.
        known: a trace file, for policies and predictors that need one.
        trace: whether to record the routing (`ExpertDecoder.trace`).
        reads: `direct`, past the page cache, or `buffered`.
        threads: number of reading threads.
        link: bytes/s of a simulated disk; None is the real one.

    Raises:
        UserError: model or store cannot be used, a name or number is wrong, or the budget is too small.
    """
    budget = size_or_share(budget)
    whole = StreamedModel(model, store)
    manifest = whole.store.manifest
    routing = Trace.load(known, manifest) if known else None
    make = registry.policy(policy, routing)
    who = _predictor(whole, model, predictor, distance, width, stream, routing)
    noted = Trace(manifest.blocks, manifest.experts, manifest.top_k) if trace else None
    reader = Reader(whole.store, reads, threads, link)
    try:
        if isinstance(budget, float):
            budget = budget_of_share(manifest, budget, reader.buffer_bytes)
        slots = slots_of_budget(manifest, budget, reader.buffer_bytes)
        return ExpertDecoder(whole, whole.residency(slots, make), reader, who, noted)
    except BaseException:
        reader.close()
        raise


def _predictor(whole: StreamedModel, model, name: str, distance, width, stream, routing) -> Predictor:
    """A predictor by name; a trained one is loaded."""
    made = None
    if name in registry.TRAINED:
        folder = stream if name == "m2r2" else None
        made = trained.predictor(whole.backbone, model, name, width, folder)
    return registry.predictor(name, whole, distance, width, routing, made)
