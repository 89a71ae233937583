"""The hash of a model's weights, to which trained modules are bound: of its files or of its parameters."""

import hashlib
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .folder import weight_files


def weights_sha256(folder: Path) -> str:
    """Hash of a model's weight files."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def parameters_sha256(model: nn.Module) -> str:
    """Hash of a model's parameters: their names, shapes and values.

    Floats are hashed as float32, which changes no value, so a bfloat16 model has the same hash after its
    conversion to float32.
    """
    digest = hashlib.sha256()
    for name, w in sorted(tree_flatten(model.parameters())):
        w = w.astype(mx.float32) if mx.issubdtype(w.dtype, mx.floating) else w
        digest.update(f"{name} {w.dtype} {w.shape}\n".encode())
        digest.update(memoryview(np.ascontiguousarray(w)).cast("B") if w.size else b"")
    return digest.hexdigest()
