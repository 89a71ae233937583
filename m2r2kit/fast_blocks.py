"""One step of the accelerated stream: what a fast block is made of.

    block       the base block, with a low-rank change of its matrices
    attention   the base attention, likewise, without the base FFN
    adapter     neither

On top of each, if asked for: attention to a deeper block's keys, and a small FFN of its own.
All start as "change nothing", so an untrained stream is the logit lens (`residuals.py`).
"""

import copy

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.base import scaled_dot_product_attention

from .backbone import Backbone
from .fixed_cache import FixedKV
from .lean_pass import product

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


def one_token_mask(entry):
    """What one new token may look at: everything, or of a cache of fixed size what is filled."""
    return entry.make_mask(1) if isinstance(entry, FixedKV) else None


def seen(entry, verified):
    """Keys and values of a block at the first `verified` positions: (keys, values, mask).

    Position 0 stands in while nothing is verified, as in training; there is none to stand in
    before the very first token, and then keys and values are None.
    """
    if isinstance(entry, FixedKV):
        return entry.keys, entry.values, mx.arange(entry.keys.shape[2]) < mx.maximum(verified, 1)
    count = min(max(verified, 1), entry.offset)
    if count == 0:
        return None, None, None
    return entry.keys[..., :count, :], entry.values[..., :count, :], None


# --- low-rank changes of frozen matrices ----------------------------------------------------


class Delta(nn.Module):
    """x -> x A B, zero at the start: A (in, r), B (r, out)."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.a = mx.random.normal((inputs, rank)) * inputs**-0.5
        self.b = mx.zeros((rank, outputs))

    def __call__(self, x):
        return product(product(x, self.a), self.b)

    def matrix(self) -> mx.array:
        """A B, (in, out)."""
        return self.a @ self.b


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


class TwoMatrices(nn.Module):
    """For a pair (h, p) the frozen matrix and the changed one, as one product; so many numbers
    are read twice that it pays in small blocks only."""

    def __init__(self, base: nn.Linear, delta: Delta | None):
        super().__init__()
        slow = base.weight.T
        self._matrices = mx.stack([slow, slow + delta.matrix() if delta else slow])  # (2, in, out)
        self._bias = base.bias if "bias" in base else None
        mx.eval(self._matrices)

    def __call__(self, x):
        y = x @ self._matrices
        return y if self._bias is None else y + self._bias


SMALL_BLOCK = 1 << 20  # numbers: a second read from the processor's cache costs less than an operation


def is_small(block: nn.Module) -> bool:
    """Whether a block's matrices may be read twice: few numbers, all in float32, on a CPU."""
    weights = [w for _, w in tree_flatten(block.parameters())]
    quantized = any(isinstance(m, nn.QuantizedLinear) for m in block.modules())
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    few = sum(w.size for w in weights) <= SMALL_BLOCK
    return on_cpu and few and not quantized and all(w.dtype == mx.float32 for w in weights)


def _matrix_shape(linear: nn.Module) -> tuple[int, int]:
    outputs, inputs = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        inputs = inputs * 32 // linear.bits
    return inputs, outputs


def _changed(module: nn.Module, make, path: str = "") -> nn.Module:
    """A copy of a module that shares its weights; `make(matrix, name)` says what takes a matrix's place."""
    clone = copy.copy(module)
    for name, child in module.children().items():
        inner = f"{path}{name}"
        if isinstance(child, (nn.Linear, nn.QuantizedLinear)):
            clone[name] = make(child, inner)
        elif isinstance(child, nn.Module):
            clone[name] = _changed(child, make, f"{inner}/")
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
        x = mx.concatenate([mx.fast.rms_norm(y, self.norm.weight, 1e-5) for y in x], axis=-1)
        return product(nn.silu(product(x, self.down)), self.up)


class Carry(nn.Module):
    """What p takes along from the token before: the model's last state there, h_N, or where the model
    has not been yet, p_E, which stands for it. Adds norm(state) C to p_0; zero at the start.

    The recurrence is EAGLE's (arXiv 2401.15077, section 3), which begins a draft from the last state."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.matrix = mx.zeros((width, width))

    def __call__(self, state):
        return product(self.norm(state), self.matrix)


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
        q = product(self.norm(p), self.q).reshape(B, T, -1, self._head_dim).transpose(0, 2, 1, 3)
        q = self._attention.rope(q, offset=offset)
        y = scaled_dot_product_attention(q, keys, values, cache=None, scale=self._attention.scale, mask=mask)
        return product(y.transpose(0, 2, 1, 3).reshape(B, T, -1), self.o)


class FastBlock(nn.Module):
    """One step of p: block l of a model, by the stream's settings (`residuals.StreamConfig`);
    `read` is the slow block whose keys it also reads."""

    def __init__(self, backbone: Backbone, l: int, read: int, config):
        super().__init__()
        block, parts = backbone.blocks[l], backbone.parts
        self._norm_after, self.read = parts.norm_after, read
        self._form = config.form
        if config.form == "block":
            self.deltas = _new_deltas(block, config.rank)
            self._block = block
            self._base = _changed(block, self._with_delta(pair=False))
            self._pair = _changed(block, self._with_delta(pair=True))
        elif config.form == "attention":
            attention = block[parts.attention]
            self.deltas = _new_deltas(attention, config.rank)
            self._base = _changed(attention, self._with_delta(pair=False))
            self._norm = block[parts.attention_norm]
        if config.ffn_width:
            self.ffn = SmallFFN(backbone.width, config.ffn_width, config.feed_slow)
        if config.deep:
            attention = block[parts.attention]
            heads = backbone.config["num_attention_heads"]
            self.deep = DeepAttention(attention, backbone.width, heads, head_dim(backbone))

    def _with_delta(self, pair: bool):
        def make(matrix, name):
            return Changed(matrix, self.deltas[name], pair) if name in self.deltas else matrix

        return make

    def merged_pair(self) -> nn.Module:
        """What `pair` computes with, as it is now, in as few operations as a block of this size
        allows; anew after training."""
        if not is_small(self._block):
            return self._pair
        return _changed(self._block, lambda matrix, name: TwoMatrices(matrix, self.deltas.get(name)))

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

    def pair(self, h, p, slow, deep, merged=None):
        """(h_l, p_l) -> (h_{l+1}, p_{l+1}) for one new token: one read of each base matrix.

        Only for the form `block`. `slow` is the slow cache entry of block l and grows by one;
        `merged` is what `merged_pair` gave.
        """
        mask = one_token_mask(slow)
        both = (merged or self._pair)(mx.concatenate([h, p]), mask, cache=PairKV(slow))
        return both[:1], self._own_parts(both[1:], both[:1], deep)


def head_dim(backbone: Backbone) -> int:
    """Width of one attention head."""
    config = backbone.config
    return config.get("head_dim") or backbone.width // config["num_attention_heads"]
