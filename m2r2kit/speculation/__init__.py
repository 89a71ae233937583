"""Speculative decoding: draft a few tokens cheaply, verify them with the model in one pass; the output is
unchanged.
"""

from ..common import on_demand

__getattr__, __dir__ = on_demand(
    __name__,
    {
        "accept": "Sampler accept_greedy accept_sampled",
        "decode": "Generation Speculation generate",
        "drafters.base": "M2R2 Drafter EarlyExit Plain",
    },
)
