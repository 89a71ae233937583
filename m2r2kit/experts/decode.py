"""Decoding with experts that are read from disk, block by block, while the model computes.

    compute up to block l's router               meanwhile: reads issued at earlier blocks
    read the experts it chose                    on demand
    read those predicted for later blocks        ahead
    wait for the chosen ones                     the only wait: the stall
    continue

The router always decides; a prediction only starts a read. The tokens equal those of the model in memory.
"""

import time
from collections.abc import Callable, Iterator
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
from .predictors import Predictor
from .reader import Reader
from .reads import Reads
from .residency import Residency
from .slots import Bank
from .state_predictors import StatePredictor
from .store import Store
from .trace import Pass, Predicted, Trace

CHUNK = 512  # positions of a prompt per pass; an expert is read at most once per chunk


class StreamedModel:
    """A model without its experts, and the store that holds them.

    Raises:
        UserError: the model or the store cannot be used, or the store belongs to another model.
    """

    def __init__(self, model: str | Path, store: str | Path | Store):
        self.store = store if isinstance(store, Store) else Store(store)
        manifest = self.store.manifest
        dtype, sha256 = getattr(mx, manifest.dtype), self.store.model_sha256
        decode = not manifest.quantized  # compute as when the experts were packed
        self.backbone, self.experts = load_without_experts(model, dtype, sha256, decode)
        self.store.fits(facts_of(self.backbone, self.experts))

    def residency(self, slots: int, policy: Callable, shared: bool = False) -> Residency:
        """An empty memory of `slots` per block (of all blocks together if `shared`).

        Raises:
            UserError: too few slots for one token, or `shared` with records of different sizes.
        """
        m = self.store.manifest
        if shared and not m.one_size:
            raise UserError(
                "The blocks of this model have experts of different sizes, so they cannot share slots."
            )
        return Residency(m.blocks, m.experts, m.top_k, slots, policy, shared)


