"""What training spends its time in, written so that a CPU does it in vector instructions.

MLX evaluates `exp` on a CPU one element at a time, and attention, SiLU and cross-entropy are
made of it. Here they stand on `fast_exp`, each with its gradient by hand: what autodiff would
keep between the passes is large, and comes fresh from the system every step.
"""

import mlx.core as mx


def fast_exp(x: mx.array) -> mx.array:
    """e^x = (e^(x/128))^128 with four terms of the series; relative error < 2e-5 for |x| < 10.

    Only products and sums, so the compiler turns it into vector instructions: 1.5 ns an
    element where `mx.exp` takes 17. Larger |x| are less exact (e^20 to 2e-4), and below -80
    it stays at e^-80, before numbers become denormal and slow.
    """
    y = mx.maximum(x, -80.0) * (1 / 128)
    p = 1 + y * (1 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24))))
    for _ in range(7):
        p = p * p
    return p


FEW_NUMBERS = 1024  # up to which one kernel that takes e^x one by one is the quickest


def falling_exp(x: mx.array) -> mx.array:
    """e^x for x <= 0 = (e^(x/16))^16 with six terms, for decoding; error < 1e-6, relative to e^0 = 1.

    Softmax and the logistic function need no more: they add e^x to a 1. Below -32 it stays near e^-32.
    Of few numbers `mx.exp` is the faster one: the terms take three kernels and it takes part of one.
    """
    if x.size <= FEW_NUMBERS:
        return mx.exp(x)
    y = mx.maximum(x, -32.0) * (1 / 16)
    y2 = y * y
    p = (1 + y) + y2 * ((1 / 2 + y * (1 / 6)) + y2 * ((1 / 24 + y * (1 / 120)) + y2 * (1 / 720)))
    for _ in range(4):
        p = p * p
    return p


def logistic(x: mx.array) -> mx.array:
    """1 / (1 + e^-x), from `falling_exp`."""
    if x.size <= FEW_NUMBERS:
        return mx.sigmoid(x)
    e = falling_exp(-mx.abs(x))
    return mx.where(x > 0, 1.0, e) / (1 + e)


def row_exp(x: mx.array) -> mx.array:
    """e^(x - the largest of its row): softmax over the last axis, not yet divided by the sum.

    The largest is subtracted because scores and logits grow beyond 88 in training, where e^x overflows.
    No result is below e^-40: times a small gradient it would be denormal, which makes products on Intel's
    processors three times slower, and beside the row's largest it is nothing.
    """
    return fast_exp(mx.maximum(x - x.max(-1, keepdims=True), -40.0))


@mx.custom_function
def attention_weights(scores, bias):
    """`row_exp` of scores + bias."""
    return row_exp(scores + bias)


@attention_weights.vjp
def _(primals, cotangent, output):
    # the row's largest cancels in the division by the sum, so it may be taken as a constant
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


ROWS = 1024  # of logits at a time: 4,096 x 4,096 numbers would come fresh from the system each time


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
        e = row_exp(h @ embedding.T)  # again: cheaper than keeping the numbers
        weight = (c / e.sum(-1))[:, None]
        d_hidden.append((e @ embedding) * weight)
        d_embedding = d_embedding + e.T @ (h * weight)
    d_hidden = mx.concatenate(d_hidden) - embedding[targets] * cotangent[:, None]
    return d_hidden, d_embedding, mx.zeros_like(targets)


@mx.custom_function
def _soft_cross_entropy(hidden, embedding, targets, taught, head, share):
    """The loss and its gradients at once: the logits are too many to keep, and two sets of them to
    compute again."""
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
    """Mean cross-entropy against 1 - `share` of the right token and `share` of a teacher's distribution.

    Args:
        hidden, embedding: the student's states (n, D) and output matrix (V, D); gradients go to these.
        targets: (n,) the right tokens.
        taught, head: the teacher's states (n, D') and output matrix (V, D').

    Returns:
        a number, in nats.
    """
    return _soft_cross_entropy(hidden, embedding, targets, taught, head, mx.array(share))[0]
