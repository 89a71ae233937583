"""How early the model's answer can be read: agreement and cosines, by depth and by readout."""

import mlx.core as mx
import numpy as np

from .backbone import Backbone
from .residuals import AcceleratedStream, tau
from .training import Lesson, carried, cosine, unverified


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


def of_readout(backbone: Backbone, readout, lessons: list[Lesson], most_unverified: int = 6) -> dict:
    """Agreement, cross-entropy against the model's own choice, and cosine to h_N of a readout.

    Args:
        readout: (lesson, verified) -> (B, T, D), what the head reads.
    """
    rng = np.random.default_rng(0)
    totals = np.zeros(3)
    for lesson in lessons:
        final = lesson.states[backbone.depth]
        state = readout(lesson, unverified(rng, *lesson.tokens.shape, most_unverified))
        logits, right = backbone.head(state), mx.argmax(backbone.head(final), axis=-1)
        chosen = mx.take_along_axis(logits, right[..., None], -1)[..., 0]
        nats = (mx.logsumexp(logits, axis=-1) - chosen).mean().item()
        same = (mx.argmax(logits, axis=-1) == right).mean().item()
        totals += (same, nats, cosine(state, final).mean().item())
    return dict(
        zip(("agreement", "cross_entropy", "cosine_final"), (totals / len(lessons)).tolist(), strict=True)
    )


def of_stream(
    backbone: Backbone, stream: AcceleratedStream, lessons: list[Lesson], exit: int | None = None
) -> dict:
    """`of_readout` for p_E, and by block the cosine of p_l to h_tau(l) beside that of h_l."""
    exit = exit or stream.config.exits[0]
    a, b = stream.interval(exit)
    figures = of_readout(
        backbone, lambda x, v: stream(x.states, x.cache, v, exit, carried(stream, x, v))[-1], lessons
    )
    ahead, bare = [], []
    for l in range(a, b + 1):
        depth = tau(l, a, b, backbone.depth, stream.config.rate)
        pairs = [(stream(x.states, x.cache, exit=exit)[l - a], x.states[l], x.states[depth]) for x in lessons]
        ahead.append(float(np.mean([cosine(p, target).mean().item() for p, _, target in pairs])))
        bare.append(float(np.mean([cosine(h, target).mean().item() for _, h, target in pairs])))
    return figures | {"cosine_target": ahead[-1], "cosine_by_block": ahead, "cosine_bare_by_block": bare}
