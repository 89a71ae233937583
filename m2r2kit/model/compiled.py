"""Layers and functions with fewer operations, for compiled passes on a CPU.

A pass of a small model mostly costs the launch of its operations: some seventy a block, most of which compute
nothing. MLX makes four operations of the product of one position and a matrix (transpose, flatten, product,
unflatten), and likewise in attention. `exp`, in softmax and SwiGLU, runs one element at a time. Inside
`lean_pass` the layers and functions below use fewer operations; their results agree with MLX's to about 1e-6.
Outside they are MLX's own. `view.py` puts them into a private copy of a model, so neither the model nor MLX
is changed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local

import mlx.core as mx
import mlx.nn as nn

from .cpu.fast_math import falling_exp, logistic
from .mlxlm import activations, base

here = local()  # `shared`: arrays that the blocks of this thread's lean pass share; None outside one


@contextmanager
def lean_pass() -> Iterator[None]:
    """Trace with fewer operations, in this thread; a no-op on a GPU, where MLX has fused kernels."""
    if is_lean() or mx.default_device() != mx.Device(mx.cpu):
        yield
        return
    try:
        here.shared = {}
        yield
    finally:
        here.shared = None


def is_lean() -> bool:
    """Whether this thread is inside `lean_pass`."""
    return shared() is not None


def shared() -> dict | None:
    """Arrays that the blocks of the current lean pass share, by key; None outside one."""
    return getattr(here, "shared", None)


@contextmanager
def replaced(owner, name: str, stand_in) -> Iterator[None]:
    """Give an attribute another value for a while."""
    before = getattr(owner, name, None)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, before)


def product(x: mx.array, matrix: mx.array) -> mx.array:
    """x @ matrix: x (B, T, in), matrix (in, out) -> (B, T, out); one operation in a lean pass."""
    if is_lean() and x.ndim == 3 and x.shape[0] == 1:
        matrix = matrix[None]
        mx.eval(matrix)  # evaluated, the view is a constant of the compiled pass and not an operation in it
    return x @ matrix


# --- layers -----------------------------------------------------------------------------------

SMALL, LARGE = (
    1 << 18,
    1 << 20,
)  # parameters of a matrix that may be kept twice: always, or for several positions


class LeanLinear(nn.Linear):
    """`nn.Linear` whose product is one operation in a lean pass."""

    def __call__(self, x: mx.array) -> mx.array:
        if not is_lean():
            return super().__call__(x)
        y = product(x, input_by_output(self) if self.weight.size <= SMALL else self.weight.T)
        return y + self.bias if "bias" in self else y


class LeanEmbedding(nn.Embedding):
    """`nn.Embedding` whose product as the head is one operation in a lean pass."""

    def as_linear(self, x: mx.array) -> mx.array:
        if not is_lean():
            return super().as_linear(x)
        few = x.shape[1] < 4 or self.weight.size > LARGE
        return product(x, self.weight.T if few else input_by_output(self))


def input_by_output(layer: nn.Module) -> mx.array:
    """A contiguous copy of a layer's matrix as (in, out), the layout that few_rows.c needs for several
    positions. The layer, which belongs to the private copy, keeps it until its weights change."""
    of, matrix = getattr(layer, "_input_by_output", (None, None))
    if of is not layer.weight:
        matrix = mx.contiguous(layer.weight.T)
        mx.eval(matrix)
        # not by `self.x = ..`, which would make it a parameter
        object.__setattr__(layer, "_input_by_output", (layer.weight, matrix))
    return matrix


# --- functions --------------------------------------------------------------------------------


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x."""
    if not is_lean():
        return activations.swiglu(gate, x)
    return gate * x * logistic(gate.astype(mx.float32)).astype(x.dtype)


def attention(queries, keys, values, cache, scale: float, mask, sinks=None) -> mx.array:
    """mlx-lm's `scaled_dot_product_attention`, with fewer operations for a boolean mask in a lean pass.

    queries (B, heads, T, d), keys and values (B, KV heads, capacity, d), mask (T, capacity) -> as queries.
    """
    plain = isinstance(mask, mx.array) and mask.dtype == mx.bool_ and mask.ndim <= 2
    if not is_lean() or not plain or sinks is not None or hasattr(cache, "bits"):
        return base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    B, heads, T, d = queries.shape
    repeats = heads // keys.shape[1]
    if mask.ndim == 2 and min(repeats, mask.shape[0]) > 1:
        mask = _tiled(mask, repeats)
    scores = (queries.reshape(B, -1, repeats * T, d) @ keys.swapaxes(-1, -2)) * scale
    scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    weights = falling_exp((scores - scores.max(-1, keepdims=True)).astype(mx.float32))
    y = (weights.astype(values.dtype) @ values) / weights.sum(-1, keepdims=True)
    return y.astype(queries.dtype).reshape(B, heads, T, -1)


def _tiled(mask: mx.array, repeats: int) -> mx.array:
    """The mask for query heads that share their keys, computed once for all blocks."""
    key = "mask", id(mask), repeats
    if key not in shared():  # the mask is kept too: its id is unique only while it exists
        shared()[key] = mx.tile(mask, (repeats, 1)), mask
    return shared()[key][0]
