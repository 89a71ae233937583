"""Baselines of the stream: other readouts at an exit, with as many parameters.

| readout | state that the head reads | related to |
|---|---|---|
| `Bare` | h_E | logit lens, LayerSkip's draft |
| `WideHead` | h_E + Up silu(Down norm(h_E)) | tuned lens, Medusa's first head |
| `ExtraBlock` | one more transformer block on h_E | Kangaroo, EESD |

Each is called with a teacher batch and returns the state (B, T, D).
"""

import mlx.core as mx
import mlx.nn as nn

from ..model.backbone import Backbone
from .fast_block import SmallFFN, head_dim


class Bare(nn.Module):
    """The hidden state at the exit, unchanged. It has no parameters."""

    def __init__(self, exit: int):
        super().__init__()
        self.exit = exit

    def __call__(self, batch) -> mx.array:
        return batch.states[self.exit]


class WideHead(nn.Module):
    """A residual layer before the head; its hidden width follows from the number of parameters."""

    def __init__(self, backbone: Backbone, exit: int, parameters: int):
        super().__init__()
        self.exit = exit
        self.ffn = SmallFFN(backbone.width, max(1, parameters // (2 * backbone.width)))

    def __call__(self, batch) -> mx.array:
        h = batch.states[self.exit]
        return h + self.ffn(h)


class ExtraBlock(nn.Module):
    """One more transformer block on h_E, with its own keys and values."""

    def __init__(self, backbone: Backbone, exit: int, parameters: int):
        super().__init__()
        D = backbone.width
        self.exit, self._head_dim = exit, head_dim(backbone)
        self._rope = backbone.blocks[0][backbone.parts.attention].rope
        self._heads = D // self._head_dim
        self.norm = nn.RMSNorm(D)
        self.qkv = mx.random.normal((D, 3 * D)) * D**-0.5
        self.o = mx.zeros((D, D))
        self.ffn = SmallFFN(D, max(1, (parameters - 4 * D * D) // (2 * D)))

    def __call__(self, batch) -> mx.array:
        h = batch.states[self.exit]
        B, T, D = h.shape
        shape = (B, T, self._heads, self._head_dim)
        q, k, v = (
            y.reshape(shape).transpose(0, 2, 1, 3) for y in mx.split(self.norm(h) @ self.qkv, 3, axis=-1)
        )
        scale = self._head_dim**-0.5
        y = mx.fast.scaled_dot_product_attention(self._rope(q), self._rope(k), v, scale=scale, mask="causal")
        h = h + y.transpose(0, 2, 1, 3).reshape(B, T, D) @ self.o
        return h + self.ffn(h)
