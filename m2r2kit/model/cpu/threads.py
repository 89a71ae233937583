"""What Linux needs before anything is computed on it.

`prepare()` runs where computing begins: when a model is opened, a training starts, a machine is measured. On
Linux it puts OpenBLAS under MLX (`blas.py`), sees to the kernels that MLX compiles (`kernels.py`), asks the
allocator to keep freed memory, and the scheduler for fewer interruptions. On macOS, and where conda built
MLX, the BLAS stays as it is. Importing the kit changes nothing, and `restore()` undoes it all.

Environment: `M2R2KIT_BLAS=stock` leaves BLAS, allocator and scheduler alone.
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
_unfused = ""
_preparing = threading.Lock()


def prepare() -> BlasState:
    """Make MLX fast on this machine, once a process. It never raises: whatever cannot be had, MLX computes
    the same without it, and the state says why."""
    global _state, _unfused
    with _preparing:
        if _state is None:
            stock = os.environ.get("M2R2KIT_BLAS") == "stock"
            if sys.platform == "linux":
                if not stock:
                    _keep_freed_memory()
                    _take_turns_less_often()
                _unfused = _prepare_kernels()
            _state = _prepare_blas()
    return _state


def restore() -> None:
    """Give MLX its own BLAS back and undo all else that `prepare` changed in this process, until it is called
    again (as when another model is opened)."""
    global _state
    with _preparing:
        if sys.platform == "linux" and _state is not None:
            blas.uninstall()
            if kernels := sys.modules.get(f"{__package__}.kernels"):
                kernels.undo()
            if os.environ.get("M2R2KIT_BLAS") != "stock":
                _give_freed_memory_back()
            _take_turns_as_before()
        _state = None


def unfused() -> str:
    """Why MLX does not fuse small operations here, in words; empty if it does."""
    prepare()
    return _unfused


def _prepare_kernels() -> str:
    try:
        from . import kernels  # imports MLX, which may not be there

        return kernels.prepare()
    except Exception as error:  # the promise of `prepare`
        return f"kernels cannot be compiled ({type(error).__name__}: {error})"


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
    except Exception as error:  # the promise of `prepare`
        blas.uninstall()
        return BlasState("stock", f"OpenBLAS cannot be put under MLX ({type(error).__name__}: {error})")
    if not _product_is_right():
        blas.uninstall()
        return BlasState("stock", "OpenBLAS gave wrong products on this machine, so MLX uses its own BLAS")
    return BlasState("openblas", detail)


def _product_is_right() -> bool:
    import mlx.core as mx

    numbers = np.random.default_rng(0)
    # one, few and many rows take paths of their own, and large products are shared out
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
    """Let malloc reuse what was freed. By default glibc gives large blocks back to the system
    at once, and each new array then pays a page fault for every 4 KiB (2-3x for large ones)."""
    _mallopt({M_ARENA_MAX: 1, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 1 << 30})


def _give_freed_memory_back() -> None:
    _mallopt({M_ARENA_MAX: 0, M_MMAP_THRESHOLD: 128 << 10, M_TRIM_THRESHOLD: 128 << 10})  # glibc's own


def _mallopt(settings: dict[int, int]) -> None:
    with suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in settings.items():
            mallopt(name, value)


_batch: list[int] = []  # native ids of the threads whose policy was changed


def _take_turns_less_often() -> None:
    """Use the batch scheduling policy (SCHED_BATCH) for this thread, and for those that are not Python's:
    MLX hands every operation to a thread of its own, and on one core the two would change places at each."""
    pythons = {thread.native_id for thread in threading.enumerate()} - {threading.get_native_id()}
    for thread in _threads() - pythons:
        if _change_policy(thread, os.SCHED_OTHER, os.SCHED_BATCH):
            _batch.append(thread)


def _take_turns_as_before() -> None:
    while _batch:
        _change_policy(_batch.pop(), os.SCHED_BATCH, os.SCHED_OTHER)


def _change_policy(thread: int, before: int, after: int) -> bool:
    """Give a thread (0: this one) another policy, if it has the one before; a container may forbid it, and
    everything is right without."""
    with suppress(OSError):
        if os.sched_getscheduler(thread) == before:
            os.sched_setscheduler(thread, after, os.sched_param(0))
            return True
    return False


def _threads() -> set[int]:
    """Native ids of this process's threads."""
    try:
        return {int(name) for name in os.listdir("/proc/self/task")}
    except OSError:
        return {threading.get_native_id()}


# --- while tokens are decoded ---

SMALL = 4 << 20  # bytes of a matrix whose product one thread ends before two have agreed on it
_answering: set[int] = set()  # native ids of the threads that are `answering`
_decoding = threading.Lock()


@contextmanager
def answering() -> Iterator[None]:
    """For a thread that waits for a disk: it has little to compute, and should begin the moment it is asked,
    also where all cores are busy. So `_take_turns_less_often` is not for it."""
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
    """While one token after the other is computed and reads go on beside it, keep the two off each other.

    What computes keeps to one core, with one thread a product, and the readers keep off it; whoever only
    waits for them lets them have all cores. Nothing is done where no reads go on, where the system places no
    threads (macOS) or has one core only, inside another `decoding`, and where matrices are large enough to be
    shared out.

    Args:
        matrix: bytes of the largest matrix that a token is multiplied by.
        apart: whether reads go on beside the computing.
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
    for thread in _threads():
        with suppress(OSError):  # it may have ended, or a container forbid it
            os.sched_setaffinity(thread, answering if thread in _answering else computing)
