"""Who drafts. Each drafter leaves the slow states of its tokens at its exit, for the verification.

A drafter runs the blocks below its exit on the real tokens, so the slow states and the slow
keys and values of those blocks are already those of the model; the verification goes on from
there. `exit` 0 means that nothing was computed ahead.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..backbone import Backbone
from ..errors import UserError
from ..residuals import AcceleratedStream
from .accept import Sampler


@dataclass
class Draft:
    """K drafted tokens (a lazy array while greedy), the slow states h_E of the pending token and
    of the first K - 1 drafts, and the probabilities that the tokens were drawn from."""

    tokens: list
    states: list[mx.array]
    q: list[np.ndarray]


class Plain:
    """Drafts nothing: the loop is then plain decoding."""

    exit = 0

    def __call__(self, token, drafts: int, sampler: Sampler, cache: list, verified: int) -> Draft:
        return Draft([], [], [])


class EarlyExit:
    """Reads the bare residual h_E at the exit (the logit lens): LayerSkip's draft without its training."""

    def __init__(self, backbone: Backbone, exit: int):
        if not 1 <= exit < backbone.depth:
            raise UserError(f"The exit must lie between 1 and {backbone.depth - 1}; got {exit}.")
        self.backbone, self.exit = backbone, exit

    def _read(self, token: mx.array, cache: list, verified: int) -> tuple[mx.array, mx.array]:
        """What comes of one token (1, 1): the slow state at the exit (1, 1, D), and logits (1, 1, V)."""
        return self.backbone.read(token, cache, self.exit)

    def __call__(self, token, drafts: int, sampler: Sampler, cache: list, verified: int) -> Draft:
        """Draft after the pending token.

        Args:
            token: the newest token, not yet in the cache; an int or a (1, 1) array.
            verified: positions of the cache that the model has verified.
        """
        draft = Draft([], [], [])
        token = mx.array([[token]]) if isinstance(token, int) else token
        for _ in range(drafts):
            h, logits = self._read(token, cache, verified)
            draft.states.append(h)
            if sampler.greedy:  # stays lazy: the whole draft is computed with its verification
                token = mx.argmax(logits, axis=-1)
                draft.tokens.append(token)
            else:
                q = sampler.probabilities(logits[0])[0]
                drawn = sampler.draw(q)
                draft.tokens.append(drawn)
                draft.q.append(q)
                token = mx.array([[drawn]])
        return draft


class M2R2(EarlyExit):
    """Reads the accelerated residual p_E, which stands for the end of the model."""

    def __init__(self, backbone: Backbone, stream: AcceleratedStream, exit: int | None = None):
        super().__init__(backbone, exit or stream.config.exits[0])
        self.stream = stream
        stream.interval(self.exit)  # refuses an exit that it was not trained for

    def _read(self, token, cache, verified):
        return self.stream.read(token, cache, verified, self.exit)
