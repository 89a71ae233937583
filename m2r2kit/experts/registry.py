"""Policies and predictors by name. Their modules are imported only when one is created."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common import Entry, UserError, registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from .decode import StreamedModel
    from .policies import Policy
    from .predictors import Predictor
    from .state_predictors import StatePredictor
    from .trace import Trace

TRACE, TRAINING = "generate --trace", "train predictor"  # commands that create what some of them need

POLICIES = registry(
    Entry("none", "no cache: every expert is dropped after its use"),
    Entry("lru", "evicts the expert whose last use is longest ago"),
    Entry("lfu", "evicts the expert used least often so far"),
    Entry("lfru", "evicts the expert with the lowest uses / passes since the last use"),
    Entry("clock", "keeps an expert that was used since the hand last passed it", source="Corbató 1968"),
    Entry("s3-fifo", "a small queue for new experts, a main one, and a ghost", source="Yang et al. 2023"),
    Entry("least-stale", "evicts experts unused in this pass, earlier blocks first", source="SpecMD 2026"),
    Entry("trace-guided", "evicts the expert least used in the most similar earlier text", TRACE,
          "MoE-Infinity, Xue et al. 2024"),
    Entry("belady", "evicts the expert whose next use is farthest ahead: the optimum", TRACE, "Belady 1966"),
)  # fmt: skip
PREDICTORS = registry(
    Entry("nothing", "predicts nothing: every missing expert is read on demand"),
    Entry("previous", "the experts of the previous token"),
    Entry("static", "the experts that ran most often in earlier texts", TRACE),
    Entry(
        "next-router",
        "routers of the next blocks on the current hidden state",
        source="Eliseev and Mazur 2023",
    ),
    Entry("m2r2", "the accelerated stream of rate 2, then the router", TRAINING, "M2R2 2025"),
    Entry("m2r2-r1", "the same stream of rate 1: a control without velocity", TRAINING),
    Entry("direct", "a low-rank map of the hidden state for each pair of blocks, then the router", TRAINING),
    Entry("random", "experts drawn at random: a control"),
    Entry("shuffled", "next-router with its experts permuted: a control"),
    Entry("oracle", "the experts of this run, from its trace: an upper bound", TRACE),
    Entry("self", "each router on its own input: always right, but too late"),
)
TRAINED = tuple(name for name, entry in PREDICTORS.items() if entry.needs == TRAINING)


def _known(kind: str, names: dict[str, Entry], name: str, trace: Trace | None) -> None:
    """Raise UserError for an unknown name or a missing trace."""
    if name not in names:
        raise UserError(f"There is no {kind} '{name}'; choose {', '.join(names)}.")
    if names[name].needs == TRACE and trace is None:
        raise UserError(f"The {kind} '{name}' needs a routing trace; record one with `--trace`.")


def policy(name: str, trace: Trace | None = None) -> Callable[[int], Policy]:
    """A factory of policies: slots -> policy.

    Args:
        trace: of earlier texts for `trace-guided`; of this run for `belady`.

    Raises:
        UserError: no such policy, or the trace that it needs is missing.
    """
    from . import policies

    _known("policy", POLICIES, name, trace)
    if name == "trace-guided":
        tables = trace.tables()
        return lambda slots: policies.TraceGuided(slots, tables)
    if name == "belady":
        uses = trace.uses()
        return lambda slots: policies.Belady(slots, uses)
    return policies.SIMPLE[name]


def predictor(
    name: str,
    model: StreamedModel,
    distance: int = 2,
    width: int | None = None,
    trace: Trace | None = None,
    made: StatePredictor | None = None,
) -> Predictor:
    """A predictor by name.

    Args:
        distance: blocks to look ahead; that of a stream follows from its rate.
        width: experts to predict per block; by default as many as run.
        trace: of earlier texts for `static`; of this run for `oracle`.
        made: the trained predictor, with its own width (`trained.predictor`).

    Raises:
        UserError: unknown predictor, a number out of range, or a missing trace or trained predictor.
    """
    from .predictors import Oracle, Predictor, PreviousToken, Random, Static
    from .state_predictors import NextRouter

    manifest, backbone = model.store.manifest, model.backbone
    width = manifest.top_k if width is None else width
    if not 1 <= width <= manifest.experts:
        raise UserError(f"A predictor predicts 1 to {manifest.experts} experts; got {width}.")
    most = max(1, len(manifest.blocks) - 1)
    if not 1 <= distance <= most:
        raise UserError(f"A predictor looks 1 to {most} blocks ahead; got {distance}.")
    _known("predictor", PREDICTORS, name, trace)
    if name in TRAINED and made is None:
        raise UserError(f"The predictor '{name}' must be trained for this model first; none is given.")
    match name:
        case "nothing":
            return Predictor()
        case "previous":
            return PreviousToken(manifest.blocks, distance)
        case "static":
            return Static(trace, distance, width)
        case "random":
            return Random(manifest.blocks, distance, manifest.experts, width)
        case "oracle":
            return Oracle(trace, distance)
        case "next-router":
            return NextRouter(backbone, distance, width)
        case "shuffled":
            return NextRouter(backbone, distance, width).shuffle()
        case "self":
            return NextRouter(backbone, 0, width)
        case _:
            return made
