"""Agreement with the model's final token and cosine to its states, by depth and by readout."""

import mlx.core as mx
import numpy as np

from ..model.backbone import Backbone
from .distil import TeacherBatch, chain, cosine
from .stream import AcceleratedStream, tau


def agreement(backbone: Backbone, state: mx.array, final: mx.array) -> float:
    """Fraction of positions at which `state` and h_N predict the same token; both are (B, T, D)."""
    mine, right = (mx.argmax(backbone.head(x), axis=-1) for x in (state, final))
    return (mine == right).mean().item()


def by_depth(backbone: Backbone, tokens: np.ndarray) -> dict[str, list[float]]:
    """The logit lens on windows (B, T): for each depth l = 0..N, `agreement` of H nu(h_l) with the final
    token, and `cosine` of h_l with h_N.
    """
    states = backbone.states(mx.array(tokens))
    final = states[-1]
    return {
        "agreement": [agreement(backbone, h, final) for h in states],
        "cosine": [cosine(h, final).mean().item() for h in states],
    }


def of_readout(backbone: Backbone, readout, batches: list[TeacherBatch]) -> dict:
    """`agreement` of a readout, its `cross_entropy` against the model's greedy token in nats, and its
    `cosine_final` to h_N.

    Args:
        readout: maps a teacher batch to the state that the head reads, (B, T, D).
    """
    totals = np.zeros(3)
    for batch in batches:
        final = batch.states[backbone.depth]
        state = readout(batch)
        logits, right = backbone.head(state), mx.argmax(backbone.head(final), axis=-1)
        chosen = mx.take_along_axis(logits, right[..., None], -1)[..., 0]
        nats = (mx.logsumexp(logits, axis=-1) - chosen).mean().item()
        same = (mx.argmax(logits, axis=-1) == right).mean().item()
        totals += (same, nats, cosine(state, final).mean().item())
    return dict(
        zip(("agreement", "cross_entropy", "cosine_final"), (totals / len(batches)).tolist(), strict=True)
    )


def of_stream(
    backbone: Backbone, stream: AcceleratedStream, batches: list[TeacherBatch], exit: int | None = None
) -> dict:
    """`of_readout` and `of_chain` for p_E, and for each block the cosine to h_tau(l) of p_l and of h_l."""
    exit = exit or stream.config.exits[0]
    a, b = stream.interval(exit)
    figures = of_readout(backbone, lambda x: stream(x.states, x.cache, exit=exit)[-1], batches)
    ahead, bare = [], []
    for l in range(a, b + 1):
        depth = tau(l, a, b, backbone.depth, stream.config.rate)
        pairs = [(stream(x.states, x.cache, exit=exit)[l - a], x.states[l], x.states[depth]) for x in batches]
        ahead.append(float(np.mean([cosine(p, target).mean().item() for p, _, target in pairs])))
        bare.append(float(np.mean([cosine(h, target).mean().item() for _, h, target in pairs])))
    figures |= {"cosine_target": ahead[-1], "cosine_by_block": ahead, "cosine_bare_by_block": bare}
    return figures | of_chain(backbone, stream, batches, exit)


AHEAD = 6  # drafts of a chain in `of_chain`


def of_chain(backbone: Backbone, stream: AcceleratedStream, batches: list[TeacherBatch], exit: int) -> dict:
    """Simulate chains of `AHEAD` drafts after every position of text that the model generated: `chain_tau`
    is the number of tokens a verification yields; `chain_acceptance` holds a_1 .. a_AHEAD, the acceptance
    rate of each draft given that the earlier ones are accepted.
    """
    right = []
    for batch in batches:
        T = batch.tokens.shape[1]
        final = mx.argmax(backbone.head(batch.states[backbone.depth]), axis=-1)
        drafts = [mx.argmax(backbone.head(p[-1]), axis=-1) for p in chain(stream, batch, AHEAD, exit)]
        # draft j of the chain after position t is at position t + j
        same = [np.array(d == final)[:, j : T - AHEAD + j + 1] for j, d in enumerate(drafts)]
        right.append(np.cumprod(np.stack(same, axis=-1), axis=-1).reshape(-1, AHEAD))
    reached = np.concatenate(right).mean(axis=0)  # fraction of chains that are right up to draft j
    a = reached / np.maximum(np.concatenate([[1.0], reached[:-1]]), 1e-9)
    return {"chain_tau": float(1 + reached.sum()), "chain_acceptance": a.tolist()}
