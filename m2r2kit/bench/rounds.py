"""Arms side by side on the same prompts: equality first, then time, interleaved.

For each prompt every arm decodes in turn, and the turn moves on from prompt to prompt and from round to
round (A B C, B C A, C A B, ..), so that whatever else the machine does meets all arms alike. A speed-up is
the median over rounds of the ratio of total times, with its smallest and largest.
"""

import statistics
from collections.abc import Callable, Sequence

import numpy as np


def rounds(
    arms: Sequence,
    prompts: int,
    repeats: int,
    seconds: Callable,
    first: Callable | None = None,
    report: Callable | None = None,
) -> list[np.ndarray]:
    """Run all arms on all prompts, `repeats` times and once before.

    Args:
        arms: whatever `seconds` and `first` take.
        prompts: how many there are.
        seconds: (arm, number of a prompt) -> what it took: one number or several.
        first: (arm, number of a prompt), for the round before, which warms up: here texts are compared.
            By default `seconds`, and what it gives is not kept.
        report: called after each text.

    Returns:
        of each arm what `seconds` gave, (repeats, prompts) or (repeats, prompts, n).
    """
    taken: list[list[list]] = [[[None] * prompts for _ in range(repeats)] for _ in arms]
    for round_ in range(repeats + 1):
        for number in range(prompts):
            for step in range(len(arms)):
                which = (round_ + number + step) % len(arms)
                if round_:
                    taken[which][round_ - 1][number] = seconds(arms[which], number)
                else:
                    (first or seconds)(arms[which], number)
                if report:
                    report()
    return [np.array(each, dtype=float) for each in taken]


def ratios(plain: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of the rounds' ratios plain / other; above 1 the other is faster."""
    each = [float(p / o) for p, o in zip(plain, other, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}
