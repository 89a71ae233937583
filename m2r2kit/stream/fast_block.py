"""The fast block: one step of the accelerated stream.

    block       the base block with trained changes of its matrices, of full or low rank
    attention   the base attention with such changes, without the base FFN
    adapter     neither

Optional parts: attention to the keys and values of a deeper block, and a small FFN at the end. In a `block`,
that deep attention replaces the base attention, unless `StreamConfig.near` keeps both. All new parts are
zero at initialisation, so they change nothing (`stream.py`).
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
    """The layer cache that a block sees when p passes it: it reads the slow cache and writes nothing.

    Args:
        slow: layer cache of the slow stream, which already holds the tokens of p.
        positions: number of positions of p, the newest of the slow stream.
    """

    def __init__(self, slow, positions: int):
        self.slow = slow
        self.offset = slow.offset - positions

    def update_and_fetch(self, keys, values):
        return self.slow.keys_and_values()


def one_token_mask(layer_cache):
    """The attention mask of one new token: None, or for a cache of fixed size the filled positions."""
    return layer_cache.make_mask(1) if isinstance(layer_cache, FixedKV) else None


def seen(layer_cache, verified):
    """The first `verified` positions of a layer cache: (keys, values, mask).

    Args:
        verified: an int for a single new token, or (T,) or (B, T) for whole sequences, one for each
            position. The mask is then additive, (T, T) or (B, 1, T, T).

    If nothing is verified, a token sees position 0, because attention needs at least one. Before the first
    token the cache is empty, and all three are None.
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


# --- deltas of frozen matrices --------------------------------------------------------------


class Delta(nn.Module):
    """x -> x A B, with A (in, r) and B (r, out); x -> x B with B (in, out) if rank is None. B is zero at
    initialisation.
    """

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
    """A frozen linear layer plus its delta."""

    def __init__(self, base: nn.Module, delta: Delta):
        super().__init__()
        self._base, self.delta = base, delta

    def __call__(self, x):
        y = self._base(x)
        return y + self.delta(x).astype(y.dtype)


class Merged(nn.Module):
    """A frozen linear layer and its delta as one matrix product."""

    def __init__(self, base: nn.Linear, delta: Delta | None):
        super().__init__()
        matrix = base.weight.T if delta is None else base.weight.T + delta.matrix()
        self._matrix = mx.contiguous(matrix)  # (in, out), the fastest order for few_rows.c
        self._bias = base.bias if "bias" in base else None
        mx.eval(self._matrix)

    def __call__(self, x):
        y = product(x, self._matrix)
        return y if self._bias is None else y + self._bias


SMALL_BLOCK = 1 << 20  # a block of at most this many parameters is copied to save operations


def is_small(block: nn.Module) -> bool:
    """True if a block's matrices may be merged with their deltas: small, float32, on the CPU."""
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
    """A copy of a module that shares its weights; `make(linear, name)` replaces each linear layer."""
    clone = copy.copy(module)
    for name, child in module.children().items():
        inner = f"{path}{name}"
        if isinstance(child, (nn.Linear, nn.QuantizedLinear)):
            clone[name] = make(child, inner)
        elif isinstance(child, nn.Module):
            clone[name] = changed(child, make, f"{inner}/")
    return clone


def new_deltas(module: nn.Module, rank: int | None) -> dict[str, Delta]:
    """A delta for each linear layer that p uses; keys and values come from the slow stream, so theirs need
    none.
    """
    found = {}
    if rank == 0:
        return found
    for name, child in module.named_modules():
        if isinstance(child, (nn.Linear, nn.QuantizedLinear)) and not name.endswith(("k_proj", "v_proj")):
            found[name.replace(".", "/")] = Delta(*_matrix_shape(child), rank)  # MLX splits names at dots
    return found


# --- parts of a fast block ------------------------------------------------------------------


