"""Wing 3: experts of a mixture-of-experts model, read from disk ahead of time (AoT).

    store.py, packing.py              the experts of a model as records on disk
    reader.py                         threads that bring records past the page cache
    slots.py                          where records lie in memory, and how the model computes from there
    residency.py, policies.py         which experts are there, and which one goes
    predictors.py                     which experts will be needed, said from ids ..
    state_predictors.py, learn.py     .. and from states: routers, the stream, a map; how these are trained
    moe.py, loader.py, generation.py  a model that decodes so, and what comes out
    trace.py, replay.py, planner.py   the same counts without the model, and bounds without a machine
    clock.py, probe.py                the time that another disk would take, and what this one gives
    methods.py, trained.py            all of them by name, and from disk

Predictions change when bytes arrive and never which expert runs: the tokens are those of the model
that has all its experts in memory.
"""
