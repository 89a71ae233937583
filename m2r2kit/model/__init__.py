"""mlx-lm models as embedding, blocks and head, with their caches and compiled passes."""

from ..common import on_demand

__getattr__, __dir__ = on_demand(
    __name__,
    {
        "backbone": "Backbone crop",
    },
)
