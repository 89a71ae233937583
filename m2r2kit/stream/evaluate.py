"""How early the model's answer can be read: agreement and cosines, by depth and by readout."""

import mlx.core as mx
import numpy as np

from ..model.backbone import Backbone
from .distil import TeacherBatch, chain, cosine
from .stream import AcceleratedStream, tau


def agreement(backbone: Backbone, state: mx.array, final: mx.array) -> float:
    """Share of the tokens whose likeliest next token is the same from `state` as from h_N; (B, T, D) each."""
    mine, right = (mx.argmax(backbone.head(x), axis=-1) for x in (state, final))
    return (mine == right).mean().item()


def by_depth(backbone: Backbone, tokens: np.ndarray) -> dict[str, list[float]]:
    """The logit lens: for each depth l = 0..N of windows (B, T), `agreement` of H nu(h_l) with the
    final token, and `cosine` of h_l with h_N."""
    states = backbone.states(mx.array(tokens))
    final = states[-1]
    return {
        "agreement": [agreement(backbone, h, final) for h in states],
        "cosine": [cosine(h, final).mean().item() for h in states],
    }


def of_readout(backbone: Backbone, readout, batches: list[TeacherBatch]) -> dict:
    """Agreement, cross-entropy against the model's own choice, and cosine to h_N of a readout.

    Args:
        readout: batch -> (B, T, D), what the head reads.
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
    """`of_readout` for p_E, and by block the cosine of p_l to h_tau(l) beside that of h_l."""
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


AHEAD = 6  # drafts of the chains below


def of_chain(backbone: Backbone, stream: AcceleratedStream, batches: list[TeacherBatch], exit: int) -> dict:
    """What chains of `AHEAD` drafts would yield from all tokens of rows that the model wrote: `chain_tau`,
    tokens a verification, and `chain_acceptance`, a_1 .. of each draft after those before it were right."""
    right = []
    for batch in batches:
        T = batch.tokens.shape[1]
        final = mx.argmax(backbone.head(batch.states[backbone.depth]), axis=-1)
        drafts = [mx.argmax(backbone.head(p[-1]), axis=-1) for p in chain(stream, batch, AHEAD, exit)]
        # draft j of the chain that begins at token t stands at t + j
        same = [np.array(d == final)[:, j : T - AHEAD + j + 1] for j, d in enumerate(drafts)]
        right.append(np.cumprod(np.stack(same, axis=-1), axis=-1).reshape(-1, AHEAD))
    reached = np.concatenate(right).mean(axis=0)  # share of chains that are right up to draft j
    a = reached / np.maximum(np.concatenate([[1.0], reached[:-1]]), 1e-9)
    return {"chain_tau": float(1 + reached.sum()), "chain_acceptance": a.tolist()}
