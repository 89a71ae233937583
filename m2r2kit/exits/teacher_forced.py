"""Teacher-forced evaluation of a gate along given texts: exit, agreement and loss of every token.

The texts are the whole model's own (prompt and greedy answer). The tokens of each answer pass the exits as
in decoding, and later tokens read what the fill leaves in skipped blocks; only the next token is the given
one, or in `differing` the predicted one. All rows run through all blocks, so this measures quality and
depth, not time; `decode.py` is what gets timed.

With deferred tokens all blocks have their true states. The fill matters only for a reader that reads keys of
blocks that a deferred token has not passed yet.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..model.backbone import Backbone
from ..model.cache import FixedKV, Traced
from .fill import Fill
from .gates import Gate, Seen


@dataclass
class Texts:
    """Texts of the whole model, padded to rows of equal length.

    Attributes:
        tokens: int32 (B, T), prompt and answer; tokens after a row's end are never read.
        first: (B,) the first gated position: the last of the prompt.
        end: (B,) the last position, whose token is only predicted.
    """

    tokens: np.ndarray
    first: np.ndarray
    end: np.ndarray

    @property
    def gated(self) -> np.ndarray:
        """bool (B, T - 1): positions whose token passes the gate."""
        at = np.arange(self.tokens.shape[1] - 1)
        return (at >= self.first[:, None]) & (at < self.end[:, None])

    def part(self, rows) -> "Texts":
        """Some of the rows."""
        end = int(self.end[rows].max()) + 1
        return Texts(self.tokens[rows, :end], self.first[rows], self.end[rows])


@dataclass
class Outcome:
    """The outcome of a gate along texts; each (B, T - 1), valid where `gated`.

    Attributes:
        exit: index of the exit taken, J if all blocks ran.
        right: whether the predicted token is the whole model's.
        nats: cross-entropy of the whole model's token.
        blocks: number of blocks run, for methods without exits.
        wasted: number of heads evaluated at exits where the token stayed, for gates with two scores.
        tokens: the predicted token at each position.
    """

    gated: np.ndarray
    exit: np.ndarray
    right: np.ndarray
    nats: np.ndarray
    blocks: np.ndarray | None = None
    wasted: np.ndarray | int = 0
    tokens: np.ndarray | None = None

    @property
    def agreement(self) -> float:
        """Fraction of gated positions whose token is the whole model's."""
        return float(self.right[self.gated].mean())


