"""What this machine is, and what must be true before anything is computed on it.

`prepare()` runs when `m2r2kit` is imported. On Linux it puts OpenBLAS under MLX (`blas.py`),
asks the allocator to keep freed memory, and the scheduler for fewer interruptions; on macOS,
and where conda built MLX, it leaves the BLAS as it is.

Environment: `M2R2KIT_BLAS=stock` leaves MLX's BLAS alone.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import blas


@dataclass(frozen=True)
class BlasState:
    """Which BLAS computes MLX's products: `kind` is openblas, stock or native."""

    kind: str
    detail: str


_state: BlasState | None = None


def prepare() -> BlasState:
    """Make MLX fast on this machine, once a process; never raises for a missing BLAS."""
    global _state
    if _state is None:
        if sys.platform == "linux":
            _keep_freed_memory()
            _take_turns_less_often()
        _state = _prepare_blas()
    return _state


def _prepare_blas() -> BlasState:
    if sys.platform != "linux":
        return BlasState("native", "Accelerate and Metal, as MLX ships them")
    if os.environ.get("M2R2KIT_BLAS") == "stock":
        return BlasState("stock", "left alone, because M2R2KIT_BLAS=stock")
    # pip inside conda installs the wheel with the slow BLAS: only conda's own MLX is left alone
    if any(Path(sys.prefix, "conda-meta").glob("mlx-[0-9]*.json")):
        return BlasState("native", "conda's own BLAS")
    try:
        detail = blas.install()
    except blas.BlasError as error:
        return BlasState("stock", str(error))
    if not _product_is_right():
        blas.uninstall()
        return BlasState("stock", "OpenBLAS gave wrong products on this machine, so MLX uses its own BLAS")
    return BlasState("openblas", detail)


def _product_is_right() -> bool:
    import mlx.core as mx

    numbers = np.random.default_rng(0)
    for rows in (1, 7, 33):  # one, few and many rows take paths of their own
        a = numbers.standard_normal((rows, 33), dtype=np.float32)
        b = numbers.standard_normal((33, 21), dtype=np.float32)
        for right in (mx.array(b), mx.array(np.ascontiguousarray(b.T)).T):
            product = mx.matmul(mx.array(a), right, stream=mx.cpu)
            if not np.allclose(np.array(product), a @ b, atol=1e-4):
                return False
    return True


def _keep_freed_memory() -> None:
    """Let malloc reuse what was freed. By default glibc gives large blocks back to the system
    at once, and each new array then pays a page fault for every 4 KiB (2-3x for large ones)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return  # not glibc
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8  # malloc.h
    mallopt(m_arena_max, 1)
    mallopt(m_mmap_threshold, 32 << 20)
    mallopt(m_trim_threshold, 1 << 30)


def _take_turns_less_often() -> None:
    """Schedule this process as one that works rather than answers (SCHED_BATCH). MLX hands every
    operation to a thread of its own; on one core the two would change places at each."""
    try:
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:
        pass  # a container may forbid it; everything is right without


# --- while tokens are decoded ---

SMALL = 4 << 20  # bytes of a matrix whose product one thread ends before two have agreed on it
_answering: set[int] = set()  # native ids of the threads that are `answering`
_decoding = threading.Lock()


@contextmanager
def answering() -> Iterator[None]:
    """For a thread that waits for a disk: it has little to compute, and should begin the moment it is asked,
    also where all cores are busy. So `_take_turns_less_often` is not for it."""
    me = threading.get_native_id()
    with suppress(AttributeError, OSError):  # everything is right without
        if os.sched_getscheduler(0) == os.SCHED_BATCH:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    _answering.add(me)
    try:
        yield
    finally:
        _answering.discard(me)


@contextmanager
def decoding(matrix: int, apart: bool = False) -> Iterator[None]:
    """While one token after the other is computed, let nothing wake a second core for it.

    A token of a small model is some hundreds of small operations. OpenBLAS's own threads wait for each other
    at each product, however small: with a reader thread at work beside them, each of these waits lasts until
    the system takes turns. So a product has one thread here. Where reads go on beside the computing, what
    computes keeps to one core and the readers keep off it; whoever only waits for them lets them have all
    cores. Where the system places no threads (macOS), or has one core only, that part does nothing, and
    inside another `decoding`, or where matrices are large enough to be shared out, all of it.

    Args:
        matrix: bytes of the largest matrix that a token is multiplied by.
        apart: whether reads go on beside the computing.
    """
    if matrix > SMALL or not _decoding.acquire(blocking=False):
        yield
        return
    cores = _cores()
    try:
        with blas.one_thread():
            if apart and len(cores) > 1:
                here = {_core(cores)}
                _place(here, cores - here)
            yield
    finally:
        if apart and len(cores) > 1:
            _place(cores, cores)
        _decoding.release()


def _cores() -> set[int]:
    """Cores on which this thread may run; none where the system does not say."""
    try:
        return os.sched_getaffinity(0)
    except AttributeError:
        return set()


def _core(cores: set[int]) -> int:
    """The core on which this thread runs: where the system found room for it."""
    try:
        here = ctypes.CDLL(None).sched_getcpu()
    except AttributeError:
        here = -1  # not glibc
    return here if here in cores else min(cores)


def _place(computing: set[int], answering: set[int]) -> None:
    """The cores on which this process's threads may run."""
    for name in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it may have ended, or a container forbid it
            os.sched_setaffinity(int(name), answering if int(name) in _answering else computing)
