"""Decoding with exits: a token leaves where its gate says so, and the blocks above are skipped.

    probe j    the slow stream up to where exit j's interval begins, what is read at the exit, the gate's
               score, the head's token                                  (one compiled pass)
    leave      emit that token; fill the skipped blocks, or let it wait for the next deep pass
    or go on   to the next exit, and after the last one through all blocks

With a threshold that nobody reaches it is plain decoding, to the bit.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from ..backbone import Backbone
from ..fixed_cache import FEW, FIRST_ROOM, Traced
from .fill import Fill
from .gates import Gate, Seen


@dataclass
class ExitGeneration:
    """What came out of one prompt.

    Attributes:
        tokens: emitted ids, the end-of-text mark included if it was reached.
        depth: of each token, the exit that it took; N for those through all blocks.
        seconds: from the first pass over the prompt to the last token; `prefill_seconds`, of that pass.
        stopped: `eos` or `length`.
    """

    tokens: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    stopped: str = "length"


class ExitDecoder:
    """A model that decodes with exits.

    Args:
        reader: of `readers.py`.
        gate: of `gates.py`, or ARLA.
        fill: of `fill.py`; None lets skipped tokens wait and run with the next one that goes deep.
    """

    def __init__(self, backbone: Backbone, reader, gate: Gate, fill: Fill | None):
        self.backbone, self.reader, self.gate, self.fill = backbone, reader, gate, fill
        # or the compiled passes would make them anew each time; they keep the weights of this moment
        mx.eval(reader.parameters(), gate.parameters(), fill.parameters() if fill is not None else [])
        N, starts = backbone.depth, reader.starts
        self.probes, self.fills = [], []
        for j, (begin, end) in enumerate(zip((0, *starts[:-1]), starts, strict=True)):
            # where tokens wait, they are run with the newest one, before the probe (`_catch_up`)
            runs = range(begin, end) if fill is not None or j == 0 else range(0)
            self.probes.append(Traced(self._probe(j, runs), N, runs, reader.reads))
            self.fills.append(Traced(self._filling(j), N, range(end, N)))

    def _probe(self, j: int, runs: range):
        """The compiled body of one probe, with the slow blocks that it `runs`; its first input is a token
        at the first exit, a state later."""
        backbone, reader = self.backbone, self.reader

        def body(entries, x, position, before, progress, *trajectory):
            h = backbone.run(backbone.embed(x) if j == 0 else x, entries, runs.start, runs.stop)
            starts, states = list(trajectory[:j]), list(trajectory[j:])
            p = reader.at(j, h, entries, position, before)
            seen = Seen(backbone.head, progress, starts=[*starts, h], states=[*states, p])
            return h, p, self.gate(j, seen), mx.argmax(backbone.head(p), axis=-1)

        return body

    def _filling(self, j: int):
        """The compiled body of filling the blocks above exit j: only their keys and values are computed."""

        def body(entries, h, p, before):
            mask = entries[self.reader.starts[j]].make_mask(1)
            filled = self.fill(j, h, p, before)
            for l in range(self.reader.starts[j], self.backbone.depth):
                self.backbone.blocks[l](filled(l), mask, cache=entries[l])
            return ()

        return body

    def token(self, token: int, state: "State", threshold: float, progress: float) -> tuple[int, int]:
        """One token through the exits: (the next token, number of the exit, J for all blocks)."""
        cache, J = state.cache, len(self.reader.exits)
        x, starts, states = mx.array([[token]]), [], []
        progress = mx.full((1, 1, 1), progress)
        must = sum(h.shape[1] for rows in state.waiting for h in rows) >= FEW - 1
        for j in range(J):
            if j and self.fill is None:
                x = self._catch_up(j - 1, x, state)
            h, p, score, choice = self.probes[j](
                cache, x, mx.array(state.position), state.before, progress, *starts, *states
            )
            mx.async_eval(score, choice)
            starts, states = [*starts, h], [*states, p]
            if score.item() >= threshold and not must:
                if self.fill is not None:
                    self.fills[j](cache, h, p, state.before)
                else:
                    state.waiting[j].append(h)
                state.before = p
                state.position += 1
                return choice.item(), j
            x = h
        x, state.waiting[-1] = mx.concatenate([*state.waiting[-1], x], axis=1), []
        h, logits = self.backbone.close(x, cache, self.reader.starts[-1])
        state.before = h[:, -1:]
        state.position += 1
        return mx.argmax(logits[:, -1], axis=-1).item(), J

    def _catch_up(self, k: int, h: mx.array, state: "State") -> mx.array:
        """The newest token, and with it those that wait at exit k, to the next exit, where they wait on."""
        rows = mx.concatenate([*state.waiting[k], h], axis=1)
        state.waiting[k] = []
        rows = self.backbone.run(rows, state.cache, self.reader.starts[k], self.reader.starts[k + 1])
        if rows.shape[1] > 1:
            state.waiting[k + 1].append(rows[:, :-1])
        return rows[:, -1:]

    def begin(self, prompt: list[int], room: int) -> "State":
        """A state that has read all of a prompt but its last token, through all blocks."""
        cache = self.backbone.new_cache(room)
        before = mx.zeros((1, 1, self.backbone.width))
        if len(prompt) > 1:
            h = self.backbone.run(self.backbone.embed(mx.array([prompt[:-1]])), cache)
            before = mx.contiguous(h[:, -1:])
            mx.eval(before, [(c.keys, c.values) for c in cache])
        return State(cache, before, len(prompt) - 1, [[] for _ in self.reader.exits])

    def generate(
        self,
        prompt: list[int],
        threshold: float,
        max_tokens: int = 128,
        on_tokens: Callable | None = None,
        given: list[int] | None = None,
        longest: int = 128,
    ) -> ExitGeneration:
        """Continue a prompt.

        Args:
            threshold: score from which a token leaves.
            on_tokens: called with ([token], [depth]) after each.
            given: tokens that follow in the place of those that are emitted, to compare with them.
            longest: length of an answer at which a schedule has come to its end.

        Raises:
            UserError: an empty or over-long prompt.
        """
        backbone = self.backbone
        limit = min(max_tokens, backbone.room_after(prompt))
        out, begun = ExitGeneration(), time.perf_counter()
        state = self.begin(prompt, len(prompt) + min(limit, FIRST_ROOM))
        out.prefill_seconds = time.perf_counter() - begun
        token, depths = prompt[-1], (*self.reader.exits, backbone.depth)
        while len(out.tokens) < limit:
            new, number = self.token(token, state, threshold, min(1.0, len(out.tokens) / longest))
            token = new if given is None else given[len(out.tokens)]
            out.tokens.append(new)
            out.depth.append(depths[number])
            if on_tokens:
                on_tokens([new], [depths[number]])
            if token in backbone.eos:
                out.stopped = "eos"
                break
        out.seconds = time.perf_counter() - begun
        return out


@dataclass
class State:
    """Where a text stands: its cache, what was read of the last token, its length, and who waits where."""

    cache: list
    before: mx.array
    position: int
    waiting: list[list[mx.array]]
