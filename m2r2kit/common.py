"""What every room needs: how bad input is reported, where files lie, how they are written whole or not at
all, and how much memory was used."""

import atexit
import errno
import json
import os
import pkgutil
import re
import resource
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the project's folder, with `data/` and `notebooks/` in it
IN_PROJECT = (ROOT / "data").is_dir()  # not where the package alone is installed
GET_PROJECT = (
    "the package is installed without the project's models, prompts, paper files and notebooks: "
    "`git clone --depth 1` the project and work in its folder"
)


def way_to(path: str | Path, otherwise: str) -> str:
    """What to do about a file that is not there.

    Args:
        otherwise: what to do where the file is no part of the project, or the project is here.
    """
    if IN_PROJECT or not Path(path).is_relative_to(ROOT):
        return otherwise
    return f"{GET_PROJECT}, or give your own"


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, and what to do.

    The command line prints it without a traceback and ends with exit code 2.
    """


def in_short(error: BaseException) -> str:
    """What an exception of a library says, on one line that fits into a sentence."""
    text = str(error).strip()
    if isinstance(error, KeyError | ImportError) or not text:
        text = f"{type(error).__name__} {text}".strip()
    text = " ".join(text.split())
    return (text if len(text) < 160 else text[:157] + "..").rstrip(":. ")


@dataclass(frozen=True)
class Entry:
    """One line of a registry: something that is asked for by name.

    A registry is a dict from names to entries. It imports nothing heavy, because the command line reads its
    choices and help texts from it before it knows which command will run.

    Attributes:
        about: what it is, in one sentence without a final stop.
        needs: the command that makes what it needs, such as `train drafter`; empty if it needs nothing.
        source: the paper, as author and year; empty for controls and for what is ours.
    """

    name: str
    about: str
    needs: str = ""
    source: str = ""

    def __str__(self) -> str:
        return f"{self.about}: {self.source}" if self.source else self.about


def registry(*entries: Entry) -> dict[str, Entry]:
    """Entries by their names, in the order in which they are shown."""
    return {entry.name: entry for entry in entries}


def on_demand(package: str, names: dict[str, str]) -> tuple[Callable, Callable]:
    """A package's `__getattr__` and `__dir__`, which import its files when they are asked for.

    So `from m2r2kit import experts` is all that a notebook imports, and it costs nothing until
    `experts.Clock` or `experts.simulate` is read.

    Args:
        package: the package's `__name__`.
        names: a file of the package -> the names that the package gives from it, with spaces between them.
            Every file can be asked for by its own name as well.
    """
    home = {name: file for file, given in names.items() for name in given.split()}

    def files() -> list[str]:
        found = pkgutil.iter_modules(sys.modules[package].__path__)
        return [module.name for module in found if not module.name.startswith("_")]

    def get(name: str):
        if name in home:
            return getattr(import_module(f".{home[name]}", package), name)
        if name in files():
            return import_module(f".{name}", package)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted({*vars(sys.modules[package]), *home, *files()})


SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_or_share(value: int | float | str) -> int | float:
    """Bytes (an int: `4096`, `64e6`, `64MB`), or a share of the whole (a float up to 1: `0.25`, `25%`).

    Raises:
        UserError: it is neither.
    """
    written = str(value).strip().upper()
    digits = written.rstrip("BGIKM%")
    unit = written[len(digits) :]
    try:
        found = float(digits)
        if unit == "%":
            found /= 100
        elif unit or found > 1 or isinstance(value, int):
            found = int(found * SIZES[unit])
    except (ValueError, KeyError, OverflowError):  # no number, no unit, or infinite
        found = 0
    if not found > 0 or (isinstance(found, float) and found > 1):
        raise UserError(f"'{value}' is no size such as 64MB and no share such as 25%")
    return found


def parse_json(text: str | bytes, **options):
    """JSON as `json.loads` reads it; what is nested too deeply is a ValueError, as all else that is wrong."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


# --- folders --------------------------------------------------------------------------------


def cache_dir() -> Path:
    """The cache folder, which may not exist yet; the variable `M2R2KIT_CACHE` names another one.

    Without a home folder (no HOME, and a user id that has no passwd entry, as in some containers) it lies
    among the temporary files.
    """
    if root := os.environ.get("M2R2KIT_CACHE"):
        return Path(root)
    try:
        return Path.home() / ".cache" / "m2r2kit"
    except RuntimeError:
        return private_folder() / "cache"


