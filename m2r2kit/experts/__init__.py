"""Wing 3: experts of a mixture-of-experts model, read from disk ahead of time (AoT).

    store.py, packing.py           the experts of a model as records on disk
    reader.py                      threads that read records past the page cache
    slots.py                       where records lie in memory, and how the model computes from there
    residency.py, policies.py      which experts are in memory, and which one is evicted
    predictors.py                  which experts will be needed, predicted from ids ..
    state_predictors.py, train.py  .. and from states: routers, the stream, a map; how these are trained
    moe.py, reads.py, decode.py    a model that decodes so
    opening.py                     all of it at once, from a model and a store
    trace.py, simulate.py          the same counts without the model, and the time on another disk
    registry.py, trained.py        all of them by name, and from disk

A prediction changes when bytes arrive and never which expert runs: the tokens are those of the model with
all its experts in memory.
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
