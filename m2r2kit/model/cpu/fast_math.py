"""Vectorised functions for a CPU: exp, and softmax, SwiGLU and cross-entropy made of it.

On a CPU MLX evaluates `exp` one element at a time. The functions for training use `fast_exp` and have
hand-written gradients, because autodiff would keep large intermediate arrays, whose memory is allocated anew
in every step.
"""

import mlx.core as mx


def fast_exp(x: mx.array) -> mx.array:
    """e^x = (e^(x/128))^128, with four terms of the series; relative error < 2e-5 for |x| < 10.

    It has only products and sums, which the compiler vectorises: 1.5 ns an element, where `mx.exp` takes
    17 ns. For larger |x| it is less exact (2e-4 at x = 20). x is clamped at -80, because denormal results
    would be slow.
    """
    y = mx.maximum(x, -80.0) * (1 / 128)
    p = 1 + y * (1 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24))))
    for _ in range(7):
        p = p * p
    return p


FEW = 1024  # up to this many elements, the scalar `mx.exp` is the fastest


def falling_exp(x: mx.array) -> mx.array:
    """e^x = (e^(x/16))^16 for x <= 0, with six terms, for decoding; absolute error < 1e-6.

    That suffices for softmax and the logistic function, which add e^x to 1. x is clamped at -32. For few
    elements `mx.exp` is faster, because it is part of one kernel and the series takes three.
    """
    if x.size <= FEW:
        return mx.exp(x)
    y = mx.maximum(x, -32.0) * (1 / 16)
    y2 = y * y
    p = (1 + y) + y2 * ((1 / 2 + y * (1 / 6)) + y2 * ((1 / 24 + y * (1 / 120)) + y2 * (1 / 720)))
    for _ in range(4):
        p = p * p
    return p


def logistic(x: mx.array) -> mx.array:
    """1 / (1 + e^-x), with `falling_exp`."""
    if x.size <= FEW:
        return mx.sigmoid(x)
    e = falling_exp(-mx.abs(x))
    return mx.where(x > 0, 1.0, e) / (1 + e)


def row_exp(x: mx.array) -> mx.array:
    """Softmax over the last axis without its division: e^(x - max(x)).

    The maximum is subtracted because scores and logits exceed 88 in training, where e^x overflows. Results
    are at least e^-40, which is negligible beside the maximum: smaller ones times a small gradient would be
    denormal, which makes products three times slower on Intel processors.
    """
    return fast_exp(mx.maximum(x - x.max(-1, keepdims=True), -40.0))


@mx.custom_function
def attention_weights(scores, bias):
    """`row_exp` of scores + bias."""
    return row_exp(scores + bias)


@attention_weights.vjp
def _(primals, cotangent, output):
    # the maximum cancels when the caller divides by the sum, so it is treated as a constant
    return cotangent * output, mx.zeros_like(primals[1])


@mx.custom_function
def swiglu(gate, up):
    """silu(gate) * up."""
    return gate * up / (1.0 + fast_exp(-gate))


@swiglu.vjp
def _(primals, cotangent, output):
    gate, up = primals
    s = 1.0 / (1.0 + fast_exp(-gate))
    silu = gate * s
    return cotangent * up * (s + silu * (1.0 - s)), cotangent * silu


ROWS = 1024  # of logits at once; larger arrays would be allocated from the system each time


@mx.custom_function
def cross_entropy(hidden, embedding, targets):
    """-log softmax(hidden @ embedding.T)[targets]; (n, D), (V, D), (n,) -> (n,), in nats."""
    losses = []
    for i in range(0, hidden.shape[0], ROWS):
        logits = hidden[i : i + ROWS] @ embedding.T
        right = mx.take_along_axis(logits, targets[i : i + ROWS, None], 1)[:, 0]
        losses.append(mx.log(row_exp(logits).sum(-1)) + logits.max(-1) - right)
    return mx.concatenate(losses)


@cross_entropy.vjp
def _(primals, cotangent, output):
    hidden, embedding, targets = primals
    d_embedding = mx.zeros_like(embedding).at[targets].add(-hidden * cotangent[:, None])
    d_hidden = []
    for i in range(0, hidden.shape[0], ROWS):
        h, c = hidden[i : i + ROWS], cotangent[i : i + ROWS]
        e = row_exp(h @ embedding.T)  # recomputed, which is cheaper than keeping the logits
        weight = (c / e.sum(-1))[:, None]
        d_hidden.append((e @ embedding) * weight)
        d_embedding = d_embedding + e.T @ (h * weight)
    d_hidden = mx.concatenate(d_hidden) - embedding[targets] * cotangent[:, None]
    return d_hidden, d_embedding, mx.zeros_like(targets)


@mx.custom_function
def _soft_cross_entropy(hidden, embedding, targets, taught, head, share):
    """(loss, its gradients by `hidden` and `embedding`), in one pass: the logits of student and teacher are
    too large to keep and too expensive to compute twice."""
    n = hidden.shape[0]
    losses, d_hidden, d_embedding = [], [], mx.zeros_like(embedding)
    for i in range(0, n, ROWS):
        h = hidden[i : i + ROWS]
        logits = h @ embedding.T
        e, wanted = row_exp(logits), row_exp(taught[i : i + ROWS] @ head.T)
        total, wanted = e.sum(-1), wanted * (share / wanted.sum(-1, keepdims=True))
        right = mx.take_along_axis(logits, targets[i : i + ROWS, None], 1)[:, 0]
        losses.append(mx.log(total) + logits.max(-1) - (1 - share) * right - (wanted * logits).sum(-1))
        d = e / total[:, None] - wanted
        d_hidden.append(d @ embedding)
        d_embedding = d_embedding + d.T @ h
    d_hidden = (mx.concatenate(d_hidden) - (1 - share) * embedding[targets]) / n
    d_embedding = d_embedding.at[targets].add(-(1 - share) * hidden) / n
    return mx.concatenate(losses).mean(), d_hidden, d_embedding


@_soft_cross_entropy.vjp
def _(primals, cotangents, outputs):
    rest = (mx.zeros_like(p) for p in primals[2:])
    return cotangents[0] * outputs[1], cotangents[0] * outputs[2], *rest


def soft_cross_entropy(hidden, embedding, targets, taught, head, share) -> mx.array:
    """Mean cross-entropy with a mixture of the correct tokens (1 - `share`) and a teacher (`share`).

    Args:
        hidden, embedding: the student's states (n, D) and output matrix (V, D), which get gradients.
        targets: (n,), the correct tokens.
        taught, head: the teacher's states (n, D') and output matrix (V, D').
        share: 0..1, weight of the teacher's distribution.

    Returns:
        a scalar, in nats.
    """
    return _soft_cross_entropy(hidden, embedding, targets, taught, head, mx.array(share))[0]
