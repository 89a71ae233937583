"""Checks of memory, limits, folders and disk."""

import mmap
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

from ...common import GET_PROJECT, IN_PROJECT, ROOT, cache_dir, machine_bytes, memory_bytes
from .check import Check

LEAST_MEMORY, LEAST_DISK = 2 << 30, 1 << 30
LEAST_FILES = 4096  # mlx_lm raises the limit to this when it is imported
OWN_CACHE = "set M2R2KIT_CACHE to a folder of your own"


# --- memory and limits --------------------------------------------------------------------


def memory() -> Check:
    """Memory available to this process: the machine's, or a container's limit."""
    total, available = memory_bytes()
    value = f"{total / 2**30:.1f} GB, {available / 2**30:.1f} GB available"
    if total < machine_bytes():
        value += f" (a limit of the container; the machine has {machine_bytes() / 2**30:.1f} GB)"
    if available >= LEAST_MEMORY:
        return Check("memory", value, True)
    advice = "close other programs: the notebooks need 2 GB of free memory"
    if total < LEAST_MEMORY:
        advice = "the notebooks need 2 GB: raise the container's limit, such as `docker run --memory 4g`"
    return Check("memory", value, False, advice)


def open_files() -> Check:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY or hard >= LEAST_FILES:
        return Check("open files", "no limit" if hard == resource.RLIM_INFINITY else f"at most {hard}", True)
    advice = (
        f"mlx_lm needs {LEAST_FILES}: ask an administrator to raise the hard limit "
        f"(`docker run --ulimit nofile={LEAST_FILES}`, or /etc/security/limits.conf)"
    )
    return Check("open files", f"at most {hard}", False, advice)


# --- folders ------------------------------------------------------------------------------


def home_folder() -> Check:
    """The kit's own commands find a stand-in; others keep settings and models there."""
    home = os.path.expanduser("~")
    advice = "set HOME to a folder of your own: Jupyter and Hugging Face keep settings and models there"
    if not os.path.isabs(home):
        value = "none: HOME is not set, and the system does not know this user"
        return Check("home folder", value, True, advice)
    if not os.access(home, os.W_OK | os.X_OK):
        return Check("home folder", f"{home} cannot be written", True, advice)
    return Check("home folder", home, True)


def cache_folder() -> Check:
    """It holds compiled libraries, expert stores and training text."""
    folder = cache_dir()
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if there == folder:
        state = folder.stat()
        if state.st_uid != os.geteuid():
            return Check("cache folder", f"{folder} belongs to another user", False, OWN_CACHE)
        if state.st_mode & 0o022:
            advice = f"compiled libraries are loaded from it: run `chmod go-w {folder}`, or {OWN_CACHE}"
            return Check("cache folder", f"{folder} can be written by others", False, advice)
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return Check("cache folder", f"{folder} cannot be written", False, OWN_CACHE)
    return Check("cache folder", str(folder), True)


def kit_folder() -> Check:
    """It holds the notebooks and the records of measurements."""
    if not IN_PROJECT:
        return Check("kit folder", "none", True, f"not needed, but {GET_PROJECT}")
    shut = [name for name in ("notebooks", "data/results") if not os.access(ROOT / name, os.W_OK)]
    if not shut:
        return Check("kit folder", str(ROOT), True)
    advice = (
        "notebooks run, but changes to them and new records cannot be saved in it: "
        "copy the folder to a place of your own"
    )
    return Check("kit folder", f"{ROOT}, of which {' and '.join(shut)} cannot be written", True, advice)


# --- disk ---------------------------------------------------------------------------------


def disk_space() -> Check:
    try:
        free = shutil.disk_usage(Path.cwd()).free
    except FileNotFoundError:
        return Check("disk space", "unknown", False, "the folder you are in was deleted: `cd` to another one")
    ok = free >= LEAST_DISK
    advice = "" if ok else "free some space: trained modules and expert stores need 1 GB"
    return Check("disk space", f"{free / 2**30:.1f} GB free here", ok, advice)


def disk_reads() -> Check:
    """Speed of reading a new file past the page cache, as the expert reader does."""
    try:
        rate, way = _read_rate(64 << 20)
    except OSError as error:  # full, or not to be written
        advice = "free some space in the cache folder, or set M2R2KIT_CACHE to one that can be written"
        return Check("disk reads", f"not measured ({error.strerror or error})", False, advice)
    return Check("disk reads", f"{rate:.0f} MB/s ({way})", True, "", {"disk_read_mb_s": round(rate, 1)})


def _read_rate(size: int, chunk: int = 4 << 20) -> tuple[float, str]:
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(prefix="doctor-", dir=folder)
    try:
        block = os.urandom(chunk)  # random, so that a compressing disk gains nothing
        for _ in range(size // chunk):
            os.write(handle, block)
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        source, way = _open_uncached(path)
        buffer = mmap.mmap(-1, chunk)  # page-aligned, as direct reads need
        try:
            start = time.perf_counter()
            for offset in range(0, size, chunk):
                if os.preadv(source, [buffer], offset) != chunk:
                    raise OSError("short read")
            seconds = time.perf_counter() - start
        finally:
            os.close(source)
            buffer.close()
    finally:
        os.close(handle)
        os.unlink(path)
    return size / 1e6 / seconds, way


def _open_uncached(path: str) -> tuple[int, str]:
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT), "direct"
        except OSError:
            return os.open(path, os.O_RDONLY), "page cache dropped first"  # such as tmpfs
    source = os.open(path, os.O_RDONLY)
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(source, fcntl.F_NOCACHE, 1)
        return source, "uncached"
    return source, "perhaps from the page cache"
