"""Put a real BLAS under MLX's Linux CPU wheel, without root and without a compiler.

The wheel links the reference BLAS, which multiplies float32 matrices 50-90 times slower
than the machine can. The package index's `scipy-openblas32` holds OpenBLAS with every
symbol prefixed `scipy_`. MLX calls BLAS through a table of addresses (the ELF "global
offset table"); we write OpenBLAS's addresses into the entries that belong to BLAS and
LAPACK. Nothing on disk changes, and only this process is affected; `uninstall()` writes the
old addresses back.

The x86-64 and the arm64 wheel are alike in all that matters here: both bundle reference BLAS
3.10 as a library of its own, and both call it through jump slots (R_X86_64_JUMP_SLOT,
R_AARCH64_JUMP_SLOT) of the same 64-bit ELF layout. For arm64 this was read from the wheel
and not run.

Where a C compiler is found, `few_rows.c` goes in between: products with few rows, which decoding
is made of, are several times faster there than in OpenBLAS's general routine. Products are shared out
among threads by `pool.c`, and OpenBLAS computes each part in one: its own threads spin while they wait for
one another, and on a busy machine a product then takes many times what one thread needs.
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

# The LAPACK routines that MLX's linear algebra calls, in the types it calls them with.
LAPACK = re.compile(
    r"^([sdcz](geev|gesdd|geqrf|getrf|getri|potrf|trtri)|[sd](syevd|orgqr)|[cz](heevd|ungqr))_$"
)

SHIM = "".join(Path(__file__).with_name(name).read_text() for name in ("pool.c", "few_rows.c"))


class BlasError(RuntimeError):
    """OpenBLAS could not be put under MLX; the message says why in one sentence."""


# --- the ELF structures that name MLX's calls -------------------------------------------


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

# Tags of the dynamic section (elf.h): where strings, symbols and jump relocations lie.
_STRTAB, _SYMTAB, _PLTRELSZ, _JMPREL = 5, 6, 2, 23
_RTLD_NOLOAD = 4


def got_entries(library: Path) -> dict[str, int]:
    """Address of the offset-table entry of every function that a loaded library calls."""
    handle = ctypes.CDLL(str(library), mode=_RTLD_NOLOAD)._handle
    libc = ctypes.CDLL(None)
    link = ctypes.POINTER(_LinkMap)()
    # RTLD_DI_LINKMAP = 2: glibc's own record of where it put the library
    if libc.dlinfo(ctypes.c_void_p(handle), 2, ctypes.byref(link)) != 0:
        raise BlasError(f"the loader does not say where {library.name} lies in memory")
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
    # PROT_READ | PROT_WRITE, for a library whose table the loader made read-only ("full RELRO");
    # an entry is 8 bytes and aligned, so it never spans two pages
    if libc.mprotect(ctypes.c_void_p(address // page * page), ctypes.c_size_t(page), 3) != 0:
        raise BlasError(f"the system refuses to make a page writable ({os.strerror(ctypes.get_errno())})")
    ctypes.c_uint64.from_address(address).value = value


# --- the shim -----------------------------------------------------------------------------


def load_shim(openblas: Path) -> tuple[ctypes.CDLL | None, str]:
    """The compiled `SHIM`, or None; and what came of it, in words.

    It is compiled once and kept beside its hash in the cache folder, or in the user's folder for temporary
    files where others may write to the former. A library is loaded only if nobody but this user and root can
    have changed it, and if it is whole; otherwise it is made again.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    flags = ["-O3", "-pthread", *_vector_flags()]
    # a home folder may be shared by machines of two kinds, hence machine and flags in the name
    key = f"{SHIM}{openblas}{compiler}{platform.machine()}{flags}"
    name = f"blas-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    reason = "no C compiler"
    for folder in (cache_dir, private_folder):
        try:
            path = folder() / name
        except OSError:  # there is no place for temporary files
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
    """Compile `SHIM` to `target`, whole or not at all; why that failed, or nothing."""
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
            new.chmod(0o644)  # whatever the umask: nobody else may write it
            digest = hashlib.sha256(new.read_bytes()).hexdigest()
        write_whole(target.with_suffix(".sha256"), digest)
        target.with_suffix(".sha256").chmod(0o644)
    except (OSError, UserError):
        return "no folder for compiled code"
    except subprocess.SubprocessError:
        return "the C compiler does not work"
    return ""


def _is_whole(path: Path) -> bool:
    """Whether a library is as it was compiled, by this user or root."""
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
    except OSError:  # such as a folder that is mounted `noexec`
        return None


def _vector_flags() -> list[str]:
    """What to tell the compiler of this machine's wide arithmetic; it assumes none on x86-64."""
    try:
        known = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    flags = ["-mavx2", "-mfma"] if {"avx2", "fma"} <= known else []
    return [*flags, "-mavx512f", "-mprefer-vector-width=512"] if flags and "avx512f" in known else flags


# --- the whole ----------------------------------------------------------------------------


def openblas_path() -> Path | None:
    """The shared library of `scipy-openblas32`, or None if it is not installed."""
    try:
        import scipy_openblas32
    except ImportError:
        return None
    path = Path(scipy_openblas32.get_lib_dir()) / "libscipy_openblas.so"
    return path if path.exists() else None


_old: dict[int, int] = {}  # entry's address -> what stood there: the function, or the loader's stub
_openblas: list[tuple[ctypes.CDLL, int]] = []  # the library in use, if any, and the threads that it had
_pools: list[ctypes.CDLL] = []  # the shim in use, if any


def install() -> str:
    """Route MLX's BLAS and LAPACK calls to OpenBLAS; returns what was done, in words.

    Raises `BlasError` with one sentence where that is not possible. Calling it twice is harmless.
    """
    try:
        import mlx.core  # libmlx.so must be loaded before its table can be found
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
                continue  # the reference routine stays: slower, and as right
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
    """Give MLX its own BLAS back, in this process."""
    while _old:
        address, value = _old.popitem()
        ctypes.c_uint64.from_address(address).value = value  # its page is writable by now
    while _openblas:
        library, threads = _openblas.pop()
        library.scipy_openblas_set_num_threads(threads)
    _pools.clear()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread a product for a while, where `pool.c` is in use."""
    with ExitStack() as stack:
        for pool in _pools:
            stack.callback(pool.m2r2kit_set_threads, pool.m2r2kit_set_threads(1))
        yield
