"""Makes the kernels that MLX compiles on Linux safe to load.

For a compiled function MLX writes C++, compiles it with `g++` to a library in $TMPDIR/mlx/VERSION/cpu and
loads the library. The folder is shared by all users of the machine, and MLX loads a library without checking
who made it or whether it is complete. `prepare` gives each user a folder that no other user can write to,
removes incomplete libraries, and turns compilation off if `g++` does not work.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from ...common import private_folder, trusted, write_whole

PROGRAM = """#include <cmath>
#include <complex>
#include <cstdint>
#include <vector>
extern "C" float f(float x) { return std::exp(x); }
"""


_before: dict[str, str | None] = {}  # original environment variables
_disabled = False


def prepare() -> str:
    """Make MLX's compiled kernels safe, before the first one is loaded.

    Returns:
        why MLX cannot compile kernels here; empty if it can.
    """
    global _disabled
    if os.environ.get("MLX_DISABLE_COMPILE"):
        return "MLX_DISABLE_COMPILE is set"
    compiler = shutil.which("g++")
    if compiler is None:
        return "there is no g++"
    if not _ours(kernels_folder()):
        _before.setdefault("TMPDIR", os.environ.get("TMPDIR"))
        os.environ["TMPDIR"] = str(private_folder())  # MLX reads it for each kernel
    folder = kernels_folder()
    if not _ours(folder):
        reason = f"{folder} is not writable for you alone"
    else:
        for library in folder.glob("*.so"):
            remove_damaged(library)
        reason = "" if _works(compiler, folder) else f"{compiler} does not work"
    if reason:
        mx.disable_compile()
        _disabled = True
    return reason


def undo() -> None:
    """Undo `prepare` in this process; removed libraries stay removed."""
    global _disabled
    while _before:
        name, value = _before.popitem()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if _disabled:
        mx.enable_compile()
        _disabled = False


def kernels_folder() -> Path:
    """MLX's current folder of kernels, in C++'s folder for temporary files."""
    given = (os.environ.get(name) for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR"))
    return Path(next((folder for folder in given if folder), "/tmp"), "mlx", mx.__version__, "cpu")


def _ours(folder: Path) -> bool:
    """Create a folder if it is missing; returns whether only this user and root can write to it."""
    try:
        missing = [each for each in (folder, *folder.parents[:2]) if not each.exists()]
        for each in reversed(missing):
            each.mkdir(mode=0o755, exist_ok=True)
            each.chmod(0o755)  # whatever the umask
    except OSError:
        return False
    return trusted(folder) and os.access(folder, os.W_OK | os.X_OK)


def is_whole_library(library: Path) -> bool:
    """Whether a 64-bit ELF file is as long as its header says; True for 32-bit files."""
    try:
        with library.open("rb") as file:
            header = file.read(64)
        if len(header) < 64 or header[:4] != b"\x7fELF":
            return False
        if header[4] != 2:
            return True
        sections = int.from_bytes(header[40:48], sys.byteorder)  # offset of the section table (elf.h)
        size, count = (int.from_bytes(header[i : i + 2], sys.byteorder) for i in (58, 60))
        return library.stat().st_size >= sections + size * count
    except OSError:
        return False


def remove_damaged(library: Path) -> None:
    """Delete a library that was cut short, unless it is still being written."""
    if is_whole_library(library):
        return
    with suppress(OSError):  # in use, or already deleted
        with library.open("rb") as file:  # a lease is refused while any process writes the file
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        library.unlink()


def _works(compiler: str, folder: Path) -> bool:
    """Whether `g++` compiles the kind of program that MLX gives it; success is remembered in a file."""
    state = os.stat(compiler)
    asked = f"{os.path.realpath(compiler)} {state.st_size} {state.st_mtime_ns}"
    note = folder / f"m2r2kit-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.ok"
    if note.exists():
        return True
    command = [compiler, "-std=c++17", "-O3", "-fPIC", "-shared", "-x", "c++", "-", "-o", "/dev/null"]
    try:
        subprocess.run(command, input=PROGRAM.encode(), capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return False
    write_whole(note, asked)
    return True
