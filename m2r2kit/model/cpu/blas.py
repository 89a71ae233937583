"""Routes the BLAS calls of MLX's Linux CPU wheel to OpenBLAS, without root and without a compiler.

The wheel bundles the reference BLAS, which multiplies float32 matrices 50-90 times slower than the machine
can. The package `scipy-openblas32` contains OpenBLAS with the prefix `scipy_` on every symbol. MLX calls BLAS
through a table of addresses (the ELF global offset table, GOT). `install()` writes OpenBLAS's addresses into
the BLAS and LAPACK entries of the table, and `uninstall()` writes the old ones back. Nothing on disk changes,
and only this process is affected.

The x86-64 and arm64 wheels both bundle reference BLAS 3.10 as a separate library, and call it through jump
slots (R_X86_64_JUMP_SLOT, R_AARCH64_JUMP_SLOT) of the same 64-bit ELF layout. The arm64 wheel was inspected,
but not run.

If there is a C compiler, products with few rows, the bulk of decoding, go through `few_rows.c`, which is
several times faster for them than OpenBLAS. `pool.c` divides products among threads, and OpenBLAS computes
each part in one thread: OpenBLAS's own threads spin while they wait for each other, which makes products many
times slower on a busy machine.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ...common import UserError, cache_dir, private_folder, trusted, whole, write_whole

# The LAPACK routines that MLX's linear algebra calls, with their types.
LAPACK = re.compile(
    r"^([sdcz](geev|gesdd|geqrf|getrf|getri|potrf|trtri)|[sd](syevd|orgqr)|[cz](heevd|ungqr))_$"
)

SHIM = "".join(Path(__file__).with_name(name).read_text() for name in ("pool.c", "few_rows.c"))


class BlasError(RuntimeError):
    """OpenBLAS cannot be installed; the message gives the reason in one sentence."""


# --- ELF structures ---------------------------------------------------------------------


class _Dyn(ctypes.Structure):
    _fields_ = [("tag", ctypes.c_int64), ("value", ctypes.c_uint64)]


class _Rela(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("info", ctypes.c_uint64), ("addend", ctypes.c_int64)]


class _Sym(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_uint32), ("info", ctypes.c_uint8), ("other", ctypes.c_uint8),
        ("section", ctypes.c_uint16), ("value", ctypes.c_uint64), ("size", ctypes.c_uint64),
    ]  # fmt: skip


class _LinkMap(ctypes.Structure):
    pass


_LinkMap._fields_ = [
    ("base", ctypes.c_uint64), ("path", ctypes.c_char_p), ("dynamic", ctypes.c_uint64),
    ("next", ctypes.POINTER(_LinkMap)), ("previous", ctypes.POINTER(_LinkMap)),
]  # fmt: skip

# Tags of the dynamic section (elf.h): the tables of strings, symbols and jump relocations.
_STRTAB, _SYMTAB, _PLTRELSZ, _JMPREL = 5, 6, 2, 23
_RTLD_NOLOAD = 4


def got_entries(library: Path) -> dict[str, int]:
    """The functions that a loaded library calls: name -> address of its GOT entry."""
    handle = ctypes.CDLL(str(library), mode=_RTLD_NOLOAD)._handle
    libc = ctypes.CDLL(None)
    link = ctypes.POINTER(_LinkMap)()
    # RTLD_DI_LINKMAP = 2: glibc's record of the loaded library
    if libc.dlinfo(ctypes.c_void_p(handle), 2, ctypes.byref(link)) != 0:
        raise BlasError(f"the loader does not tell where {library.name} is in memory")
    base, dynamic = link.contents.base, link.contents.dynamic
    tags = {}
    while (entry := _Dyn.from_address(dynamic)).tag != 0:
        tags[entry.tag] = entry.value
        dynamic += ctypes.sizeof(_Dyn)
    if not {_STRTAB, _SYMTAB, _PLTRELSZ, _JMPREL} <= tags.keys():
        raise BlasError(f"{library.name} has no table of calls to patch")
    names = {}
    for i in range(tags[_PLTRELSZ] // ctypes.sizeof(_Rela)):
        rela = _Rela.from_address(tags[_JMPREL] + i * ctypes.sizeof(_Rela))
        symbol = _Sym.from_address(tags[_SYMTAB] + (rela.info >> 32) * ctypes.sizeof(_Sym))
        name = ctypes.string_at(tags[_STRTAB] + symbol.name).decode()
        names[name] = base + rela.offset
    return names


def _write_pointer(address: int, value: int) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    libc = ctypes.CDLL(None, use_errno=True)
    # 3 = PROT_READ | PROT_WRITE: with "full RELRO" the loader makes the table read-only;
    # an entry is 8 aligned bytes, so it never spans two pages
    if libc.mprotect(ctypes.c_void_p(address // page * page), ctypes.c_size_t(page), 3) != 0:
        raise BlasError(f"the system refuses to make a page writable ({os.strerror(ctypes.get_errno())})")
    ctypes.c_uint64.from_address(address).value = value


# --- the shim -----------------------------------------------------------------------------


def load_shim(openblas: Path) -> tuple[ctypes.CDLL | None, str]:
    """(The compiled `SHIM` or None, a description of the result).

    It is compiled once and kept with its hash in the cache folder, or in the user's temporary folder if other
    users may write to the cache folder. A library is loaded only if it is complete and only this user and
    root can have changed it; otherwise it is compiled again.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    flags = ["-O3", "-pthread", *_vector_flags()]
    # machine and flags are in the key because different machines may share a home folder
    key = f"{SHIM}{openblas}{compiler}{platform.machine()}{flags}"
    name = f"blas-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    reason = "no C compiler"
    for folder in (cache_dir, private_folder):
        try:
            path = folder() / name
        except OSError:  # no folder for temporary files
            continue
        if _is_whole(path) and (library := _loaded(path)):
            return library, "few rows through few_rows.c"
        if compiler is None:
            continue
        reason = _compile(path, [compiler, *flags], openblas)
        if not reason and (library := _loaded(path)):
            return library, "few rows through few_rows.c"
    return None, f"{reason or 'libraries there cannot be loaded'}, so no fast path for few rows"


