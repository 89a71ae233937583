"""Train predictors of experts: a stream or a direct map learns the outputs of later blocks' routers.

    loss = mean over (l, m) of KL(softmax s g_m(u_m) || softmax s g_m(the state for block m at block l))
           + align_weight * (1 - cos(p_l, h_tau(l)))                            for a stream

s scales a token's logits to a standard deviation of `SPREAD`: balanced routers have nearly flat logits, but
only the order of the experts matters. The model, including its routers, is frozen, and the teacher forward
needs all experts in memory.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..model.backbone import Backbone
from ..model.mlxlm import create_attention_mask
from ..stream.distil import DistilConfig, History, KeptKV, distance, distil, off_target, targets_of
from ..stream.stream import AcceleratedStream, StreamConfig, intervals
from . import moe
from .state_predictors import DirectMap, StreamPredictor, router

SPREAD = 2.5  # standard deviation of a router's logits in the loss


@dataclass
class RouterTeacherBatch:
    """The teacher forward of one batch of token ids (B, T).

    Attributes:
        states: h_0 .. h_N, each (B, T, D); `after`: u_0 .. u_{N-1}.
        cache: keys and values of each block.
        logits: of each router, block -> (B, T, E).
    """

    states: list[mx.array]
    after: list[mx.array]
    cache: list[KeptKV]
    logits: dict[int, mx.array]


def teacher_batch(backbone: Backbone, rows: np.ndarray) -> RouterTeacherBatch:
    """Run the frozen model on token ids (B, T)."""
    cache = backbone.new_cache()
    states, after, logits = [backbone.embed(mx.array(rows))], [], {}
    for l in range(backbone.depth):
        mask = create_attention_mask(states[-1], cache[l])
        u = moe.attend(backbone, l, states[-1], mask, cache[l])
        after.append(u)
        states.append(moe.dense(backbone, l, u))  # its experts are in memory
        if moe.has_experts(backbone, l):
            logits[l] = router(backbone, l, u)
    kept = [KeptKV(*map(mx.contiguous, c.keys_and_values())) for c in cache]
    mx.eval(states, after, logits, [(k.keys, k.values) for k in kept])
    return RouterTeacherBatch(states, after, kept, logits)


def default_exits(depth: int) -> tuple[int, ...]:
    """Intervals of one block, so that p restarts from the model's hidden state at each block; at rate 2 it
    looks two blocks ahead."""
    return tuple(range(1, max(2, depth)))


def new_stream(
    backbone: Backbone,
    rate: float,
    exits: tuple[int, ...] | None = None,
    rank: int = 0,
    ffn_width: int = 320,
) -> AcceleratedStream:
    """An untrained stream that predicts experts: shared-KV attention and a small FFN in each block. With
    `rank` 0 the attention is unchanged, so a p that begins at a block reuses the block's own attention
    output."""
    config = StreamConfig(
        "attention", exits or default_exits(backbone.depth), rate=rate, rank=rank, ffn_width=ffn_width,
        deep=0.0, carry=False,
    )  # fmt: skip
    return AcceleratedStream(backbone, config)


def predictor_of(module) -> StreamPredictor | DirectMap:
    """The predictor of a trained module."""
    return StreamPredictor(module) if isinstance(module, AcceleratedStream) else module


def loss(module, batch: RouterTeacherBatch, settings: DistilConfig, rng=None) -> mx.array:
    """The loss above, a scalar; pairs (l, m) predicted from u itself have no parameters and are left out."""
    predictor, total, pairs = predictor_of(module), 0.0, 0
    backbone = predictor._backbone
    for (l, m), state in predictor.over(batch.states, batch.after, batch.cache).items():
        if state is not batch.after[l]:
            E = batch.logits[m].shape[-1]
            said, right = router(backbone, m, state).reshape(-1, E), batch.logits[m].reshape(-1, E)
            right = mx.stop_gradient(right)
            scale = SPREAD * mx.rsqrt(right.var(-1, keepdims=True) + 1e-6)
            total, pairs = total + distance(said * scale, right * scale).mean(), pairs + 1
    total = total / max(1, pairs)
    if isinstance(module, AcceleratedStream) and settings.align_weight:
        total = total + settings.align_weight * misalignment(predictor, batch)
    return total


def misalignment(predictor: StreamPredictor, batch: RouterTeacherBatch) -> mx.array:
    """Mean of 1 - cos(p_l, h_tau(l)) over the stream's blocks."""
    N, config, apart = predictor._backbone.depth, predictor._stream.config, []
    for a, b in intervals(config):
        p = predictor.path(batch.states, batch.after, batch.cache, a, b)
        apart += off_target(p, targets_of(batch.states, a, b, N, config.rate))
    return mx.stack(apart).mean()


def train(
    module,
    batches: list[RouterTeacherBatch],
    settings: DistilConfig,
    report: Callable | None = None,
    seconds: float = math.inf,
) -> History:
    """Train a stream or a direct map in place."""
    return distil(module, loss, batches, settings, report, seconds)


def recall(
    predictor: StreamPredictor | DirectMap, batches: list[RouterTeacherBatch]
) -> dict[tuple[int, int], float]:
    """Recall on held-out text: (l, m) -> the share of block m's top-k that is predicted at block l; pairs
    predicted from u itself are left out."""
    backbone, found = predictor._backbone, {}
    k = backbone.config["num_experts_per_tok"]
    for batch in batches:
        for (l, m), state in predictor.over(batch.states, batch.after, batch.cache).items():
            if state is batch.after[l]:
                continue
            said = np.array(mx.argsort(-router(backbone, m, state), axis=-1)[..., : predictor.width])
            right = np.array(mx.argsort(-batch.logits[m], axis=-1)[..., :k])
            both = (said[..., :, None] == right[..., None, :]).any(-2).mean()
            found.setdefault((l, m), []).append(float(both))
    return {pair: float(np.mean(values)) for pair, values in found.items()}


def by_distance(recalls: dict[tuple[int, int], float]) -> dict[int, float]:
    """Mean recall by distance m - l."""
    found: dict[int, list[float]] = {}
    for (l, m), value in recalls.items():
        found.setdefault(m - l, []).append(value)
    return {distance: float(np.mean(values)) for distance, values in sorted(found.items())}
