"""Text that the frozen model writes itself: what its drafts will have to predict.

A predictor trained on fixed text alone loses much of what it learnt when the model decodes by
itself, so a stream is trained on both (`data/paper/choices.toml`).
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ..model.backbone import Backbone


def continue_greedily(
    backbone: Backbone, starts: Sequence[np.ndarray], length: int, report: Callable | None = None
) -> np.ndarray:
    """Continue many beginnings at once, each token the likeliest.

    Args:
        starts: token ids of each of the B beginnings; a longer one is still being read while the
            answer to a shorter one is written.
        length: tokens of a row in the end, beginning included; longer than any beginning.
        report: called with B after each token.

    Returns:
        int32 (B, length).
    """
    lengths = np.array([len(s) for s in starts])
    given = np.zeros((len(starts), lengths.max()), np.int32)
    for row, start in zip(given, starts, strict=True):
        row[: len(start)] = start
    cache, least = backbone.new_cache(length, len(starts)), lengths.min()
    columns = [mx.array(given[:, :least])]
    for position in range(least, length):
        following = mx.argmax(backbone.logits(columns[-1], cache)[:, -1:], axis=-1).astype(mx.int32)
        if position < lengths.max():
            read = mx.array(position < lengths[:, None])
            following = mx.where(read, mx.array(given[:, position : position + 1]), following)
        mx.async_eval(following)
        columns.append(following)
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
) -> list[np.ndarray]:
    """Whole questions out of a long row of token ids, so that the model is asked as a user would ask it.

    Args:
        asks, answers: the marks at which a user's turn and the answer begin; a question holds both.
        longest: tokens of a question at most.
        least: tokens of its answer at least, as there would be little to learn from a shorter one.

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
    rounds = [rng.permutation(len(found)) for _ in range(-(-rows // len(found)))]
    return [found[i] for i in np.concatenate(rounds)[:rows]] if rows else []