def _compile(target: Path, compiler: list[str], openblas: Path) -> str:
    """Compile `SHIM` to `target` atomically; returns why it failed, or an empty text."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not trusted(target.parent):
            return "others may write to the folder for compiled code"
        with whole(target) as new:
            subprocess.run(
                [*compiler, "-shared", "-fPIC", "-x", "c", "-", "-x", "none", str(openblas),
                 f"-Wl,-rpath,{openblas.parent}", "-o", str(new)],
                input=SHIM.encode(), check=True, capture_output=True, timeout=60,
            )  # fmt: skip
            new.chmod(0o644)  # not writable for others, whatever the umask
            digest = hashlib.sha256(new.read_bytes()).hexdigest()
        write_whole(target.with_suffix(".sha256"), digest)
        target.with_suffix(".sha256").chmod(0o644)
    except (OSError, UserError):
        return "no folder for compiled code"
    except subprocess.SubprocessError:
        return "the C compiler does not work"
    return ""


def _is_whole(path: Path) -> bool:
    """Whether a library is complete and was compiled by this user or root."""
    digest = path.with_suffix(".sha256")
    try:
        if not trusted(path) or not trusted(digest):
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == digest.read_text()
    except (OSError, ValueError):
        return False


def _loaded(path: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # for example, the folder is mounted `noexec`
        return None


def _vector_flags() -> list[str]:
    """Compiler flags for this machine's AVX; by default compilers do not use it on x86-64."""
    try:
        known = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    flags = ["-mavx2", "-mfma"] if {"avx2", "fma"} <= known else []
    return [*flags, "-mavx512f", "-mprefer-vector-width=512"] if flags and "avx512f" in known else flags


# --- installing ---------------------------------------------------------------------------


def openblas_path() -> Path | None:
    """The path of OpenBLAS in `scipy-openblas32`, or None if that is not installed."""
    try:
        import scipy_openblas32
    except ImportError:
        return None
    path = Path(scipy_openblas32.get_lib_dir()) / "libscipy_openblas.so"
    return path if path.exists() else None


_old: dict[int, int] = {}  # address of a GOT entry -> its original value
_openblas: list[tuple[ctypes.CDLL, int]] = []  # the library in use, if any, and its original thread count
_pools: list[ctypes.CDLL] = []  # the shim in use, if any


def install() -> str:
    """Route MLX's BLAS and LAPACK calls to OpenBLAS; returns a description. May be called repeatedly.

    Raises:
        BlasError: it is not possible; the message gives the reason in one sentence.
    """
    try:
        import mlx.core  # loads libmlx.so, whose table is patched
    except ImportError as error:
        raise BlasError(f'MLX cannot be loaded ({error}); run `pip install "mlx[cpu]"`') from None

    library = Path(mlx.core.__file__).parent / "lib" / "libmlx.so"
    if not library.exists():
        raise BlasError(f"MLX's library is not at {library}")
    openblas = openblas_path()
    if openblas is None:
        raise BlasError("the package scipy-openblas32 is not installed; run `pip install scipy-openblas32`")
    try:
        source = ctypes.CDLL(str(openblas))
    except OSError as error:
        raise BlasError(f"OpenBLAS cannot be loaded ({error})") from None
    shim, few = load_shim(openblas)

    entries = got_entries(library)
    if "cblas_sgemm" not in entries:
        raise BlasError("this MLX does not call cblas_sgemm, so there is nothing to replace")
    try:
        for name, address in entries.items():
            if not (name.startswith("cblas_") or LAPACK.match(name)):
                continue
            function = getattr(source, f"scipy_{name}", None)
            if name == "cblas_sgemm" and shim is not None:
                function = shim.m2r2kit_sgemm
            if function is None:
                continue  # keep the reference routine: slower, but correct
            _old.setdefault(address, ctypes.c_uint64.from_address(address).value)
            _write_pointer(address, ctypes.cast(function, ctypes.c_void_p).value)
    except BlasError:
        uninstall()
        raise
    if not _openblas:
        _openblas.append((source, source.scipy_openblas_get_num_threads()))
    source.scipy_openblas_set_num_threads(1)
    if shim is not None:
        _pools[:] = [shim]
        shim.m2r2kit_set_threads(min(_openblas[0][1], len(os.sched_getaffinity(0))))
    version = ctypes.CFUNCTYPE(ctypes.c_char_p)(("scipy_openblas_get_config", source))()
    return f"{version.decode().split(' NO_')[0]} ({few})"


def uninstall() -> None:
    """Restore MLX's own BLAS in this process."""
    while _old:
        address, value = _old.popitem()
        ctypes.c_uint64.from_address(address).value = value  # `install` made the page writable
    while _openblas:
        library, threads = _openblas.pop()
        library.scipy_openblas_set_num_threads(threads)
    _pools.clear()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute products in one thread inside the context, if `pool.c` is in use."""
    with ExitStack() as stack:
        for pool in _pools:
            stack.callback(pool.m2r2kit_set_threads, pool.m2r2kit_set_threads(1))
        yield
