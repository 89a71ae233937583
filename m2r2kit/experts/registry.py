"""Policies and predictors by the names that the command line knows."""

from collections.abc import Callable

from ..cli.arguments import POLICIES, PREDICTORS, TRAINED
from ..common import UserError
from . import policies
from .decode import StreamedModel
from .predictors import Oracle, Predictor, PreviousToken, Random, Static
from .state_predictors import NextRouter, StatePredictor
from .trace import Trace


def policy(name: str, experts: int, trace: Trace | None = None) -> Callable[[int], policies.Policy]:
    """What makes a policy for a pool of so many slots.

    Args:
        experts: E of each block.
        trace: earlier texts for `trace-guided`; for `belady` this very run.

    Raises:
        UserError: the policy needs a trace and there is none.
    """
    if name in policies.SIMPLE:
        return policies.SIMPLE[name]
    if name == "least-stale":
        return lambda slots: policies.LeastStale(slots, experts)
    if name not in POLICIES:
        raise UserError(f"There is no policy '{name}'; choose {', '.join(POLICIES)}.")
    if trace is None:
        raise UserError(f"The policy '{name}' needs a routing trace; record one with `--trace`.")
    if name == "trace-guided":
        tables = trace.tables()
        return lambda slots: policies.TraceGuided(slots, tables)
    uses = trace.uses()
    return lambda slots: policies.Belady(slots, uses)


def predictor(
    name: str,
    model: StreamedModel,
    distance: int = 2,
    width: int | None = None,
    trace: Trace | None = None,
    made: StatePredictor | None = None,
) -> Predictor:
    """A predictor by its name.

    Args:
        distance: blocks that it looks ahead; the stream's own follows from its rate.
        width: experts that it names; by default as many as run.
        trace: of earlier texts for `static`; for `oracle` of this very run.
        made: what was trained, and names as many as it was loaded for (`trained.predictor`).

    Raises:
        UserError: it needs what is not given, or there is none of this name.
    """
    manifest, backbone = model.store.manifest, model.backbone
    width = manifest.top_k if width is None else width
    if not 1 <= width <= manifest.experts:
        raise UserError(f"A predictor names 1 to {manifest.experts} experts; got {width}.")
    if not 1 <= distance <= max(1, len(manifest.blocks) - 1):
        raise UserError(f"A predictor looks 1 to {len(manifest.blocks) - 1} blocks ahead; got {distance}.")
    if name in ("static", "oracle") and trace is None:
        raise UserError(f"The predictor '{name}' needs a routing trace; record one with `--trace`.")
    if name in TRAINED and made is None:
        raise UserError(f"The predictor '{name}' has to be trained for this model first; none is given.")
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
        case _ if name in TRAINED:
            return made
    raise UserError(f"There is no predictor '{name}'; choose {', '.join(PREDICTORS)}.")
