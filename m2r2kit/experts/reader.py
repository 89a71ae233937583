"""Threads that bring records from disk, past the page cache, each into the place it is meant for.

They read bytes and know nothing of MLX. What is needed now overtakes what may be needed later. By
default reads go past the page cache (O_DIRECT on Linux, F_NOCACHE on macOS): a file that was just
written, or fits the memory, would otherwise be read at the speed of memory and be called a disk.
"""

import fcntl
import hashlib
import mmap
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ..common import UserError
from ..model.cpu.threads import answering
from .store import Store

MODES = ("direct", "buffered")
QUEUED, READING, LANDING, DONE, CANCELLED = range(5)
NOW, AHEAD, PARKED = range(3)  # needed now; may be needed; was not when it was expected to be


class Link:
    """A slower disk, simulated: a token bucket of `rate` bytes/s.

    Charged from when a request was issued, not from when its bytes came: then the rate is what it
    says whether they came from the disk or from memory.
    """

    def __init__(self, rate: float):
        self.rate, self.next, self.lock = rate, 0.0, threading.Lock()

    def finish(self, issued: float, nbytes: int) -> None:
        """Sleep until a request of so many bytes, issued then (perf_counter), would be through."""
        with self.lock:
            self.next = max(self.next, issued) + nbytes / self.rate
            until = self.next
        if (rest := until - time.perf_counter()) > 0:
            time.sleep(rest)


class Request:
    """One record on its way.

    Attributes:
        land: called with the record (uint8, read-only in spirit) when it is there, in a reader's thread.
        urgent: asked for when it was needed.
        rank: NOW and AHEAD are the queues in which it waits; PARKED is not read until it gets another.
        issued, begun, finished: perf_counter; 0 until then.
        error: why it failed, one sentence.
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
    """Reads records of a store. Close it, or use it in a `with`.

    Args:
        mode: `direct` past the page cache, or `buffered` through it.
        threads: that read at once; each has one buffer of a record. One of several does not read ahead,
            so that what is needed now waits for nothing that may be.
        link: bytes/s of a simulated link in front of the disk; None is the disk as it is.

    A record's checksum is compared when it is first read through this `Store`. A read that fails, comes
    short or has a wrong checksum is tried once more; then `wait` raises, and the record has not landed.

    Raises:
        UserError: a file cannot be opened so.
    """

    def __init__(self, store: Store, mode: str = "direct", threads: int = 2, link: float | None = None):
        self.store, self.mode = store, mode
        self.link = Link(link) if link else None
        self.size = store.manifest.record_bytes
        self.bytes_read = self.reads = self.retries = 0
        self._changed = threading.Condition()
        self._queues: tuple[deque[Request], deque[Request]] = deque(), deque()  # NOW, AHEAD
        self._early, self._most_early = 0, max(1, threads - 1)  # reads ahead under way, and how many may be
        self._closed = False
        self._files: dict[int, int] = {}
        try:
            for block in store.manifest.blocks:
                self._files[block] = open_file(store.path(block), mode)
        except UserError:
            self._close_files()
            raise
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def buffer_bytes(self) -> int:
        """Memory that reading takes, apart from where records land."""
        return len(self._threads) * self.size

    # --- for the thread that computes ---

    def submit(self, block: int, expert: int, land: Callable[[np.ndarray], None], urgent: bool) -> Request:
        """Ask for a record."""
        request = Request(block, expert, land, urgent)
        with self._changed:
            self._queues[request.rank].append(request)
            self._changed.notify_all()
        return request

    def rank(self, requests: Iterable[Request], rank: int) -> None:
        """Give another rank to requests whose reading has not begun."""
        with self._changed:
            for request in requests:
                self._move(request, rank)

    def _move(self, request: Request, rank: int) -> None:
        if request.state == QUEUED and request.rank != rank:
            request.rank = rank  # its place in the other queue is skipped later
            if rank != PARKED:
                self._queues[rank].append(request)
                self._changed.notify_all()

    def cancel(self, request: Request) -> None:
        """A record is not wanted any more; when this returns it has landed or never will."""
        with self._changed:
            while request.state == LANDING:
                self._changed.wait()
            if request.state != DONE:
                request.state = CANCELLED

    def wait(self, requests: Iterable[Request]) -> None:
        """Until all of these have landed; those that were asked for ahead are needed now.

        Raises:
            UserError: one of them could not be read.
        """
        requests = list(requests)
        with self._changed:
            for request in requests:
                self._move(request, NOW)
            for request in requests:
                while request.state != DONE:
                    self._changed.wait()
        for request in requests:
            if request.error:
                raise UserError(request.error)

    def close(self) -> None:
        """Stop the threads and close the files."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._close_files()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    # --- the threads ---

    def _work(self) -> None:
        area = mmap.mmap(-1, self.size)  # page-aligned, as O_DIRECT asks for
        buffer = np.frombuffer(area, np.uint8)
        with answering():
            while (request := self._take()) is not None:
                self._serve(request, buffer)

    def _take(self) -> Request | None:
        """The next request, when there is one; None when the reader closes."""
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
        """Bring one record, and put it in its place if it is still wanted."""
        error = self._bring(request, buffer)
        with self._changed:
            if request.state == CANCELLED:
                self._served(request)
                return
            request.state = LANDING
        try:
            if error is None:
                request.land(buffer)
        except Exception as fault:  # or whoever waits would wait for ever
            error = f"Expert {request.expert} of block {request.block} cannot be put in its place ({fault})."
        with self._changed:
            request.error, request.finished = error, time.perf_counter()
            request.state = DONE
            self._served(request)

    def _served(self, request: Request) -> None:
        self._early -= request.rank == AHEAD
        self._changed.notify_all()

    def _bring(self, request: Request, buffer: np.ndarray) -> str | None:
        """One record into the buffer; why it failed twice, if it did."""
        for attempt in range(2):
            try:
                self._read(request, buffer)
                return None
            except OSError as error:
                reason = error.strerror or str(error)
                with self._changed:
                    self.retries += attempt == 0
        where = self.store.path(request.block)
        return (
            f"Expert {request.expert} of block {request.block} cannot be read from {where} ({reason}); "
            "check the disk, or pack the model again."
        )

    def _read(self, request: Request, buffer: np.ndarray) -> None:
        issued, view = time.perf_counter(), memoryview(buffer)
        offset, got = request.expert * self.size, 0
        while got < self.size:
            n = os.preadv(self._files[request.block], [view[got:]], offset + got)
            if n == 0:
                raise OSError("the file ends too early")
            got += n
            if got < self.size and self.mode == "direct" and got % 4096:
                raise OSError("the read came short")  # it cannot go on from the middle of a page
        with self._changed:
            self.reads += 1
            self.bytes_read += got
        record = request.block, request.expert
        if record not in self.store.verified:
            if hashlib.sha256(buffer).hexdigest() != self.store.checksum(*record):
                raise OSError("its checksum is wrong")
            self.store.verified.add(record)
        if self.link:
            self.link.finish(issued, self.size)


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
    """Bytes that this process has made the system read from disks so far; None where it does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)
