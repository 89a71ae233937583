"""Shared basics: user errors, registries, lazy imports, folders, atomic writes and memory limits."""

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

ROOT = Path(__file__).resolve().parents[1]  # the project folder, which holds `data/` and `notebooks/`
IN_PROJECT = (ROOT / "data").is_dir()  # False if only the package is installed
GET_PROJECT = (
    "the package is installed without the project's models, prompts, paper files and notebooks: "
    "`git clone --depth 1` the project and work in its folder"
)


def missing_advice(path: str | Path, otherwise: str) -> str:
    """What to do about a missing file.

    Args:
        otherwise: the advice if the project is present, or the file is not part of it.
    """
    if IN_PROJECT or not Path(path).is_relative_to(ROOT):
        return otherwise
    return f"{GET_PROJECT}, or give your own"


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def in_short(error: BaseException) -> str:
    """A library's exception as one short line that fits into a sentence."""
    text = str(error).strip()
    if isinstance(error, KeyError | ImportError) or not text:
        text = f"{type(error).__name__} {text}".strip()
    text = " ".join(text.split())
    return (text if len(text) < 160 else text[:157] + "..").rstrip(":. ")


@dataclass(frozen=True)
class Entry:
    """One item of a registry: a method, model or predictor that users choose by name.

    A registry is a dict from names to entries. It imports nothing heavy: the command line reads choices and
    help texts from it before it knows which command will run.

    Attributes:
        about: what it is, in one sentence without a final full stop.
        needs: the command that makes what it needs, such as `train drafter`; empty if it needs nothing.
        source: the paper, as author and year; empty for controls and our own methods.
    """

    name: str
    about: str
    needs: str = ""
    source: str = ""

    def __str__(self) -> str:
        return f"{self.about}: {self.source}" if self.source else self.about


def registry(*entries: Entry) -> dict[str, Entry]:
    """A dict of entries by name, in display order."""
    return {entry.name: entry for entry in entries}


def on_demand(package: str, names: dict[str, str]) -> tuple[Callable, Callable]:
    """A package's `__getattr__` and `__dir__`, which import its modules on first use.

    `from m2r2kit import experts` costs nothing until `experts.Clock` or `experts.simulate` is used.

    Args:
        package: the package's `__name__`.
        names: module of the package -> the names that the package exports from it, separated by spaces.
            Every module is also an attribute of the package.
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
    """Bytes as an int (`4096`, `64e6`, `64MB`), or a share of the total as a float up to 1 (`0.25`, `25%`).

    Raises:
        UserError: the value is neither.
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
    except (ValueError, KeyError, OverflowError):  # not a number, an unknown unit, or infinite
        found = 0
    if not found > 0 or (isinstance(found, float) and found > 1):
        raise UserError(f"'{value}' is neither a size such as 64MB nor a share such as 25%")
    return found


def parse_json(text: str | bytes, **options):
    """`json.loads` that raises ValueError for JSON nested too deeply, as for all other bad JSON."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


# --- folders --------------------------------------------------------------------------------


def cache_dir() -> Path:
    """The cache folder: `$M2R2KIT_CACHE`, or `~/.cache/m2r2kit`. It may not exist yet.

    Without a home folder (no HOME and no passwd entry, as in some containers) it is in a temporary folder.
    """
    if root := os.environ.get("M2R2KIT_CACHE"):
        return Path(root)
    try:
        return Path.home() / ".cache" / "m2r2kit"
    except RuntimeError:
        return private_folder() / "cache"


@cache
def private_folder() -> Path:
    """A temporary folder that only this user can write to.

    Later processes reuse it. If another user has taken its name, the folder is for this process only.
    """
    folder = Path(tempfile.gettempdir(), f"m2r2kit-{os.getuid()}")
    with suppress(OSError):
        folder.mkdir(mode=0o700)
    if trusted(folder) and os.access(folder, os.W_OK | os.X_OK):
        return folder
    folder = Path(tempfile.mkdtemp(prefix="m2r2kit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def trusted(path: Path) -> bool:
    """Whether a path exists and only this user and root can change it.

    The path and all its parents belong to one of the two, and no other user may write to them. A folder may
    be writable for all if it has the sticky bit, which protects each user's files from the others.
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


# --- atomic writes --------------------------------------------------------------------------

TEMPORARY = ".m2r2kit-"  # prefix of temporary folders
REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
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
    """Write a file or a folder atomically: `target` is complete, or as it was before.

    The block writes to the path that it is given, which has `target`'s name in a new folder beside it. The
    path is renamed to `target` when the block ends, and deleted if the block fails. Missing parents are
    created. A link is followed; a pipe or a device is written to directly.

    Args:
        replace: whether a folder may replace another folder.

    Raises:
        UserError: the target cannot be written (the cause, and what to do). Errors about other files, such
            as one that the block reads, pass unchanged.
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
    except RuntimeError as error:  # MLX does not report the cause
        if not str(error).startswith(("[write]", "[save")):
            raise
        raise UserError(
            f"{target} cannot be written: the disk is full or damaged; free some space."
        ) from error


def write_whole(file: str | Path, content: str | bytes) -> None:
    """Write a file atomically; raises the same errors as `whole`."""
    with whole(file) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


def check_writable(file: str | Path) -> None:
    """Check before long work that `file` can be written; nothing is left behind.

    Raises:
        UserError: the file cannot be written (the cause, and what to do).
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
    """An OSError as one sentence: what cannot be written, why, and what to do."""
    remedy = REMEDIES.get(error.errno, f"{error.strerror or error}; choose another place")
    if Path(target).is_relative_to(cache_dir()):
        remedy = re.sub("choose .*", "set M2R2KIT_CACHE to another folder", remedy)
    return UserError(f"{target} cannot be written: {remedy}.")


def _swap(new: Path, folder: Path) -> None:
    """Replace a folder; if that fails, the old one stays."""
    old = new.with_name(".old")
    folder.replace(old)
    try:
        new.replace(folder)
    except BaseException:
        old.replace(folder)
        raise


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A path of `target`'s name in a new temporary folder beside it.

    At the end the folder is deleted, and so are the parents created for it, if they are empty.
    """
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
    """The machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_bytes(root: Path = Path("/")) -> tuple[int, int]:
    """(Total, free): the memory that this process may use and how much of it is free now, in bytes.

    The total is the machine's memory, or the limit of a container or batch system (cgroup v1 and v2).

    Args:
        root: the folder that holds `proc` and `sys`.
    """
    import psutil

    total, free = machine_bytes(), psutil.virtual_memory().available
    for limit, used in _limits(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """(Limit, usage) in bytes of each cgroup of this process.

    Inactive file cache does not count as usage: the kernel reclaims it when memory is needed.
    """
    names = {True: ("memory.max", "memory.current", "inactive_file"),
             False: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}  # fmt: skip
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            second = not controllers  # cgroup v2 has one line without controllers
            if not second and "memory" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("" if second else "memory")
            # inside a container the path may be the host's; the mount itself is then the cgroup
            folder = mount / path.strip("/")
            for group in (folder, *folder.parents):
                if not group.is_relative_to(mount):
                    break
                with suppress(OSError, ValueError):  # no limit (`max`), or no file
                    limit, used = (int((group / name).read_text()) for name in names[second][:2])
                    yield limit, used - _inactive(group / "memory.stat", names[second][2])


def _inactive(file: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        return int(dict(map(str.split, file.read_text().splitlines()))[name])
    return 0


def peak_bytes() -> int:
    """Peak resident memory of this process so far, in bytes.

    On Linux it is VmHWM, because `ru_maxrss` also counts the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
