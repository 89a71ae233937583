"""Wing 2: draft a few tokens cheaply, verify them with the model in one pass, lose nothing."""

from .accept import Sampler
from .decode import Generation, generate
from .drafters.base import M2R2, Drafter, EarlyExit, Plain

__all__ = ["M2R2", "Drafter", "EarlyExit", "Generation", "Plain", "Sampler", "generate"]
