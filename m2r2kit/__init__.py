"""m2r2kit: multi-rate residuals (M2R2, arXiv 2502.02040), to learn, reproduce and use."""

from .common import on_demand

__version__ = "0.1.0"

_API = ("load", "load_stream", "train_stream", "generate", "stream_generate", "pack", "restore")
_TYPES = ("Generation", "Manifest", "StreamConfig", "TrainedStream")
__all__ = ["__version__", *_API, *_TYPES]

__getattr__, __dir__ = on_demand(__name__, {"api": " ".join(_API + _TYPES)})  # and every subpackage
