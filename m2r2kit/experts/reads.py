"""The reads of a decoder: issued for the bookkeeping, reordered when routers decide, awaited when needed."""

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from .generation import Event, ExpertWork
from .policies import Expert
from .reader import AHEAD, PARKED, Reader, Request
from .residency import Load, Residency
from .slots import Bank
from .trace import Predicted


class Reads:
    """Carries out the loads of a `Residency`.

    Args:
        bank_of: block -> the slots of its pool.
        timeline: `Event`s are appended to it; reads when they are used.

    Attributes:
        pending: reads of experts that have not been used since.
        work: counts and waits, replaced for each text.
    """

    def __init__(
        self,
        reader: Reader,
        residency: Residency,
        bank_of: dict[int, Bank],
        timeline: list[Event] | None = None,
    ):
        self.reader, self.residency, self.bank_of, self.timeline = reader, residency, bank_of, timeline
        self.pending: dict[Expert, Request] = {}
        self.work = ExpertWork()

    def fill(self, loads: Sequence[Load]) -> None:
        """Carry out the initial loads of all experts, if all fit, and wait for them."""
        self.start(loads, urgent=True)
        self.reader.wait(self.pending.pop(load.key) for load in loads)

    def start(self, loads: Sequence[Load], urgent: bool) -> None:
        """Issue reads and cancel pending reads of the evicted experts."""
        for key, slot, evicted in loads:
            if evicted in self.pending:
                self.reader.cancel(self.pending.pop(evicted))
            l, expert = key
            self.pending[key] = self.reader.submit(l, expert, _into(self.bank_of[l], slot), urgent)

    def sort(self, l: int, wanted: Sequence[int], predicted: Predicted) -> None:
        """After block l's router: park wrong predictions for it, and requeue parked reads that are predicted
        again."""
        pending = self.pending
        if not pending:
            return
        self.again((m, experts) for m, experts in predicted if m != l)
        wrong = self.residency.wrong(l, wanted)
        self.reader.rank([pending[key] for key in wrong if key in pending], PARKED)

    def again(self, predicted: Iterable[tuple[int, Sequence[int]]]) -> None:
        """Requeue parked reads that are predicted again."""
        keys = ((m, expert) for m, experts in predicted for expert in experts)
        requests = [self.pending[key] for key in keys if key in self.pending]
        self.reader.rank([r for r in requests if r.rank == PARKED], AHEAD)

    def ready(self, l: int, experts: Sequence[int]) -> list[int]:
        """Wait until these experts of block l are in memory and return their slots."""
        keys, held, work = [(l, e) for e in experts], self.residency.pool_of[l].held, self.work
        waiting = [self.pending.pop(key) for key in keys if key in self.pending]
        if waiting:
            for request in waiting:
                if not request.urgent:
                    work.in_time += request.done
                    work.late += not request.done
            begun = time.perf_counter()
            self.reader.wait(waiting)
            ended = time.perf_counter()
            work.stall_seconds += ended - begun
            self.note("wait", l, begun, ended)
            for r in waiting:
                self.note("demand" if r.urgent else "ahead", l, r.begun, r.finished, r.expert)
        return [held[key] for key in keys]

    def settle(self) -> None:
        """Wait for pending prefetches, so that they do not disturb the next timing."""
        self.reader.wait(r for r in self.pending.values() if r.rank != PARKED)

    def note(self, *event) -> None:
        """Add an event to the timeline, if there is one."""
        if self.timeline is not None:
            self.timeline.append(Event(*event))


def _into(bank: Bank, slot: int) -> Callable[[np.ndarray], None]:
    return lambda record: bank.write(slot, record)
