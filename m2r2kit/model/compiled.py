"""Fewer operations in a compiled pass.

In a small model a pass is mostly the cost of starting its operations one by one: some seventy in
each block, of which the greater part moves no number. MLX takes a row times a matrix apart into
a transpose, a flattening, the product and an unflattening, and attention on a CPU likewise. And
`exp`, of which attention and SwiGLU are made, is taken one element at a time. While a pass is
traced, the functions below stand in their places. Each computes the same to some 1e-6.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from threading import RLock, local

import mlx.core as mx
import mlx.nn as nn

from .cpu.fast_math import falling_exp, logistic
from .rotation import shared_angles

attention = mx.fast.scaled_dot_product_attention
lock, here = RLock(), local()  # one pass at a time, and other threads compute as always


@contextmanager
def lean_pass():
    """Whatever this thread traces inside is made of fewer operations."""
    if mx.default_device() != mx.Device(mx.cpu):
        yield  # elsewhere MLX has one kernel for each of these
        return
    stand_ins = [
        (nn.RoPE, "__call__", shared_angles()),
        (nn.Linear, "__call__", linear),
        (nn.Embedding, "as_linear", as_linear),
        (mx.fast, "scaled_dot_product_attention", shared_attention()),
    ]
    for name, module in list(sys.modules.items()):  # each family took it by its name
        if name.startswith("mlx_lm.models.") and hasattr(module, "swiglu"):
            stand_ins.append((module, "swiglu", swiglu))
    with lock, ExitStack() as stack:
        stack.enter_context(replaced(here, "tracing", True))
        for owner, name, stand_in in stand_ins:
            stack.enter_context(replaced(owner, name, in_this_thread(stand_in, getattr(owner, name))))
        yield


def is_lean() -> bool:
    """Whether this thread is tracing such a pass."""
    return getattr(here, "tracing", False)


@contextmanager
def replaced(owner, name: str, stand_in):
    """A value that stands in another's place for a while."""
    before = getattr(owner, name, None)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, before)


def in_this_thread(stand_in: Callable, before: Callable) -> Callable:
    """A function that does what it did before for whoever is not tracing."""

    def function(*arguments, **options):
        return (stand_in if is_lean() else before)(*arguments, **options)

    return function


def product(x: mx.array, matrix: mx.array) -> mx.array:
    """x @ matrix, in a lean pass as one operation: x (B, T, in), matrix (in, out) -> (B, T, out)."""
    if is_lean() and x.ndim == 3 and x.shape[0] == 1:
        matrix = matrix[None]
        mx.eval(matrix)  # a view made now is a constant of the compiled pass, not a part of it
    return x @ matrix


SMALL, LARGE = 1 << 18, 1 << 20  # numbers of a matrix that may be kept a second time: always, for some rows


def linear(layer: nn.Linear, x: mx.array) -> mx.array:
    y = product(x, input_by_output(layer) if layer.weight.size <= SMALL else layer.weight.T)
    return y + layer.bias if "bias" in layer else y


def as_linear(embedding: nn.Embedding, x: mx.array) -> mx.array:
    few = x.shape[1] < 4 or embedding.weight.size > LARGE
    return product(x, embedding.weight.T if few else input_by_output(embedding))


def input_by_output(layer: nn.Module) -> mx.array:
    """A copy of a layer's matrix in the order (in, out), in which few_rows.c multiplies several rows at
    once. The layer keeps it, for all passes, until it has new weights."""
    of, matrix = getattr(layer, "_input_by_output", (None, None))
    if of is not layer.weight:
        matrix = mx.contiguous(layer.weight.T)
        mx.eval(matrix)
        # a plain attribute, or MLX takes it for a parameter
        object.__setattr__(layer, "_input_by_output", (layer.weight, matrix))
    return matrix


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x."""
    return gate * x * logistic(gate.astype(mx.float32)).astype(x.dtype)


def shared_attention() -> Callable:
    """What stands in for attention in one pass, where the mask is a yes or no."""
    masks: dict[int, tuple] = {}  # those for heads that share their keys: all blocks use the same

    def attend(q, k, v, *, scale, mask=None, sinks=None):
        """q (B, heads, T, d), k and v (B, shared heads, room, d), mask (T, room) -> as q."""
        plain = isinstance(mask, mx.array) and mask.dtype == mx.bool_ and mask.ndim <= 2
        if sinks is not None or not plain:
            return attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
        B, heads, T, d = q.shape
        repeats = heads // k.shape[1]
        if mask.ndim == 2 and min(repeats, mask.shape[0]) > 1:
            if id(mask) not in masks:  # the mask is kept as well: its id stands for it as long as it lives
                masks[id(mask)] = mx.tile(mask, (repeats, 1)), mask
            mask = masks[id(mask)][0]
        scores = (q.reshape(B, -1, repeats * T, d) @ k.swapaxes(-1, -2)) * scale
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
        weights = falling_exp((scores - scores.max(-1, keepdims=True)).astype(mx.float32))
        y = (weights.astype(v.dtype) @ v) / weights.sum(-1, keepdims=True)  # fewer numbers to divide
        return y.astype(q.dtype).reshape(B, heads, T, -1)

    return attend
