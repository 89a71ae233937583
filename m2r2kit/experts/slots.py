"""The slot bank: where experts lie in memory, and how the model computes from there.

One array for each piece of a record, with room for a few experts: (slots, out, in) in the place of
(E, out, in). mlx-lm's own `SwitchGLU` runs over it, with slot numbers in the place of expert ids;
each row is multiplied by the same matrix, so its result is the same to the bit.

A record is copied through a NumPy view of the arrays. That changes memory which MLX takes for
constant: it is right because a slot is written only between its last use and its next (`residency.py`).
Checked on CPUs; on a GPU of Apple's, whose memory is shared, we have not been able to try it.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..common import UserError
from ..model.view import private
from .store import Manifest


class Bank:
    """Room for `slots` experts of a store, all empty."""

    def __init__(self, manifest: Manifest, slots: int):
        self.pieces = manifest.pieces
        self.arrays = {p.name: mx.zeros((slots, *p.shape), getattr(mx, p.dtype)) for p in self.pieces}
        mx.eval(self.arrays)
        self.views = [bytes_of(self.arrays[p.name]) for p in self.pieces]  # each (slots, bytes)
        if any(not view.flags.writeable for view in self.views):
            raise UserError("This version of MLX does not let its arrays be written; experts cannot stream.")

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def write(self, slot: int, record: np.ndarray) -> None:
        """Put a record (bytes) into a slot; any thread may."""
        for piece, view in zip(self.pieces, self.views, strict=True):
            view[slot] = record[piece.offset : piece.offset + piece.nbytes]

    def switch(self, experts: nn.Module) -> nn.Module:
        """A block's `SwitchGLU` that computes from this bank: x (.., D), slots (.., k) -> (.., k, D)."""
        clone = private(experts)
        clone.update(tree_unflatten(list(self.arrays.items())))
        return clone


def bytes_of(array: mx.array) -> np.ndarray:
    """The memory of an evaluated array as it is, uint8 (rows, bytes of a row); nothing is copied."""
    return np.frombuffer(memoryview(array).cast("B"), np.uint8).reshape(array.shape[0], -1)


def slots_of_budget(manifest: Manifest, budget: int, buffers: int, shared: bool = False) -> int:
    """Slots of each block (all blocks together if `shared`) that fit a budget.

    Args:
        budget: bytes for the bank and for the readers' buffers together.
        buffers: bytes of these.

    Raises:
        UserError: the budget does not hold the experts of one token in every block.
    """
    blocks = 1 if shared else len(manifest.blocks)
    slots = max(0, budget - buffers) // (blocks * manifest.bytes_used)
    if slots < manifest.top_k:
        least = manifest.top_k * blocks * manifest.bytes_used + buffers
        raise UserError(f"A budget of {budget} bytes is too small for this model; it needs {least} at least.")
    return min(slots, manifest.experts * (len(manifest.blocks) if shared else 1))


def budget_of_share(manifest: Manifest, share: float, buffers: int) -> int:
    """The budget that holds this share of all experts, whole slots in each block."""
    slots = round(share * manifest.experts)
    return slots * len(manifest.blocks) * manifest.bytes_used + buffers
