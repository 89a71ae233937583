"""Pictures drawn from records and arrays; the same pictures with controls."""

from ..common import on_demand

__getattr__, __dir__ = on_demand(
    __name__,
    {
        "style": "HATCHES LensTable MarkedText StreamsMap histograms lines new_figure show step_bars",
        "widgets": "choice explore slider switch",
    },
)