class SmallFFN(nn.Module):
    """p -> Up silu(Down norm(p)); Up is zero at initialisation."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.down = mx.random.normal((width, hidden)) * width**-0.5
        self.up = mx.zeros((hidden, width))

    def __call__(self, p):
        x = mx.fast.rms_norm(p, self.norm.weight, 1e-5)
        return product(nn.silu(product(x, self.down)), self.up)


class Carry(nn.Module):
    """Adds norm(state) C to p_0, where `state` is the last state of the previous token: h_N if the model has
    verified it, else p_E. C is zero at initialisation.

    The recurrence is EAGLE's (arXiv 2401.15077, section 3), which starts a draft from the last state.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.matrix = mx.zeros((width, width))

    def __call__(self, state):
        return product(self.norm(state), self.matrix)


class DeepAttention(nn.Module):
    """Attention of p to the slow keys and values of a deeper block, verified tokens only.

    p_l approximates a deeper state than h_l, so the keys of a deeper block fit it better than those of block
    l. Drafted tokens have no keys there until they are verified.
    """

    def __init__(self, attention: nn.Module, width: int, heads: int, head_dim: int):
        super().__init__()
        self._attention = attention  # its scale and rotary embedding are used
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
    """One step of p through block l of a model.

    Args:
        read: the deeper slow block whose keys and values it reads, or None.
        near: whether it also reads those of block l.
        config: the stream's settings (`stream.StreamConfig`).
    """

    def __init__(self, backbone: Backbone, l: int, read: int | None, near: bool, config):
        super().__init__()
        block, parts = backbone.blocks[l], backbone.parts
        self._norm_after, self.read = parts.norm_after, read
        self._part = None  # the part of the base block that p passes
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
        """The base block merged with its current deltas, for decoding; None if merging saves nothing. Call
        it again after training.
        """
        if self._part not in ("block", "ffn") or not is_small(self._unchanged):
            return None
        return changed(self._unchanged, lambda matrix, name: Merged(matrix, self.deltas.get(name)))

    def __call__(self, p, near: tuple | None, deep: tuple | None, merged: nn.Module | None = None):
        """p_l -> p_{l+1}. If it reads the keys of block l, the slow stream must have written them.

        Args:
            p: p_l, (B, T, D).
            near: the slow layer cache of block l (`SharedKV`), and a mask as mlx-lm's blocks take it.
            deep: (keys, values, offset, mask) for `DeepAttention`.
            merged: the result of `merged`, which replaces the base block and its deltas.
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
        """The rest of the step after the base block's part: (B, T, D) -> same."""
        return p + self.ffn(p).astype(p.dtype) if "ffn" in self else p

    @property
    def begins_at_u(self) -> bool:
        """True if p's attention output at the start of an interval equals the base model's u_l and can be
        reused.
        """
        return self._part == "attention" and not self.deltas and self.read is None

    def macs(self) -> int:
        """Multiply-accumulates of one token."""
        parts = self.ffn.down.size + self.ffn.up.size if "ffn" in self else 0
        parts += self.deep.q.size + self.deep.o.size if "deep" in self else 0
        return parts + (matrix_sizes(self._unchanged) if self._part else 0)

    def _around(self, part, p):
        """Apply a part of the base block with its norms, which the model family places before it, after it,
        or both.
        """
        y = self._norm(part(p)) if self._norm_after else part(self._norm(p))
        return self._out(y) if self._out is not None else y


def matrix_sizes(module: nn.Module) -> int:
    """Number of weights in a module's matrices: its multiply-accumulates for one token."""
    return sum(w.size for _, w in tree_flatten(module.parameters()) if w.ndim == 2)


def own_ffn(config, width: int) -> int:
    """Hidden width of the FFN that a fast block adds to its form; 0 for none."""
    if config.ffn_width is not None:
        return config.ffn_width
    return 0 if config.form == "block" else 4 * width


def head_dim(backbone: Backbone) -> int:
    """Width of one attention head."""
    config = backbone.config
    return config.get("head_dim") or backbone.width // config["num_attention_heads"]
