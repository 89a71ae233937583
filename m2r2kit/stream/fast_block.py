"""One step of the accelerated stream: what a fast block is made of.

    block       the base block, with a change of its matrices, of full or low rank
    attention   the base attention, likewise, without the base FFN
    adapter     neither

Beside each, if asked for, attention to a deeper block's keys, and after it a small FFN of its own. In
a `block` that attention may also stand in the place of the base attention (`StreamConfig.near`).
All that is new starts as "change nothing" (`residuals.py`).
"""

import copy

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..model.backbone import Backbone
from ..model.cache import FixedKV
from ..model.compiled import attention, product

# --- keys and values of the slow stream, as seen by p ---------------------------------------


class SharedKV:
    """The layer cache that a block gets when p passes it: it reads the slow one and writes nothing.

    Args:
        slow: layer cache of the slow stream, which already holds the tokens of p.
        positions: number of tokens of p: the newest of the slow stream.
    """

    def __init__(self, slow, positions: int):
        self.slow = slow
        self.offset = slow.offset - positions

    def update_and_fetch(self, keys, values):
        return self.slow.keys_and_values()


def one_token_mask(layer_cache):
    """What one new token may look at: everything, or of a cache of fixed size what is filled."""
    return layer_cache.make_mask(1) if isinstance(layer_cache, FixedKV) else None


def seen(layer_cache, verified):
    """Keys and values of a layer cache at the first `verified` positions: (keys, values, mask).

    Args:
        verified: one number for a single new token, or (T,) or (B, T) for whole sequences, one a token; then
            the mask is additive, (T, T) or (B, 1, T, T).

    While nothing is verified a token sees position 0, because attention needs one; before the very first
    token there is none, and keys and values are None.
    """
    if getattr(verified, "ndim", 0):
        keys, values = layer_cache.keys_and_values()
        limit = mx.maximum(verified, 1)[..., :, None]
        mask = mx.where(mx.arange(keys.shape[2]) < limit, 0.0, -1e9)
        return keys, values, mask if mask.ndim == 2 else mask[:, None]
    if isinstance(layer_cache, FixedKV):
        keys, values = layer_cache.keys, layer_cache.values
        return keys, values, mx.arange(keys.shape[2]) < mx.maximum(verified, 1)
    count = min(max(verified, 1), layer_cache.offset)
    if count == 0:
        return None, None, None
    return layer_cache.keys[..., :count, :], layer_cache.values[..., :count, :], None


# --- changes of frozen matrices -------------------------------------------------------------


class Delta(nn.Module):
    """x -> x A B, zero at the start: A (in, r), B (r, out); x -> x B with B (in, out) if no rank is given."""

    def __init__(self, inputs: int, outputs: int, rank: int | None):
        super().__init__()
        if rank is not None:
            self.a = mx.random.normal((inputs, rank)) * inputs**-0.5
        self.b = mx.zeros((inputs if rank is None else rank, outputs))

    def __call__(self, x):
        return product(product(x, self.a) if "a" in self else x, self.b)

    def matrix(self) -> mx.array:
        """A B, (in, out)."""
        return self.a @ self.b if "a" in self else self.b


class Changed(nn.Module):
    """A frozen matrix with its change."""

    def __init__(self, base: nn.Module, delta: Delta):
        super().__init__()
        self._base, self.delta = base, delta

    def __call__(self, x):
        y = self._base(x)
        return y + self.delta(x).astype(y.dtype)


class Merged(nn.Module):
    """A frozen matrix and its change as one product."""

    def __init__(self, base: nn.Linear, delta: Delta | None):
        super().__init__()
        matrix = base.weight.T if delta is None else base.weight.T + delta.matrix()
        self._matrix = mx.contiguous(matrix)  # (in, out), the order that few_rows.c is fastest in
        self._bias = base.bias if "bias" in base else None
        mx.eval(self._matrix)

    def __call__(self, x):
        y = product(x, self._matrix)
        return y if self._bias is None else y + self._bias


SMALL_BLOCK = 1 << 20  # parameters of a block that may be kept a second time, to save operations


def is_small(block: nn.Module) -> bool:
    """Whether a block's matrices may be merged with their changes: small, in float32, on a CPU."""
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


def changed(module: nn.Module, make, path: str = "") -> nn.Module:
    """A copy of a module that shares its weights; `make(matrix, name)` says what takes a matrix's place."""
    clone = copy.copy(module)
    for name, child in module.children().items():
        inner = f"{path}{name}"
        if isinstance(child, (nn.Linear, nn.QuantizedLinear)):
            clone[name] = make(child, inner)
        elif isinstance(child, nn.Module):
            clone[name] = changed(child, make, f"{inner}/")
    return clone


