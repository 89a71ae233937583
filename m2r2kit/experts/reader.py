"""Threads that read records from disk into slots; independent of MLX.

Demand reads overtake prefetches. By default reads bypass the page cache (O_DIRECT on Linux, F_NOCACHE on
macOS): otherwise a recently written or small file is read from memory, and its speed is not the disk's.
"""

import fcntl
import mmap
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import psutil

from ..common import UserError
from ..model.cpu.threads import answering
from .store import PAGE, Store

MODES = ("direct", "buffered")
QUEUED, READING, LANDING, DONE, CANCELLED = range(5)
NOW, AHEAD, PARKED = range(3)  # needed now; prefetch; mispredicted, on hold
PATIENCE = 2.0  # seconds that `close` waits for reads under way


class Link:
    """A slower disk, simulated: a token bucket of `rate` bytes/s.

    Reads are charged from when they are issued, so the rate holds whether the bytes come from the disk or
    from memory.
    """

    def __init__(self, rate: float):
        self.rate, self.next, self.lock = rate, 0.0, threading.Lock()

    def finish(self, issued: float, nbytes: int) -> None:
        """Sleep until a request of `nbytes`, issued at `issued` (perf_counter), would be finished."""
        with self.lock:
            self.next = max(self.next, issued) + nbytes / self.rate
            until = self.next
        if (rest := until - time.perf_counter()) > 0:
            time.sleep(rest)


class Request:
    """One read of a record.

    Attributes:
        land: called in a reader's thread with the record (uint8, read-only).
        urgent: whether it was issued on demand.
        rank: the queue, NOW or AHEAD; a PARKED request is not read until its rank changes.
        issued, begun, finished: perf_counter; 0 until then.
        error: one sentence if it failed.
    """

    __slots__ = (
        "begun", "block", "error", "expert", "finished", "issued", "land", "rank", "state", "urgent",
    )  # fmt: skip

    def __init__(self, block: int, expert: int, land: Callable[[np.ndarray], None], urgent: bool):
        self.block, self.expert, self.land, self.urgent = block, expert, land, urgent
        self.rank, self.state, self.error = NOW if urgent else AHEAD, QUEUED, None
        self.issued, self.begun, self.finished = time.perf_counter(), 0.0, 0.0

    @property
    def done(self) -> bool:
        return self.state == DONE


