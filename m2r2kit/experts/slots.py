"""The slot bank: the experts in memory, and computing from them.

One array for each piece of a record, with a capacity of a few experts: (slots, out, in) instead of
(E, out, in). mlx-lm's own `SwitchGLU` runs on it, with slot numbers instead of expert ids; each position is
multiplied by the same matrix, so the result is bit-identical.

Records are copied through NumPy views of the arrays, which changes memory that MLX treats as constant. This
is correct because a slot is written only between two uses (`residency.py`). Tested on CPUs, not on Apple
GPUs, which share the memory.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..common import UserError
from ..model.view import private
from .store import Manifest, Piece


class Bank:
    """Empty slots for experts whose records consist of `pieces`.

    Raises:
        UserError: this version of MLX has read-only arrays.
    """

    def __init__(self, pieces: Sequence[Piece], slots: int):
        self.pieces = pieces
        self.arrays = {p.name: mx.zeros((slots, *p.shape), getattr(mx, p.dtype)) for p in self.pieces}
        mx.eval(self.arrays)
        self.views = [bytes_of(self.arrays[p.name]) for p in self.pieces]  # each (slots, bytes)
        if any(not view.flags.writeable for view in self.views):
            raise UserError("This version of MLX does not let its arrays be written; experts cannot stream.")

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def write(self, slot: int, record: np.ndarray) -> None:
        """Copy a record (bytes) into a slot; may be called from any thread."""
        for piece, view in zip(self.pieces, self.views, strict=True):
            view[slot] = record[piece.offset : piece.offset + piece.nbytes]

    def switch(self, experts: nn.Module) -> nn.Module:
        """A block's `SwitchGLU` that computes from this bank: x (.., D), slots (.., k) -> (.., k, D)."""
        clone = private(experts)
        clone.update(tree_unflatten(list(self.arrays.items())))
        return clone


def bytes_of(array: mx.array) -> np.ndarray:
    """The memory of an evaluated array as uint8 (shape[0], bytes), without a copy."""
    return np.frombuffer(memoryview(array).cast("B"), np.uint8).reshape(array.shape[0], -1)


def slots_of_budget(manifest: Manifest, budget: int, buffers: int, shared: bool = False) -> int:
    """Slots of each block (all blocks together if `shared`) that fit a budget.

    Args:
        budget: bytes for the bank and the readers' buffers together.
        buffers: bytes of the readers' buffers.

    Raises:
        UserError: the budget does not hold the experts of one token in every block.
    """
    each = manifest.slot_bytes // (len(manifest.blocks) if shared else 1)
    slots = max(0, budget - buffers) // each
    if slots < manifest.top_k:
        least = manifest.top_k * each + buffers
        raise UserError(f"A budget of {budget} bytes is too small for this model; it needs at least {least}.")
    return min(slots, manifest.experts * (len(manifest.blocks) if shared else 1))


def budget_of_share(manifest: Manifest, share: float, buffers: int) -> int:
    """The budget that holds this share of all experts, in whole slots, and the buffers."""
    return round(share * manifest.experts) * manifest.slot_bytes + buffers
