"""Decoding with exits: a token leaves where its gate accepts it, and the blocks above are skipped.

    probe j    run the slow stream to the start of exit j's interval; compute the state that the head reads
               and the gate's score, or its first score                          (one compiled pass)
    score j    the head's token, and the second score of a gate that has two     (another pass, if needed)
    leave      emit that token; fill the skipped blocks, or defer the token to the next deep pass (FREE, Bae
               et al. 2023) and until then fill only the blocks that the reader reads
    or go on   to the next exit, and after the last one through all blocks

With the threshold `NEVER` it is plain decoding, bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .. import driver
from ..driver import Decoder, Emitted, Generation
from ..model.backbone import Backbone
from ..model.cache import FEW, Traced
from ..model.compiled import lean_pass
from .fill import Fill
from .gates import Gate, Seen

NEVER = 2.0  # a threshold that no score reaches


class ExitDecoder(Decoder):
    """A model that decodes with exits.

    Args:
        reader: a reader of `readouts.py`.
        gate: a gate of `gates.py`, or ARLA.
        fill: a fill of `fill.py`.
        waits: defer skipped tokens to the next token that goes deep.
        use: indices of the exits to try, increasing; by default all. Others cost nothing.

    Attributes:
        threshold: score at which a token exits, one for all exits or one for each; `NEVER` at first. It may
            change between texts.
        longest: length of an answer at which a schedule ends.
    """

    def __init__(self, backbone: Backbone, reader, gate: Gate, fill: Fill, waits=False, use=None):
        self.backbone, self.reader, self.gate, self.fill, self.waits = backbone, reader, gate, fill, waits
        reader.prepare()
        mx.eval(gate.parameters(), fill.parameters())
        N = backbone.depth
        self.use = tuple(range(len(reader.exits))) if use is None else tuple(use)
        self.starts = [reader.starts[j] for j in self.use]
        self.probes, self.second_scores, self.fills = [], [], []
        for j, begin, end in zip(self.use, (0, *self.starts[:-1]), self.starts, strict=True):
            # deferred tokens run with the newest one before the probe (`_catch_up`)
            runs = range(begin, end) if not self.probes or not waits else range(0)
            self.probes.append(Traced(self._probe(j, runs), N, runs, reader.reads))
            self.second_scores.append(mx.compile(self._second_score(j)) if gate.two_scores else None)
            seen = waits or gate.monotone  # fill only the blocks that the reader reads
            filled = [l for l in reader.reads if l >= end] if seen else range(end, N)
            self.fills.append(Traced(self._filling(j, filled), N, filled))
        self.choose = mx.compile(self._choice)
        self.threshold: float | Sequence[float] = NEVER
        self.longest = 128

    def _probe(self, j: int, runs: range):
        """The body of probe j's compiled pass, which runs the slow blocks `runs`. Its input is a token at
        the first exit in use, and a state at later ones.
        """
        backbone, reader = self.backbone, self.reader
        numbers = [i for i in self.use if i <= j]  # exits of the trajectory so far

        def body(caches, x, position, before, progress, *trajectory):
            x = backbone.embed(x) if j == self.use[0] else x
            h = backbone.run(x, caches, runs.start, runs.stop)
            p = reader.at(j, h, caches, position, before)
            starts, states = [*trajectory[: len(numbers) - 1], h], [*trajectory[len(numbers) - 1 :], p]
            starts, states = (dict(zip(numbers, each, strict=True)) for each in (starts, states))
            seen = Seen(backbone.head, progress, starts=starts, states=states)
            # a gate that needs the head evaluates it here; for others it runs only if the token leaves
            if self.gate.two_scores:
                view = self.gate.view(j, seen)
                return h, p, mx.sigmoid(self.gate.first(j, view)), view
            return h, p, self.gate(j, seen), *([self._choice(p)] if self.gate.needs_head else [])

        return body

    def _second_score(self, j: int):
        """The compiled body of the second score at exit j: (score, the head's token)."""

        def body(p, view):
            with lean_pass():
                logits = self.backbone.head(p)
            return mx.sigmoid(self.gate.second(j, view, logits)), mx.argmax(logits, axis=-1)

        return body

    def _choice(self, p: mx.array) -> mx.array:
        """The head's token for a state (1, 1, D)."""
        with lean_pass():
            return mx.argmax(self.backbone.head(p), axis=-1)

    def _filling(self, j: int, blocks: Sequence[int]):
        """The compiled body that fills `blocks` above exit j; it computes only their keys and values."""

        def body(caches, h, p, before):
            filled = self.fill(j, h, p, before)
            for l in blocks:
                mask = caches[l].make_mask(1)
                self.backbone.blocks[l](filled(l), mask, cache=caches[l])
            return ()

        return body

    def token(self, token: int, state: "State", levels: Sequence[float], progress: float) -> tuple[int, int]:
        """Decode one token: (the next token, index of its exit, J for all blocks). `levels` are the
        scores at which it leaves, one for each exit.
        """
        cache = state.cache
        x, starts, states = mx.array([[token]]), [], []
        progress = mx.full((1, 1, 1), progress)
        must = sum(h.shape[1] for states in state.waiting for h in states) >= FEW - 1
        for n, j in enumerate(self.use):
            if n and self.waits:
                x = self._catch_up(n - 1, x, state)
            h, p, score, *more = self.probes[n](
                cache, x, mx.array(state.position), state.before, progress, *starts, *states
            )
            starts, states = [*starts, h], [*states, p]
            leaves = not must and score.item() >= self.gate.first_share * levels[j]
            if leaves and self.gate.two_scores:
                score, *more = self.second_scores[n](p, *more)
                mx.async_eval(score, *more)
                leaves = score.item() >= levels[j]
            if leaves:
                choice = more[0] if more else self.choose(p)
                mx.async_eval(choice)  # before the fill, which is not on the critical path
                if self.fills[n].writes:
                    self.fills[n](cache, h, p, state.before)
                if self.waits:
                    state.waiting[n].append(h)
                state.before = p
                state.position += 1
                return choice.item(), j
            x = h
        x = self._with_waiting(len(self.use) - 1, x, state)
        h, logits = self.backbone.close(x, cache, self.starts[-1])
        state.before = h[:, -1:]
        state.position += 1
        return mx.argmax(logits[:, -1], axis=-1).item(), len(self.reader.exits)

    def _catch_up(self, k: int, h: mx.array, state: "State") -> mx.array:
        """Run the newest token and the tokens deferred at exit k to the next exit, where those stay
        deferred.
        """
        states = self._with_waiting(k, h, state)
        states = self.backbone.run(states, state.cache, self.starts[k], self.starts[k + 1])
        if states.shape[1] > 1:
            state.waiting[k + 1].append(states[:, :-1])
        return states[:, -1:]

    def _with_waiting(self, k: int, h: mx.array, state: "State") -> mx.array:
        """The tokens deferred at exit k and the newest one, ready to run on; their filled keys and values
        are dropped from the caches.
        """
        states = mx.concatenate([*state.waiting[k], h], axis=1)
        state.waiting[k] = []
        stop = self.starts[k + 1] if k + 1 < len(self.starts) else self.backbone.depth
        for l in self.reader.reads if self.waits else ():
            if self.starts[k] <= l < stop:
                state.cache[l].trim(states.shape[1] - 1)
        return states

    def read(self, prompt: list[int], capacity: int) -> "State":
        """The state after all prompt tokens but the last, which pass all blocks."""
        cache = self.backbone.new_cache(capacity)
        before = mx.zeros((1, 1, self.backbone.width))
        if len(prompt) > 1:
            h = self.backbone.run(self.backbone.embed(mx.array([prompt[:-1]])), cache)
            before = mx.contiguous(h[:, -1:])
            mx.eval(before, [(c.keys, c.values) for c in cache])
        return State(cache, before, len(prompt) - 1, [[] for _ in self.use])

    def begin(self, prompt, capacity):
        self._state, self._emitted = self.read(prompt, capacity), 0
        one = isinstance(self.threshold, float | int)
        self._levels = [self.threshold] * len(self.reader.exits) if one else self.threshold
        self._depths = (*self.reader.exits, self.backbone.depth)

    def step(self, pending, left):
        progress = min(1.0, self._emitted / self.longest)
        new, number = self.token(pending, self._state, self._levels, progress)
        self._emitted += 1
        return Emitted([new], depth=self._depths[number])

    def generate(
        self,
        prompt: list[int],
        threshold: float | Sequence[float],
        max_tokens: int = 128,
        given: list[int] | None = None,
        longest: int = 128,
    ) -> Generation:
        """`driver.generate` with this threshold."""
        self.threshold, self.longest = threshold, longest
        return driver.generate(self, prompt, max_tokens, given=given)


@dataclass
class State:
    """Decoding state of a text: its cache, the state read for the last token (1, 1, D), the position, and
    the states deferred at each exit.
    """

    cache: list
    before: mx.array
    position: int
    waiting: list[list[mx.array]]
