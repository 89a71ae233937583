"""Pack the experts of a model into a store (`store.py`), one block after the other.

Everything is written into a folder beside OUT, `OUT.packing`, which is renamed at the end: a store is whole
or absent. An interrupted packing resumes with the first missing block. If two processes pack the same store,
a lock makes the second wait and use the store of the first.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..common import UserError, cache_dir, check_writable, parse_json, unwritable, write_whole
from ..model.backbone import Backbone
from ..model.families import FAMILIES
from ..model.folder import model_folder
from ..model.hashes import weights_sha256
from .store import FORMAT, MANIFEST, STAMPS, Manifest, Piece, Store, file_name, padded, stamped, stamps

SPARE = 16 << 20  # bytes to leave free on the disk
ORDER = ("gate_proj", "up_proj", "down_proj")  # the order of use
LOCK, PROGRESS = "lock", "progress.json"  # in the folder of a packing
OWN = re.compile(r"lock|(progress|manifest|model)\.json|block-\d+\.bin(\.new)?|\.m2r2kit-\w+")  # files in it


def take_experts(model: nn.Module) -> dict[int, nn.Module]:
    """Take the experts (`SwitchGLU`) of each block out of a model: block -> experts.

    As `Backbone.load(.., take_out=..)` calls it, their weights are never read.
    """
    parts, taken = FAMILIES[model.model_type].parts, {}
    for l, block in enumerate(model.layers):
        if "switch_mlp" in block[parts.ffn]:
            taken[l] = block[parts.ffn].pop("switch_mlp")
    return taken


def load_without_experts(
    model: str | Path,
    dtype: mx.Dtype | None = None,
    sha256: Callable | None = None,
    decode: bool | None = None,
) -> tuple[Backbone, dict[int, nn.Module]]:
    """The view of a model without its experts, and the experts as `take_experts` returns them, unread.

    Raises:
        UserError: the model cannot be loaded, or has no experts.
    """
    experts: dict[int, nn.Module] = {}
    backbone = Backbone.load(model, dtype, lambda m: experts.update(take_experts(m)), sha256, decode)
    if not experts:
        raise UserError(f"{model} is not a mixture of experts; use one, such as data/pocket-moe.")
    return backbone, experts


def arithmetic(backbone: Backbone) -> mx.Dtype:
    """The dtype that a model computes in."""
    return backbone.blocks[0][backbone.parts.attention_norm].weight.dtype


def tensors(experts: nn.Module) -> list[tuple[str, mx.array]]:
    """Names and arrays (E, ..) of a block's experts, in the order of a record."""
    flat = tree_flatten(experts.parameters())
    return sorted(flat, key=lambda item: (ORDER.index(item[0].split(".")[0]), item[0] != "weight"))


def pieces(experts: nn.Module) -> tuple[Piece, ...]:
    """How the tensors of one expert lie in its record."""
    found, offset = [], 0
    for name, w in tensors(experts):
        nbytes = w.nbytes // w.shape[0]
        found.append(Piece(name, dtype_name(w.dtype), tuple(w.shape[1:]), offset, nbytes))
        offset += nbytes
    return tuple(found)


def dtype_name(dtype: mx.Dtype) -> str:
    """Such as `float32`."""
    return str(dtype).split(".")[-1]


def facts_of(backbone: Backbone, experts: dict[int, nn.Module]) -> dict:
    """The fields of a manifest except the hashes of the records. Reads no weights; sets the experts' dtype to
    that of the other weights.

    Raises:
        UserError: blocks have different numbers of experts.
    """
    dtype = arithmetic(backbone)
    for each in experts.values():
        each.set_dtype(dtype)
    counts = {tensors(each)[0][1].shape[0] for each in experts.values()}
    if len(counts) > 1:
        raise UserError("The blocks of this model have different numbers of experts; no store can hold them.")
    return {
        "model_sha256": backbone.sha256,
        "family": backbone.family,
        "dtype": dtype_name(dtype),
        "blocks": tuple(experts),
        "experts": counts.pop(),
        "top_k": backbone.config["num_experts_per_tok"],
        "pieces": tuple(pieces(each) for each in experts.values()),
    }


def pack(
    model: str | Path, out: str | Path, report: Callable | None = None, decode: bool | None = None
) -> Manifest:
    """Write the experts of a model into a new store.

    If another process is packing the same store, wait for it and use what it wrote.

    Args:
        report: called as (bytes of a block, total bytes) after each block, also for blocks that an
            interrupted packing finished.
        decode: whether to store quantized experts dequantized; by default as the model is loaded
            (`load.load`).

    Raises:
        UserError: no such model, no experts, `out` exists, or the disk is too small or fails.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise UserError(f"{out} exists already; delete it, or give another folder.")
    check_writable(out)  # before minutes of hashing
    seen = stamps(model_folder(model))  # before its hash is computed
    backbone, experts = load_without_experts(model, decode=decode)
    facts = facts_of(backbone, experts)
    del backbone
    try:
        with own_folder(out) as folder:
            if folder is not None:
                return _write(experts, facts, folder, out, report, seen)
    except OSError as error:
        said = str(unwritable(out, error)).rstrip(".")
        raise UserError(f"{said}, and the same command goes on from there.") from error
    store = Store(out)
    store.fits(facts)
    return store.manifest


def kept(model: str | Path) -> Store:
    """A model's store in the cache folder; packed on the first call. Raises UserError as `pack` does."""
    folder = model_folder(model)
    out = cache_dir() / "experts" / f"{folder.name}-{weights_sha256(folder)[:12]}-{FORMAT}"
    if not out.exists():
        check_cache(out.parent)
        try:
            pack(folder, out)
        except UserError:
            if not out.exists():  # otherwise another process packed it meanwhile
                raise
    return Store(out)


