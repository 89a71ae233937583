"""mlx-lm's own generation with the same weights, as a decoder: the reference for plain decoding."""

from contextlib import nullcontext

import mlx.core as mx

from ..driver import Decoder, Emitted
from ..model.backbone import Backbone
from ..model.mlxlm import generate_step


class MlxLm(Decoder):
    """`mlx_lm.generate.generate_step`, one token a step. The first step reads the prompt.

    Args:
        sampler: as made by `mlx_lm.sample_utils.make_sampler`; by default greedy.
    """

    def __init__(self, backbone: Backbone, sampler=None):
        self.backbone, self.sampler = backbone, sampler

    def begin(self, prompt, capacity):
        self._prompt, self._steps, self._eos = mx.array(prompt), None, self.backbone.eos

    def step(self, pending, left):
        if self._steps is None:  # `left` is the token limit in the first step
            self._steps = generate_step(
                self._prompt, self.backbone.model, max_tokens=left, sampler=self.sampler
            )
        token = int(next(self._steps)[0])
        if left == 1 or token in self._eos:
            self._steps.close()  # restores MLX's stream
        return Emitted([token])

    def threads(self):
        return nullcontext()  # mlx-lm's default threads
