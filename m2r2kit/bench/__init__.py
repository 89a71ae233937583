"""Measure, record, compare."""

from ..common import on_demand

__getattr__, __dir__ = on_demand(
    __name__,
    {
        "records": "about",
        "tables": "Table",
    },
)
