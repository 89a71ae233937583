"""Counts, waits and events of decoding with experts from disk."""

from dataclasses import dataclass, field
from typing import NamedTuple

from .residency import Counts


@dataclass
class ExpertWork:
    """Counts and waits of one text (`Generation.experts`).

    Attributes:
        counts: of the tokens' passes; `prefill` has those of the prompt.
        in_time, late: of `counts.ahead`, the prefetches that had finished when needed, and the others.
        stall_seconds: time spent waiting for reads, in the tokens' passes.
    """

    counts: Counts = field(default_factory=Counts)
    prefill: Counts = field(default_factory=Counts)
    in_time: int = 0
    late: int = 0
    stall_seconds: float = 0.0


class Event(NamedTuple):
    """One event of a token's pass: `compute` up to the router of `block`, `wait` for its experts, or a
    `demand` or `ahead` read of `expert`, from the moment its thread starts it. Times are from
    `time.perf_counter`."""

    kind: str
    block: int
    start: float
    end: float
    expert: int | None = None
