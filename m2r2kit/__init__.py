"""m2r2kit: multi-rate residuals (M2R2, arXiv 2502.02040), to learn, reproduce and use."""

from .model.cpu.threads import prepare as _prepare

__version__ = "0.1.0"

_prepare()
