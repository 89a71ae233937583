"""MLX's compiled kernels: written completely or not at all, where no other user can write."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

if sys.platform == "linux":
    from m2r2kit.model.cpu.kernels import is_whole_library, remove_damaged

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="MLX compiles kernels with g++ on Linux only"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]

COMPUTE = """
import json, os, sys
import mlx.core as mx
from m2r2kit.model.cpu import threads as runtime
reason = runtime.unfused()
f = mx.compile(lambda x: mx.exp(x) * 2 + x / 3)
value = f(mx.array([0.0], dtype=mx.float32)).item()
print(json.dumps([value, reason, os.environ.get("TMPDIR")]))
"""


def compute(tmp, path=None):
    """A compiled function in a process of its own: (value, why it was not fused, TMPDIR there)."""
    env = {k: v for k, v in os.environ.items() if k != "MLX_DISABLE_COMPILE"}
    env |= {"TMPDIR": str(tmp), "PATH": f"{path}:{env['PATH']}" if path else env["PATH"]}
    run = subprocess.run(
        [sys.executable, "-c", COMPUTE], env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def kernels(tmp):
    return sorted(tmp.glob("**/*.so"))


def test_they_are_made_in_the_folder_for_temporary_files(tmp_path):
    assert compute(tmp_path) == [2.0, "", str(tmp_path)]
    assert kernels(tmp_path)
    assert all(p.stat().st_mode & 0o022 == 0 for p in (tmp_path / "mlx").glob("**/cpu"))


def test_those_that_were_cut_short_are_made_again(tmp_path):
    compute(tmp_path)
    sizes = {path: path.stat().st_size for path in kernels(tmp_path)}
    for i, path in enumerate(sizes):
        os.truncate(path, (100, 0)[i % 2])
    assert compute(tmp_path)[:2] == [2.0, ""]
    assert {path: path.stat().st_size for path in kernels(tmp_path)} == sizes


@pytest.mark.parametrize("length", [0, 3, 63, 100, 5000, -1])
def test_a_library_that_was_cut_short_is_not_whole(length, tmp_path):
    whole = Path(mx.__file__).read_bytes()
    (tmp_path / "a.so").write_bytes(whole)
    assert is_whole_library(tmp_path / "a.so")
    (tmp_path / "a.so").write_bytes(whole[:length])
    assert not is_whole_library(tmp_path / "a.so")


def test_one_that_is_being_written_is_left(tmp_path):
    half = tmp_path / "half.so"
    with half.open("wb") as file:
        file.write(b"\x7fELF")
        file.flush()
        remove_damaged(half)
        assert half.exists()
    remove_damaged(half)
    assert not half.exists()


@pytest.mark.parametrize("part", ["mlx", "mlx/{}", "mlx/{}/cpu"])
def test_in_a_folder_that_others_may_write_to_nothing_is_made_or_loaded(part, tmp_path):
    folder = tmp_path / part.format(mx.__version__)
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    value, reason, tmp = compute(tmp_path)
    assert (value, reason) == (2.0, "") and tmp == str(tmp_path / f"m2r2kit-{os.getuid()}")
    assert not list((tmp_path / "mlx").glob("**/*.so")) and kernels(tmp_path / tmp)
    assert (tmp_path / tmp).stat().st_mode & 0o777 == 0o700


def test_without_a_working_compiler_mlx_computes_unfused(tmp_path):
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin" / "g++"
    compiler.write_text("#!/bin/sh\ncase $1 in --version) exit 0; esac\necho no cmath >&2\nexit 1\n")
    compiler.chmod(0o755)
    value, reason, _ = compute(tmp_path, tmp_path / "bin")
    assert value == 2.0 and reason == f"{compiler} does not work"
    assert not kernels(tmp_path)