class Reader:
    """Reads records of a store. Close it, or use it as a context manager.

    Args:
        mode: `direct` past the page cache, or `buffered` through it.
        threads: number of threads, each with a buffer of one record. If there are several, one is reserved
            for demand reads.
        link: bytes/s of a simulated link in front of the disk; None is the real disk.

    Every record is checked (`Store.is_right`). A read that fails, is short or returns a wrong record is
    retried once; then `wait` raises, and the record is not stored in its slot.

    Raises:
        UserError: a setting is out of range, a file cannot be opened in this mode, or memory or threads are
            exhausted.
    """

    def __init__(self, store: Store, mode: str = "direct", threads: int = 2, link: float | None = None):
        if mode not in MODES:
            raise UserError(f"There are no {mode} reads; choose {' or '.join(MODES)}.")
        if type(threads) is not int or threads < 1:  # without a thread, every wait would last forever
            raise UserError(f"The number of reading threads must be at least 1; got {threads}.")
        if link is not None and not link > 0:
            raise UserError(f"The rate of a simulated link must be above 0 bytes/s; got {link}.")
        self.store, self.mode = store, mode
        self.link = None if link is None else Link(link)
        self.size = store.manifest.record_bytes  # of the largest record
        self.bytes_read = self.reads = self.retries = 0
        self._changed = threading.Condition()
        self._queues: tuple[deque[Request], deque[Request]] = deque(), deque()  # NOW, AHEAD
        self._early, self._most_early = 0, max(1, threads - 1)  # running prefetches, and their limit
        self._closed, self._failed = False, ""
        self._files: dict[int, int] = {}
        self._threads: list[threading.Thread] = []
        try:
            for block in store.manifest.blocks:
                self._files[block] = open_file(store.path(block), mode)
            for _ in range(threads):
                buffer = np.frombuffer(mmap.mmap(-1, self.size), np.uint8)  # page-aligned, as O_DIRECT needs
                thread = threading.Thread(target=self._work, args=(buffer,), daemon=True)
                thread.start()
                self._threads.append(thread)
        except UserError:
            self.close()
            raise
        except (OSError, MemoryError, RuntimeError) as error:
            self.close()
            raise UserError(
                f"The system has no memory or threads left for reading ({error}); close other programs, or "
                "use fewer --threads."
            ) from error

    @property
    def buffer_bytes(self) -> int:
        """Memory of the read buffers, without the slots."""
        return len(self._threads) * self.size

    # --- for the thread that computes ---

    def submit(self, block: int, expert: int, land: Callable[[np.ndarray], None], urgent: bool) -> Request:
        """Issue a read."""
        request = Request(block, expert, land, urgent)
        with self._changed:
            self._check()
            self._queues[request.rank].append(request)
            self._changed.notify_all()
        return request

    def rank(self, requests: Iterable[Request], rank: int) -> None:
        """Change the rank of requests that are still queued."""
        with self._changed:
            for request in requests:
                self._move(request, rank)

    def _move(self, request: Request, rank: int) -> None:
        if request.state == QUEUED and request.rank != rank:
            request.rank = rank  # `_take` skips it in the other queue
            if rank != PARKED:
                self._queues[rank].append(request)
                self._changed.notify_all()

    def cancel(self, request: Request) -> None:
        """Cancel a request. On return, its record is in the slot or will never be written."""
        with self._changed:
            while request.state == LANDING and not self._failed:
                self._changed.wait()
            if request.state != DONE:
                request.state = CANCELLED

    def wait(self, requests: Iterable[Request]) -> None:
        """Wait until all of these are in their slots; prefetches among them become demand reads.

        Raises:
            UserError: one of them could not be read, or the reader has stopped.
        """
        requests = list(requests)
        with self._changed:
            for request in requests:
                self._move(request, NOW)
            for request in requests:
                while request.state != DONE:
                    self._check()
                    self._changed.wait()
        for request in requests:
            if request.error:
                raise UserError(request.error)

    def close(self) -> None:
        """Stop the threads and close the files. A read that hangs longer than `PATIENCE` is abandoned with
        its open file, and its result is discarded."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        until = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            while self._files:
                os.close(self._files.popitem()[1])

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _check(self) -> None:
        """Raise if the reader has failed or is closed."""
        if self._failed or self._closed:
            raise UserError(self._failed or "This reader of experts is closed; open the store again.")

    # --- the threads ---

    def _work(self, buffer: np.ndarray) -> None:
        try:
            with answering():
                while (request := self._take()) is not None:
                    self._serve(request, buffer)
        except BaseException as error:  # waiting threads must be notified of any failure
            with self._changed:
                self._failed = f"A thread that reads experts ended ({_reason(error)}); open the model again."
                self._changed.notify_all()

    def _take(self) -> Request | None:
        """Wait for the next request; None when the reader closes."""
        with self._changed:
            while True:
                if self._closed:
                    return None
                rank = NOW if self._queues[NOW] else AHEAD
                if not self._queues[rank] or (rank == AHEAD and self._early >= self._most_early):
                    self._changed.wait()
                    continue
                request = self._queues[rank].popleft()
                if request.state == QUEUED and request.rank == rank:
                    request.state, request.begun = READING, time.perf_counter()
                    self._early += rank == AHEAD
                    return request

    def _serve(self, request: Request, buffer: np.ndarray) -> None:
        """Read one record and write it into its slot if it is still needed."""
        record = buffer[: self.store.manifest.record_size(request.block)]
        error = self._bring(request, record)
        with self._changed:
            if request.state == CANCELLED or self._closed:
                self._served(request)
                return
            request.state = LANDING
        try:
            if error is None:
                request.land(record)
        except Exception as fault:
            where = f"Expert {request.expert} of block {request.block}"
            error = f"{where} cannot be written into its slot ({_reason(fault)}); open the model again."
        with self._changed:
            request.error, request.finished = error, time.perf_counter()
            request.state = DONE
            self._served(request)

    def _served(self, request: Request) -> None:
        self._early -= request.rank == AHEAD
        self._changed.notify_all()

    def _bring(self, request: Request, record: np.ndarray) -> str | None:
        """Read one record, in at most two attempts; returns the error, if any."""
        for attempt in range(2):
            try:
                self._read(request, record)
                return None
            except Exception as error:  # a MemoryError too
                reason = _reason(error)
                with self._changed:
                    self.retries += attempt == 0
        where = self.store.path(request.block)
        return (
            f"Expert {request.expert} of block {request.block} cannot be read from {where} ({reason}); "
            "check the disk, or pack the model again."
        )

    def _read(self, request: Request, record: np.ndarray) -> None:
        issued, view, size = time.perf_counter(), memoryview(record), len(record)
        offset, got = request.expert * size, 0
        while got < size:
            n = os.preadv(self._files[request.block], [view[got:]], offset + got)
            if n == 0:
                raise OSError("the file ends too early")
            got += n
            if got < size and self.mode == "direct" and got % PAGE:
                raise OSError("the read was short")  # a direct read cannot resume within a page
        with self._changed:
            self.reads += 1
            self.bytes_read += got
        if not self.store.is_right(request.block, request.expert, record):
            raise OSError("its checksum is wrong")
        if self.link:
            self.link.finish(issued, size)


def _reason(error: BaseException) -> str:
    """An error's message, or its type if it has none."""
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__


def open_file(path: Path, mode: str) -> int:
    """A file descriptor for reading, past the page cache if `mode` is `direct`."""
    flags = os.O_RDONLY | (getattr(os, "O_DIRECT", 0) if mode == "direct" else 0)
    try:
        file = os.open(path, flags)
        if mode == "direct" and sys.platform == "darwin":
            fcntl.fcntl(file, fcntl.F_NOCACHE, 1)
        return file
    except OSError as error:
        hint = "; read it --reads buffered" if mode == "direct" else ""
        raise UserError(f"{path} cannot be opened ({error.strerror or error}){hint}.") from error


def system_read_bytes() -> int | None:
    """Bytes that the system has read from disks for this process so far; None if it does not count them."""
    try:
        return psutil.Process().io_counters().read_bytes
    except (AttributeError, OSError, RuntimeError, psutil.Error):  # not counted on this system
        return None
