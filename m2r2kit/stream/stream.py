"""The accelerated residual stream (M2R2, arXiv 2502.02040).

The slow stream h is the unchanged model. The accelerated stream p starts at h and passes the same blocks,
but each of its steps approximates R steps of the slow stream:

    p_a     = h_a                                    (start of an interval a..b)
    p_{l+1} = FastBlock_l(p_l ; K, V of the slow stream)
    p_l     ~ h_{tau(l)},  tau(l) = min(N, a + R (l - a))

It has no KV cache of its own: queries come from p, keys and values from h. The model is frozen and only
small modules are trained, so verified tokens are the model's own.

The equations are our reconstruction from the paper's abstract and from texts about it
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
        form: the fast block: `block` (the base block with trained changes of its matrices), `attention`
            (attention to the slow keys and values, and a small FFN) or `adapter` (a small FFN only).
        exits: depths E_1 < E_2 < .. at which p is read; each ends an interval, and p starts the next one at
            h.
        span: length of each interval in blocks; None starts each interval at the previous exit.
        rate: R; None is the rate at which p reaches depth N at every exit. 1 is the control.
        rank: rank of the change of each base matrix; None is full rank, which is free in decoding where it
            is merged; 0 is no change.
        ffn_width: hidden width of the fast block's FFN; 0 disables it; None is the form's default: 0 for
            `block`, 4 D for the others.
        deep: relative depth (0 to 1, from a to N) of the block whose KV cache p also reads, verified tokens
            only; 0 disables it.
        near: also attend to block l's own KV, drafted tokens included. Always on if `deep` is 0 or the form
            is `attention`. Without it a draft reads only what the model has verified.
        carry: p also starts from the last state of the previous token (`fast_block.Carry`).
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
    """The (a, b) of each interval: 0..E_1, E_1..E_2, .., each at most `span` blocks long."""
    ends = zip((0, *config.exits[:-1]), config.exits, strict=True)
    return [(max(a, b - (config.span or b)), b) for a, b in ends]


def reads_near(config: StreamConfig) -> bool:
    """True if p reads the slow keys and values of its own blocks, which drafted tokens must then compute."""
    return config.form == "attention" or (config.form == "block" and (config.near or not config.deep))


def tau(l: int, a: int, b: int, depth: int, rate: float | None) -> int:
    """The slow depth that p_l approximates, in the interval a..b of a model of `depth` blocks."""
    R = (depth - a) / (b - a) if rate is None else rate
    return min(depth, a + round(R * (l - a)))


# --- the stream -----------------------------------------------------------------------------


class AcceleratedStream(nn.Module):
    """The accelerated residual stream of a model.

    Args:
        backbone: the frozen model.
        config: the stream's settings.

    Raises:
        UserError: the model cannot have this form, or one of these exits.
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
        # plain attributes: MLX treats a module's dicts and lists as parameters
        object.__setattr__(self, "_traced", {})
        object.__setattr__(self, "_places", places(self))
        object.__setattr__(self, "_blocks", blocks)

    def parameter_count(self) -> int:
        """Number of trainable parameters."""
        from mlx.utils import tree_flatten

        return sum(v.size for _, v in tree_flatten(self.trainable_parameters()))

    def interval(self, exit: int) -> tuple[int, int]:
        """The interval (a, b) that ends at an exit.

        Raises:
            UserError: the stream has no such exit.
        """
        for a, b in intervals(self.config):
            if b == exit:
                return a, b
        raise UserError(
            f"This stream has no exit {exit}; it was trained for {', '.join(map(str, self.config.exits))}."
        )

    def block(self, l: int) -> FastBlock:
        """The fast block that maps p_l to p_{l+1}."""
        return self._blocks[l]

    def slow_depth(self, exit: int) -> int:
        """Number of slow blocks that a draft at an exit runs; verification resumes there. If p reads the
        keys of its own blocks, the last of them computes only its keys and values.
        """
        a, b = self.interval(exit)
        return b - 1 if reads_near(self.config) else a

    def __call__(self, states, cache, verified=None, exit: int | None = None, before=None) -> list[mx.array]:
        """p_a .. p_E over whole sequences, for training and evaluation.

        Args:
            states: the slow states h_0, h_1, .. at least up to the exit, each (B, T, D).
            cache: the slow KV cache after the same tokens (T positions in every block).
            verified: (B, T) or (T,), the number of verified positions before each token; None means all
                earlier ones.
            before: for `carry`, the last state of the token before each, (B, T, D); None means the model's
                h_N.
            exit: the exit to read; by default the first.

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
        """p_a = h_a, the start of an interval; at block 0 plus the state carried from the previous token.

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
        """p_l -> p_{l+1}, (B, T, D): the one step of the recurrence, for whole sequences in training and for
        single tokens in decoding.

        Args:
            cache: layer caches of the slow stream. If p reads the keys of its own blocks (`reads_near`),
                that of block l already holds the tokens of p.
            verified: number of positions of the deep cache that each token sees: an int, or (T,) or (B, T)
                for whole sequences.
            position: of the first token of p.
            mask: attention mask of block l, as mlx-lm's blocks take it.
            merged: results of `FastBlock.merged` by block, which replace the blocks.
        """
        block, near, deep = self.block(l), None, None
        if self.config.deep:
            keys, values, deep_mask = seen(cache[block.read], verified)
            deep = (keys, values, position, deep_mask)
        if reads_near(self.config):
            near = SharedKV(cache[l], p.shape[1]), mask
        return block(p, near, deep, merged[l] if merged else None)

    def step(self, h, cache, verified: int, exit: int | None = None, before=None, position=None):
        """One new token through both streams: h_0 (1, 1, D) -> h at `slow_depth` and p_E, each (1, 1, D).

        The slow cache of the blocks below the interval grows by one position, and so does that of its own
        blocks if p reads their keys (`reads_near`). p writes nothing.

        Args:
            verified: number of verified positions, whose deep keys p reads.
            before: for `carry`, the last state of the previous token, (1, 1, D); None means zeros.
            position: of the token; by default the offset of block 0's cache, which drafts do not advance if
                they run no slow block.
        """
        return self._one("step", h, cache, verified, exit, before, position)

    def read(self, token, cache, verified: int, exit: int | None = None, before=None, position=None):
        """`step` for a token (1, 1), with its embedding and the head: (h, p_E, logits (1, 1, V))."""
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
        """One `step` or `read`; `merged` blocks, if any, replace blocks a..b-1."""
        h = self._backbone.run(self._backbone.embed(x) if kind == "read" else x, cache, 0, a)
        last, p = self.accelerate(h, cache, verified, position, b, before, merged)
        return (last, p) if kind == "step" else (last, p, self._backbone.head(p))

    def accelerate(self, h, cache, verified, position, exit: int, before=None, merged: dict | None = None):
        """One token of each sequence through the interval a..b of an exit: h_a (B, 1, D) -> h at
        `slow_depth` and p_b, each (B, 1, D). Arguments as for `step`.

        Args:
            merged: results of `FastBlock.merged` by block, which replace the blocks.
        """
        a, b = self.interval(exit)
        last, p, mask = h, self.begin(a, h, before), None
        for l in range(a, b):
            if reads_near(self.config):
                last, mask = h, one_token_mask(cache[l])
                h = self._backbone.run(h, cache, l, l + 1)  # lazy: the last block computes only its KV
            p = self.advance(l, p, cache, verified, position, mask, merged)
        return last, p

    def _compiled(self, kind: str, a: int, b: int) -> Traced:
        """A compiled step, compiled again after training has replaced the weights."""
        weights = [module[name] for module, name in self._places]
        known, traced = self._traced.get((kind, b), ([], None))
        if traced is None or any(x is not y for x, y in zip(known, weights, strict=True)):
            mx.eval(weights)  # lazy weights would be recomputed in each pass
            merged = {l: self.block(l).merged() for l in range(a, b)}
            reads = [self.block(l).read for l in range(a, b)] if self.config.deep else ()

            def body(caches, x, verified, position, *more):
                return self._body(kind, x, caches, verified, position, a, b, merged, *more)

            writes = range(b if reads_near(self.config) else a)
            traced = Traced(body, self._backbone.depth, writes, reads)
            self._traced[kind, b] = weights, traced
        return traced


