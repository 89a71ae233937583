"""The hall: a residual stream that runs ahead of the model's own (M2R2, arXiv 2502.02040).

The slow stream h is the unchanged model. The accelerated stream p starts as h and passes the
same few blocks, but each of its steps stands for R steps of the slow one:

    p_a     = h_a                                    (identity start of an interval a..b)
    p_{l+1} = FastBlock_l(p_l ; K, V of the slow stream)
    p_l     ~ h_{tau(l)},  tau(l) = min(N, a + R (l - a))

It owns no KV cache: queries come from p, keys and values from h. Everything trained is small
and the model is frozen, so whatever the model verifies is the model's own output.

The paper's equations are not public; these are our reconstruction (`data/paper/choices.toml`).
"""

import copy
import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from . import checkpoints
from .backbone import Backbone
from .errors import UserError

FORMS = ("block", "attention", "adapter")


@dataclass(frozen=True)
class StreamConfig:
    """Settings of an accelerated stream.

    Attributes:
        form: FastBlock: `block` (the base block with a low-rank change), `attention`
            (shared-KV attention, own small FFN) or `adapter` (own small FFN only).
        exits: depths E_1 < E_2 < .. at which p is read; each begins a new interval, in which
            p starts again as h.
        rate: R; None means that p reaches the end of the model at every exit. 1 is the control.
        rank: rank of the change of each base matrix; 0 leaves them all as they are.
        ffn_width: width of the fast block's own FFN; 0 switches it off (`block` only).
        feed_slow: the own FFN reads h as well as p.
        deep: p also attends to the slow keys and values of the block it stands for, of all
            tokens that the model has already verified.
    """

    form: str = "block"
    exits: tuple[int, ...] = (3,)
    rate: float | None = None
    rank: int = 64
    ffn_width: int = 160
    feed_slow: bool = True
    deep: bool = True


def intervals(config: StreamConfig) -> list[tuple[int, int]]:
    """The (a, b) of each interval: 0..E_1, E_1..E_2, .."""
    return list(zip((0, *config.exits[:-1]), config.exits, strict=True))


def tau(l: int, a: int, b: int, depth: int, rate: float | None) -> int:
    """The slow depth that p_l stands for, inside the interval a..b of a model of `depth` blocks."""
    R = (depth - a) / (b - a) if rate is None else rate
    return min(depth, a + round(R * (l - a)))


# --- keys and values of the slow stream, as seen by p ---------------------------------------


class SharedKV:
    """What a block takes for its cache when p passes it: reads the slow entry, writes nothing."""

    def __init__(self, slow, rows: int):
        self.slow = slow
        self.offset = slow.offset - rows  # positions of p's rows: the newest of the slow stream

    def update_and_fetch(self, keys, values):
        return self.slow.keys_and_values()


class PairKV:
    """The cache for a pair (h, p) in one batch: stores the keys of h, shows them to both."""

    def __init__(self, slow):
        self.slow, self.offset = slow, slow.offset

    def update_and_fetch(self, keys, values):
        keys, values = self.slow.update_and_fetch(keys[:1], values[:1])
        return mx.broadcast_to(keys, (2, *keys.shape[1:])), mx.broadcast_to(values, (2, *values.shape[1:]))


# --- low-rank changes of frozen matrices ----------------------------------------------------


