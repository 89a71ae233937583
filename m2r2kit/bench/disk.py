"""Measure a disk: by read size, by threads, past the page cache and through it.

Bytes/s alone do not distinguish a disk from memory, so the bytes that the system read are reported too.
"""

import mmap
import os
import threading
import time
from typing import NamedTuple

import numpy as np

from ..common import UserError
from ..experts.reader import open_file, system_read_bytes
from ..experts.store import PAGE, Store


class Speed(NamedTuple):
    """Bytes/s that the program received, and that the system read from disks (None if not counted)."""

    seen: float
    system: float | None


def speed(
    store: Store, size: int, threads: int = 2, mode: str = "direct", reads: int = 200, seed: int = 0
) -> Speed:
    """Measure reads at random offsets of a store.

    Args:
        size: bytes per read, whole pages.
        reads: number of reads; their offsets are determined by the seed.

    Raises:
        UserError: the files cannot be opened in this mode, or a read fails.
    """
    files = {block: open_file(store.path(block), mode) for block in store.manifest.blocks}
    rng = np.random.default_rng(seed)
    blocks = rng.choice(store.manifest.blocks, reads).tolist()
    places = (rng.integers(0, store.path(blocks[0]).stat().st_size - size, reads) // PAGE * PAGE).tolist()
    failed: list[OSError] = []

    def work(first: int) -> None:
        area = mmap.mmap(-1, size)
        try:
            for block, place in zip(blocks[first::threads], places[first::threads]):
                if os.preadv(files[block], [area], place) < size:
                    raise OSError("a read was short")
        except OSError as error:
            failed.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    before, begun = system_read_bytes(), time.perf_counter()
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        seconds = time.perf_counter() - begun
        for file in files.values():
            os.close(file)
    if failed:
        raise UserError(f"{store.folder} cannot be read in mode {mode} ({failed[0].strerror or failed[0]}).")
    after = system_read_bytes()
    system = None if after is None or before is None else (after - before) / seconds
    return Speed(reads * size / seconds, system)


def forget(store: Store) -> bool:
    """Drop a store's files from the page cache; False if the system does not support this."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for block in store.manifest.blocks:
        file = os.open(store.path(block), os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
    return True


def way(store: Store) -> tuple[str, str]:
    """How to read a store so that the disk is measured: (mode, explanation).

    `direct` if direct reads work, unless the system counts too few bytes read from a disk; otherwise
    `buffered`, and only a simulated link can represent a disk.
    """
    try:
        found = speed(store, PAGE, 1, "direct", 20)
    except UserError as error:
        return "buffered", f"No direct reads here, so only the simulated link represents a disk: {error}"
    if found.system is not None and found.system < found.seen / 2:
        return "buffered", (
            "Direct reads work here, but the system read nothing from a disk (the folder is in memory, or "
            "the disk is hidden): only the simulated link represents a disk."
        )
    return "direct", "Reads bypass the page cache and come from the disk."
