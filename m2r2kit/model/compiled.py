"""Fewer operations in a compiled pass.

In a small model a pass mostly costs the start of its operations: some seventy a block, most of which
compute nothing. MLX splits the product of one position and a matrix into a transpose, a flattening,
the product and an unflattening, and attention on a CPU likewise. And `exp`, in softmax and SwiGLU, runs one
element at a time. Inside `lean_pass` the functions and layers below use fewer operations; their results
agree with MLX's to about 1e-6. Outside, they are MLX's own. `view.py` puts them into a private copy of a
model, so neither the model nor MLX is changed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local

import mlx.core as mx
import mlx.nn as nn

from .cpu.fast_math import falling_exp, logistic
from .mlxlm import activations, base

here = local()  # of each thread: what the blocks of the pass that it traces share, or None


@contextmanager
def lean_pass() -> Iterator[None]:
    """Trace with fewer operations, in this thread and on a CPU (elsewhere MLX has one kernel for each)."""
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
    """Arrays that all blocks of the present lean pass share, by what they depend on; None outside one."""
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
    """x @ matrix, in a lean pass as one operation: x (B, T, in), matrix (in, out) -> (B, T, out)."""
    if is_lean() and x.ndim == 3 and x.shape[0] == 1:
        matrix = matrix[None]
        mx.eval(matrix)  # a view made now is a constant of the compiled pass, not a part of it
    return x @ matrix


# --- layers -----------------------------------------------------------------------------------

SMALL, LARGE = (
    1 << 18,
    1 << 20,
)  # parameters of a matrix that may be kept twice: always, or for several positions


class LeanLinear(nn.Linear):
    """`nn.Linear`, with one operation for its product in a lean pass."""

    def __call__(self, x: mx.array) -> mx.array:
        if not is_lean():
            return super().__call__(x)
        y = product(x, input_by_output(self) if self.weight.size <= SMALL else self.weight.T)
        return y + self.bias if "bias" in self else y


class LeanEmbedding(nn.Embedding):
    """`nn.Embedding`, likewise where it is the head."""

    def as_linear(self, x: mx.array) -> mx.array:
        if not is_lean():
            return super().as_linear(x)
        few = x.shape[1] < 4 or self.weight.size > LARGE
        return product(x, self.weight.T if few else input_by_output(self))


def input_by_output(layer: nn.Module) -> mx.array:
    """A copy of a layer's matrix as (in, out), the order in which few_rows.c multiplies several positions at
    once. The layer, a private one, keeps it until it has other weights."""
    of, matrix = getattr(layer, "_input_by_output", (None, None))
    if of is not layer.weight:
        matrix = mx.contiguous(layer.weight.T)
        mx.eval(matrix)
        # a plain attribute, or MLX takes it for a parameter
        object.__setattr__(layer, "_input_by_output", (layer.weight, matrix))
    return matrix


# --- functions --------------------------------------------------------------------------------


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x."""
    if not is_lean():
        return activations.swiglu(gate, x)
    return gate * x * logistic(gate.astype(mx.float32)).astype(x.dtype)


def attention(queries, keys, values, cache, scale: float, mask, sinks=None) -> mx.array:
    """mlx-lm's `scaled_dot_product_attention`, in a lean pass by way of fewer operations for a boolean mask.

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
    y = (weights.astype(values.dtype) @ values) / weights.sum(-1, keepdims=True)  # fewer numbers to divide
    return y.astype(queries.dtype).reshape(B, heads, T, -1)


def _tiled(mask: mx.array, repeats: int) -> mx.array:
    """A mask for heads that share their keys, computed once for all blocks."""
    key = "mask", id(mask), repeats
    if key not in shared():  # the mask is kept as well: its id stands for it as long as it lives
        shared()[key] = mx.tile(mask, (repeats, 1)), mask
    return shared()[key][0]
