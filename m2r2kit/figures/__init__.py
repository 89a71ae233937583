"""Figures drawn from records and arrays, and the same figures with controls."""

from ..common import on_demand

__getattr__, __dir__ = on_demand(
    __name__,
    {
        "style": "HATCHES PALE LensTable MarkedText StreamsMap histograms lines new_figure picture show "
        "step_bars visible",
        "widgets": "choice explore slider switch",
    },
)
