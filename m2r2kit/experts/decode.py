"""Decoding with experts that come from disk: block by block, the reads beside the computing.

    compute up to block l's router           meanwhile: reads asked for at earlier blocks
    ask for the experts it chose             now
    ask for those named for later blocks     later
    wait for the chosen ones                 the only wait: the stall
    go on

The router decides, always; a prediction only starts a read. Tokens are those of the model in memory.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from .. import driver
from ..common import UserError
from ..driver import Decoder, Emitted, Generation
from ..model.backbone import Backbone
from ..model.cpu.threads import decoding
from ..model.mlxlm import create_attention_mask
from . import moe
from .generation import Event, ExpertWork
from .packing import facts_of, load_without_experts
from .policies import Expert
from .predictors import Predictor
from .reader import AHEAD, PARKED, Reader, Request
from .residency import Load, Residency
from .slots import Bank
from .state_predictors import StatePredictor
from .store import Store
from .trace import Named, Pass, Trace

CHUNK = 512  # tokens of a prompt that are read at once: each expert is read once a chunk


class StreamedModel:
    """A model without its experts, and the store that holds them.

    Raises:
        UserError: the model or the store cannot be used, or the store is not that of this model.
    """

    def __init__(self, model: str | Path, store: str | Path | Store):
        self.store = store if isinstance(store, Store) else Store(store)
        manifest = self.store.manifest
        dtype, sha256 = getattr(mx, manifest.dtype), self.store.model_sha256
        decode = not manifest.quantized  # the model computes as it did when its experts were packed
        self.backbone, self.experts = load_without_experts(model, dtype, sha256, decode)
        self.store.fits(facts_of(self.backbone, self.experts))

    def residency(self, slots: int, policy: Callable, shared: bool = False) -> Residency:
        """An empty memory with so many slots in each block (in all blocks together, if `shared`)."""
        m = self.store.manifest
        if shared and not m.one_size:
            raise UserError("The blocks of this model have experts of different sizes, which share no slots.")
        return Residency(m.blocks, m.experts, m.top_k, slots, policy, shared)


class ExpertDecoder(Decoder):
    """Decodes a streamed model with one memory, one reader and one predictor.

    Args:
        residency: which experts are in memory; from `StreamedModel.residency`.
        reader: of the same store; it stays the caller's to close.
        predictor: None names nothing.
        trace: a trace to add all passes to.
        timeline: a list to add `Event`s to; reads appear when they are used, computing for tokens only.

    Attributes:
        choose: logits (V,) -> the next token; None takes the likeliest. It may be changed between texts.
        cut: stop at each router also where all experts are in memory, to measure what the stops cost; it
            may be changed between texts.
    """

    def __init__(
        self,
        model: StreamedModel,
        residency: Residency,
        reader: Reader,
        predictor: Predictor | None = None,
        trace: Trace | None = None,
        timeline: list[Event] | None = None,
    ):
        self.timeline = timeline
        self.backbone: Backbone = model.backbone
        self.residency, self.reader, self.trace = residency, reader, trace
        self.predictor = predictor or Predictor()
        manifest = model.store.manifest
        banks = [Bank(parts, pool.slots) for parts, pool in zip(manifest.pieces, residency.pools)]
        self.bank_of = {l: banks[residency.pools.index(pool)] for l, pool in residency.pool_of.items()}
        self.switches = {l: self.bank_of[l].switch(model.experts[l]) for l in manifest.blocks}
        looks = isinstance(self.predictor, StatePredictor)
        parts = self.backbone, self.switches, self.predictor if looks else None
        first = {l: residency.shared * i * manifest.experts for i, l in enumerate(manifest.blocks)}
        largest = max(piece.nbytes for parts in manifest.pieces for piece in parts)
        self.matrix_bytes = max(self.backbone.matrix_bytes, largest)
        self.cut, self.cut_pass = False, moe.TokenPass(*parts)
        self.whole_pass = moe.TokenPass(*parts, first) if residency.whole else None
        self.pending: dict[Expert, Request] = {}  # reads of experts that have not been used since
        self.texts, self.broken = 0, False
        self.choose: Callable[[mx.array], int] | None = None
        self.work = ExpertWork()

    @property
    def bank_bytes(self) -> int:
        """Memory of all slots."""
        return sum(bank.nbytes for bank in {id(bank): bank for bank in self.bank_of.values()}.values())

    # --- text ---

    def begin(self, prompt, capacity):
        """The prompt is read in chunks, so that each expert is read once a chunk.

        Raises:
            UserError: an error has stopped this decoder before, or a record cannot be read.
        """
        with self._whole():
            self.texts, self.work, residency = self.texts + 1, ExpertWork(), self.residency
            before = replace(residency.counts)
            self._fill(residency.new_text())
            self.predictor.new_text()
            self._cache = moe.new_cache(self.backbone, capacity)
            self._last, self._next = mx.zeros((1, 1, self.backbone.width)), None
            for i in range(0, len(prompt) - 1, CHUNK):
                self._last = self._read(prompt[i : min(i + CHUNK, len(prompt) - 1)], self._cache)
            self._before = replace(residency.counts)
            self.work = ExpertWork(prefill=self._before - before)  # its waits are the tokens' own

    def step(self, pending, left):
        with self._whole():
            if self.whole_pass and not self.cut:
                more = self.choose is None and left > 1
                logits, self._last, choice = self._flow(pending, self._cache, self._last, more)
            else:
                logits, self._last = self._token(pending, self._cache, self._last)
                choice = mx.argmax(logits)
            self.work.counts = self.residency.counts - self._before
            return Emitted([choice.item() if self.choose is None else self.choose(logits)])

    def threads(self):
        # without a predictor nothing is read while something is computed
        return decoding(self.matrix_bytes, apart=type(self.predictor) is not Predictor)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What is not done to its end leaves the decoder unusable: a slot may not hold what it should."""
        if self.broken:
            raise UserError("This decoder was stopped by an error; open the model again.")
        self.broken = True
        yield
        self.broken = False

    def generate(
        self,
        prompt: list[int],
        max_tokens: int = 128,
        choose: Callable[[mx.array], int] | None = None,
        on_tokens: Callable | None = None,
    ) -> Generation:
        """`driver.generate` with this choice of tokens."""
        self.choose = choose
        return driver.generate(self, prompt, max_tokens, on_tokens)

    def settle(self) -> None:
        """Wait for what was asked for ahead and not needed, so that it does not meet what is timed next."""
        self.reader.wait(r for r in self.pending.values() if r.rank != PARKED)

    # --- passes ---

    def _token(self, token: int, cache: list, last: mx.array) -> tuple[mx.array, mx.array]:
        """One token through all blocks: (logits (V,), h_N (1, 1, D))."""
        residency, predictor = self.residency, self.predictor
        number = residency.passes
        residency.begin()
        named = [*predictor.before(number), *predictor.of(token)]
        for m, experts in named:
            self._start(residency.speculate(m, experts), urgent=False)
        self._again(named)
        noted = Pass(self.texts - 1, False, named=[named])
        steps = self.cut_pass.run(mx.array([[token]]), cache, last)
        decision = next(steps)
        while decision.l is not None:
            begun = time.perf_counter()
            mx.eval(decision.arrays())
            self._note("compute", decision.l, begun, time.perf_counter())
            l, (wanted,) = decision.l, decision.ids.tolist()
            named = self._chosen(noted, number, l, wanted, decision.named)
            now, ahead = residency.arrive(l, wanted, named)
            self._start(now, urgent=True)
            self._start(ahead, urgent=False)
            self._sort(l, wanted, named)
            decision = steps.send(self._ready(l, wanted))
        mx.eval(decision.arrays())
        residency.end()
        if self.trace:
            self.trace.passes.append(noted)
        return decision.logits[0, -1], decision.u

    def _flow(
        self, token: int, cache: list, last: mx.array, more: bool
    ) -> tuple[mx.array, mx.array, mx.array]:
        """`_token` where all experts are in memory, so that no block has to stop; and the likeliest token.
        If there is to be one `more`, its pass is being computed while this one is read."""
        residency, number, begun = self.residency, self.residency.passes, time.perf_counter()
        decision = self._next or next(self.whole_pass.run(mx.array([[token]]), cache, last))
        choice = mx.argmax(decision.logits, axis=-1)  # (1, 1)
        mx.async_eval(choice, *decision.arrays())
        self._next = next(self.whole_pass.run(choice, cache, decision.u)) if more else None
        if more:
            mx.async_eval(self._next.arrays())
        mx.eval(choice, *decision.arrays())
        self._note("compute", residency.blocks[-1], begun, time.perf_counter())
        residency.begin()
        named = [*self.predictor.before(number), *self.predictor.of(token)]
        for m, experts in named:
            residency.speculate(m, experts)
        noted = Pass(self.texts - 1, False, named=[named])
        for l, wanted in zip(residency.blocks, decision.ids.tolist(), strict=True):
            at = [each for each in decision.named if each[0] == l]
            residency.arrive(l, wanted, self._chosen(noted, number, l, wanted, at))
        residency.end()
        if self.trace:
            self.trace.passes.append(noted)
        return decision.logits[0, -1], decision.u, choice

    def _chosen(self, noted: Pass, number: int, l: int, wanted: list[int], named: list) -> Named:
        """Block l's router has chosen: what is named at this moment, which is noted with it."""
        at = self.predictor.at(number, l, wanted)
        for _, blocks, experts in named:
            at = [*at, *zip(blocks, experts.tolist(), strict=True)]
        noted.wanted.append(wanted)
        noted.named.append(at)
        return at

    def _read(self, tokens: list[int], cache: list) -> mx.array:
        """A chunk of a prompt through all blocks, each expert that it needs read once; the last h_N."""
        backbone, residency = self.backbone, self.residency
        residency.begin()
        noted = Pass(self.texts - 1, True, named=[[] for _ in range(len(residency.blocks) + 1)])
        h = backbone.embed(mx.array([tokens]))
        for l in range(backbone.depth):
            mask = create_attention_mask(h, cache[l])
            u = moe.attend(backbone, l, h, mask, cache[l])
            if l not in self.switches:
                h = moe.dense(backbone, l, u)
                continue
            rows, ids, weights = moe.route(backbone, l, u)
            mx.eval(u, rows, ids, weights)
            chosen = np.array(ids)  # (T, k)
            h = moe.combine(u, self._grouped(l, rows, chosen), weights)
            noted.wanted.append(np.unique(chosen).tolist())
        mx.eval(h, [(c.keys, c.values) for c in cache])
        residency.end()
        if self.trace:
            self.trace.passes.append(noted)
        return mx.contiguous(h[:, -1:])

    def _grouped(self, l: int, rows: mx.array, chosen: np.ndarray) -> mx.array:
        """What the chosen experts (T, k) give for rows (T, D), one group of experts that fits the slots
        after the other: (T, k, D)."""
        T, k = chosen.shape
        parts, places = [], []
        for group in self.residency.groups(l, chosen.ravel().tolist()):
            self._start(self.residency.demand(l, group), urgent=True)
            slots = dict(zip(group, self._ready(l, group), strict=True))
            where = np.flatnonzero(np.isin(chosen, group))  # of the T k pairs of row and expert
            here = mx.array([[slots[e]] for e in chosen.ravel()[where].tolist()])  # (n, 1)
            y = self.switches[l](rows[mx.array(where // k)], here)  # (n, 1, D)
            mx.eval(y)  # before the slots are given to the next group
            self.residency.release(l, group)
            parts.append(y)
            places.append(where)
        order = np.argsort(np.concatenate(places))
        return mx.concatenate(parts)[mx.array(order)].reshape(T, k, -1)

    # --- reads ---

    def _fill(self, loads: Sequence[Load]) -> None:
        """Read all experts, where all fit."""
        self._start(loads, urgent=True)
        self.reader.wait(self.pending.pop(load.key) for load in loads)

    def _start(self, loads: Sequence[Load], urgent: bool) -> None:
        """Issue reads; pending reads of what they evict are cancelled."""
        for key, slot, evicted in loads:
            if evicted in self.pending:
                self.reader.cancel(self.pending.pop(evicted))
            l, expert = key
            self.pending[key] = self.reader.submit(l, expert, _into(self.bank_of[l], slot), urgent)

    def _sort(self, l: int, wanted: Sequence[int], named: Named) -> None:
        """Block l has chosen: wrong predictions for it are parked, so that right ones are read first;
        parked ones that are predicted again rejoin the queue."""
        pending = self.pending
        if not pending:
            return
        self._again((m, experts) for m, experts in named if m != l)
        wrong = self.residency.wrong(l, wanted)
        self.reader.rank([pending[key] for key in wrong if key in pending], PARKED)

    def _again(self, named: Iterable[tuple[int, Sequence[int]]]) -> None:
        keys = ((m, expert) for m, experts in named for expert in experts)
        requests = [self.pending[key] for key in keys if key in self.pending]
        self.reader.rank([r for r in requests if r.rank == PARKED], AHEAD)

    def _ready(self, l: int, experts: Sequence[int]) -> list[int]:
        """The slots of these experts, when all of them are there."""
        keys, held, out = [(l, e) for e in experts], self.residency.pool_of[l].held, self.work
        waiting = [self.pending.pop(key) for key in keys if key in self.pending]
        if waiting:
            for request in waiting:
                if not request.urgent:
                    out.in_time += request.done
                    out.late += not request.done
            begun = time.perf_counter()
            self.reader.wait(waiting)
            ended = time.perf_counter()
            out.stall_seconds += ended - begun
            self._note("wait", l, begun, ended)
            for r in waiting:
                self._note("demand" if r.urgent else "ahead", l, r.begun, r.finished, r.expert)
        return [held[key] for key in keys]

    def _note(self, *event) -> None:
        if self.timeline is not None:
            self.timeline.append(Event(*event))


def _into(bank: Bank, slot: int) -> Callable[[np.ndarray], None]:
    return lambda record: bank.write(slot, record)
