"""Early exit (dynamic compute): easy tokens leave early, hard tokens pass all blocks."""

from ..common import on_demand

__getattr__, __dir__ = on_demand(
    __name__,
    {
        "decode": "ExitDecoder",
        "gates": "Chance Confidence Saturation Static",
        "methods": "method with_gate",
        "teacher_forced": "ForcedPass texts_of",
    },
)
