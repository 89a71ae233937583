"""How the small models in `data/` are made."""

from ..common import on_demand

__getattr__, __dir__ = on_demand(__name__, {})