class ExpertDecoder(Decoder):
    """Decodes a streamed model with one memory, one reader and one predictor.

    Args:
        residency: which experts are in memory; from `StreamedModel.residency`.
        reader: of the same store; the caller closes it.
        predictor: None predicts nothing.
        trace: all passes are appended to it.
        timeline: `Event`s are appended to it; reads when they are used, computing for tokens only.

    Attributes:
        choose: logits (V,) -> the next token; None takes the most likely. It may change between texts.
        cut: stop at each router even if all experts are in memory, to measure the cost of the stops. It may
            change between texts.
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
        self.backbone: Backbone = model.backbone
        self.residency, self.reader, self.trace = residency, reader, trace
        self.predictor = predictor or Predictor()
        manifest = model.store.manifest
        banks = [Bank(pieces, pool.slots) for pieces, pool in zip(manifest.pieces, residency.pools)]
        bank_of = {l: banks[residency.pools.index(pool)] for l, pool in residency.pool_of.items()}
        self.bank_bytes = sum(bank.nbytes for bank in banks)  # memory of all slots
        self.reads = Reads(reader, residency, bank_of, timeline)
        self.switches = {l: bank_of[l].switch(model.experts[l]) for l in manifest.blocks}
        looks = isinstance(self.predictor, StatePredictor)
        parts = self.backbone, self.switches, self.predictor if looks else None
        first = {l: residency.shared * i * manifest.experts for i, l in enumerate(manifest.blocks)}
        largest = max(piece.nbytes for pieces in manifest.pieces for piece in pieces)
        self.matrix_bytes = max(self.backbone.matrix_bytes, largest)
        self.cut, self.cut_pass = False, moe.TokenPass(*parts)
        self.whole_pass = moe.TokenPass(*parts, first) if residency.whole else None
        self.texts, self.broken = 0, False
        self.choose: Callable[[mx.array], int] | None = None

    @property
    def work(self) -> ExpertWork:
        """Counts and waits of the current text."""
        return self.reads.work

    # --- text ---

    def begin(self, prompt, capacity):
        """Read the prompt in chunks, so that each expert is read once per chunk.

        Raises:
            UserError: an earlier error has stopped this decoder, or a record cannot be read.
        """
        with self._whole():
            self.texts, self.reads.work, residency = self.texts + 1, ExpertWork(), self.residency
            before = replace(residency.counts)
            self.reads.fill(residency.new_text())
            self.predictor.new_text()
            self._cache = moe.new_cache(self.backbone, capacity)
            self._last, self._next = mx.zeros((1, 1, self.backbone.width)), None
            for i in range(0, len(prompt) - 1, CHUNK):
                self._last = self._read(prompt[i : min(i + CHUNK, len(prompt) - 1)], self._cache)
            self._before = replace(residency.counts)
            self.reads.work = ExpertWork(prefill=self._before - before)  # stalls count tokens only

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
        # without a predictor, reads and computing do not overlap
        return decoding(self.matrix_bytes, apart=type(self.predictor) is not Predictor)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """An incomplete operation leaves the decoder unusable, because slots may hold wrong experts."""
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
        """`driver.generate` with `choose` as for the class."""
        self.choose = choose
        return driver.generate(self, prompt, max_tokens, on_tokens)

    def settle(self) -> None:
        """Wait for pending prefetches, so that they do not disturb the next timing."""
        self.reads.settle()

    # --- passes ---

    def _token(self, token: int, cache: list, last: mx.array) -> tuple[mx.array, mx.array]:
        """One token through all blocks: (logits (V,), h_N (1, 1, D))."""
        residency, predictor = self.residency, self.predictor
        number = residency.passes
        residency.begin()
        predicted = [*predictor.before(number), *predictor.of(token)]
        for m, experts in predicted:
            self.reads.start(residency.speculate(m, experts), urgent=False)
        self.reads.again(predicted)
        noted = Pass(self.texts - 1, False, predicted=[predicted])
        steps = self.cut_pass.run(mx.array([[token]]), cache, last)
        decision = next(steps)
        while decision.l is not None:
            begun = time.perf_counter()
            mx.eval(decision.arrays())
            self.reads.note("compute", decision.l, begun, time.perf_counter())
            l, (wanted,) = decision.l, decision.ids.tolist()
            predicted = self._chosen(noted, number, l, wanted, decision.predicted)
            now, ahead = residency.arrive(l, wanted, predicted)
            self.reads.start(now, urgent=True)
            self.reads.start(ahead, urgent=False)
            self.reads.sort(l, wanted, predicted)
            decision = steps.send(self.reads.ready(l, wanted))
        mx.eval(decision.arrays())
        residency.end()
        if self.trace:
            self.trace.passes.append(noted)
        return decision.logits[0, -1], decision.u

    def _flow(
        self, token: int, cache: list, last: mx.array, more: bool
    ) -> tuple[mx.array, mx.array, mx.array]:
        """`_token` with all experts in memory and no stops; also returns the most likely token (1, 1). If
        `more`, the next token's pass is computed while this one is evaluated."""
        residency, number, begun = self.residency, self.residency.passes, time.perf_counter()
        decision = self._next or next(self.whole_pass.run(mx.array([[token]]), cache, last))
        choice = mx.argmax(decision.logits, axis=-1)  # (1, 1)
        mx.async_eval(choice, *decision.arrays())
        self._next = next(self.whole_pass.run(choice, cache, decision.u)) if more else None
        if more:
            mx.async_eval(self._next.arrays())
        mx.eval(choice, *decision.arrays())
        self.reads.note("compute", residency.blocks[-1], begun, time.perf_counter())
        residency.begin()
        predicted = [*self.predictor.before(number), *self.predictor.of(token)]
        for m, experts in predicted:
            residency.speculate(m, experts)
        noted = Pass(self.texts - 1, False, predicted=[predicted])
        for l, wanted in zip(residency.blocks, decision.ids.tolist(), strict=True):
            at = [each for each in decision.predicted if each[0] == l]
            residency.arrive(l, wanted, self._chosen(noted, number, l, wanted, at))
        residency.end()
        if self.trace:
            self.trace.passes.append(noted)
        return decision.logits[0, -1], decision.u, choice

    def _chosen(self, noted: Pass, number: int, l: int, wanted: list[int], predicted: list) -> Predicted:
        """The predictions made when block l's router has chosen; also records both for the trace."""
        at = self.predictor.at(number, l, wanted)
        for _, blocks, experts in predicted:
            at = [*at, *zip(blocks, experts.tolist(), strict=True)]
        noted.wanted.append(wanted)
        noted.predicted.append(at)
        return at

    def _read(self, tokens: list[int], cache: list) -> mx.array:
        """Run a chunk of a prompt through all blocks, reading each needed expert once; returns the last
        h_N."""
        backbone, residency = self.backbone, self.residency
        residency.begin()
        noted = Pass(self.texts - 1, True, predicted=[[] for _ in range(len(residency.blocks) + 1)])
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
        """The outputs (T, k, D) of the chosen experts (T, k) for inputs `rows` (T, D), computed in groups of
        experts that fit the slots."""
        T, k = chosen.shape
        parts, places = [], []
        for group in self.residency.groups(l, chosen.ravel().tolist()):
            self.reads.start(self.residency.demand(l, group), urgent=True)
            slots = dict(zip(group, self.reads.ready(l, group), strict=True))
            where = np.flatnonzero(np.isin(chosen, group))  # indices into the T k pairs (position, expert)
            here = mx.array([[slots[e]] for e in chosen.ravel()[where].tolist()])  # (n, 1)
            y = self.switches[l](rows[mx.array(where // k)], here)  # (n, 1, D)
            mx.eval(y)  # before the slots are given to the next group
            self.residency.release(l, group)
            parts.append(y)
            places.append(where)
        order = np.argsort(np.concatenate(places))
        return mx.concatenate(parts)[mx.array(order)].reshape(T, k, -1)
