"""Predictors of experts from hidden states, inside the model's compiled pass.

    u_l     the hidden state after block l's attention, which block l's own router reads
    g_m     block m's router on a state, as block m applies it: gate_m(norm_m(.))

Three ways: the next routers applied early to u, a direct low-rank map, and the accelerated stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..common import UserError
from ..model.backbone import Backbone
from ..stream.stream import AcceleratedStream, StreamConfig, intervals, tau
from .predictors import Predictor


class StatePredictor(nn.Module, Predictor):
    """Predicts experts from hidden states inside the compiled pass, and those of block 0 before it, by its
    router on the embedding alone.

    Attributes:
        width: experts to predict per block.
    """

    def __init__(self, backbone: Backbone, width: int | None):
        super().__init__()
        self._backbone, self._permute = backbone, None
        self.width = width or backbone.config["num_experts_per_tok"]
        gates = {l: block[backbone.parts.ffn] for l, block in enumerate(backbone.blocks)}
        self._with_experts = tuple(l for l, ffn in gates.items() if "gate" in ffn)
        object.__setattr__(self, "_of", {})  # token -> experts of block 0

    def targets(self, l: int) -> list[int]:
        """Blocks whose experts are predicted at block l."""
        raise NotImplementedError

    @property
    def reads(self) -> list[int]:
        """Blocks whose KV cache it reads, besides the current one."""
        return []

    def ahead(self, l: int, h, u, p, cache, mask, before) -> tuple[mx.array, list[mx.array]]:
        """At block l: (the predictor's state for block l + 1, a hidden state for each target's router).

        Args:
            h: the input of block l, (1, 1, D); `u`: the state after its attention.
            p: the predictor's state from block l - 1; h at block 0.
            cache: the layer caches; block l's already holds this token. `mask`: of block l's attention.
            before: h_N of the previous token, (1, 1, D).
        """
        raise NotImplementedError

    def predict(self, l: int, states: list[mx.array]) -> mx.array:
        """The experts that the targets' routers choose for these states: (targets, width) ids, best first."""
        logits = [router(self._backbone, m, s) for m, s in zip(self.targets(l), states, strict=True)]
        return self._best(mx.concatenate(logits, axis=1)[0])

    def _best(self, logits: mx.array) -> mx.array:
        """The predicted experts: logits (.., E) -> ids (.., width)."""
        order = mx.argsort(-logits, axis=-1)[..., : self.width]
        return order if self._permute is None else self._permute[order]

    def of(self, token):
        if self._with_experts[0] != 0:  # earlier blocks without experts change the state
            return []
        if token not in self._of:
            logits = router(self._backbone, 0, self._backbone.embed(mx.array([[token]])))
            self._of[token] = self._best(logits[0, -1]).tolist()
        return [(0, self._of[token])]

    def shuffle(self, seed: int = 0) -> "StatePredictor":
        """Permute the predicted experts: a control with as many reads and no information."""
        experts = self._backbone.config.get("num_experts") or self._backbone.config["num_local_experts"]
        self._permute = mx.array(np.random.default_rng(seed).permutation(experts))
        self._of.clear()
        return self


def router(backbone: Backbone, m: int, state: mx.array) -> mx.array:
    """g_m: the logits of block m's router on a state, (1, T, D) -> (1, T, E)."""
    block, parts = backbone.blocks[m], backbone.parts
    return block[parts.ffn].gate(block[parts.ffn_norm](state))


class NextRouter(StatePredictor):
    """The routers of the next blocks on the current state; no training. Distance 0 is each router on its own
    input: always right, but too late to help."""

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
        """(l, m) where block m's experts are predicted at block l."""
        return [(l, m) for l in self._with_experts for m in self.targets(l)]

    def of(self, token):
        return super().of(token) if self.distance else []

    def ahead(self, l, h, u, p, cache, mask, before):
        return p, [u] * len(self.targets(l))


# --- the stream and its control, the direct map ---------------------------------------


@dataclass(frozen=True)
class Turn:
    """The targets at one block of an interval: `by_u` from u, because p does not reach them in time; `by_p`
    from p_{l+1}."""

    first: bool
    by_u: tuple[int, ...]
    by_p: tuple[int, ...]


def turns(config: StreamConfig, depth: int, with_experts: Sequence[int]) -> dict[int, Turn]:
    """The targets of a stream at each block. p_{l+1}, known after block l's attention, stands for h_tau(l+1)
    and predicts the blocks from tau(l+1) up to the depth of the next state. Blocks that no p reaches before
    they run are predicted from u at the start of an interval."""
    steps = [
        (l, a, tau(l + 1, a, b, depth, config.rate), tau(l, a, b, depth, config.rate))
        for a, b in intervals(config)
        for l in range(a, b)
    ]
    found, predicted = {}, set()
    ends = [at for _, _, at, _ in steps[1:]]
    ends += [
        2 * at - before for _, _, at, before in steps[-1:]
    ]  # the last state covers as many blocks as the one before
    for (l, a, at, _), end in zip(steps, ends, strict=True):
        by_u = tuple(m for m in with_experts if l == a and l < m < at and m not in predicted)
        by_p = tuple(m for m in with_experts if at <= m < max(end, at + 1))
        predicted |= {*by_u, *by_p}
        found[l] = Turn(l == a, by_u, by_p)
    while found and not (found[max(found)].by_u or found[max(found)].by_p):
        del found[max(found)]  # without targets, p is not computed
    return found


