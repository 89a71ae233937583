"""Which experts will be needed: everything that may name them before the router does.

Some look at ids alone (this file's first half): they run in a replay as well. The others look at
states and run inside the model's compiled pass (`ahead`): the next routers applied early, a direct
low-rank map of equal size, and the accelerated stream. What any of them says only starts reads.

    u_l     the state after block l's attention: what block l's own router reads
    g_m     router of block m, applied to a state as block m would: gate_m(norm_m(.))
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..backbone import Backbone
from ..fast_blocks import SharedKV, seen
from ..residuals import AcceleratedStream, intervals, reads_near, tau
from .trace import Named, Trace


class Predictor:
    """Names nothing; what all predictors share. Experts are named best first."""

    def new_text(self) -> None:
        """A new text begins."""

    def before(self, number: int) -> Named:
        """Before the first block of a token's pass, the number-th of the run."""
        return []

    def at(self, number: int, l: int, wanted: Sequence[int]) -> Named:
        """When block l's router has chosen the experts `wanted`."""
        return []


class Distant(Predictor):
    """Names a block's experts `distance` blocks before it, and those of the first ones at the beginning.

    Args:
        blocks: those that have experts.
    """

    def __init__(self, blocks: Sequence[int], distance: int):
        self.blocks, self.distance = tuple(blocks), distance
        self.later = dict(zip(self.blocks, self.blocks[distance:]))

    def guess(self, number: int, m: int) -> list[int]:
        """The experts of block m in this pass."""
        raise NotImplementedError

    def before(self, number):
        return [(m, self.guess(number, m)) for m in self.blocks[: self.distance]]

    def at(self, number, l, wanted):
        m = self.later.get(l)
        return [] if m is None else [(m, self.guess(number, m))]


class PreviousToken(Distant):
    """The experts that the token before had."""

    def __init__(self, blocks, distance):
        super().__init__(blocks, distance)
        self.new_text()

    def new_text(self):
        self.last: dict[int, list[int]] = {}

    def guess(self, number, m):
        return self.last.get(m, [])

    def at(self, number, l, wanted):
        named = super().at(number, l, wanted)
        self.last[l] = list(wanted)
        return named


class Static(Distant):
    """The `width` experts that ran most often in an earlier trace."""

    def __init__(self, trace: Trace, distance: int, width: int):
        super().__init__(trace.blocks, distance)
        counts = trace.tables().sum(axis=0).reshape(-1, trace.experts)
        self.best = {l: np.argsort(-counts[l], kind="stable")[:width].tolist() for l in trace.blocks}

    def guess(self, number, m):
        return self.best[m]


class Random(Distant):
    """`width` experts at random, the same in each run: the floor."""

    def __init__(self, blocks, distance, experts: int, width: int, seed: int = 0):
        super().__init__(blocks, distance)
        self.experts, self.width, self.seed = experts, width, seed

    def guess(self, number, m):
        rng = np.random.default_rng([self.seed, number, m])
        return rng.choice(self.experts, self.width, replace=False).tolist()


class Oracle(Distant):
    """What a trace of this very run says: the ceiling."""

    def __init__(self, trace: Trace, distance: int):
        super().__init__(trace.blocks, distance)
        self.follow(trace, 0)

    def follow(self, trace: Trace, first: int) -> None:
        """The run's passes from number `first` on are those of a trace."""
        self.wanted, self.first = [dict(zip(trace.blocks, p.wanted)) for p in trace.passes], first

    def guess(self, number, m):
        return self.wanted[number - self.first][m]