def shifted(states: mx.array) -> mx.array:
    """The state of the previous token for each token, zeros for the first: (B, T, D)."""
    return mx.pad(states[:, :-1], [(0, 0), (1, 0), (0, 0)])


def places(module) -> list[tuple[dict, str]]:
    """Where a module keeps its trainable arrays: (dict, name) of each."""
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


def default_form(backbone: Backbone) -> str:
    """The default form of a stream: `block`, but `attention` for a mixture, where `block` would need experts
    of its own.
    """
    return "attention" if backbone.is_moe else "block"


def check(backbone: Backbone, config: StreamConfig) -> None:
    """Raise UserError for settings that the model cannot have."""
    if config.form not in FORMS:
        raise UserError(f"There is no fast block '{config.form}'; choose one of {', '.join(FORMS)}.")
    if backbone.is_moe and config.form == "block":
        raise UserError(
            "The form 'block' of a mixture of experts would need experts of its own; "
            "use 'attention' or 'adapter'."
        )
    exits = config.exits
    if not exits or list(exits) != sorted(set(exits)) or exits[0] < 1 or exits[-1] >= backbone.depth:
        raise UserError(f"Exits must increase and lie between 1 and {backbone.depth - 1}; got {exits}.")
    if config.rate is not None and not (math.isfinite(config.rate) and config.rate >= 1):
        raise UserError(f"The rate must be at least 1; got {config.rate}.")
    if config.span is not None and config.span < 1:
        raise UserError(f"The span of an interval must be at least 1; got {config.span}.")
    if (config.rank or 0) < 0 or (config.ffn_width or 0) < 0:
        raise UserError("The rank and the FFN's width must be at least 0.")
    if not 0 <= config.deep <= 1:
        raise UserError(
            f"The relative depth of the keys that p reads must lie between 0 and 1; got {config.deep}."
        )
    if config.form != "block" and config.ffn_width == 0:
        raise UserError(f"The form '{config.form}' needs an FFN; give it a width of at least 1.")


def load_stream(backbone: Backbone, folder) -> AcceleratedStream:
    """Load the trained stream of a model, as written by `train stream`.

    Raises:
        UserError: there is none, it is damaged, or it belongs to another model.
    """
    config, text = checkpoints.read_settings(folder, "stream", StreamConfig)
    stream = checkpoints.build(AcceleratedStream, backbone, config, folder, "stream")
    checkpoints.load_weights(stream, text, backbone.sha256, folder, "stream")
    return stream
