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
    cache = backbone.new_cache(length, len(starts))
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


def beginnings(ids: np.ndarray, rows: int, width: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Beginnings of `width` tokens each, from anywhere in a long row of token ids."""
    starts = rng.choice(len(ids) - width, rows, replace=len(ids) - width < rows)
    return [ids[s : s + width] for s in starts]


def questions(
    ids: np.ndarray,
    asks: int,
    answers: int,
    rows: int,
    longest: int,
    rng: np.random.Generator,
    least: int = 32,
    together: int = 64,
) -> list[np.ndarray]:
    """Whole questions out of a long row of token ids, so that the model is asked as a user would ask it.

    Args:
        asks, answers: the marks at which a user's turn and the answer begin; a question holds both.
        longest: tokens of a question at most.
        least: tokens of its answer at least, as there would be little to learn from a shorter one.
        together: so many of one length, if there are, for the model answers them in one batch.

    Returns:
        `rows` of them, some twice if there are not so many; none if there are none at all.
    """
    turns = np.flatnonzero(ids == asks)
    found = []
    for start, following in zip(turns, [*turns[1:], len(ids)][: len(turns)], strict=True):
        marks = np.flatnonzero(ids[start:following] == answers)
        if len(marks) and marks[0] < longest and following - start - marks[0] > least:
            found.append(ids[start : start + marks[0] + 1])
    if not found:
        return []
    of_length: dict[int, list] = {}
    for i in rng.permutation(len(found)):
        of_length.setdefault(len(found[i]), []).append(found[i])
    groups = [same[i : i + together] for same in of_length.values() for i in range(0, len(same), together)]
    chosen: list[np.ndarray] = []
    while len(chosen) < rows:  # large groups first to last, each as likely as it has questions
        sizes = np.array([len(g) for g in groups], float)
        for i in rng.choice(len(groups), len(groups), replace=False, p=sizes / sizes.sum()):
            chosen += groups[i][: rows - len(chosen)]
    return chosen
