"""Text that the frozen model writes itself: what its drafts will have to predict.

A predictor trained on fixed text alone loses much of what it learnt when the model decodes by
itself, so a stream is trained on both (`data/paper/choices.toml`).
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from .backbone import Backbone


def continue_greedily(
    backbone: Backbone, starts: np.ndarray, length: int, report: Callable | None = None
) -> np.ndarray:
    """Continue many beginnings at once, each token the likeliest.

    Args:
        starts: token ids (B, P).
        length: tokens of a row in the end, beginning included.

    Returns:
        int32 (B, length).
    """
    cache = backbone.new_cache()
    columns = [mx.array(starts)]
    token = mx.argmax(backbone.logits(columns[0], cache)[:, -1:], axis=-1)
    while True:
        columns.append(token)
        if sum(c.shape[1] for c in columns) >= length:
            break
        following = mx.argmax(backbone.logits(token, cache), axis=-1)
        mx.async_eval(following)
        token = following
        if report:
            report(len(starts))
    return np.asarray(mx.concatenate(columns, axis=1)).astype(np.int32)


def beginnings(
    ids: np.ndarray, marks: set[int], rows: int, width: int, rng: np.random.Generator
) -> np.ndarray:
    """Beginnings (rows, width) of a long row of token ids; where the text has marks of a new
    turn or document, at a mark, so that the model is asked as a user would ask it."""
    places = np.flatnonzero(np.isin(ids[:-width], list(marks))) if marks else np.empty(0, dtype=int)
    if len(places) < rows:
        places = np.arange(len(ids) - width)
    starts = rng.choice(places, rows, replace=len(places) < rows)
    return np.stack([ids[s : s + width] for s in starts])
