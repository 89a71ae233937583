"""Run the bookkeeping of a trace again, with any policy, budget and predictor, and without the model."""

from .predictors import Predictor
from .residency import Counts, Residency
from .trace import Trace


def replay(trace: Trace, residency: Residency, predictor: Predictor | None = None) -> Counts:
    """What the live run would count from an empty memory; the `residency` is the one to fill.

    Args:
        predictor: one that needs no model (`predictors.Recorded` names what the live run named).
    """
    text = None
    for number, p in enumerate(trace.passes):
        if p.text != text:
            text = p.text
            residency.new_text()
            if predictor:
                predictor.new_text()
        residency.begin()
        if p.prompt:
            for l, wanted in zip(trace.blocks, p.wanted):
                for group in residency.groups(l, wanted):
                    residency.demand(l, group)
                    residency.release(l, group)
        elif predictor:
            for m, experts in predictor.before(number):
                residency.speculate(m, experts)
            for l, wanted in zip(trace.blocks, p.wanted):
                residency.arrive(l, wanted, predictor.at(number, l, wanted))
        else:
            for l, wanted in zip(trace.blocks, p.wanted):
                residency.arrive(l, wanted, ())
        residency.end()
    return residency.counts
