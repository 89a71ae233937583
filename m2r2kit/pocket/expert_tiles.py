"""A mixture's experts over many tokens, as large matrix products for a CPU.

mlx-lm multiplies one row by one expert's matrix at a time, which is 20 times slower on a CPU. Here the
rows are sorted by expert and each expert's rows are padded to whole tiles; a tile is one product. All
shapes are known before the routing, so the whole step compiles. (The idea of MegaBlocks, Gale et al. 2022,
arXiv 2211.15841: no token is dropped, and experts have no capacity limit.)
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model.cpu.fast_math import fast_exp, swiglu

TILE = 64  # rows per product; 32 and 128 are slower with 16,384 rows and 32 experts


def tiles(chosen: mx.array, experts: int) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Assign each (token, expert) pair to a place in the tiles; P = TILE * (n * k // TILE + experts) places.

    Args:
        chosen: (n, k) distinct expert ids of each token.

    Returns:
        slot: (n, k), the place of each pair;
        choice: (P,), the pair (token * k + column of `chosen`) in each place, n * k for padding;
        owner: (P / TILE,), the expert of each tile;
        segments: (experts, 2), first place of an expert's tiles and the place after its last.
    """
    n = chosen.size
    flat = chosen.reshape(-1)
    count = n // TILE + experts  # an upper bound: at most one tile per expert is partly filled
    sizes = (flat[:, None] == mx.arange(experts)).sum(0)
    ends = mx.cumsum((sizes + TILE - 1) // TILE)
    first = mx.concatenate([mx.zeros(1, ends.dtype), ends[:-1]]) * TILE
    order = mx.argsort(flat)
    expert = flat[order]
    place = first[expert] + mx.arange(n) - (mx.cumsum(sizes) - sizes)[expert]
    slot = place[mx.argsort(order)].reshape(chosen.shape)
    choice = mx.put_along_axis(mx.full((count * TILE,), n), place, order.astype(mx.int32), 0)
    owner = mx.minimum((mx.arange(count)[:, None] >= ends).sum(1), experts - 1)
    return slot, choice, owner.astype(mx.uint32), mx.stack([first, ends * TILE], 1).astype(mx.uint32)


def _products(rows: mx.array, stack: mx.array, owner: mx.array) -> mx.array:
    """Multiply each tile of rows (P, a) by its expert's matrix of a stack (experts, a, b): (P, b)."""
    y = mx.gather_mm(rows.reshape(len(owner), TILE, -1), stack, rhs_indices=owner)
    return y.reshape(len(rows), -1)


def expert_sum(x: mx.array, scores: mx.array, chosen: mx.array, weights: dict) -> mx.array:
    """Sum of score * expert(token) over a token's experts; an expert is a SwiGLU FFN.

    Args:
        x: (n, D) hidden states. scores, chosen: (n, k) weight and id of each token's experts.
        weights: `gate_proj`, `up_proj` (experts, F, D) and `down_proj` (experts, D, F), as in `SwitchGLU`.

    Returns:
        (n, D); differentiable in x, scores and the weights.
    """
    gate, up, down = (weights[f"{name}_proj"]["weight"] for name in ("gate", "up", "down"))
    places = tiles(mx.stop_gradient(chosen), len(gate))
    return _expert_sum(x, scores, gate, up, down, *places)[0]


def _rows(x: mx.array, choice: mx.array, k: int) -> mx.array:
    """The hidden state of each place: (P, D). Padding holds an arbitrary one."""
    return x[mx.minimum(choice // k, len(x) - 1)]


def _outputs(rows, gate, up, down, owner) -> tuple[mx.array, mx.array, mx.array]:
    """Expert output of each place (P, D), and the gate and up projections (P, F)."""
    g, u = (_products(rows, w.swapaxes(1, 2), owner) for w in (gate, up))
    return _products(swiglu(g, u), down.swapaxes(1, 2), owner), g, u


@mx.custom_function
def _expert_sum(x, scores, gate, up, down, slot, choice, owner, segments):
    rows = _rows(x, choice, scores.shape[1])
    y, g, u = _outputs(rows, gate, up, down, owner)
    # also returns what the backward pass needs: computing it again would cost a third of the step
    return (y[slot] * scores[..., None]).sum(1), rows, g, u, y


@_expert_sum.vjp
def _(primals, cotangents, outputs):
    _, scores, gate, up, down, slot, choice, owner, segments = primals
    (_, rows, g, u, y), d = outputs, cotangents[0]
    weight = mx.concatenate([scores.reshape(-1), mx.zeros(1)])[choice]  # (P,), 0 for padding
    d_scores = (y[slot] @ d[..., None]).squeeze(-1)
    d_y = _rows(d, choice, scores.shape[1]) * weight[:, None]
    d_a = _products(d_y, down, owner)
    s = 1.0 / (1.0 + fast_exp(-g))
    silu = g * s
    d_g, d_u = d_a * u * (s + silu * (1.0 - s)), d_a * silu
    d_rows = _products(d_g, gate, owner) + _products(d_u, up, owner)
    d_weights = (mx.segmented_mm(a.T, b, segments) for a, b in ((d_g, rows), (d_u, rows), (d_y, silu * u)))
    rest = (mx.zeros_like(p) for p in primals[5:])
    return d_rows[slot].sum(1), d_scores, *d_weights, *rest


class TiledExperts(nn.Module):
    """Replaces a float32 `SwitchGLU`: the same outputs, and `used` counts the tokens of each expert."""

    def __init__(self, switch):
        super().__init__()
        self.stacks = [getattr(switch, f"{name}_proj").weight for name in ("gate", "up", "down")]
        self.used = np.zeros(len(self.stacks[0]), dtype=np.int64)

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """(..., D) hidden states and (..., k) ids of their experts -> (..., k, D)."""
        self.used += np.bincount(np.array(chosen).ravel(), minlength=len(self.used))
        k, D = chosen.shape[-1], x.shape[-1]
        slot, choice, owner, _ = tiles(chosen.reshape(-1, k), len(self.used))
        y, _, _ = _outputs(_rows(x.reshape(-1, D), choice, k), *self.stacks, owner)
        return y[slot].reshape(*chosen.shape, D)