class StreamPredictor(StatePredictor):
    """The accelerated stream.

    Args:
        stream: of the form `attention` or `adapter`; rate 1 is the control without velocity.
        opening: a stream of rate 1 with intervals of one block, for block 1, which the faster stream does not
            reach in time. Without it, block 1 is predicted from u.

    Raises:
        UserError: the opening does not begin at the state after attention.
    """

    def __init__(
        self, stream: AcceleratedStream, width: int | None = None, opening: AcceleratedStream | None = None
    ):
        super().__init__(stream._backbone, width)
        plan = turns(stream.config, self._backbone.depth, self._with_experts)
        if opening is not None and not opening.block(0).begins_at_u:
            raise UserError("An opening stream must begin at the state after attention.")
        object.__setattr__(self, "_opening", opening)
        # set past MLX, which would treat them as parameters of this module
        object.__setattr__(self, "_stream", stream)
        object.__setattr__(self, "_turns", plan)

    def targets(self, l):
        turn = self._turns.get(l)
        return [*turn.by_u, *turn.by_p] if turn else []

    @property
    def reads(self):
        return sorted({f.read for f in self._stream.fast}) if self._stream.config.deep else []

    def ahead(self, l, h, u, p, cache, mask, before):
        if l not in self._turns:
            return p, []
        turn, stream = self._turns[l], self._stream
        if turn.first and self._begins_at_u(l):
            p = stream.block(l).after_attention(u)
        else:
            position = cache[l].offset - 1  # of this token, already in the cache
            p = stream.begin(l, h, before) if turn.first else p
            p = stream.advance(l, p, cache, position, position, mask)
        return p, self._by_u(l, u, turn) + [p] * len(turn.by_p)

    def _by_u(self, l: int, u: mx.array, turn: Turn) -> list[mx.array]:
        """The states for the targets `by_u`."""
        if turn.by_u and self._opening is not None and l == 0:
            u = self._opening.block(0).after_attention(u)
        return [u] * len(turn.by_u)

    def _begins_at_u(self, l: int) -> bool:
        carried = self._stream.config.carry and l == 0
        return self._stream.block(l).begins_at_u and not carried

    def path(self, states: list, after: list, cache: list, a: int, b: int) -> list[mx.array]:
        """p_a .. p_b of an interval over whole sequences; arguments as for `over`."""
        if b == a + 1 and self._begins_at_u(a):
            return [states[a], self._stream.block(a).after_attention(after[a])]
        return self._stream(states, cache, exit=b)

    def over(self, states: list, after: list, cache: list) -> dict[tuple[int, int], mx.array]:
        """The router inputs of `ahead` for whole sequences, for training: (l, m) -> (B, T, D).

        Args:
            states: h_0 .. h_N, each (B, T, D); `after`: u_0 .. u_{N-1}.
            cache: the slow stream's keys and values of the same tokens.
        """
        found = {}
        for a, b in intervals(self._stream.config):
            p = self.path(states, after, cache, a, b)
            for l in (l for l in range(a, b) if l in self._turns):
                turn = self._turns[l]
                by_u = self._by_u(l, after[l], turn)
                found |= {(l, m): state for m, state in zip(turn.by_u, by_u)}
                found |= {(l, m): p[l - a + 1] for m in turn.by_p}
        return found


@dataclass(frozen=True)
class DirectConfig:
    """Settings of a `DirectMap`: exits and rate of the stream it is compared with, and the rank of its
    maps."""

    exits: tuple[int, ...] = (1,)
    rate: float | None = None
    rank: int = 8


class DirectMap(StatePredictor):
    """A low-rank change of u_l for each pair (l, m) where a stream predicts block m at block l:
    g_m(u_l + u_l A B). Untrained, it equals the next router. It is the control of the stream: as many
    parameters, no recurrence."""

    def __init__(self, backbone: Backbone, config: DirectConfig, width: int | None = None):
        super().__init__(backbone, width)
        self.config, D = config, backbone.width
        like = StreamConfig(exits=config.exits, rate=config.rate)
        plan = turns(like, backbone.depth, self._with_experts)
        pairs = [(l, m) for l, turn in plan.items() for m in (*turn.by_u, *turn.by_p)]
        self.a = [mx.random.normal((D, config.rank)) * D**-0.5 for _ in pairs]
        self.b = [mx.zeros((config.rank, D)) for _ in pairs]
        object.__setattr__(self, "_turns", plan)
        object.__setattr__(self, "_places", {pair: i for i, pair in enumerate(pairs)})

    @classmethod
    def like(cls, stream: AcceleratedStream) -> "DirectMap":
        """A map that predicts the same blocks at the same time as `stream`, with about as many parameters."""
        config = stream.config
        one = cls(stream._backbone, DirectConfig(config.exits, config.rate, 1))
        each = 2 * stream._backbone.width * len(one.a)
        rank = max(1, round(stream.parameter_count() / each))
        return cls(stream._backbone, DirectConfig(config.exits, config.rate, rank))

    def targets(self, l):
        turn = self._turns.get(l)
        return [*turn.by_u, *turn.by_p] if turn else []

    def changed(self, l: int, m: int, u: mx.array) -> mx.array:
        """The approximation of u_m: (.., D) -> (.., D)."""
        i = self._places[l, m]
        return u + (u @ self.a[i]) @ self.b[i]

    def ahead(self, l, h, u, p, cache, mask, before):
        if l not in self._turns:
            return p, []
        return p, [self.changed(l, m, u) for m in self.targets(l)]

    def over(self, states: list, after: list, cache: list) -> dict[tuple[int, int], mx.array]:
        """As `StreamPredictor.over`."""
        return {(l, m): self.changed(l, m, after[l]) for l in self._turns for m in self.targets(l)}
