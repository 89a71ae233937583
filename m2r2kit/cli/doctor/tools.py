"""Checks of compilers, of MLX's compiled kernels and of the notebook kernel."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ...model.cpu import threads
from .check import Check

SECONDS_TO_COMPILE = 300
C_PROGRAM = "#include <math.h>\nfloat f(float x) { return expf(x); }\n"
PROGRAM = """\
#include <cmath>
#include <complex>
extern "C" float f(float x) { return std::exp(x); }
"""


def c_compiler() -> Check:
    if sys.platform == "darwin":
        return Check("C compiler", "not needed on macOS", True)
    path = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if path is None:
        advice = "not needed, but with one, matrix-vector products are 1.4-3 times faster"
        return Check("C compiler", "none", True, advice)
    if reason := _cannot_compile([path, "-x", "c", "-"], C_PROGRAM):
        return Check("C compiler", f"{path} does not compile: {reason}", False, _reinstall("gcc libc6-dev"))
    return Check("C compiler", path, True)


def fused_kernels() -> Check:
    """On Linux `mx.compile` compiles C++ with `g++` and caches it; without `g++` nothing is fused."""
    if sys.platform == "darwin":
        return Check("fused kernels", "compiled by Metal", True)
    from ...model.cpu.kernels import is_whole_library, kernels_folder

    folder = kernels_folder()
    if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
        advice = "set TMPDIR to a folder of your own, so that MLX can cache its compiled kernels"
        return Check("fused kernels", f"{folder} belongs to another user", False, advice)
    if damaged := [file for file in folder.glob("*.so") if _is_old(file) and not is_whole_library(file)]:
        advice = f"delete {folder}; MLX compiles it again"
        return Check("fused kernels", f"{len(damaged)} damaged in {folder}", False, advice)
    path = shutil.which("g++")
    if path is None:
        advice = "not needed, but with g++ MLX fuses small operations and decodes faster"
        return Check("fused kernels", "no g++", True, advice)
    if reason := _cannot_compile([path, "-std=c++17", "-x", "c++", "-"], PROGRAM):
        return Check("fused kernels", f"{path} does not compile: {reason}", False, _reinstall("g++"))
    if reason := threads.unfused():
        return Check("fused kernels", f"none: {reason}", True, "not needed, but with them decoding is faster")
    return Check("fused kernels", path, True)


def _is_old(library: Path) -> bool:
    """Whether nobody writes this file any more, as far as its date tells."""
    try:
        return time.time() - library.stat().st_mtime > SECONDS_TO_COMPILE
    except OSError:
        return False  # deleted meanwhile


def _reinstall(packages: str) -> str:
    again = f"`apt install --reinstall {packages}`"
    return f"reinstall it (Debian and Ubuntu: {again}), or remove it from PATH"


def _cannot_compile(command: list[str], program: str) -> str:
    """Why a compiler cannot build a small shared library; empty if it can."""
    try:
        with tempfile.TemporaryDirectory(prefix="m2r2kit-") as folder:
            command = [*command, "-shared", "-fPIC", "-o", os.path.join(folder, "library.so")]
            done = subprocess.run(command, input=program.encode(), capture_output=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "it takes more than 60 s"
    except OSError as error:
        return error.strerror or str(error)
    if done.returncode == 0:
        return ""
    lines = done.stderr.decode(errors="replace").splitlines()
    lines = [line for line in lines if "error" in line.lower()] or lines
    return lines[0].strip()[:120] if lines else f"exit code {done.returncode}"


def notebook_kernel() -> Check:
    """Notebooks must start this Python, not another kernel of the same name."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except RuntimeError:
        advice = "`python3 ci/kit.py lab` uses another folder; Jupyter by itself does not"
        return Check("notebook kernel", "unknown, because there is no home folder", True, advice)
    except NoSuchKernel:
        return Check("notebook kernel", "none", False, "run `python -m ipykernel install --sys-prefix`")
    program = spec.argv[0] if spec.argv else ""
    if starts_this_python(program):
        return Check("notebook kernel", spec.display_name, True)
    advice = (
        f"set JUPYTER_PREFER_ENV_PATH=1 before JupyterLab starts (`python3 ci/kit.py lab` does), or delete "
        f"{spec.resource_dir}"
    )
    return Check("notebook kernel", f"'{spec.display_name}' starts {program or 'nothing'}", False, advice)


def starts_this_python(program: str) -> bool:
    """Whether a kernel's command, whose first word is `program`, starts this Python."""
    names = ("python", f"python{sys.version_info[0]}", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    if program in names:
        return True  # Jupyter replaces these with its own Python
    # the file's link is not followed: an environment's Python is a link to its base Python
    folder, name = os.path.split(os.path.abspath(program))
    return name in names and os.path.realpath(folder) == os.path.realpath(os.path.dirname(sys.executable))
