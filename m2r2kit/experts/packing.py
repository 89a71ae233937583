"""Pack the experts of a model into a store (`store.py`), one block after the other.

Everything is written into `OUT.partial`, each file under a temporary name until it is whole, and
the folder gets its own name when all is there: a store is whole or absent. A packing that was
interrupted goes on with the first block that is missing.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..common import UserError, cache_dir
from ..model.backbone import Backbone
from ..model.families import PARTS, Parts
from ..model.load import model_folder, weights_sha256
from .store import MANIFEST, PAGE, STAMPS, Manifest, Piece, Store, file_name, stamps

SPARE = 16 << 20  # bytes that packing leaves free on the disk
ORDER = ("gate_proj", "up_proj", "down_proj")  # as they are needed


def take_experts(model: nn.Module) -> dict[int, nn.Module]:
    """Take the experts (`SwitchGLU`) of each block out of a model: block -> experts.

    With `Backbone.load(.., take_out=..)` they are out before any of them is read.
    """
    parts, taken = PARTS.get(model.model_type, Parts()), {}
    for l, block in enumerate(model.layers):
        if "switch_mlp" in block[parts.ffn]:
            taken[l] = block[parts.ffn].pop("switch_mlp")
    return taken


def load_without_experts(
    model: str | Path, dtype: mx.Dtype | None = None, sha256: Callable | None = None
) -> tuple[Backbone, dict[int, nn.Module]]:
    """The view of a model without its experts, and these, not read yet, as `take_experts` gives them.

    Raises:
        UserError: the model cannot be loaded, or has no experts.
    """
    experts: dict[int, nn.Module] = {}
    backbone = Backbone.load(model, dtype, lambda m: experts.update(take_experts(m)), sha256)
    if not experts:
        raise UserError(f"{model} is no mixture of experts; there is nothing to pack or to stream.")
    return backbone, experts


def arithmetic(backbone: Backbone) -> mx.Dtype:
    """The dtype that a model computes in."""
    return backbone.blocks[0][backbone.parts.attention_norm].weight.dtype


def tensors(experts: nn.Module) -> list[tuple[str, mx.array]]:
    """Names and arrays (E, ..) of what a block's experts consist of, in the order of a record."""
    flat = tree_flatten(experts.parameters())
    return sorted(flat, key=lambda item: (ORDER.index(item[0].split(".")[0]), item[0] != "weight"))


def pieces(experts: nn.Module) -> tuple[Piece, ...]:
    """How the tensors of one expert lie in its record."""
    found, offset = [], 0
    for name, w in tensors(experts):
        nbytes = w.nbytes // w.shape[0]
        found.append(Piece(name, str(w.dtype).split(".")[-1], tuple(w.shape[1:]), offset, nbytes))
        offset += nbytes
    return tuple(found)


def pack(model: str | Path, out: str | Path, report: Callable | None = None) -> Manifest:
    """Write the experts of a model into a new store.

    Args:
        report: called as (bytes of a finished block, bytes of all) after each, also after those
            that an interrupted packing had finished.

    Raises:
        UserError: no such model, no experts, `out` exists, or the disk is too small or fails.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already; delete it, or give another folder.")
    seen = stamps(model_folder(model))  # before its hash is taken
    backbone, experts = load_without_experts(model)
    dtype = arithmetic(backbone)
    for each in experts.values():
        each.set_dtype(dtype)
    layout = {pieces(each) for each in experts.values()}
    if len(layout) > 1:
        raise UserError(f"The blocks of {model} have experts of different sizes; a store needs one size.")
    parts = layout.pop()
    record = -(-(parts[-1].offset + parts[-1].nbytes) // PAGE) * PAGE
    E = tensors(next(iter(experts.values())))[0][1].shape[0]
    facts = {
        "model_sha256": backbone.sha256,
        "family": backbone.family,
        "dtype": str(dtype).split(".")[-1],
        "blocks": tuple(experts),
        "experts": E,
        "top_k": backbone.config["num_experts_per_tok"],
        "record_bytes": record,
        "pieces": parts,
    }
    del backbone
    partial = out.with_name(out.name + ".partial")
    try:
        return _write(experts, facts, partial, out, report, seen)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{out} could not be written ({reason}); make room, and the same command goes on from there."
        ) from error


def kept(model: str | Path) -> Store:
    """A model's store in the cache folder; packed on the first call. Raises UserError as `pack` does."""
    folder = model_folder(model)
    out = cache_dir() / "experts" / f"{folder.name}-{weights_sha256(folder)[:12]}"
    if not out.exists():
        pack(folder, out)
    return Store(out)


def _write(experts: dict, facts: dict, partial: Path, out: Path, report, seen: list) -> Manifest:
    E, record = facts["experts"], facts["record_bytes"]
    partial.mkdir(parents=True, exist_ok=True)
    done = _finished(partial, facts)
    for file in partial.glob("block-*.bin"):  # what another packing has left
        if file.name not in map(file_name, done):
            file.unlink()
    missing = (len(experts) - len(done)) * E * record
    free = shutil.disk_usage(partial).free
    if free < missing + SPARE:
        raise UserError(
            f"The experts take {missing / 1e9:.2f} GB more on the disk of {out} and "
            f"{free / 1e9:.2f} GB are free; make room."
        )
    for l in list(experts):
        switch = experts.pop(l)  # so that its weights are freed when they are written
        if l not in done:
            done[l] = _write_block(switch, partial / file_name(l), E, record)
            _note(partial, facts, done)
        if report:
            report(E * record, len(facts["blocks"]) * E * record)
    manifest = Manifest(**facts, sha256=tuple(tuple(done[l]) for l in facts["blocks"]))
    _replace(partial / MANIFEST, manifest.to_json().encode())
    _replace(partial / STAMPS, json.dumps(seen).encode())
    (partial / PROGRESS).unlink()
    partial.rename(out)
    return manifest


def _write_block(experts: nn.Module, file: Path, E: int, record: int) -> list[str]:
    """The records of one block into a file; their SHA-256."""
    found = tensors(experts)
    mx.eval([w for _, w in found])
    views = [np.array(w.reshape(E, -1).view(mx.uint8), copy=False) for _, w in found]  # (E, bytes)
    sums, temporary = [], file.with_name(file.name + ".new")
    with temporary.open("wb") as stream:
        for e in range(E):
            content = b"".join(view[e].tobytes() for view in views).ljust(record, b"\0")
            stream.write(content)
            sums.append(hashlib.sha256(content).hexdigest())
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    return sums


# --- going on after an interruption ---------------------------------------------------------

PROGRESS = "progress.json"


def _finished(partial: Path, facts: dict) -> dict[int, list[str]]:
    """Checksums of the blocks that an interrupted packing of the same model has finished."""
    try:
        kept = json.loads((partial / PROGRESS).read_text())
        if kept["facts"] != _as_json(facts):
            raise ValueError("of another model")
        size = facts["experts"] * facts["record_bytes"]
        done = {int(l): sums for l, sums in kept["sha256"].items()}
        return {l: s for l, s in done.items() if (partial / file_name(l)).stat().st_size == size}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # none, or nothing that can be gone on with


def _note(partial: Path, facts: dict, done: dict[int, list[str]]) -> None:
    text = json.dumps({"facts": _as_json(facts), "sha256": done})
    _replace(partial / PROGRESS, text.encode())


def _as_json(facts: dict):
    return json.loads(json.dumps(facts | {"pieces": [p.__dict__ for p in facts["pieces"]]}))


def _replace(file: Path, content: bytes) -> None:
    temporary = file.with_name(file.name + ".new")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
