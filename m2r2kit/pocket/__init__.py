"""Train and export the small models of `data/`."""

from ..common import on_demand

__getattr__, __dir__ = on_demand(__name__, {})
