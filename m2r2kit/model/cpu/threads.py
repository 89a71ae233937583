"""Makes MLX fast on Linux: BLAS, compiled kernels, allocator, scheduler and cores.

`prepare()` runs when a model is loaded, a training starts or a machine is measured. On Linux it routes BLAS
calls to OpenBLAS (`blas.py`), checks the kernels that MLX compiles (`kernels.py`), lets the allocator keep
freed memory and uses batch scheduling. macOS and conda's MLX keep their own BLAS. Importing the kit changes
nothing, and `restore()` undoes all changes.

Environment: `M2R2KIT_BLAS=stock` leaves BLAS, allocator and scheduler unchanged.
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
    """The BLAS that MLX uses.

    Attributes:
        kind: `openblas`, `stock` (the wheel's own) or `native` (macOS, conda).
        detail: version, or why OpenBLAS is not used.
    """

    kind: str
    detail: str


_state: BlasState | None = None
_unfused = ""
_preparing = threading.Lock()


def prepare() -> BlasState:
    """Make MLX fast on this machine, once in a process.

    It never raises: without any of its parts MLX computes the same results, and the state gives the reason.
    """
    global _state, _unfused
    with _preparing:
        if _state is None:
            stock = os.environ.get("M2R2KIT_BLAS") == "stock"
            if sys.platform == "linux":
                if not stock:
                    _keep_freed_memory()
                    _use_batch_policy()
                _unfused = _prepare_kernels()
            _state = _prepare_blas()
    return _state


def restore() -> None:
    """Restore MLX's own BLAS and undo all other changes that the kit has made to this process.

    They are made again when the next model is loaded.
    """
    global _state
    with _preparing:
        if sys.platform == "linux" and _state is not None:
            blas.uninstall()
            if kernels := sys.modules.get(f"{__package__}.kernels"):
                kernels.undo()
            if os.environ.get("M2R2KIT_BLAS") != "stock":
                _give_freed_memory_back()
            _use_default_policy()
        _state = None


def unfused() -> str:
    """Why MLX cannot compile and fuse small operations here; empty if it can."""
    prepare()
    return _unfused


def _prepare_kernels() -> str:
    try:
        from . import kernels  # imports MLX, which may be missing

        return kernels.prepare()
    except Exception as error:  # `prepare` never raises
        return f"kernels cannot be compiled ({type(error).__name__}: {error})"


def _prepare_blas() -> BlasState:
    if sys.platform != "linux":
        return BlasState("native", "Accelerate and Metal, as in MLX")
    if os.environ.get("M2R2KIT_BLAS") == "stock":
        return BlasState("stock", "left unchanged, because M2R2KIT_BLAS=stock")
    # pip inside conda installs the wheel with the slow BLAS, so look for conda's own MLX
    if any(Path(sys.prefix, "conda-meta").glob("mlx-[0-9]*.json")):
        return BlasState("native", "conda's own BLAS")
    try:
        detail = blas.install()
    except blas.BlasError as error:
        return BlasState("stock", str(error))
    except Exception as error:  # `prepare` never raises
        blas.uninstall()
        return BlasState("stock", f"OpenBLAS cannot be installed ({type(error).__name__}: {error})")
    if not _product_is_right():
        blas.uninstall()
        return BlasState("stock", "OpenBLAS gave wrong products on this machine, so MLX uses its own BLAS")
    return BlasState("openblas", detail)


def _product_is_right() -> bool:
    import mlx.core as mx

    numbers = np.random.default_rng(0)
    # one, few and many rows take different paths, and large products use several threads
    for rows, inner, columns in ((1, 33, 21), (7, 33, 21), (33, 33, 21), (40, 300, 900)):
        a = numbers.standard_normal((rows, inner), dtype=np.float32)
        b = numbers.standard_normal((inner, columns), dtype=np.float32)
        for right in (mx.array(b), mx.array(np.ascontiguousarray(b.T)).T):
            product = mx.matmul(mx.array(a), right, stream=mx.cpu)
            if not np.allclose(np.array(product), a @ b, atol=1e-3):
                return False
    return True


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h


def _keep_freed_memory() -> None:
    """Let malloc keep freed memory. By default glibc returns large blocks to the system at once, and each new
    array then costs a page fault for every 4 KiB (large arrays take 2-3 times as long)."""
    _mallopt({M_ARENA_MAX: 1, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 1 << 30})


def _give_freed_memory_back() -> None:
    _mallopt({M_ARENA_MAX: 0, M_MMAP_THRESHOLD: 128 << 10, M_TRIM_THRESHOLD: 128 << 10})  # glibc's defaults


def _mallopt(settings: dict[int, int]) -> None:
    with suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in settings.items():
            mallopt(name, value)


_batch: list[int] = []  # native ids of the threads with a changed policy


def _use_batch_policy() -> None:
    """Use the batch scheduling policy (SCHED_BATCH) for this thread and for those not started by Python.

    MLX passes every operation to a thread of its own; with the default policy the two threads would preempt
    each other at each operation on one core.
    """
    pythons = {thread.native_id for thread in threading.enumerate()} - {threading.get_native_id()}
    for thread in _threads() - pythons:
        if _change_policy(thread, os.SCHED_OTHER, os.SCHED_BATCH):
            _batch.append(thread)


def _use_default_policy() -> None:
    while _batch:
        _change_policy(_batch.pop(), os.SCHED_BATCH, os.SCHED_OTHER)


def _change_policy(thread: int, before: int, after: int) -> bool:
    """Change the scheduling policy of a thread (0: this one) from `before` to `after`; returns whether it was
    changed. A container may forbid it."""
    with suppress(OSError):
        if os.sched_getscheduler(thread) == before:
            os.sched_setscheduler(thread, after, os.sched_param(0))
            return True
    return False


def _threads() -> set[int]:
    """Native ids of all threads of this process."""
    try:
        return {int(name) for name in os.listdir("/proc/self/task")}
    except OSError:
        return {threading.get_native_id()}


# --- while tokens are decoded ---

SMALL = 4 << 20  # bytes of a matrix; up to this size one thread is faster than two
_answering: set[int] = set()  # native ids of the threads that are `answering`
_decoding = threading.Lock()


@contextmanager
def answering() -> Iterator[None]:
    """Use the default scheduling policy for a thread that waits for a disk.

    It computes little, and should start at once when it is needed, even if all cores are busy.
    """
    me = threading.get_native_id()
    with suppress(AttributeError):  # macOS has none
        _change_policy(0, os.SCHED_BATCH, os.SCHED_OTHER)
    _answering.add(me)
    try:
        yield
    finally:
        _answering.discard(me)


@contextmanager
def decoding(matrix: int, apart: bool = False) -> Iterator[None]:
    """Run decoding and background reads on different cores.

    Decoding uses one core, with one thread for each product; reader threads use the others. Nothing is
    done without background reads, with one core, where threads cannot be pinned (macOS), inside another
    `decoding`, and for matrices large enough for several threads.

    Args:
        matrix: bytes of the largest weight matrix.
        apart: whether there are background reads.
    """
    cores = _cores()
    if not apart or len(cores) < 2 or matrix > SMALL or not _decoding.acquire(blocking=False):
        yield
        return
    try:
        with blas.one_thread():
            here = {_core(cores)}
            _place(here, cores - here)
            yield
    finally:
        _place(cores, cores)
        _decoding.release()


def _cores() -> set[int]:
    """Cores on which this thread may run; empty where the system does not tell (macOS)."""
    try:
        return os.sched_getaffinity(0)
    except AttributeError:
        return set()


def _core(cores: set[int]) -> int:
    """The core on which this thread runs now."""
    try:
        here = ctypes.CDLL(None).sched_getcpu()
    except AttributeError:
        here = -1  # not glibc
    return here if here in cores else min(cores)


def _place(computing: set[int], answering: set[int]) -> None:
    """Set the cores of this process's threads, for those that compute and those that are `answering`."""
    for thread in _threads():
        with suppress(OSError):  # it may have ended, or a container may forbid it
            os.sched_setaffinity(thread, answering if thread in _answering else computing)
