"""mlx-lm's own generation of the same weights, as a decoder: what plain decoding is compared with."""

from contextlib import nullcontext

import mlx.core as mx

from ..driver import Decoder, Emitted
from ..model.backbone import Backbone
from ..model.mlxlm import generate_step


class MlxLm(Decoder):
    """`mlx_lm.generate.generate_step`, step by step; it reads the prompt with the first one.

    Args:
        sampler: as `mlx_lm.sample_utils.make_sampler` makes them; by default greedy.
    """

    def __init__(self, backbone: Backbone, sampler=None):
        self.backbone, self.sampler = backbone, sampler

    def begin(self, prompt, capacity):
        self._prompt, self._steps, self._eos = mx.array(prompt), None, self.backbone.eos

    def step(self, pending, left):
        if self._steps is None:  # now the most that it may emit is known
            self._steps = generate_step(
                self._prompt, self.backbone.model, max_tokens=left, sampler=self.sampler
            )
        token = int(next(self._steps)[0])
        if left == 1 or token in self._eos:
            self._steps.close()  # it has set a stream of its own
        return Emitted([token])

    def threads(self):
        return nullcontext()  # as a user of mlx-lm has them