class Delta(nn.Module):
    """x -> x A B, zero at the start: A (in, r), B (r, out)."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.a = mx.random.normal((inputs, rank)) * inputs**-0.5
        self.b = mx.zeros((rank, outputs))

    def __call__(self, x):
        return (x @ self.a) @ self.b


FAST_ROW = mx.array([0.0, 1.0]).reshape(2, 1, 1)  # of a pair (h, p)


class Changed(nn.Module):
    """A frozen matrix with its change. In a pair only the second row, p, gets the change,
    so that both rows go through the matrix in one read."""

    def __init__(self, base: nn.Module, delta: Delta, pair: bool):
        super().__init__()
        self._base, self.delta, self._pair = base, delta, pair

    def __call__(self, x):
        y = self._base(x)
        # in the model's own arithmetic: a wider sum would widen the slow row as well
        if self._pair:
            return y + (((x @ self.delta.a) * FAST_ROW) @ self.delta.b).astype(y.dtype)
        return y + self.delta(x).astype(y.dtype)


def _matrix_shape(linear: nn.Module) -> tuple[int, int]:
    outputs, inputs = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        inputs = inputs * 32 // linear.bits
    return inputs, outputs


def _changed(module: nn.Module, deltas: dict[str, Delta], pair: bool, path: str = "") -> nn.Module:
    """A copy of a module that shares its weights, with the matrices named in `deltas` changed."""
    clone = copy.copy(module)
    for name, child in module.children().items():
        inner = f"{path}{name}"
        if inner in deltas:
            clone[name] = Changed(child, deltas[inner], pair)
        elif isinstance(child, nn.Module):
            clone[name] = _changed(child, deltas, pair, f"{inner}/")
    return clone


def _new_deltas(module: nn.Module, rank: int) -> dict[str, Delta]:
    """A change for each matrix that p uses; its own keys and values would be thrown away."""
    found = {}
    if rank == 0:
        return found
    for name, child in module.named_modules():
        if isinstance(child, (nn.Linear, nn.QuantizedLinear)) and not name.endswith(("k_proj", "v_proj")):
            found[name.replace(".", "/")] = Delta(*_matrix_shape(child), rank)  # MLX splits names at dots
    return found


# --- parts of a fast block ------------------------------------------------------------------


class SmallFFN(nn.Module):
    """Up s(Down norm(p)), zero at the start; reads [norm(p), norm(h)] if h is fed as well."""

    def __init__(self, width: int, hidden: int, feed_slow: bool):
        super().__init__()
        self._feed_slow = feed_slow
        self.norm = nn.RMSNorm(width)
        self.down = mx.random.normal((width * (1 + feed_slow), hidden)) * width**-0.5
        self.up = mx.zeros((hidden, width))

    def __call__(self, p, h):
        x = [p, h] if self._feed_slow else [p]
        return _small_ffn(x, self.norm.weight, self.down, self.up)


@mx.compile  # for decoding, where a step is mostly the cost of starting small operations
def _small_ffn(x: list, weight, down, up):
    x = mx.concatenate([mx.fast.rms_norm(y, weight, 1e-5) for y in x], axis=-1)
    return nn.silu(x @ down) @ up


class DeepAttention(nn.Module):
    """Attention of p to the slow keys and values of a deeper block, of verified tokens only.

    p_l stands for a deeper state than h_l, so the keys of that deeper block are its natural
    memory. Tokens drafted and not yet verified have none there, and are left out.
    """

    def __init__(self, attention: nn.Module, width: int, heads: int, head_dim: int):
        super().__init__()
        self._attention = attention  # for its scale and rotary embedding
        self.norm = nn.RMSNorm(width)
        self.q = mx.random.normal((width, heads * head_dim)) * width**-0.5
        self.o = mx.zeros((heads * head_dim, width))
        self._head_dim = head_dim

    def __call__(self, p, keys, values, offset, mask=None):
        if keys is None or keys.shape[2] == 0:
            return mx.zeros_like(p)
        B, T, _ = p.shape
        q = (self.norm(p) @ self.q).reshape(B, T, -1, self._head_dim).transpose(0, 2, 1, 3)
        q = self._attention.rope(q, offset=offset)
        y = scaled_dot_product_attention(q, keys, values, cache=None, scale=self._attention.scale, mask=mask)
        return y.transpose(0, 2, 1, 3).reshape(B, T, -1) @ self.o


class FastBlock(nn.Module):
    """One step of p, in one of the three forms; `read` is the slow block whose keys it also reads."""

    def __init__(self, backbone: Backbone, l: int, read: int, config: StreamConfig):
        super().__init__()
        block, parts = backbone.blocks[l], backbone.parts
        self._norm_after, self.read = parts.norm_after, read
        self._form = config.form
        if config.form == "block":
            self.deltas = _new_deltas(block, config.rank)
            self._base = _changed(block, self.deltas, pair=False)
            self._pair = _changed(block, self.deltas, pair=True)
        elif config.form == "attention":
            attention = block[parts.attention]
            self.deltas = _new_deltas(attention, config.rank)
            self._base = _changed(attention, self.deltas, pair=False)
            self._norm = block[parts.attention_norm]
        if config.ffn_width:
            self.ffn = SmallFFN(backbone.width, config.ffn_width, config.feed_slow)
        if config.deep:
            attention = block[parts.attention]
            heads = backbone.config["num_attention_heads"]
            self.deep = DeepAttention(attention, backbone.width, heads, head_dim(backbone))

    def _own_parts(self, p, h, deep):
        """What comes on top of the base block: deep attention, then the small FFN."""
        if "deep" in self:
            p = p + self.deep(p, *deep).astype(p.dtype)
        if "ffn" in self:
            p = p + self.ffn(p, h).astype(p.dtype)
        return p

    def __call__(self, p, h, shared: SharedKV, mask, deep):
        """p_l -> p_{l+1}, after the slow stream has passed block l.

        Args:
            p, h: p_l and the slow state h_{l+1}, each (B, T, D).
            shared: the slow keys and values of block l.
            mask: as mlx-lm's blocks take it.
            deep: (keys, values, offset, mask) for `DeepAttention`.
        """
        if self._form == "block":
            p = self._base(p, mask, cache=shared)
        elif self._form == "attention":
            if self._norm_after:
                p = p + self._norm(self._base(p, mask, cache=shared))
            else:
                p = p + self._base(self._norm(p), mask, cache=shared)
        return self._own_parts(p, h, deep)

    def pair(self, h, p, slow, deep):
        """(h_l, p_l) -> (h_{l+1}, p_{l+1}) for one new token: one read of each base matrix.

        Only for the form `block`. `slow` is the slow cache entry of block l and grows by one.
        """
        both = self._pair(mx.concatenate([h, p]), None, cache=PairKV(slow))
        return both[:1], self._own_parts(both[1:], both[:1], deep)


def head_dim(backbone: Backbone) -> int:
    """Width of one attention head."""
    config = backbone.config
    return config.get("head_dim") or backbone.width // config["num_attention_heads"]


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
        self.fast = []
        for a, b in intervals(config):
            for l in range(a, b):
                # the last block that brings the slow stream to where p_{l+1} stands
                read = max(tau(l + 1, a, b, backbone.depth, config.rate) - 1, 0)
                self.fast.append(FastBlock(backbone, l, read, config))

    def parameter_count(self) -> int:
        """Numbers that training changes."""
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

    def __call__(self, states, cache, verified=None, exit: int | None = None) -> list[mx.array]:
        """p_a .. p_E over whole sequences, for training and for measuring.

        Args:
            states: the slow states h_0, h_1, .. up to the exit at least, each (B, T, D).
            cache: the slow KV cache after the same tokens (T positions in every block).
            verified: (B, T) or (T,), how many positions before each token the model has
                verified; None means all that come before it.
            exit: which exit; by default the first.

        Returns:
            E - a + 1 arrays (B, T, D).
        """
        a, b = self.interval(exit or self.config.exits[0])
        T = states[0].shape[1]
        mask = "causal" if T > 1 else None
        deep_mask = self._deep_mask(T, verified) if self.config.deep else None
        p = [states[a]]
        for l in range(a, b):
            block = self.fast[l]
            deep = (*cache[block.read].keys_and_values(), 0, deep_mask) if self.config.deep else None
            p.append(block(p[-1], states[l + 1], SharedKV(cache[l], T), mask, deep))
        return p

    @staticmethod
    def _deep_mask(T: int, verified) -> mx.array:
        """Additive mask (.., T, T): token t sees the positions below verified[t].

        A token with nothing verified before it sees position 0, as the pass needs one.
        """
        limit = mx.arange(T) if verified is None else verified
        limit = mx.maximum(limit, 1)[..., :, None]
        mask = mx.where(mx.arange(T) < limit, 0.0, -1e9)
        return mask if mask.ndim == 2 else mask[:, None]

    def step(self, h, cache, verified: int, exit: int | None = None) -> tuple[mx.array, mx.array]:
        """One new token through both streams: h_0 (1, 1, D) -> h_E, p_E.

        The slow cache of the blocks below the exit grows by one position; p writes nothing.

        Args:
            verified: positions (from the first) that the model has verified: the deep keys.
        """
        a, b = self.interval(exit or self.config.exits[0])
        h = self._backbone.run(h, cache, 0, a)
        p = h
        for l in range(a, b):
            block = self.fast[l]
            offset = cache[l].offset
            deep = None
            if self.config.deep:
                entry = cache[block.read]
                # position 0 stands in while nothing is verified, as in training; there is none
                # to stand in before the very first token
                seen = min(max(verified, 1), entry.offset)
                keys = entry.keys[..., :seen, :] if seen else None
                values = entry.values[..., :seen, :] if seen else None
                deep = (keys, values, offset, None)
            if self.config.form == "block":
                h, p = block.pair(h, p, cache[l], deep)
            else:
                h = self._backbone.run(h, cache, l, l + 1)
                p = block(p, h, SharedKV(cache[l], 1), None, deep)
        return h, p


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
    if config.rank < 0 or config.ffn_width < 0:
        raise UserError("Neither the rank nor the FFN's width can be negative.")
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
