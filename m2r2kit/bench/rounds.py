"""Run arms interleaved on the same prompts: first a comparison of the texts, then timing.

For each prompt all arms decode in turn, and the order rotates with each prompt and round (A B C, B C A,
C A B, ..), so that other load on the machine affects all arms equally. A speed-up is the median over rounds
of the ratio of total times, with minimum and maximum.
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
    """Run all arms on all prompts in one warm-up round and `repeats` timed rounds.

    Args:
        arms: the first argument of `seconds` and `first`.
        prompts: number of prompts.
        seconds: (arm, index of a prompt) -> one or several times.
        first: (arm, index of a prompt), for the warm-up round, where texts are compared; by default
            `seconds`, with its result discarded.
        report: called after each text.

    Returns:
        the results of `seconds` per arm, (repeats, prompts) or (repeats, prompts, n).
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
    """Median, minimum and maximum over rounds of plain / other; above 1 the other is faster."""
    each = [float(p / o) for p, o in zip(plain, other, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}
