"""Is this machine fit for the kit? Each finding is OK or one sentence of what to do.

`m2r2kit doctor` prints the table, `--json` the same for programs. It takes a few seconds,
most of them for the matrix products and the disk, which are measured and not looked up.
"""

import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import psutil

from .. import __version__
from ..common import cache_dir
from ..model.cpu import threads as runtime

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
OLDEST_GLIBC, OLDEST_MACOS = (2, 35), (14, 0)
LEAST_RATIO = 0.7  # MLX's products against NumPy's
LEAST_MEMORY, LEAST_DISK = 2 << 30, 1 << 30


@dataclass
class Check:
    """One finding. `advice` says what to do, or for an OK one what could be gained."""

    name: str
    value: str
    ok: bool
    advice: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


def checks() -> list[Check]:
    """All findings, in the order of the table. Measures for a few seconds; never raises."""
    found = []
    for check in (
        python, packages, system, device, blas, products,
        memory, disk_space, disk_reads, c_compiler, fused_kernels, notebook_kernel,
    ):  # fmt: skip
        try:
            result = check()
        except ImportError as error:
            sentence = "run `python3 ci/kit.py lab`, which installs what is missing"
            result = Check(check.__name__.replace("_", " "), str(error), False, sentence)
        except Exception as error:  # one broken part must not hide the others
            sentence = f"this check itself failed ({type(error).__name__}: {error}); please report it"
            result = Check(check.__name__.replace("_", " "), "unknown", False, sentence)
        found += result if isinstance(result, list) else [result]
    return found


def run(as_json: bool) -> int:
    """Print the findings; returns 0, or 1 if one is not OK."""
    found = checks()
    ok = all(check.ok for check in found)
    if as_json:
        numbers = {key: value for check in found for key, value in check.numbers.items()}
        print(json.dumps({"ok": ok, **numbers, "checks": [asdict(check) for check in found]}, indent=2))
        return 0 if ok else 1
    width = max(len(check.name) for check in found)
    for check in found:
        print(f"{'OK ' if check.ok else 'FIX'}  {check.name:<{width}}  {check.value}")
        if check.advice:
            print(f"     {'':<{width}}  -> {check.advice}")
    print("\nThis machine is ready." if ok else "\nSomething needs fixing: see the lines marked FIX.")
    return 0 if ok else 1


# --- versions and the system --------------------------------------------------------------


def python() -> Check:
    ok = OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON
    advice = "" if ok else "install Python 3.11, 3.12 or 3.13: MLX is tested with these here"
    return Check("Python", platform.python_version(), ok, advice)


def packages() -> list[Check]:
    found = [Check("m2r2kit", __version__, True)]
    for name in ("mlx", "mlx-lm", "numpy"):
        try:
            found.append(Check(name, metadata.version(name), True))
        except metadata.PackageNotFoundError:
            found.append(
                Check(name, "not installed", False, "run `python3 ci/kit.py lab`, which installs it")
            )
    return found


def system() -> Check:
    value = f"{platform.system()} {platform.machine()}"
    if sys.platform == "darwin":
        version = platform.mac_ver()[0]
        if platform.machine() != "arm64":
            return Check("system", value, False, "MLX needs Apple silicon and an arm64 Python")
        ok = _numbers(version) >= OLDEST_MACOS
        return Check("system", f"macOS {version} arm64", ok, "" if ok else "MLX needs macOS 14 or newer")
    if sys.platform != "linux":
        return Check("system", value, False, "use Linux, WSL 2 or macOS on Apple silicon")
    glibc = platform.libc_ver()[1]
    ok = bool(glibc) and _numbers(glibc) >= OLDEST_GLIBC
    advice = "" if ok else "MLX needs glibc 2.35 or newer, as in Debian 12 and Ubuntu 22.04"
    return Check("system", f"{value}, glibc {glibc or 'missing'}", ok, advice)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def device() -> Check:
    import mlx.core as mx

    kind = "gpu (Metal)" if mx.metal.is_available() else str(mx.default_device().type).split(".")[-1]
    return Check("MLX device", f"{kind}, {os.cpu_count()} CPU cores", True)


# --- matrix products ----------------------------------------------------------------------


def blas() -> Check:
    state = runtime.prepare()
    if state.kind != "stock":
        return Check("BLAS", f"{state.kind}: {state.detail}", True)
    advice = "products are 50-90 times slower than they could be; `pip install scipy-openblas32` mends it"
    if os.environ.get("M2R2KIT_BLAS") == "stock":
        advice = "products are 50-90 times slower than they could be; unset M2R2KIT_BLAS"
    return Check("BLAS", f"stock: {state.detail}", False, advice)