def check_cache(folder: Path) -> None:
    """Raise UserError if the cache folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"The cache folder {cache_dir()} cannot be written ({error.strerror}); choose another one with "
            "the variable M2R2KIT_CACHE."
        ) from error


# --- the folder of a packing ----------------------------------------------------------------


@contextmanager
def own_folder(out: Path) -> Iterator[Path | None]:
    """The locked folder beside `out` for packing; None if another process packed `out` while this one waited.
    If packing fails before a block is finished, the folder is deleted.

    Raises:
        UserError: a folder of that name holds something else.
    """
    folder = out.with_name(out.name + ".packing")
    with _locked(folder):
        if os.path.lexists(out):
            shutil.rmtree(folder, ignore_errors=True)
            yield None
            return
        try:
            yield folder
        except BaseException:
            if not (folder / PROGRESS).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _locked(folder: Path) -> IO:
    """Create the folder or take over that of an interrupted packing; it is locked until the returned file is
    closed."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            other = sorted(p.name for p in folder.iterdir() if not OWN.fullmatch(p.name))
            if other or folder.is_symlink():
                raise UserError(f"{folder} is not a folder of an interrupted packing; move it away.")
            lock = (folder / LOCK).open("a")
        except FileNotFoundError:
            continue  # another process has finished
        try:
            _wait_for(lock)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / LOCK)):
                return lock
        except FileNotFoundError:
            pass  # another process has finished
        except BaseException:
            lock.close()
            raise
        lock.close()


def _wait_for(lock: IO) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:  # some network disks have no locks; then packing runs without
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise


def _write(experts: dict, facts: dict, folder: Path, out: Path, report, seen: list) -> Manifest:
    sizes = {
        l: facts["experts"] * padded(parts[-1].offset + parts[-1].nbytes)
        for l, parts in zip(facts["blocks"], facts["pieces"])
    }
    total, done = sum(sizes.values()), _finished(folder, facts, sizes)
    ours = {LOCK, PROGRESS, *map(file_name, done), *(file_name(l) + ".new" for l in sizes)}
    for file in list(folder.iterdir()):  # leftovers of an interrupted packing, perhaps of another model
        if file.name not in ours:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    missing, free = sum(sizes[l] for l in sizes if l not in done), shutil.disk_usage(folder).free
    if free < missing + SPARE:
        raise UserError(
            f"The experts take {missing / 1e9:.2f} GB more on the disk of {out} and "
            f"{free / 1e9:.2f} GB are free; free some space."
        )
    for l in list(experts):
        switch = experts.pop(l)  # frees its weights after writing
        if l not in done:
            done[l] = _write_block(switch, folder / file_name(l), sizes[l] // facts["experts"])
            write_whole(folder / PROGRESS, json.dumps({"facts": _as_json(facts), "sha256": done}))
        if report:
            report(sizes[l], total)
    manifest = Manifest(**facts, sha256=tuple(tuple(done[l]) for l in facts["blocks"]))
    write_whole(folder / MANIFEST, manifest.to_json())
    write_whole(folder / STAMPS, stamped(facts["model_sha256"], seen))
    folder.rename(out)
    for name in (PROGRESS, LOCK):
        (out / name).unlink()
    return manifest


def _write_block(experts: nn.Module, file: Path, record: int) -> list[str]:
    """Write the records of one block, each of `record` bytes, and return their SHA-256."""
    found = tensors(experts)
    E = found[0][1].shape[0]
    mx.eval([w for _, w in found])
    views = [np.array(w.reshape(E, -1).view(mx.uint8), copy=False) for _, w in found]  # (E, bytes)
    sums, temporary = [], file.with_name(file.name + ".new")
    with temporary.open("wb") as stream:
        for e in range(E):
            content = b"".join(view[e].tobytes() for view in views).ljust(record, b"\0")
            stream.write(content)
            sums.append(hashlib.sha256(content).hexdigest())
        stream.flush()
        os.fsync(stream.fileno())  # otherwise the progress file may reach the disk first
    temporary.replace(file)
    return sums


def _finished(folder: Path, facts: dict, sizes: dict[int, int]) -> dict[int, list[str]]:
    """Checksums of the blocks that an interrupted packing of the same model finished."""
    try:
        noted = parse_json((folder / PROGRESS).read_text())
        if noted["facts"] != _as_json(facts):
            raise ValueError("of another model")
        done = {int(l): sums for l, sums in noted["sha256"].items()}
        return {l: s for l, s in done.items() if (folder / file_name(l)).stat().st_size == sizes[l]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # nothing to resume


def _as_json(facts: dict):
    return json.loads(json.dumps(facts, default=asdict))
