"""Fills: the keys and values of the blocks that a token skips.

A token that leaves at E_j has no keys and values in the blocks above. Each fill provides the state that
enters block l in place of h_l; the block's own matrices map it to keys and values, and the rest of the block
is not computed.

| fill | replacement for h_l | source |
|---|---|---|
| `copy` | the slow state at the exit | CALM, Schuster et al. 2022 |
| `p` | the accelerated state at the exit, which approximates h_N | ours |
| `linear` | a low-rank map for each block, from both and the last state of the previous token | ours |

Two alternatives need no fill: defer skipped tokens to the next deep pass (`decode.py`, as FREE and EE-LLM
do), or never go deeper again (`gates.Schedule`).
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..stream.distil import shifted

FILLS = ("copy", "p", "linear")


class Fill(nn.Module):
    """(exit index j, slow state there, state read there, last state of the previous token), each (B, T,
    D) -> a function from block l to its replacement for h_l. This class is `copy` or `p` and has no
    parameters.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def __call__(self, j: int, h: mx.array, p: mx.array, before: mx.array) -> Callable[[int], mx.array]:
        return lambda l: h if self.kind == "copy" else p

    def macs(self, l: int, j: int) -> int:
        """Multiply-accumulates for block l, without its key and value matrices."""
        return 0


class LinearFill(Fill):
    """c_jl norm(h) + norm([h, p, before]) U_j V_jl: a multiple of the exit's state, and a map of all three
    states through a bottleneck of width `rank`.

    Only the direction of the result matters, because every block starts with a norm.
    """

    def __init__(self, starts: tuple[int, ...], depth: int, width: int, rank: int):
        super().__init__("linear")
        self._starts = tuple(starts)
        self.down = [mx.zeros((3 * width, rank)) for _ in starts]
        self.up = [mx.zeros((depth - start, rank, width)) for start in starts]
        self.keep = [mx.zeros((depth - start,)) for start in starts]

    def __call__(self, j, h, p, before):
        squeezed, kept, start = features(h, p, before) @ self.down[j], unit(h), self._starts[j]
        return lambda l: self.keep[j][l - start] * kept + squeezed @ self.up[j][l - start]

    def macs(self, l, j):
        shared = self.down[j].size if l == self._starts[j] else 0
        return shared + self.up[j][0].size


def unit(x: mx.array) -> mx.array:
    """x scaled to a root mean square of 1 along the last axis."""
    return x * mx.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def features(h: mx.array, p: mx.array, before: mx.array) -> mx.array:
    """The three normalised states, concatenated, (B, T, 3 D)."""
    return mx.concatenate([unit(h), unit(p), unit(before)], axis=-1)


def fit_linear(reader, batches, depth: int, width: int, rank: int) -> LinearFill:
    """Fit a `LinearFill` in closed form, by reduced-rank regression on texts of the whole model (Izenman
    1975).

    Args:
        batches: an iterable of teacher batches that hold the slow states of all depths 0..N.
        rank: at most 3 D.
    """
    J = len(reader.exits)
    left, kept = np.zeros((J, 3 * width, 3 * width)), np.zeros((J, depth))
    right = [np.zeros((depth - start, 3 * width, width)) for start in reader.starts]
    for batch in batches:
        targets = [np.array(unit(batch.states[l]), np.float64).reshape(-1, width) for l in range(depth)]
        before = shifted(batch.states[depth])
        for j, start in enumerate(reader.starts):
            x = features(batch.states[start], reader.over(j, batch), before)
            x = np.array(x, np.float64).reshape(-1, 3 * width)
            left[j] += x.T @ x
            for l in range(start, depth):
                right[j][l - start] += x.T @ targets[l]
                kept[j, l] += (x[:, :width] * targets[l]).sum()
    fill = LinearFill(reader.starts, depth, width, rank)
    for j in range(J):
        a = left[j] + 1e-4 * np.trace(left[j]) / len(left[j]) * np.eye(3 * width)
        keep = kept[j, reader.starts[j] :] / np.trace(left[j][:width, :width])  # least squares on h alone
        right[j] -= keep[:, None, None] * left[j][:, :width]
        values, vectors = np.linalg.eigh(a)
        back = vectors * values**-0.5 @ vectors.T
        seen = back @ np.concatenate(list(right[j]), axis=1)  # on whitened features, for all blocks
        _, basis = np.linalg.eigh(seen @ seen.T)
        basis = basis[:, -rank:]
        fill.keep[j] = mx.array(keep.astype(np.float32))
        fill.down[j] = mx.array((back @ basis).astype(np.float32))
        up = (basis.T @ seen).reshape(rank, -1, width).swapaxes(0, 1)
        fill.up[j] = mx.array(np.ascontiguousarray(up, dtype=np.float32))
    mx.eval(fill.parameters())
    return fill