def products() -> Check:
    """float32 products 512x1024x1024 of MLX on the CPU and of NumPy, in turns of their own:
    after a product the threads of its BLAS spin for a while, and would slow the other down."""
    import mlx.core as mx

    numbers = np.random.default_rng(0)
    a = numbers.standard_normal((512, 1024), dtype=np.float32)
    b = numbers.standard_normal((1024, 1024), dtype=np.float32)
    mlx_a, mlx_b = mx.array(a), mx.array(b)

    def mlx_product():
        mx.eval(mx.matmul(mlx_a, mlx_b, stream=mx.cpu))

    def numpy_product():
        a @ b

    seconds = {mlx_product: [], numpy_product: []}
    end = time.perf_counter() + 4  # the stock BLAS needs half a second for each product
    while len(seconds[mlx_product]) < 15 and time.perf_counter() < end:
        for product, samples in seconds.items():
            time.sleep(0.03)
            product()  # wakes the threads up; not counted
            for _ in range(3):
                start = time.perf_counter()
                product()
                samples.append(time.perf_counter() - start)
    gflop = 2 * 512 * 1024 * 1024 / 1e9
    mlx, numpy = (gflop / statistics.median(samples) for samples in seconds.values())
    ratio = mlx / numpy
    return Check(
        "products",
        f"MLX {mlx:.0f} GFLOP/s, NumPy {numpy:.0f} GFLOP/s, ratio {ratio:.2f}",
        ratio >= LEAST_RATIO,
        "" if ratio >= LEAST_RATIO else "see the line BLAS; if that is OK, try again on a quiet machine",
        {"mlx_gflops": round(mlx, 2), "numpy_gflops": round(numpy, 2), "ratio": round(ratio, 3)},
    )


# --- memory and disk ----------------------------------------------------------------------


def memory() -> Check:
    state = psutil.virtual_memory()
    ok = state.available >= LEAST_MEMORY
    advice = "" if ok else "close other programs: the notebooks want 2 GB of free memory"
    return Check(
        "memory", f"{state.total / 2**30:.1f} GB, {state.available / 2**30:.1f} GB available", ok, advice
    )


def disk_space() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    ok = free >= LEAST_DISK
    advice = "" if ok else "make room: trained modules and expert stores want 1 GB"
    return Check("disk space", f"{free / 2**30:.1f} GB free here", ok, advice)


def disk_reads() -> Check:
    """Read a fresh file past the page cache, as the expert loader does."""
    try:
        rate, way = _read_rate(64 << 20)
    except OSError as error:
        advice = "make room in the cache folder, or set M2R2KIT_CACHE to one that can be written"
        return Check("disk reads", f"not measured ({error.strerror or error})", False, advice)
    return Check("disk reads", f"{rate:.0f} MB/s ({way})", True, "", {"disk_read_mb_s": round(rate, 1)})


def _read_rate(size: int, chunk: int = 4 << 20) -> tuple[float, str]:
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(prefix="doctor-", dir=folder)
    try:
        block = os.urandom(chunk)  # a disk that compresses must not be flattered
        for _ in range(size // chunk):
            os.write(handle, block)
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        source, way = _open_uncached(path)
        buffer = mmap.mmap(-1, chunk)  # page-aligned, which direct reads ask for
        try:
            start = time.perf_counter()
            for offset in range(0, size, chunk):
                if os.preadv(source, [buffer], offset) != chunk:
                    raise OSError("a read came back short")
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


# --- compilers and the kernel --------------------------------------------------------------


def c_compiler() -> Check:
    if sys.platform == "darwin":
        return Check("C compiler", "not needed on macOS", True)
    path = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    advice = "" if path else "not needed, but with one, products with a single row are 1.4-3 times faster"
    return Check("C compiler", path or "none", True, advice)


def fused_kernels() -> Check:
    """On Linux `mx.compile` writes C++ and calls `g++`; without it the same code runs unfused."""
    if sys.platform == "darwin":
        return Check("fused kernels", "compiled by Metal", True)
    advice = "not needed, but with a working g++ MLX fuses small operations: decoding is faster"
    path = shutil.which("g++")
    if path is None:
        return Check("fused kernels", "no g++", True, advice)
    program = b"#include <cmath>\n#include <complex>\nfloat f(float x) { return std::exp(x); }\n"
    command = [path, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    try:
        works = subprocess.run(command, input=program, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        works = False
    return Check("fused kernels", path if works else f"{path} does not work", True, "" if works else advice)


def notebook_kernel() -> Check:
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        return Check("notebook kernel", "none", False, "run `python -m ipykernel install --sys-prefix`")
    return Check("notebook kernel", spec.display_name, True)