class Recorded(Predictor):
    """What was named in the run that a trace is of."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.moment = {l: i + 1 for i, l in enumerate(trace.blocks)}

    def before(self, number):
        return self.trace.passes[number].named[0]

    def at(self, number, l, wanted):
        return self.trace.passes[number].named[self.moment[l]]


# --- those that look at states --------------------------------------------------------------


class StatePredictor(nn.Module, Predictor):
    """Names experts from residual states, inside the compiled pass.

    Attributes:
        width: how many experts it names.
        permute: (E,) expert ids that stand in for those named: `shuffle`, a control; None is none.
    """

    def __init__(self, backbone: Backbone, width: int | None):
        super().__init__()
        self._backbone, self._permute = backbone, None
        self.width = width or backbone.config["num_experts_per_tok"]
        gates = {l: block[backbone.parts.ffn] for l, block in enumerate(backbone.blocks)}
        self._with_experts = tuple(l for l, ffn in gates.items() if "gate" in ffn)

    def targets(self, l: int) -> list[int]:
        """Blocks whose experts are named at block l."""
        raise NotImplementedError

    @property
    def reads(self) -> list[int]:
        """Blocks whose keys it looks at, apart from the one that runs."""
        return []

    def ahead(self, l: int, h, u, p, entries, mask, before) -> tuple[mx.array, list[mx.array]]:
        """At block l: (what is handed on to block l + 1, a state for each target's router).

        Args:
            h: what enters block l, (1, 1, D); `u`: the state after its attention.
            p: what block l - 1 handed on; at block 0 it is h.
            entries: the cache, in which block l holds this token already; `mask` is what its
                attention looked at.
            before: h_N of the token before, (1, 1, D).
        """
        raise NotImplementedError

    def named(self, l: int, states: list[mx.array]) -> mx.array:
        """The targets' routers on these states: (targets, width) expert ids, best first."""
        logits = [router(self._backbone, m, s) for m, s in zip(self.targets(l), states, strict=True)]
        order = mx.argsort(-mx.concatenate(logits, axis=1)[0], axis=-1)[:, : self.width]
        return order if self._permute is None else self._permute[order]

    def shuffle(self, seed: int = 0) -> "StatePredictor":
        """Name other experts, always the same in the place of the same: as busy, and never informed."""
        experts = self._backbone.config.get("num_experts") or self._backbone.config["num_local_experts"]
        self._permute = mx.array(np.random.default_rng(seed).permutation(experts))
        return self


def router(backbone: Backbone, m: int, state: mx.array) -> mx.array:
    """g_m: the logits that block m's router would give a state, (1, T, D) -> (1, T, E)."""
    block, parts = backbone.blocks[m], backbone.parts
    return block[parts.ffn].gate(block[parts.ffn_norm](state))


class NextRouter(StatePredictor):
    """The routers of blocks to come on the state of now; no training. Distance 0 is the router on its
    own input: it must be right always, and comes too late to help."""

    def __init__(self, backbone: Backbone, distance: int = 1, width: int | None = None):
        super().__init__(backbone, width)
        self.distance = distance

    def targets(self, l):
        if l not in self._with_experts:
            return []
        i = self._with_experts.index(l)
        first = i + 1 if l == self._with_experts[0] and self.distance else i + self.distance
        return list(self._with_experts[first : i + self.distance + 1])

    def pairs(self) -> list[tuple[int, int]]:
        """(l, m) where block m's experts are named at block l."""
        return [(l, m) for l in self._with_experts for m in self.targets(l)]

    def ahead(self, l, h, u, p, entries, mask, before):
        return p, [u] * len(self.targets(l))


@dataclass(frozen=True)
class DirectConfig:
    """Settings of a `DirectMap`: blocks that it looks ahead, rank of each of its maps."""

    distance: int = 2
    rank: int = 8


class DirectMap(NextRouter):
    """The same with a low-rank change of the state for each pair of blocks: g_m(u_l + u_l A B), at the
    start the next router itself. The control of equal size for the stream: a map, nothing that runs."""

    def __init__(self, backbone: Backbone, config: DirectConfig, width: int | None = None):
        super().__init__(backbone, config.distance, width)
        self._config = config
        pairs, D = self.pairs(), backbone.width
        self.a = [mx.random.normal((D, config.rank)) * D**-0.5 for _ in pairs]
        self.b = [mx.zeros((config.rank, D)) for _ in pairs]
        object.__setattr__(self, "_places", {pair: i for i, pair in enumerate(pairs)})

    @classmethod
    def of_size(cls, backbone: Backbone, distance: int, parameters: int) -> "DirectMap":
        """One with about so many numbers to train."""
        pairs = len(NextRouter(backbone, distance).pairs())
        rank = max(1, round(parameters / (2 * backbone.width * pairs)))
        return cls(backbone, DirectConfig(distance, rank))

    def changed(self, l: int, m: int, u: mx.array) -> mx.array:
        """What stands for u_m: (.., D) -> (.., D)."""
        i = self._places[l, m]
        return u + (u @ self.a[i]) @ self.b[i]

    def ahead(self, l, h, u, p, entries, mask, before):
        return p, [self.changed(l, m, u) for m in self.targets(l)]


class StreamPredictor(StatePredictor):
    """The accelerated stream: p_{l+1}, known when block l's attention is through, stands for
    h_tau(l+1), and names the experts of the blocks from there to tau(l+2). Where an interval begins, h
    itself names those that p will not.

    Args:
        stream: of the form `attention` or `adapter`; its rate is the velocity, 1 the control.
    """

    def __init__(self, stream: AcceleratedStream, width: int | None = None):
        super().__init__(stream._backbone, width)
        object.__setattr__(self, "_stream", stream)
        config, N = stream.config, self._backbone.depth
        plan = {}  # l -> (first, by h, by p)
        for a, b in intervals(config):
            at = [tau(l, a, b, N, config.rate) for l in range(a, b + 1)] + [N]
            for l in range(a, b):
                reach = at[l - a + 1], at[l - a + 2] if l + 1 < b else at[-2] + (at[-2] - at[-3])
                by_p = self._between(max(reach[0], l + 1), max(reach[1], reach[0] + 1))
                plan[l] = l == a, self._between(a + 1, at[1]) if l == a else [], by_p
        object.__setattr__(self, "_plan", plan)

    def _between(self, first: int, end: int) -> list[int]:
        return [m for m in self._with_experts if first <= m < end]

    def targets(self, l):
        _, by_h, by_p = self._plan.get(l, (False, [], []))
        return by_h + by_p

    @property
    def reads(self):
        return sorted({f.read for f in self._stream.fast}) if self._stream.config.deep else []

    def ahead(self, l, h, u, p, entries, mask, before):
        if l not in self._plan:
            return p, []
        first, by_h, by_p = self._plan[l]
        stream, block, near, deep = self._stream, self._stream.block(l), None, None
        if first:
            p = h
            if stream.config.carry and l == 0:
                p = p + stream.carry(before).astype(p.dtype)
        if stream.config.deep:
            position = entries[l].offset - 1
            keys, values, deep_mask = seen(entries[block.read], position)
            deep = (keys, values, position, deep_mask)
        if reads_near(stream.config):
            near = SharedKV(entries[l], 1), mask
        p = block(p, near, deep)
        return p, [u] * len(by_h) + [p] * len(by_p)
