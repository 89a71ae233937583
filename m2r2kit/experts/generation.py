"""What decoding with experts from disk took, and when each thing in it happened."""

from dataclasses import dataclass, field
from typing import NamedTuple

from .residency import Counts


@dataclass
class ExpertWork:
    """What the experts of one text took (`Generation.experts`).

    Attributes:
        counts: of the tokens' passes, without the prompt's; `prefill` has those of the prompt.
        in_time, late: of `counts.ahead`, those whose read was through when they were needed, or not.
        stall_seconds: spent waiting for reads, in the tokens' passes.
    """

    counts: Counts = field(default_factory=Counts)
    prefill: Counts = field(default_factory=Counts)
    in_time: int = 0
    late: int = 0
    stall_seconds: float = 0.0


class Event(NamedTuple):
    """Something in a token's pass: `compute` up to block l's router, `wait` for block l's experts, a
    `demand` read or one asked for `ahead`, from when its thread began. Times are perf_counter's."""

    kind: str
    block: int
    start: float
    end: float
    expert: int | None = None
