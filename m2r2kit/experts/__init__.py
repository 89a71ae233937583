"""The experts of a mixture-of-experts model, read from disk ahead of time (AoT).

    store.py, packing.py           the experts of a model as records on disk
    reader.py                      threads that read records past the page cache
    slots.py                       where records lie in memory, and how the model computes from there
    residency.py, policies.py      which experts are in memory, and which one is evicted
    predictors.py                  which experts will be needed, predicted from ids,
    state_predictors.py, train.py  or from hidden states: routers, the stream, a map; their training
    moe.py, reads.py, decode.py    decoding with streamed experts
    opening.py                     a ready decoder from a model and a store
    trace.py, simulate.py          the same counts without the model, and the time on another disk
    registry.py, trained.py        policies and predictors by name; trained ones from disk

A prediction changes when bytes arrive, never which expert runs: the tokens equal those of the model with all
experts in memory.
"""

from ..common import on_demand

__getattr__, __dir__ = on_demand(
    __name__,
    {
        "decode": "ExpertDecoder StreamedModel",
        "moe": "route",
        "opening": "open_experts",
        "packing": "pack",
        "predictors": "Oracle PreviousToken Random Recorded",
        "reader": "Reader",
        "registry": "policy predictor",
        "residency": "Residency",
        "simulate": "Clock replay",
        "slots": "budget_of_share slots_of_budget",
        "state_predictors": "NextRouter router",
        "store": "Store",
        "trace": "Pass Trace distances jaccard",
    },
)
