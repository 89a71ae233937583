"""What a trained part is bound to: one hash of a model's weights, from its files or from its parameters."""

import hashlib
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .folder import weight_files


def weights_sha256(folder: Path) -> str:
    """One hash of a model's weight files: what a trained part is bound to."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def parameters_sha256(model: nn.Module) -> str:
    """One hash of a model's parameters: names, shapes and values, whatever the files they came from.

    Floats are widened to float32 first, which changes no value: a model in bfloat16 and the same model
    in float32 have one hash.
    """
    digest = hashlib.sha256()
    for name, w in sorted(tree_flatten(model.parameters())):
        w = w.astype(mx.float32) if mx.issubdtype(w.dtype, mx.floating) else w
        digest.update(f"{name} {w.dtype} {w.shape}\n".encode())
        digest.update(memoryview(np.ascontiguousarray(w)).cast("B") if w.size else b"")
    return digest.hexdigest()
