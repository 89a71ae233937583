"""A model whose experts are on disk, ready to decode: model, store, reader, memory and predictor at once."""

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
    """A decoder of a streamed model. `reader.close()` ends its threads and closes its files.

    Args:
        model: a folder or repository.
        store: the folder that `pack` wrote.
        budget: memory for experts and the readers' buffers: bytes, or a share of all experts.
        policy: which expert leaves the memory when a slot is needed; `registry.POLICIES`.
        predictor: who predicts experts ahead of time; `registry.PREDICTORS`.
        distance: blocks to look ahead; the stream's own follows from its rate.
        width: experts to predict for a block; by default as many as run.
        stream: folder of the trained stream of predictor `m2r2`; by default beside the model.
        known: file with the routing of earlier texts, for what learns from it.
        trace: whether to note this run's routing (`ExpertDecoder.trace`).
        reads: `direct`, past the page cache, or `buffered`.
        threads: that read at once.
        link: simulate a disk of so many bytes/s.

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
    """A predictor by its name, loaded if it was trained."""
    made = None
    if name in registry.TRAINED:
        folder = stream if name == "m2r2" else None
        made = trained.predictor(whole.backbone, model, name, width, folder)
    return registry.predictor(name, whole, distance, width, routing, made)
