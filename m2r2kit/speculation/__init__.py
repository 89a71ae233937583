"""Wing 2: draft a few tokens cheaply, verify them with the model in one pass, lose nothing."""

from .accept import Sampler
from .drafters import EarlyExit, M2R2, Plain
from .loop import Generation, generate

__all__ = ["EarlyExit", "Generation", "M2R2", "Plain", "Sampler", "generate"]
