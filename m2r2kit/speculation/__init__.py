"""Wing 2: draft a few tokens cheaply, verify them with the model in one pass, lose nothing."""

from importlib import import_module

_EXPORTS = {
    "Sampler": "accept",
    "Generation": "decode",
    "Speculation": "decode",
    "generate": "decode",
    "M2R2": "drafters.base",
    "Drafter": "drafters.base",
    "EarlyExit": "drafters.base",
    "Plain": "drafters.base",
}
__all__ = [*_EXPORTS]


def __getattr__(name: str):
    """Import what is asked for when it is asked for: the registry beside it is read without MLX."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
