"""m2r2kit: multi-rate residuals (M2R2, arXiv 2502.02040), to learn, reproduce and use."""

__version__ = "0.1.0"

_API = ("load", "load_stream", "train_stream", "generate", "stream_generate", "pack", "restore")
_TYPES = ("Generation", "Manifest", "StreamConfig", "TrainedStream")
__all__ = ["__version__", *_API, *_TYPES]


def __getattr__(name: str):
    """Import the door (`api.py`) when something of it is asked for: `m2r2kit --help` answers at once."""
    if name in (*_API, *_TYPES):
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*globals(), *_API, *_TYPES]
