"""A mixture-of-experts model cut between each router and its experts.

    segment    [experts of the previous block] .. attention, router    -> experts and their weights
    .. the experts are read into slots ..
    segment    [these experts] .. the next attention, router           -> ..

Each segment is one compiled pass (`cache.Traced`) from one router's decision to the next. If all experts are
in slots, nothing is read and one segment spans all blocks. Families differ in how they route, so their own
code runs with a substitute for the experts.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from ..model.backbone import Backbone
from ..model.cache import Traced
from ..model.compiled import replaced
from .state_predictors import StatePredictor

EXPERTS = "switch_mlp"  # the attribute in all families of mlx-lm


def has_experts(backbone: Backbone, l: int) -> bool:
    """Whether a block routes to experts."""
    return "gate" in backbone.blocks[l][backbone.parts.ffn]


def attend(backbone: Backbone, l: int, h: mx.array, mask, cache) -> mx.array:
    """u_l: block l up to its FFN, (B, T, D) -> (B, T, D); `cache` is the block's layer cache."""
    block, parts = backbone.blocks[l], backbone.parts
    return h + block[parts.attention](block[parts.attention_norm](h), mask, cache=cache)


def route(backbone: Backbone, l: int, u: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Block l's routing: (inputs x (T, D) of the experts, their ids (T, k), weights (T, k)).

    The block's own FFN runs with unit vectors as expert outputs; it sums them by weight, so its output is the
    weights.
    """
    block, parts = backbone.blocks[l], backbone.parts
    ffn, x = block[parts.ffn], block[parts.ffn_norm](u)
    D, noted = x.shape[-1], []

    def units(x, ids):
        noted.append(ids)
        k = ids.shape[-1]
        return mx.broadcast_to(unit_vectors(k, D, x.dtype), (*ids.shape, D))

    with replaced(ffn, EXPERTS, units):
        weights = ffn(x)
    ids = noted[0]
    k = ids.shape[-1]
    return x.reshape(-1, D), ids.reshape(-1, k), weights.reshape(-1, D)[:, :k]


_UNITS: dict[tuple, mx.array] = {}


def unit_vectors(k: int, width: int, dtype: mx.Dtype) -> mx.array:
    """e_1 .. e_k, (k, width); created once, so that compiled passes treat it as a constant."""
    if (k, width, dtype) not in _UNITS:
        _UNITS[k, width, dtype] = mx.eye(k, width, dtype=dtype)
        mx.eval(_UNITS[k, width, dtype])
    return _UNITS[k, width, dtype]


def combine(u: mx.array, y: mx.array, weights: mx.array) -> mx.array:
    """h_{l+1} (1, T, D): u_l plus the weighted sum of the experts' outputs y (T, k, D)."""
    return u + (y * weights[..., None]).sum(axis=-2).reshape(u.shape)


def dense(backbone: Backbone, l: int, u: mx.array) -> mx.array:
    """h_{l+1} of an unmodified block: without experts, or with all of them in memory."""
    block, parts = backbone.blocks[l], backbone.parts
    return u + block[parts.ffn](block[parts.ffn_norm](u))


def through(
    backbone: Backbone, l: int, u: mx.array, switch: nn.Module, first: int
) -> tuple[mx.array, mx.array]:
    """Run block l's FFN on u_l (T = 1), with all its experts in slots from `first` on. Returns h_{l+1} and
    the ids (1, k) that its router chose."""
    noted = []

    def experts(x, ids):
        noted.append(ids)
        return switch(x, ids + first if first else ids)

    with replaced(backbone.blocks[l][backbone.parts.ffn], EXPERTS, experts):
        h = dense(backbone, l, u)
    return h, noted[0].reshape(1, -1)


def new_cache(backbone: Backbone, capacity: int) -> list:
    """`Backbone.new_cache` for a model without its experts, which do not affect the shapes."""

    def no_experts(x, ids):
        return mx.zeros((*ids.shape, x.shape[-1]), x.dtype)

    with ExitStack() as stack:
        for l, block in enumerate(backbone.blocks):
            if has_experts(backbone, l):
                stack.enter_context(replaced(block[backbone.parts.ffn], EXPERTS, no_experts))
        return backbone.new_cache(capacity)


# --- one token ------------------------------------------------------------------------------


@dataclass
class Decision:
    """A token's state after block l's router; `l` is None at the end of the pass.

    Attributes:
        u: the hidden state after block l's attention, (1, 1, D); at the end h_N.
        x, ids, weights: as `route` returns them, T = 1; at the end `ids` (blocks, k) of the blocks that ran
            without a stop, if any.
        p: the predictor's state for the next segment.
        predicted: for each prediction in the segment: the next block with experts, the target blocks, and
            their predicted experts (targets, width).
        logits: at the end, (1, 1, V).
    """

    l: int | None
    u: mx.array
    x: mx.array | None = None
    ids: mx.array | None = None
    weights: mx.array | None = None
    p: mx.array | None = None
    predicted: list[tuple[int, list[int], mx.array]] = field(default_factory=list)
    logits: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        """All arrays that must be evaluated before the experts are read."""
        given = (self.u, self.x, self.ids, self.weights, self.p, self.logits)
        return [a for a in given if a is not None] + [experts for *_, experts in self.predicted]


class TokenPass:
    """The segments of a token's pass.

    Args:
        switches: for each block with experts, the module that computes from slots (`slots.Bank.switch`).
        predictor: predicts from hidden states; may be None.
        first: if all experts stay in slots, block -> slot of its first expert; then no block stops.
    """

    def __init__(
        self,
        backbone: Backbone,
        switches: dict[int, nn.Module],
        predictor: StatePredictor | None = None,
        first: dict[int, int] | None = None,
    ):
        self.backbone, self.switches, self.predictor = backbone, switches, predictor
        self.first = first or {}
        if predictor is not None:
            mx.eval(predictor.parameters())  # otherwise compiled passes compute them each time
        self.stops = [*(l for l in sorted(switches) if l not in self.first), None]
        self.segments: list[Traced] = []
        self.targets: list[list[tuple[int, list[int]]]] = []  # per segment, as in `Decision.predicted`
        for last, stop in zip([None, *self.stops], self.stops):
            asked = self._range(last, stop) if predictor is not None else ()
            predicted = [(l, predictor.targets(l)) for l in asked]
            self.targets.append([(self._next(l), blocks) for l, blocks in predicted if blocks])
            writes = self._range(last, stop)
            reads = predictor.reads if predictor is not None else ()
            self.segments.append(Traced(self._body(last, stop), backbone.depth, writes, reads))

    def _range(self, last: int | None, stop: int | None) -> range:
        """Blocks whose attention a segment runs."""
        first = 0 if last is None else last + 1
        return range(first, self.backbone.depth if stop is None else stop + 1)

    def _next(self, l: int) -> int:
        """The first block with experts from l on."""
        return min(m for m in self.switches if m >= l)

    def _body(self, last: int | None, stop: int | None):
        backbone, predictor = self.backbone, self.predictor

        def body(cache, x, before, *more):
            p = None
            if last is None:
                h = p = backbone.embed(x)
            else:
                rows, weights, slots, p = more
                h = combine(x, self.switches[last](rows, slots), weights)
            u, predicted, passed = h, [], []
            for l in self._range(last, stop):
                mask = cache[l].make_mask(1)
                u = attend(backbone, l, h, mask, cache[l])
                if predictor is not None:
                    p, states = predictor.ahead(l, h, u, p, cache, mask, before)
                    if states:
                        predicted.append(predictor.predict(l, states))
                if l in self.first:
                    h, ids = through(backbone, l, u, self.switches[l], self.first[l])
                    passed.append(ids)
                elif l != stop:
                    h = dense(backbone, l, u)
            if stop is None:
                return (h, backbone.head(h), mx.concatenate(passed) if passed else None, *predicted)
            return (u, *route(backbone, stop, u), p, *predicted)

        return body

    def run(self, x: mx.array, cache: list, before: mx.array) -> Iterator[Decision]:
        """Yield the decisions of the pass of a token x (1, 1); the last has the logits. After each other
        decision, send the slots of the chosen experts, (k,)."""
        more = ()
        for stop, segment, targets in zip(self.stops, self.segments, self.targets):
            out = segment(cache, x, before, *more)
            if stop is None:
                h, logits, ids, *predicted = out
                predicted = [(*t, experts) for t, experts in zip(targets, predicted, strict=True)]
                yield Decision(None, h, ids=ids, predicted=predicted, logits=logits)
                return
            u, rows, ids, weights, p, *predicted = out
            predicted = [(*t, experts) for t, experts in zip(targets, predicted, strict=True)]
            slots = yield Decision(stop, u, rows, ids, weights, p, predicted)
            x, more = u, (rows, weights, mx.array([slots]), p)