@cache
def private_folder() -> Path:
    """This user's own folder for temporary files, to which nobody else may write. It stays for the next
    process, unless somebody else has taken its name: then there is one for this process only."""
    folder = Path(tempfile.gettempdir(), f"m2r2kit-{os.getuid()}")
    with suppress(OSError):
        folder.mkdir(mode=0o700)
    if trusted(folder) and os.access(folder, os.W_OK | os.X_OK):
        return folder
    folder = Path(tempfile.mkdtemp(prefix="m2r2kit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def trusted(path: Path) -> bool:
    """Whether a path exists and nobody but this user and root can change what is there.

    It and all folders above it belong to one of the two, and nobody else may write to them. A folder may be
    open to all if it has the sticky bit, which keeps others from touching what is not theirs.
    """
    try:
        real = Path(os.path.realpath(path, strict=True))
        for each in (real, *real.parents):
            state = each.stat()
            writable = state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            sticky = stat.S_ISDIR(state.st_mode) and state.st_mode & stat.S_ISVTX
            if state.st_uid not in (0, os.getuid()) or (writable and not sticky):
                return False
    except OSError:
        return False
    return True


# --- writing: whole or not at all -----------------------------------------------------------

TEMPORARY = ".m2r2kit-"  # how the folders begin in which something is being written
WAYS_OUT = {
    errno.ENOSPC: "the disk is full; make room",
    errno.EDQUOT: "the disk quota is used up; make room",
    errno.EFBIG: "the file is larger than this disk or this process allows; choose another place",
    errno.EROFS: "the disk is read-only; choose another place",
    errno.EACCES: "permission is denied; choose a place that you may write to",
    errno.EPERM: "permission is denied; choose a place that you may write to",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EISDIR: "there is a folder of that name; choose another name",
    errno.EEXIST: "a part of its path is a file; choose another place",
    errno.ENOTDIR: "a part of its path is a file; choose another place",
    errno.ENOTEMPTY: "it exists already; delete it, or choose another name",
    errno.EMFILE: "too many files are open; raise the limit with `ulimit -n`",
}


@contextmanager
def whole(target: str | Path, replace: bool = False) -> Iterator[Path]:
    """A path to write a file or a folder to; it is renamed to `target` when the block ends, and deleted if
    the block fails. So `target` is whole or as it was before.

    The path has `target`'s name, in a new folder beside it that belongs to this block alone. Missing parents
    are made. A link is followed; a pipe or a device is written to directly. A folder takes the place of
    another one only with `replace`.

    Raises:
        UserError: it cannot be written (the cause, and what to do). Errors that name another file, such as
            one that is read inside the block, are left as they are.
    """
    target = Path(target)
    try:
        if target.exists() and not target.is_file() and not target.is_dir():  # /dev/stdout, a pipe
            yield target
            return
        real = Path(os.path.realpath(target))
        with _beside(real) as new:
            yield new
            if replace and real.is_dir() and new.is_dir():
                _swap(new, real)
            else:
                new.replace(real)
    except OSError as error:
        name = str(error.filename or "")
        if name and TEMPORARY not in name and not Path(os.path.realpath(target)).is_relative_to(name):
            raise
        raise unwritable(target, error) from error
    except RuntimeError as error:  # MLX says nothing of the cause
        if not str(error).startswith(("[write]", "[save")):
            raise
        raise UserError(f"{target} cannot be written: the disk is full or damaged; make room.") from error


def write_whole(file: str | Path, content: str | bytes) -> None:
    """Write a file, whole or not at all; errors as of `whole`."""
    with whole(file) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


def check_writable(file: str | Path) -> None:
    """Ask before long work whether `file` could be written at its end; nothing is left behind.

    Raises:
        UserError: it cannot be written (the cause, and what to do).
    """
    file = Path(file)
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        if file.exists() and not file.is_file():
            return
        with _beside(Path(os.path.realpath(file))) as new:
            new.touch()
    except OSError as error:
        raise unwritable(file, error) from error


def unwritable(target: str | Path, error: OSError) -> UserError:
    """One sentence: what could not be written, why, and what to do."""
    way_out = WAYS_OUT.get(error.errno, f"{error.strerror or error}; choose another place")
    if Path(target).is_relative_to(cache_dir()):
        way_out = re.sub("choose .*", "set M2R2KIT_CACHE to another folder", way_out)
    return UserError(f"{target} cannot be written: {way_out}.")


def _swap(new: Path, folder: Path) -> None:
    """Put a folder in the place of another one, which stays if that fails."""
    old = new.with_name(".old")
    folder.replace(old)
    try:
        new.replace(folder)
    except BaseException:
        old.replace(folder)
        raise


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A path of the same name in a new folder beside `target`; the folder is deleted at the end, and so are
    the parents that were made for it, if nothing else is in them."""
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=TEMPORARY, dir=target.parent, ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder, target.name)
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


# --- memory ---------------------------------------------------------------------------------


def machine_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_bytes(root: Path = Path("/")) -> tuple[int, int]:
    """The memory that this process may use in all, and what of it is free now.

    It is the machine's, or less where a container or a batch system limits it (cgroup v1 and v2).

    Args:
        root: the folder that holds `proc` and `sys`.
    """
    import psutil

    total, free = machine_bytes(), psutil.virtual_memory().available
    for limit, used in _limits(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of each group that this process is in. What the kernel caches of files that
    nobody uses at the moment does not count: it goes when memory is wanted."""
    names = {True: ("memory.max", "memory.current", "inactive_file"),
             False: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}  # fmt: skip
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            second = not controllers  # version 2 has one line without controllers
            if not second and "memory" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("" if second else "memory")
            # inside a container the path may be the host's: then the mount itself is the group
            folder = mount / path.strip("/")
            for group in (folder, *folder.parents):
                if not group.is_relative_to(mount):
                    break
                with suppress(OSError, ValueError):  # `max`; or no such file, as at the top
                    limit, used = (int((group / name).read_text()) for name in names[second][:2])
                    yield limit, used - _idle(group / "memory.stat", names[second][2])


def _idle(file: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        return int(dict(map(str.split, file.read_text().splitlines()))[name])
    return 0


def peak_bytes() -> int:
    """The largest memory of this process so far, as the system reports it (resident set, in bytes).

    Linux: VmHWM, because `ru_maxrss` there also counts the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
