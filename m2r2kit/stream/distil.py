"""Distil a small module from the frozen model: the model is its own teacher.

Each batch of text windows takes one teacher forward. Its states, keys and values stay in memory as a teacher
batch, and the small module trains on the same batches for several epochs, because a forward through all
blocks costs far more than one training step.

Loss for each exit E (notebook 02):

    KL(softmax H nu(h_N) || softmax H nu(p_E))  +  weight * mean over l of 1 - cos(p_l, h_tau(l))

summed over the drafts of a chain, as in decoding: the first draft reads the model's states of all earlier
tokens; each further draft reads the stream's own p_E in place of the newest state (`chain`).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ..common import UserError
from ..model.backbone import Backbone
from ..model.cpu import parallel
from ..model.cpu.fast_math import row_exp
from .stream import AcceleratedStream, intervals, shifted, tau


@dataclass
class DistilConfig:
    """Settings of distillation.

    Attributes:
        steps: optimiser steps.
        first_step: step at which a resumed run continues.
        first_seconds: seconds that the resumed run had already taken.
        learning_rate: peak rate of AdamW.
        warmup: steps of linear warm-up.
        align_weight: weight of 1 - cos(p_l, h_tau(l)) in the loss.
        ahead: drafts of a chain in the loss; the gradient passes through all of them.
        positions: positions of each window whose logits are compared, drawn anew for each draft.
        seed: of the order of batches and of the positions.
    """

    steps: int = 2000
    first_step: int = 0
    first_seconds: float = 0.0
    learning_rate: float = 4e-3
    warmup: int = 50
    align_weight: float = 0.1
    ahead: int = 3
    positions: int = 64
    seed: int = 0


# --- the teacher ----------------------------------------------------------------------------


class KeptKV:
    """Keys and values of one block, with the part of a layer cache's interface that the stream reads."""

    def __init__(self, keys, values):
        self.keys, self.values = keys, values
        self.offset = keys.shape[2]

    def keys_and_values(self):
        return self.keys, self.values


@dataclass
class TeacherBatch:
    """States, keys and values of the frozen model on one batch of windows (B, T)."""

    tokens: mx.array  # (B, T)
    states: dict[int, mx.array]  # slow states by depth, each (B, T, D)
    cache: dict[int, KeptKV]  # slow keys and values by block


def teacher_batch(
    backbone: Backbone, windows: np.ndarray, depths: set[int], blocks: set[int]
) -> TeacherBatch:
    """Run one teacher forward over windows (B, T); keep the states at `depths`, and the keys and values of
    `blocks`.
    """
    tokens = mx.array(windows)
    cache = backbone.new_cache()
    states = backbone.states(tokens, cache)
    kept = {l: KeptKV(*map(mx.contiguous, cache[l].keys_and_values())) for l in blocks}
    batch = TeacherBatch(tokens, {d: states[d] for d in depths}, kept)
    mx.eval(batch.states, [(k.keys, k.values) for k in kept.values()])
    return batch


def needs(stream: AcceleratedStream) -> tuple[set[int], set[int]]:
    """Depths whose states and blocks whose keys and values a teacher batch must hold to train a stream."""
    depth, config = stream._backbone.depth, stream.config
    depths, blocks = {depth}, set()
    for a, b in intervals(config):
        depths |= {*range(a, b + 1), *(tau(l, a, b, depth, config.rate) for l in range(a, b + 1))}
        blocks |= set(range(a, b))
    if config.deep:
        blocks |= {f.read for f in stream.fast}
    return depths, blocks


# --- losses ---------------------------------------------------------------------------------


exp = mx.compile(row_exp)  # uncompiled, it would pass over the logits twenty times


@mx.custom_function
def distance(student, teacher):
    """KL(softmax teacher || softmax student) of logits (n, V), without the teacher's entropy; (n,)."""
    t = exp(teacher)
    mean = (t * student).sum(-1) / t.sum(-1)
    return mx.log(exp(student).sum(-1)) + student.max(-1) - mean


@distance.vjp
def _(primals, cotangent, output):
    s, t = exp(primals[0]), exp(primals[1])
    left, right = (cotangent / s.sum(-1))[:, None], (cotangent / t.sum(-1))[:, None]
    return s * left - t * right, mx.zeros_like(primals[1])


def divergence(
    backbone: Backbone,
    guess: mx.array,
    final: mx.array,
    settings: DistilConfig,
    rng: np.random.Generator,
    read: Callable | None = None,
    among: np.ndarray | None = None,
) -> mx.array:
    """Mean KL from the model's distribution to the student's, without the model's entropy. The loss of the
    stream and of every baseline. It compares `settings.positions` positions a sequence, drawn anew at each
    call.

    Args:
        guess: the student's states (B, T, D').
        final: the model's states h_N at the same positions, (B, T, D).
        read: maps the student's states to logits; by default the model's norm and head.
        among: positions to draw from, as indices 0..B T - 1; by default all.
    """
    count = settings.positions * final.shape[0]
    guess, final = (x.reshape(-1, x.shape[-1]) for x in (guess, final))
    among = np.arange(len(final)) if among is None else among
    some = mx.array(rng.choice(among, min(count, len(among)), replace=False))
    teacher = mx.stop_gradient(backbone.head(final[some]))
    return distance((read or backbone.head)(guess[some]), teacher).mean()


