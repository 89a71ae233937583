"""The hall: a residual stream that runs ahead of the model's own (M2R2, arXiv 2502.02040).

The slow stream h is the unchanged model. The accelerated stream p starts as h and passes the
same few blocks, but each of its steps stands for R steps of the slow one:

    p_a     = h_a                                    (identity start of an interval a..b)
    p_{l+1} = FastBlock_l(p_l ; K, V of the slow stream)
    p_l     ~ h_{tau(l)},  tau(l) = min(N, a + R (l - a))

It owns no KV cache: queries come from p, keys and values from h. Everything trained is small
and the model is frozen, so whatever the model verifies is the model's own output.

We worked from the paper's abstract and texts about it; the equations are our reconstruction
(`data/paper/choices.toml`).
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..common import UserError
from ..model.backbone import Backbone
from ..model.cache import Traced, is_fixed
from . import checkpoints
from .fast_block import Carry, FastBlock, SharedKV, one_token_mask, seen
from .registry import FORMS


@dataclass(frozen=True)
class StreamConfig:
    """Settings of an accelerated stream.

    Attributes:
        form: FastBlock: `block` (the base block with a change of its matrices), `attention`
            (shared-KV attention, own small FFN) or `adapter` (own small FFN only).
        exits: depths E_1 < E_2 < .. at which p is read; each begins a new interval, in which
            p starts again as h.
        span: blocks of each interval, the last ones before its exit; None: all since the exit before.
        rate: R; None means that p reaches the end of the model at every exit. 1 is the control.
        rank: rank of the change of each base matrix; None is full rank, which costs nothing in decoding
            where it is merged; 0 changes nothing.
        ffn_width: width of the fast block's own FFN; 0 switches it off, and None is the form's
            own: none for `block`, 4 D for the others.
        deep: relative depth (0 to 1, from a to N) of the block whose KV cache p also reads, verified tokens
            only; 0 disables it.
        near: also attend to block l's own KV, drafted tokens included. Always on if `deep` is 0 or the form
            is `attention`. Without it a draft needs only what the model has verified.
        carry: p also begins with the last state of the token before it (`fast_blocks.Carry`).
    """

    form: str = "block"
    exits: tuple[int, ...] = (1,)
    span: int | None = None
    rate: float | None = None
    rank: int | None = None
    ffn_width: int | None = None
    deep: float = 0.25
    near: bool = False
    carry: bool = True


def intervals(config: StreamConfig) -> list[tuple[int, int]]:
    """The (a, b) of each interval: 0..E_1, E_1..E_2, .., or their last `span` blocks."""
    ends = zip((0, *config.exits[:-1]), config.exits, strict=True)
    return [(max(a, b - (config.span or b)), b) for a, b in ends]


def reads_near(config: StreamConfig) -> bool:
    """Whether p reads the slow keys of its own blocks, which then have to be there for drafted tokens."""
    return config.form == "attention" or (config.form == "block" and (config.near or not config.deep))


def tau(l: int, a: int, b: int, depth: int, rate: float | None) -> int:
    """The slow depth that p_l stands for, inside the interval a..b of a model of `depth` blocks."""
    R = (depth - a) / (b - a) if rate is None else rate
    return min(depth, a + round(R * (l - a)))


# --- the stream -----------------------------------------------------------------------------


class AcceleratedStream(nn.Module):
    """The accelerated residual stream of a model.

    Args:
        backbone: the frozen model that it belongs to.
        config: its settings.

    Raises:
        UserError: a form or an exit that this model cannot have.
    """

    def __init__(self, backbone: Backbone, config: StreamConfig):
        super().__init__()
        check(backbone, config)
        self._backbone, self.config = backbone, config
        N, near = backbone.depth, reads_near(config)
        blocks = {}
        for a, b in intervals(config):
            read = min(round(a + config.deep * (N - a)), N - 1) if config.deep else None
            blocks |= {l: FastBlock(backbone, l, read, near, config) for l in range(a, b)}
        self.fast = list(blocks.values())
        if config.carry:
            self.carry = Carry(backbone.width)
        # plain attributes, as MLX takes a module's dicts and lists for parameters
        object.__setattr__(self, "_traced", {})
        object.__setattr__(self, "_places", places(self))
        object.__setattr__(self, "_blocks", blocks)

    def parameter_count(self) -> int:
        """Number of trainable parameters."""
        from mlx.utils import tree_flatten

        return sum(v.size for _, v in tree_flatten(self.trainable_parameters()))

    def interval(self, exit: int) -> tuple[int, int]:
        """The interval that ends at an exit."""
        for a, b in intervals(self.config):
            if b == exit:
                return a, b
        raise UserError(
            f"This stream has no exit {exit}; it was trained for {', '.join(map(str, self.config.exits))}."
        )

    def block(self, l: int) -> FastBlock:
        """The fast block that takes p_l to p_{l+1}."""
        return self._blocks[l]

    def slow_depth(self, exit: int) -> int:
        """Number of slow blocks that a draft at an exit runs; verification resumes there. Where p reads
        the keys of its own blocks, the last of them computes only these keys."""
        a, b = self.interval(exit)
        return b - 1 if reads_near(self.config) else a

    def __call__(self, states, cache, verified=None, exit: int | None = None, before=None) -> list[mx.array]:
        """p_a .. p_E over whole sequences, for training and for measuring.

        Args:
            states: the slow states h_0, h_1, .. up to the exit at least, each (B, T, D).
            cache: the slow KV cache after the same tokens (T positions in every block).
            verified: (B, T) or (T,), how many positions before each token the model has
                verified; None means all that come before it.
            before: for `carry`, the last state of the token before each, (B, T, D); None means
                the model's own, h_N.
            exit: which exit; by default the first.

        Returns:
            E - a + 1 arrays (B, T, D).
        """
        a, b = self.interval(exit or self.config.exits[0])
        T, mask = states[a].shape[1], self._backbone.mask(states[a])
        verified = mx.arange(T) if verified is None else verified
        if self.config.carry and a == 0 and before is None:
            before = shifted(states[self._backbone.depth])
        p = [self.begin(a, states[a], before)]
        for l in range(a, b):
            p.append(self.advance(l, p[-1], cache, verified, 0, mask))
        return p

    def begin(self, a: int, h: mx.array, before: mx.array | None) -> mx.array:
        """p_a = h_a, the start of an interval; at block 0 plus what is carried from the token before.

        Args:
            h: h_a, (B, T, D).
            before: for `carry`, the last state of the token before each, (B, T, D); None means zeros.
        """
        if not self.config.carry or before is None or a > 0:
            return h
        return h + self.carry(before).astype(h.dtype)

    def advance(
        self, l: int, p, cache, verified, position, mask=None, merged: dict | None = None
    ) -> mx.array:
        """p_l -> p_{l+1}, (B, T, D): the one step of the recurrence, for whole sequences in training and
        for single tokens in decoding.

        Args:
            cache: layer caches of the slow stream; where p reads the keys of its own blocks (`reads_near`),
                that of block l already holds the tokens of p.
            verified: for each token, the number of positions whose deep keys it sees: one number, or (T,)
                or (B, T) for whole sequences.
            position: of the first token of p.
            mask: of block l's own attention over its keys, as mlx-lm's blocks take it.
            merged: results of `FastBlock.merged` by block, which take the blocks' places.
        """
        block, near, deep = self.block(l), None, None
        if self.config.deep:
            keys, values, deep_mask = seen(cache[block.read], verified)
            deep = (keys, values, position, deep_mask)
        if reads_near(self.config):
            near = SharedKV(cache[l], p.shape[1]), mask
        return block(p, near, deep, merged[l] if merged else None)

    def step(self, h, cache, verified: int, exit: int | None = None, before=None, position=None):
        """One new token through both streams: h_0 (1, 1, D) -> h at `slow_depth`, p_E, each (1, 1, D).

        Where p reads the keys of its own blocks, the slow cache of the blocks below the exit grows by one
        position, else only that of the blocks before the interval; p writes nothing.

        Args:
            verified: positions (from the first) that the model has verified: the deep keys.
            before: for `carry`, the last state of the token before, (1, 1, D); None means zeros.
            position: of the token; by default what block 0 holds, which does not grow with the drafts
                where nothing of the slow stream is computed for them.
        """
        return self._one("step", h, cache, verified, exit, before, position)

    def read(self, token, cache, verified: int, exit: int | None = None, before=None, position=None):
        """`step` from a token (1, 1) to what the head reads: (h, p_E, logits (1, 1, V))."""
        return self._one("read", token, cache, verified, exit, before, position)

    def _one(self, kind, x, cache, verified, exit, before, position):
        a, b = self.interval(exit or self.config.exits[0])
        position = cache[0].offset if position is None else position
        more = ()
        if self.config.carry:
            more = (mx.zeros((1, 1, self._backbone.width)) if before is None else before,)
        if is_fixed(cache, 0):
            return self._compiled(kind, a, b)(cache, x, mx.array(verified), mx.array(position), *more)
        return self._body(kind, x, cache, verified, position, a, b, None, *more)

    def _body(self, kind, x, cache, verified, position, a, b, merged, before=None):
        """A step of one of the `kind`s above, through the blocks a..b-1 as `merged` if there are such."""
        h = self._backbone.run(self._backbone.embed(x) if kind == "read" else x, cache, 0, a)
        last, p = self.accelerate(h, cache, verified, position, b, before, merged)
        return (last, p) if kind == "step" else (last, p, self._backbone.head(p))

    def accelerate(self, h, cache, verified, position, exit: int, before=None, merged: dict | None = None):
        """One token of each sequence through the interval a..b that ends at an exit: h_a (B, 1, D) ->
        h at `slow_depth`, p_b, each (B, 1, D); arguments as for `step`.

        Args:
            merged: what `FastBlock.merged` gave for the blocks, to be passed in their places.
        """
        a, b = self.interval(exit)
        last, p, mask = h, self.begin(a, h, before), None
        for l in range(a, b):
            if reads_near(self.config):
                last, mask = h, one_token_mask(cache[l])
                h = self._backbone.run(h, cache, l, l + 1)  # lazy: of the last block only its keys
            p = self.advance(l, p, cache, verified, position, mask, merged)
        return last, p

    def _compiled(self, kind: str, a: int, b: int) -> Traced:
        """A step compiled, and anew when training has put other weights in place."""
        weights = [module[name] for module, name in self._places]
        known, traced = self._traced.get((kind, b), ([], None))
        if traced is None or any(x is not y for x, y in zip(known, weights, strict=True)):
            mx.eval(weights)  # or the compiled pass would make them anew each time
            merged = {l: self.block(l).merged() for l in range(a, b)}
            reads = [self.block(l).read for l in range(a, b)] if self.config.deep else ()

            def body(caches, x, verified, position, *more):
                return self._body(kind, x, caches, verified, position, a, b, merged, *more)

            writes = range(b if reads_near(self.config) else a)
            traced = Traced(body, self._backbone.depth, writes, reads)
            self._traced[kind, b] = weights, traced
        return traced


def shifted(states: mx.array) -> mx.array:
    """For each token the state of the one before it, and zeros for the first: (B, T, D)."""
    return mx.pad(states[:, :-1], [(0, 0), (1, 0), (0, 0)])


def places(module) -> list[tuple[dict, str]]:
    """Where a module keeps its own weights: (dict, name) of each array, frozen ones left out."""
    found = []
    for name, value in module.items():
        if name.startswith("_"):
            continue
        if isinstance(value, mx.array):
            found.append((module, name))
        else:
            children = value if isinstance(value, list) else [value]
            found += [place for child in children if isinstance(child, dict) for place in places(child)]
    return found


def check(backbone: Backbone, config: StreamConfig) -> None:
    """Refuse settings that a model cannot have, in one sentence."""
    if config.form not in FORMS:
        raise UserError(f"There is no fast block '{config.form}'; choose {', '.join(FORMS)}.")
    if backbone.is_moe and config.form == "block":
        raise UserError(
            "In a mixture of experts the form 'block' would ask for experts of its own; "
            "use 'attention' or 'adapter'."
        )
    exits = config.exits
    if not exits or list(exits) != sorted(set(exits)) or exits[0] < 1 or exits[-1] >= backbone.depth:
        raise UserError(f"Exits must rise and lie between 1 and {backbone.depth - 1}; got {exits}.")
    if config.rate is not None and not (math.isfinite(config.rate) and config.rate >= 1):
        raise UserError(f"The rate must be at least 1; got {config.rate}.")
    if config.span is not None and config.span < 1:
        raise UserError(f"An interval spans at least one block; got {config.span}.")
    if (config.rank or 0) < 0 or (config.ffn_width or 0) < 0:
        raise UserError("Neither the rank nor the FFN's width can be negative.")
    if not 0 <= config.deep <= 1:
        raise UserError(
            f"The share of the depth at which keys are read lies between 0 and 1; got {config.deep}."
        )
    if config.form != "block" and config.ffn_width == 0:
        raise UserError(f"The form '{config.form}' needs an FFN of its own; give it a width of at least 1.")


def load_stream(backbone: Backbone, folder) -> AcceleratedStream:
    """The trained stream of a model, from `train stream`.

    Raises:
        UserError: there is none, it is damaged, or it belongs to another model.
    """
    config, text = checkpoints.read_settings(folder, "stream", StreamConfig)
    stream = AcceleratedStream(backbone, config)
    checkpoints.load_weights(stream, text, backbone.sha256, folder, "stream")
    return stream
