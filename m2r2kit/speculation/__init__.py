"""Wing 2: draft a few tokens cheaply, verify them with the model in one pass, lose nothing."""

from .accept import Sampler
from .drafters import M2R2, Drafter, EarlyExit, Plain
from .loop import Generation, generate

__all__ = ["M2R2", "Drafter", "EarlyExit", "Generation", "Plain", "Sampler", "generate"]
