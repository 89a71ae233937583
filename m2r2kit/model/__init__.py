"""A language model from mlx-lm, seen as embedding, blocks and head; its cache and its compiled passes."""

from ..common import on_demand

__getattr__, __dir__ = on_demand(
    __name__,
    {
        "backbone": "Backbone crop",
    },
)