class ForcedPass:
    """A gate and a fill, compiled for one token of many texts.

    Args:
        reader: a reader of `readouts.py`.
        gate: a gate of `gates.py`, or ARLA.
        fill: a fill of `fill.py`.
        waits: defer skipped tokens to the next token that goes deep (`decode.py`).
        use: indices of the exits to try, by default all; others are not computed.
    """

    def __init__(self, backbone: Backbone, reader, gate: Gate, fill: Fill, waits: bool = False, use=None):
        self.backbone, self.reader, self.gate, self.fill, self.waits = backbone, reader, gate, fill, waits
        self.use = tuple(range(len(reader.exits))) if use is None else tuple(use)
        reader.prepare()
        mx.eval(gate.parameters(), fill.parameters())
        count = backbone.depth + (len(reader.reads) if waits else 0)  # caches with filled keys come last
        self.traced = Traced(self._step, count, range(count))

    def _step(self, caches, token, gated, before, progress, chance, answer, threshold, caught):
        """One token of each row: (exit index, state that the head reads, predicted token, nats, wasted
        heads, caught). `caught` (reads, B) counts the positions at which each block of `reader.reads` has
        true keys.
        """
        backbone, reader = self.backbone, self.reader
        position = caches[0].offset
        known = self._known(caches, caught) if self.waits else caches
        mask = caches[0].make_mask(1)
        seen = Seen(backbone.head, progress, chance, answer, used=threshold < mx.inf)
        h = backbone.embed(token)
        J = len(reader.exits)
        left, number = mx.zeros(gated.shape, mx.bool_), mx.full(gated.shape, J)
        fillings: list[tuple] = []
        taken, wasted = h, mx.zeros(gated.shape, mx.int32)
        for l in range(backbone.depth):
            for j in [j for j in self.use if reader.starts[j] == l]:
                seen.starts[j], seen.states[j] = h, reader.at(j, h, known, position, before)
                there = gated & ~left
                goes, looked = self.gate.ask(j, seen, threshold[j])
                go = there & goes
                wasted = wasted + (there & looked & ~goes)
                taken = mx.where(go, seen.states[j], taken)
                number = mx.where(go, j, number)
                left = left | go
                fillings.append((go, self.fill(j, h, seen.states[j], before)))
            x = h
            for go, filled in fillings:
                x = mx.where(go, filled(l), x)
            if self.waits and l in reader.reads:  # lazy: only its KV
                backbone.blocks[l](x, mask, cache=caches[backbone.depth + reader.reads.index(l)])
            h = backbone.blocks[l](h if self.waits else x, mask, cache=caches[l])
        run = mx.array([*reader.starts, backbone.depth])[number[:, 0, 0]]  # blocks
        caught = (
            mx.where(run > mx.array(reader.reads)[:, None], position + 1, caught) if self.waits else caught
        )
        read = mx.where(left, taken, h)
        logits = backbone.head(read)
        given = mx.argmax(logits, axis=-1).astype(mx.int32)
        chosen = mx.take_along_axis(logits, answer[..., None], -1)[..., 0]
        return number[..., 0], read, given, mx.logsumexp(logits, axis=-1) - chosen, wasted[..., 0], caught

    def _known(self, caches, caught) -> list:
        """The caches that a reader sees with deferred tokens: true keys and values before `caught`,
        filled ones after it.
        """
        N, known = self.backbone.depth, list(caches)
        for i, l in enumerate(self.reader.reads):
            true, filled = caches[l], caches[N + i]
            there = mx.arange(true.keys.shape[2])[:, None] < caught[i][:, None, None, None]
            pairs = (true.keys, filled.keys), (true.values, filled.values)
            known[l] = FixedKV(*(mx.where(there, t, f) for t, f in pairs), true.offset)
        return known

    def __call__(
        self,
        texts: Texts,
        threshold: float | Sequence[float],
        seed: int = 0,
        longest: int = 128,
        report: Callable | None = None,
        follow: bool = True,
    ) -> Outcome:
        """Run along texts.

        Args:
            threshold: score from which a token leaves, one for all exits or one for each; infinite at
                those that are not in use.
            seed: of what a gate tosses.
            longest: length of an answer at which a schedule has come to its end.
            follow: whether the next token is the text's; if not it is the one given here, as in decoding, and
                the answer goes its own way.
        """
        levels = mx.array(np.broadcast_to(np.float32(threshold), len(self.reader.exits)))
        B, T = texts.tokens.shape
        rng, gated, first = np.random.default_rng(seed), texts.gated, int(texts.first.min())
        tokens, N = mx.array(texts.tokens), self.backbone.depth
        cache = self.backbone.new_cache(T, B)
        before = mx.zeros((B, 1, self.backbone.width))
        if first:  # positions before any gate, in one pass
            before = self.backbone.run(self.backbone.embed(tokens[:, :first]), cache)[:, -1:]
        caught = mx.full((len(self.reader.reads), B), first)
        if self.waits:
            cache += [self.backbone.new_cache(T, B)[l] for l in self.reader.reads]
            for layer_cache in cache[N:]:
                layer_cache.offset = first  # earlier positions are true and never read here
        out, token = [], tokens[:, first : first + 1]
        for t in range(first, T - 1):
            progress = np.clip((t - texts.first) / longest, 0, 1).astype(np.float32)[:, None, None]
            number, before, given, nats, wasted, caught = self.traced(
                cache,
                token,
                mx.array(gated[:, t, None, None]),
                before,
                mx.array(progress),
                mx.array(rng.random((B, 1, 1), dtype=np.float32)),
                tokens[:, t + 1 : t + 2],
                levels,
                caught,
            )
            token = tokens[:, t + 1 : t + 2]
            if not follow:
                token = mx.where(mx.array(t >= texts.first)[:, None], given, token)
            mx.eval(number, before, token, nats, wasted, caught, [(c.keys, c.values) for c in cache])
            out.append([np.array(x)[:, 0] for x in (number, given, nats, wasted)])
            if report:
                report(B)
        exit, given, nats, wasted = (
            np.pad(np.stack([row[i] for row in out], axis=1), [(0, 0), (first, 0)]) for i in range(4)
        )
        right = gated & (given == texts.tokens[:, 1:])
        return Outcome(gated, exit, right, nats, wasted=wasted, tokens=given)


def differing(forced: ForcedPass, texts: Texts, threshold: float | Sequence[float]) -> np.ndarray:
    """Decode the answers freely, each token after the predicted ones, and compare them with the whole
    model's: the fraction of positions that differ, (B,). If one answer is shorter, the remaining
    positions count as different.
    """
    most = int((texts.end - texts.first).max())
    open_ended = replace(texts, end=np.minimum(texts.first + most, texts.tokens.shape[1] - 1))
    out, eos, shares = forced(open_ended, threshold, follow=False), forced.backbone.eos, []
    for row, (first, end) in enumerate(zip(texts.first, texts.end, strict=True)):
        own, other = texts.tokens[row, first + 1 : end + 1], out.tokens[row, first : open_ended.end[row]]
        stops = np.flatnonzero(np.isin(other, list(eos)))
        other = other[: stops[0] + 1] if len(stops) else other
        both = min(len(own), len(other))
        shares.append(1 - (own[:both] == other[:both]).sum() / max(len(own), len(other)))
    return np.array(shares)


def texts_of(backbone: Backbone, prompts: list[list[int]], max_tokens: int) -> Texts:
    """The whole model's greedy answers to prompts, as rows; an answer ends with an end-of-text token."""
    from ..text.self_generated import continue_greedily

    length = max(map(len, prompts)) + max_tokens
    rows = continue_greedily(backbone, [np.array(p, np.int32) for p in prompts], length)
    first = np.array([len(p) - 1 for p in prompts])
    end = np.minimum(first + max_tokens, length - 1)
    for row, (tokens, start) in enumerate(zip(rows, first, strict=True)):
        stops = np.flatnonzero(np.isin(tokens[start + 1 :], list(backbone.eos)))
        if len(stops):
            end[row] = min(end[row], start + 1 + stops[0])
    return Texts(rows, first, end)
