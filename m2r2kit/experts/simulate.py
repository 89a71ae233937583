"""Replay a recorded run without the model: its counts (`replay`) or its time (`Clock`).

The live decoder uses the same bookkeeping (`residency.py`), so the counts are equal, with any policy, budget
and predictor that needs no model. The clock simulates a disk:

    computing   given seconds up to each router, and after the last one
    reads       one after the other, of constant duration; demand reads overtake prefetches, and a wrong
                prediction is parked, as in the live decoder

The clock is optimistic: only computing and reading take time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from .generation import Event
from .policies import Expert
from .predictors import Predictor
from .residency import Counts, Load, Residency
from .trace import Trace


def replay(trace: Trace, residency: Residency, predictor: Predictor | None = None) -> Counts:
    """The counts of the live run, prompts included.

    Args:
        residency: empty; it is filled.
        predictor: one that needs no model (`predictors.Recorded` repeats the live run's predictions).
    """
    text = None
    for number, p in enumerate(trace.passes):
        if p.text != text:
            text = p.text
            residency.new_text()
            if predictor:
                predictor.new_text()
        residency.begin()
        if p.prompt:
            for l, wanted in zip(trace.blocks, p.wanted):
                for group in residency.groups(l, wanted):
                    residency.demand(l, group)
                    residency.release(l, group)
        elif predictor:
            for m, experts in predictor.before(number):
                residency.speculate(m, experts)
            for l, wanted in zip(trace.blocks, p.wanted):
                residency.arrive(l, wanted, predictor.at(number, l, wanted))
        else:
            for l, wanted in zip(trace.blocks, p.wanted):
                residency.arrive(l, wanted, ())
        residency.end()
    return residency.counts


# --- simulated time --------------------------------------------------------------------


@dataclass
class Clocked:
    """Result of a simulated run. Prompts take no time.

    Attributes:
        tokens: the events of each token, as in a live `timeline`.
        seconds, stall_seconds: of all tokens, and of these the time spent waiting.
        counts, in_time, late: as in `ExpertWork`.
    """

    tokens: list[list[Event]] = field(default_factory=list)
    seconds: float = 0.0
    stall_seconds: float = 0.0
    counts: Counts = field(default_factory=Counts)
    in_time: int = 0
    late: int = 0


@dataclass(eq=False)
class Read:
    """A simulated read; `begun` is None while it is queued."""

    issued: float
    urgent: bool
    begun: float | None = None
    finished: float = 0.0


class Line:
    """A simulated disk: one read after the other, each of `seconds`."""

    def __init__(self, seconds: float):
        self.seconds, self.free = seconds, 0.0
        self.now_needed: list[Read] = []
        self.ahead: list[Read] = []
        self.pending: dict[Expert, Read] = {}  # reads of experts that have not been used since

    def ask(self, loads: Sequence[Load], now: float, urgent: bool) -> None:
        """Issue reads and drop pending reads of the evicted experts."""
        self.serve(now)
        for key, _, evicted in loads:
            self.drop(evicted)
            self.pending[key] = read = Read(now, urgent)
            (self.now_needed if urgent else self.ahead).append(read)

    def drop(self, key: Expert | None) -> None:
        """Drop the pending read of an expert, if there is one."""
        if key in self.pending:
            self.park([self.pending.pop(key)])

    def park(self, reads: Iterable[Read]) -> None:
        """Hold these reads until they are predicted again, or needed."""
        for read in reads:
            if read in self.ahead:
                self.ahead.remove(read)

    def again(self, keys: Iterable[Expert], now: float) -> None:
        """Requeue parked reads that are predicted again."""
        for read in (self.pending[key] for key in keys if key in self.pending):
            if read.begun is None and read not in self.ahead and read not in self.now_needed:
                read.issued = now
                self.ahead.append(read)

    def serve(self, until: float) -> None:
        """Run all reads that begin before `until`."""
        while queue := self.now_needed or self.ahead:
            begun = max(self.free, queue[0].issued)
            if begun >= until:
                return
            read = queue.pop(0)
            read.begun, read.finished = begun, begun + self.seconds
            self.free = read.finished

    def bring(self, reads: Sequence[Read], now: float) -> float:
        """The time when all of these are finished; prefetches among them become demand reads."""
        self.serve(now)
        for read in reads:
            if read.begun is None and read not in self.now_needed:
                self.park([read])
                read.issued = now
                self.now_needed.append(read)
        while self.now_needed:
            self.serve(max(self.free, now) + self.seconds / 2)
        return max([now, *(read.finished for read in reads)])


class Clock:
    """Replays a recorded run with simulated times.

    Args:
        residency: empty, of any size and policy.
        predictor: one that needs no model; None predicts nothing.
        compute: seconds up to each block's router, then those after the last router.
        read: seconds to read a record.
    """

    def __init__(
        self,
        residency: Residency,
        predictor: Predictor | None,
        compute: Sequence[float],
        read: float,
    ):
        self.residency, self.predictor = residency, predictor or Predictor()
        self.compute, self.line, self.now = compute, Line(read), 0.0
        self.out = Clocked()

    def run(self, trace: Trace) -> Clocked:
        """Replay all passes of a trace."""
        residency, text, prompts = self.residency, None, Counts()
        for number, p in enumerate(trace.passes):
            before = replace(residency.counts)
            if p.text != text:
                text = p.text
                residency.new_text()
                self.predictor.new_text()
                prompts, before = prompts + (residency.counts - before), replace(residency.counts)
            residency.begin()
            if p.prompt:
                self._prompt(trace.blocks, p.wanted)
                prompts = prompts + (residency.counts - before)
            else:
                self._token(trace, number, p.wanted)
            residency.end()
        self.out.seconds, self.out.counts = self.now, residency.counts - prompts
        return self.out

    def _prompt(self, blocks: Sequence[int], chosen: Sequence[Sequence[int]]) -> None:
        for l, wanted in zip(blocks, chosen):
            for group in self.residency.groups(l, wanted):
                for load in self.residency.demand(l, group):
                    self.line.drop(load.evicted)
                self.residency.release(l, group)

    def _token(self, trace: Trace, number: int, chosen: Sequence[Sequence[int]]) -> None:
        residency, line, events = self.residency, self.line, []
        predicted = self.predictor.before(number)
        for m, experts in predicted:
            line.ask(residency.speculate(m, experts), self.now, False)
        line.again(((m, expert) for m, experts in predicted for expert in experts), self.now)
        for l, wanted, seconds in zip(trace.blocks, chosen, self.compute):
            events.append(Event("compute", l, self.now, self.now + seconds))
            self.now += seconds
            predicted = self.predictor.at(number, l, wanted)
            loads, ahead = residency.arrive(l, wanted, predicted)
            line.ask(loads, self.now, True)
            line.ask(ahead, self.now, False)
            line.again(((m, expert) for m, experts in predicted if m != l for expert in experts), self.now)
            wrong = residency.wrong(l, wanted)
            line.park(line.pending[key] for key in wrong if key in line.pending)
            self._wait(l, wanted, events)
        events.append(Event("compute", trace.blocks[-1] + 1, self.now, self.now + self.compute[-1]))
        self.now += self.compute[-1]
        self.out.tokens.append(events)

    def _wait(self, l: int, wanted: Sequence[int], events: list[Event]) -> None:
        """Advance the time until these experts of block l are in memory."""
        line, out = self.line, self.out
        reads = {expert: line.pending.pop((l, expert)) for expert in wanted if (l, expert) in line.pending}
        if not reads:
            return
        then = line.bring(list(reads.values()), self.now)
        for read in reads.values():
            if not read.urgent:
                out.in_time += read.finished <= self.now
                out.late += read.finished > self.now
        if then > self.now:
            events.append(Event("wait", l, self.now, then))
        for expert, read in reads.items():
            kind = "demand" if read.urgent else "ahead"
            events.append(Event(kind, l, read.begun, read.finished, expert))
        out.stall_seconds += then - self.now
        self.now = then