def new_deltas(module: nn.Module, rank: int | None) -> dict[str, Delta]:
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
    """Up s(Down norm(p)), zero at the start."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.down = mx.random.normal((width, hidden)) * width**-0.5
        self.up = mx.zeros((hidden, width))

    def __call__(self, p):
        x = mx.fast.rms_norm(p, self.norm.weight, 1e-5)
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

    p_l stands for a deeper state than h_l, and a deeper block's keys say more of what was read
    than block l's. Tokens drafted and not yet verified have none there, and are left out.
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
        y = attention(q, keys, values, cache=None, scale=self._attention.scale, mask=mask)
        return product(y.transpose(0, 2, 1, 3).reshape(B, T, -1), self.o)


class FastBlock(nn.Module):
    """One step of p: block l of a model, by the stream's settings (`residuals.StreamConfig`);
    `read` is the deeper slow block whose keys it reads, if any, `near` whether it reads block l's."""

    def __init__(self, backbone: Backbone, l: int, read: int | None, near: bool, config):
        super().__init__()
        block, parts = backbone.blocks[l], backbone.parts
        self._norm_after, self.read = parts.norm_after, read
        self._part = None  # what of the base block p passes
        if config.form == "block" and near:
            self._part, base = "block", block
        elif config.form == "block":
            self._part, base, self._norm = "ffn", block[parts.ffn], block[parts.ffn_norm]
            self._out = block[parts.ffn_out] if parts.ffn_out else None
        elif config.form == "attention":
            self._part, base, self._norm = "attention", block[parts.attention], block[parts.attention_norm]
            self._out = block[parts.attention_out] if parts.attention_out else None
        if self._part:
            self.deltas = new_deltas(base, config.rank)
            self._unchanged, self._base = base, changed(base, self._with_delta)
        if width := own_ffn(config, backbone.width):
            self.ffn = SmallFFN(backbone.width, width)
        if read is not None:
            attention = block[parts.attention]
            heads = backbone.config["num_attention_heads"]
            self.deep = DeepAttention(attention, backbone.width, heads, head_dim(backbone))

    def _with_delta(self, matrix, name):
        return Changed(matrix, self.deltas[name]) if name in self.deltas else matrix

    def merged(self) -> nn.Module | None:
        """The base block with its current changes merged, for decoding; None if that saves nothing. Make it
        anew after training."""
        if self._part not in ("block", "ffn") or not is_small(self._unchanged):
            return None
        return changed(self._unchanged, lambda matrix, name: Merged(matrix, self.deltas.get(name)))

    def __call__(self, p, near: tuple | None, deep: tuple | None, merged: nn.Module | None = None):
        """p_l -> p_{l+1}, where it reads block l's keys after the slow stream has left them there.

        Args:
            p: p_l, (B, T, D).
            near: the slow keys and values of block l (`SharedKV`), and a mask as mlx-lm's blocks take it.
            deep: (keys, values, offset, mask) for `DeepAttention`.
            merged: what `merged` gave, to stand for the part of the base block with its changes.
        """
        added = self.deep(p, *deep).astype(p.dtype) if "deep" in self else 0
        base = merged or self._base if self._part else None
        if self._part == "block":
            shared, mask = near
            p = base(p, mask, cache=shared) + added
        elif self._part == "attention":
            shared, mask = near
            p = p + added + self._around(lambda x: base(x, mask, cache=shared), p)
        else:
            p = p + added
            if self._part == "ffn":
                p = p + self._around(base, p)
        return self.after_attention(p)

    def after_attention(self, p):
        """What is left to do when p has passed the base block's part: (B, T, D) -> same."""
        return p + self.ffn(p).astype(p.dtype) if "ffn" in self else p

    @property
    def begins_at_u(self) -> bool:
        """True if p's attention output at the start of an interval equals the base model's u_l and can be
        reused."""
        return self._part == "attention" and not self.deltas and self.read is None

    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        parts = self.ffn.down.size + self.ffn.up.size if "ffn" in self else 0
        parts += self.deep.q.size + self.deep.o.size if "deep" in self else 0
        return parts + (matrix_sizes(self._unchanged) if self._part else 0)

    def _around(self, part, p):
        """A part of the base block with its norms, before it, after it or both as the family has them."""
        y = self._norm(part(p)) if self._norm_after else part(self._norm(p))
        return self._out(y) if self._out is not None else y


def matrix_sizes(module: nn.Module) -> int:
    """Number of weights in a module's matrices: the products for one token."""
    return sum(w.size for _, w in tree_flatten(module.parameters()) if w.ndim == 2)


def own_ffn(config, width: int) -> int:
    """Width of the FFN that a fast block has on top of what its form gives it; 0 for none."""
    if config.ffn_width is not None:
        return config.ffn_width
    return 0 if config.form == "block" else 4 * width


def head_dim(backbone: Backbone) -> int:
    """Width of one attention head."""
    config = backbone.config
    return config.get("head_dim") or backbone.width // config["num_attention_heads"]
