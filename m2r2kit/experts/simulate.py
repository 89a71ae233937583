"""Run the bookkeeping of a recorded run again, without the model: its counts (`replay`), its time (`Clock`).

The live decoder keeps the same books (`residency.py`), so the counts are the same, with any policy, budget
and predictor that needs no model. The clock adds another disk:

    computing   so many seconds up to each router, and after the last one
    reads       one after the other, so many seconds each; demand reads overtake prefetches, and a wrong
                prediction is parked, as in the live decoder

The clock is kinder in one thing: what is neither computing nor reading takes no time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from .generation import Event
from .policies import Expert
from .predictors import Predictor
from .residency import Counts, Load, Residency
from .trace import Trace


def replay(trace: Trace, residency: Residency, predictor: Predictor | None = None) -> Counts:
    """What the live run would count, prompts included.

    Args:
        residency: the one to fill; empty at first.
        predictor: one that needs no model (`predictors.Recorded` names what the live run named).
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


# --- the same on a clock --------------------------------------------------------------------


@dataclass
class Clocked:
    """What the simulated run took. Prompts are read beforehand and take no time here.

    Attributes:
        tokens: the events of each token, as a live run's `timeline` has them.
        seconds, stall_seconds: of all tokens, and the part of them spent waiting.
        counts, in_time, late: as `ExpertWork` has them.
    """

    tokens: list[list[Event]] = field(default_factory=list)
    seconds: float = 0.0
    stall_seconds: float = 0.0
    counts: Counts = field(default_factory=Counts)
    in_time: int = 0
    late: int = 0


@dataclass(eq=False)
class Read:
    """A record on its way; `begun` is None until its turn comes."""

    issued: float
    urgent: bool
    begun: float | None = None
    finished: float = 0.0


class Line:
    """A disk that does one read after the other, each of `seconds`."""

    def __init__(self, seconds: float):
        self.seconds, self.free = seconds, 0.0
        self.now_needed: list[Read] = []
        self.ahead: list[Read] = []
        self.pending: dict[Expert, Read] = {}  # reads of experts that have not been used since

    def ask(self, loads: Sequence[Load], now: float, urgent: bool) -> None:
        """Issue reads; pending reads of what they evict are dropped."""
        self.serve(now)
        for key, _, evicted in loads:
            self.drop(evicted)
            self.pending[key] = read = Read(now, urgent)
            (self.now_needed if urgent else self.ahead).append(read)

    def drop(self, key: Expert | None) -> None:
        """This expert is not needed any more."""
        if key in self.pending:
            self.park([self.pending.pop(key)])

    def park(self, reads: Iterable[Read]) -> None:
        """Hold these reads until they are predicted again, or needed."""
        for read in reads:
            if read in self.ahead:
                self.ahead.remove(read)

    def again(self, keys: Iterable[Expert], now: float) -> None:
        """Put parked reads that are predicted again back in the queue."""
        for read in (self.pending[key] for key in keys if key in self.pending):
            if read.begun is None and read not in self.ahead and read not in self.now_needed:
                read.issued = now
                self.ahead.append(read)

    def serve(self, until: float) -> None:
        """Do all reads that begin before a moment."""
        while queue := self.now_needed or self.ahead:
            begun = max(self.free, queue[0].issued)
            if begun >= until:
                return
            read = queue.pop(0)
            read.begun, read.finished = begun, begun + self.seconds
            self.free = read.finished

    def bring(self, reads: Sequence[Read], now: float) -> float:
        """The moment when all of these are there; prefetches among them become demand reads."""
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
    """Runs a recorded run again and says when each thing happens.

    Args:
        residency: an empty one, of any size and policy.
        predictor: one that needs no model; None predicts nothing.
        compute: seconds up to each block's router, and for the rest: one more than there are blocks.
        read: seconds of a record: its bytes over the disk's bytes/s.
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
        """All passes of a trace, one after the other."""
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
        named = self.predictor.before(number)
        for m, experts in named:
            line.ask(residency.speculate(m, experts), self.now, False)
        line.again(((m, expert) for m, experts in named for expert in experts), self.now)
        for l, wanted, seconds in zip(trace.blocks, chosen, self.compute):
            events.append(Event("compute", l, self.now, self.now + seconds))
            self.now += seconds
            named = self.predictor.at(number, l, wanted)
            loads, ahead = residency.arrive(l, wanted, named)
            line.ask(loads, self.now, True)
            line.ask(ahead, self.now, False)
            line.again(((m, expert) for m, experts in named if m != l for expert in experts), self.now)
            wrong = residency.wrong(l, wanted)
            line.park(line.pending[key] for key in wrong if key in line.pending)
            self._wait(l, wanted, events)
        events.append(Event("compute", trace.blocks[-1] + 1, self.now, self.now + self.compute[-1]))
        self.now += self.compute[-1]
        self.out.tokens.append(events)

    def _wait(self, l: int, wanted: Sequence[int], events: list[Event]) -> None:
        """Until these experts of block l are there."""
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