def cosine(x: mx.array, y: mx.array) -> mx.array:
    """Cosine similarity along the last axis."""
    return (x * y).sum(-1) * mx.rsqrt((x * x).sum(-1) * (y * y).sum(-1) + 1e-12)


def targets_of(states, a: int, b: int, depth: int, rate: float | None) -> list[mx.array]:
    """h_tau(l) for l = a + 1 .. b: the targets of p_l."""
    return [states[tau(l, a, b, depth, rate)] for l in range(a + 1, b + 1)]


def off_target(path: list[mx.array], targets: list[mx.array]) -> list[mx.array]:
    """Mean of 1 - cos(p_l, h_tau(l)) for each l = a + 1 .. b of a path p_a .. p_b."""
    return [(1 - cosine(p, t)).mean() for p, t in zip(path[1:], targets, strict=True)]


def chain(stream: AcceleratedStream, batch: TeacherBatch, ahead: int, exit: int | None = None):
    """The drafts of a chain after every position at once: yields `ahead` lists p_a .. p_E, each (B, T, D).

    Draft j (from 1) at position t is the one after token t when t and the j - 2 tokens before it are drafts
    themselves. The earlier tokens are verified, and p_E of the previous draft replaces the model's last
    state at t - 1.
    """
    carries = stream.config.carry
    before = shifted(batch.states[stream._backbone.depth]) if carries else None
    for j in range(ahead):
        verified = mx.maximum(mx.arange(batch.tokens.shape[1]) - j, 0)
        p = stream(batch.states, batch.cache, verified, exit, before)
        yield p
        before = shifted(p[-1]) if carries else None


FADES = 0.8  # weight of each further draft: decoding reaches it only if the earlier ones are accepted


def stream_loss(
    stream: AcceleratedStream, batch: TeacherBatch, settings: DistilConfig, rng: np.random.Generator
) -> mx.array:
    """The loss of this module's docstring, summed over exits and drafts; a scalar."""
    backbone, config = stream._backbone, stream.config
    depth, final = backbone.depth, batch.states[backbone.depth]
    total = 0.0
    for a, b in intervals(config):
        targets = targets_of(batch.states, a, b, depth, config.rate)
        for j, p in enumerate(chain(stream, batch, settings.ahead, b)):
            loss = divergence(backbone, p[-1], final, settings, rng)
            if settings.align_weight:
                loss = loss + settings.align_weight * sum(off_target(p, targets)) / (b - a)
            total = total + FADES**j * loss
    return total


# --- the run --------------------------------------------------------------------------------


@dataclass
class History:
    """The losses of a run, and its duration."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def own_loss(module: nn.Module, *asked) -> mx.array:
    """Call `module.loss(batch, config, rng)`; the `loss` argument of `distil`."""
    return module.loss(*asked)


def distil(
    module: nn.Module, loss, batches: list[TeacherBatch], config: DistilConfig, report=None, seconds=math.inf
) -> History:
    """Train a small module on teacher batches, in epochs, with AdamW and a cosine schedule.

    With several processes (`parallel.py`) each passes its own batches, as many as the others.

    Args:
        module: its trainable parameters change in place.
        loss: (module, batch, config, rng) -> scalar; `own_loss` for a module with a `loss` method.
        report: called with (step, loss) after each step.
        seconds: time limit, `first_seconds` included; the learning rate follows whichever of steps and time
            is further on.

    Raises:
        UserError: the loss became infinite or NaN.
    """
    rng = np.random.default_rng(config.seed)
    optimizer = optim.AdamW(learning_rate=config.learning_rate, betas=[0.9, 0.98], weight_decay=0.0)
    optimizer.init(module.trainable_parameters())
    gradient = nn.value_and_grad(module, loss)
    history, begun, order = History(), time.perf_counter() - config.first_seconds, []
    for step in range(config.first_step, config.steps):
        done = max(step / config.steps, parallel.largest((time.perf_counter() - begun) / seconds))
        if done >= 1:
            break
        optimizer.learning_rate = (
            config.learning_rate * min(1, (step + 1) / config.warmup) * 0.5 * (1 + math.cos(math.pi * done))
        )
        order = order or list(rng.permutation(len(batches)))
        batch = batches[order.pop()]
        value, gradients = gradient(module, batch, config, rng)
        optimizer.update(module, parallel.average(gradients))
        mx.eval(value, module.parameters(), optimizer.state)
        if not math.isfinite(value.item()):
            raise UserError(
                f"Training diverged: the loss is not finite at step {step}; "
                "use larger batches (--batch) or another --seed."
            )
        history.losses.append(value.item())
        if report:
            report(step, value.item())
    history.seconds = time.perf_counter() - begun
    return history
