"""`m2r2kit doctor`: check this machine. Each check is OK, or says in one sentence what to do.

It takes a few seconds, most of them to measure the speed of matrix products and of the disk.
"""

import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict
from importlib import metadata

import numpy as np

from ... import __version__
from ...model.cpu import threads as runtime
from .check import Check
from .places import cache_folder, disk_reads, disk_space, home_folder, kit_folder, memory, open_files
from .tools import c_compiler, fused_kernels, notebook_kernel

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
OLDEST_GLIBC, OLDEST_MACOS = (2, 35), (14, 0)
LEAST_RATIO = 0.7  # speed of MLX's products over NumPy's


def checks() -> list[Check]:
    """All checks, in the order of the table. Takes a few seconds; never raises."""
    found = []
    for check in (
        python, packages, system, device, blas, products,
        memory, open_files, home_folder, cache_folder, kit_folder, disk_space, disk_reads,
        c_compiler, fused_kernels, notebook_kernel,
    ):  # fmt: skip
        try:
            result = check()
        except ImportError as error:
            sentence = "run `python3 ci/kit.py lab`, which installs what is missing"
            result = Check(check.__name__.replace("_", " "), str(error), False, sentence)
        except Exception as error:  # one broken check must not hide the others
            sentence = f"this check itself failed ({type(error).__name__}: {error}); please report it"
            result = Check(check.__name__.replace("_", " "), "unknown", False, sentence)
        found += result if isinstance(result, list) else [result]
    return found


def arguments(parser):
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args) -> int:
    """Print the checks; returns 0, or 1 if one is not OK."""
    found = checks()
    ok = all(check.ok for check in found)
    if args.json:
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
    advice = "" if ok else "install Python 3.11, 3.12 or 3.13"
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
    advice = "products are 50-90 times slower than they could be; run `pip install scipy-openblas32`"
    if os.environ.get("M2R2KIT_BLAS") == "stock":
        advice = "products are 50-90 times slower than they could be; unset M2R2KIT_BLAS"
    return Check("BLAS", f"stock: {state.detail}", False, advice)


def products() -> Check:
    """Speed of float32 products (512, 1024) @ (1024, 1024) in MLX on the CPU and in NumPy.

    The two alternate with pauses: after a product, the threads of its BLAS spin for a while and would slow
    down the other.
    """
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
            product()  # wakes up the threads; not measured
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
