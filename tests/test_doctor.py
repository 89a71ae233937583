"""What `m2r2kit doctor` prints, for people and for programs. No speed is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from m2r2kit import common as paths
from m2r2kit.cli import doctor
from m2r2kit.cli.doctor import places, tools
from m2r2kit.model.cpu import threads as runtime

NAMES = {
    "Python", "m2r2kit", "mlx", "mlx-lm", "numpy", "system", "MLX device", "BLAS", "products", "memory",
    "open files", "home folder", "cache folder", "kit folder", "disk space", "disk reads", "C compiler",
    "fused kernels", "notebook kernel",
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """All checks, run once; the disk check leaves nothing behind."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M2R2KIT_CACHE", str(cache))
        checks = doctor.checks()
    assert all(path.name.startswith("blas-") for path in cache.iterdir())  # the compiled library
    return checks


def test_every_check_is_there(found):
    assert {check.name for check in found} == NAMES


def test_a_check_that_is_not_ok_says_what_to_do(found):
    for check in found:
        assert check.value
        assert check.ok or check.advice, check
        assert "itself failed" not in check.advice, check


def test_products_are_measured(found):
    numbers = next(check for check in found if check.name == "products").numbers
    assert numbers.keys() == {"mlx_gflops", "numpy_gflops", "ratio"}
    assert all(value > 0 for value in numbers.values())
    assert numbers["ratio"] == pytest.approx(numbers["mlx_gflops"] / numbers["numpy_gflops"], rel=0.05)


def test_json(found, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "checks", lambda: found)
    code = doctor.run(SimpleNamespace(json=True))
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] == all(check.ok for check in found) == (code == 0)
    assert {"mlx_gflops", "numpy_gflops", "ratio", "disk_read_mb_s"} <= printed.keys()
    assert [check["name"] for check in printed["checks"]] == [check.name for check in found]
    assert all({"name", "value", "ok", "advice"} <= check.keys() for check in printed["checks"])


@pytest.mark.parametrize("ok, code, word", [(True, 0, "OK "), (False, 1, "FIX")])
def test_table(ok, code, word, monkeypatch, capsys):
    check = doctor.Check("thing", "broken", ok, "mend it")
    monkeypatch.setattr(doctor, "checks", lambda: [check])
    assert doctor.run(SimpleNamespace(json=False)) == code
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == f"{word}  thing  broken" and second.strip() == "-> mend it"


def test_a_broken_check_does_not_hide_the_others(monkeypatch):
    def memory():
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "memory", memory)
    monkeypatch.setattr(doctor, "products", lambda: doctor.Check("products", "", True))
    found = {check.name: check for check in doctor.checks()}
    assert found.keys() == NAMES
    assert not found["memory"].ok and "no such thing" in found["memory"].advice


def test_stock_blas_is_not_ok(monkeypatch):
    monkeypatch.setattr(runtime, "_state", runtime.BlasState("stock", "a reason"))
    check = doctor.blas()
    assert not check.ok and "a reason" in check.value and check.advice


@pytest.mark.parametrize("version, ok", [((3, 10, 9), False), ((3, 11, 0), True), ((3, 14, 0), False)])
def test_python_versions(version, ok, monkeypatch):
    monkeypatch.setattr(sys, "version_info", version)
    assert doctor.python().ok == ok


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
@pytest.mark.parametrize("glibc, ok", [("2.31", False), ("2.35", True), ("2.100", True), ("", False)])
def test_glibc(glibc, ok, monkeypatch):
    monkeypatch.setattr(doctor.platform, "libc_ver", lambda: ("glibc", glibc))
    assert doctor.system().ok == ok


def test_disk_without_a_place_to_write(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("M2R2KIT_CACHE", str(tmp_path / "file" / "cache"))
    assert paths.cache_dir() == tmp_path / "file" / "cache"
    check = doctor.disk_reads()
    assert not check.ok and "M2R2KIT_CACHE" in check.advice


# --- limits -------------------------------------------------------------------------------


def group(root, path, limit, used, idle=0, second=True):
    """A control group, as the kernel shows it in `sys/fs/cgroup`."""
    folder = root / "sys/fs/cgroup" / ("" if second else "memory") / path
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used)):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{'' if second else 'total_'}inactive_file {idle}\n")


@pytest.mark.parametrize(
    ("line", "groups", "expected"),
    [
        ("0::/", [("", 600, 200, 100, True)], (600, 500)),  # in a container: the mount is the group
        ("0::/a/b", [("a/b", "max", 50, 0, True), ("a", 700, 300, 0, True)], (700, 400)),  # the parent's
        ("0::/host/path", [("", 600, 700, 0, True)], (600, 0)),  # a path that is not there, and no room
        ("4:cpu,memory:/x", [("x", 500, 100, 50, False)], (500, 450)),
        ("4:memory:/x", [("x", 9223372036854771712, 100, 0, False)], None),  # how version 1 says: none
        ("0::/", [("", "max", 5, 0, True)], None),
        ("0::/", [], None),
        ("3:cpu:/x", [("x", 500, 100, 50, False)], None),
    ],
)
def test_memory_is_what_the_container_allows(line, groups, expected, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"9:name=systemd:/\n{line}\n")
    for path, *rest in groups:
        group(tmp_path, path, *rest)
    total, free = paths.memory_bytes(tmp_path)
    if expected is None:
        assert total == paths.machine_bytes() and 0 < free <= total
    else:
        assert (total, free) == expected


def test_a_machine_without_control_groups_has_its_own_memory(tmp_path):
    total, free = paths.memory_bytes(tmp_path)
    assert total == paths.machine_bytes() and 0 < free <= total


def test_a_small_container_is_named(monkeypatch):
    monkeypatch.setattr(places, "memory_bytes", lambda: (1 << 30, 1 << 29))
    check = doctor.memory()
    assert not check.ok and check.value.startswith("1.0 GB, 0.5 GB available (a limit of the container")
    assert "docker run --memory" in check.advice


def in_a_process(check, *before, prefix=(), **more):
    """What a check finds in a process of its own, after these lines: a line of `ok value | advice`."""
    lines = [*before, "from m2r2kit.cli import doctor", f"c = doctor.{check}()"]
    lines += ["print(c.ok, c.value, '|', c.advice)"]
    env = {**os.environ, **more}
    env = {name: value for name, value in env.items() if value is not None}
    command = [*prefix, sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("limit", "ok"), [(1024, False), (4096, True)])
def test_few_open_files_are_named(limit, ok):
    said = in_a_process(
        "open_files", f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, {limit}))"
    )
    assert said.startswith(f"{ok} at most {limit} |") and ("ulimit" in said) != ok


# --- folders ------------------------------------------------------------------------------

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
STRANGER = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups",
            "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # fmt: skip


def test_a_home_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert doctor.home_folder().ok
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    check = doctor.home_folder()
    assert "cannot be written" in check.value and "set HOME" in check.advice


@ROOT_ONLY
def test_a_user_without_a_home_is_told(tmp_path):
    cache = {"M2R2KIT_CACHE": str(tmp_path)}  # not what is looked at here
    said = in_a_process("home_folder", prefix=STRANGER, HOME=None, **cache)
    assert said.startswith("True none: HOME is not set") and "| set HOME" in said
    said = in_a_process("notebook_kernel", prefix=STRANGER, HOME=None, **cache)
    assert "no home folder" in said and "ci/kit.py lab" in said
    said = in_a_process("home_folder", prefix=STRANGER, HOME="/", **cache)
    assert said.startswith("True / cannot be written") and "| set HOME" in said


def test_a_cache_folder_of_my_own_is_right_and_one_open_to_others_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("M2R2KIT_CACHE", str(tmp_path / "cache"))
    assert doctor.cache_folder().ok and not (tmp_path / "cache").exists()
    (tmp_path / "cache").mkdir(mode=0o700)
    assert doctor.cache_folder().ok
    (tmp_path / "cache").chmod(0o777)
    check = doctor.cache_folder()
    assert not check.ok and "chmod go-w" in check.advice
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("M2R2KIT_CACHE", str(tmp_path / "file" / "cache"))
    check = doctor.cache_folder()
    assert not check.ok and "M2R2KIT_CACHE" in check.advice


@ROOT_ONLY
def test_a_cache_folder_of_another_user_is_named(tmp_path):
    (tmp_path / "cache").mkdir()
    said = in_a_process("cache_folder", prefix=STRANGER, M2R2KIT_CACHE=str(tmp_path / "cache"))
    assert said.startswith("False") and "belongs to another user | set M2R2KIT_CACHE" in said
    said = in_a_process("cache_folder", prefix=STRANGER, M2R2KIT_CACHE=str(tmp_path / "new"))
    assert said.startswith("False") and "cannot be written | set M2R2KIT_CACHE" in said


def test_a_read_only_kit_and_a_package_alone_are_told(monkeypatch, tmp_path):
    assert doctor.kit_folder().value == str(paths.ROOT)
    monkeypatch.setattr(places, "IN_PROJECT", False)
    assert "git clone" in doctor.kit_folder().advice
    monkeypatch.setattr(places, "IN_PROJECT", True)
    monkeypatch.setattr(places, "ROOT", tmp_path)
    (tmp_path / "notebooks").mkdir()  # and no data/results, which cannot be written therefore
    check = doctor.kit_folder()
    assert "data/results cannot be written" in check.value and "copy the folder" in check.advice


# --- compilers and kernels ----------------------------------------------------------------

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux's compilers")


@needs_linux
@pytest.mark.parametrize(("check", "name"), [(doctor.c_compiler, "cc"), (doctor.fused_kernels, "g++")])
def test_a_compiler_that_cannot_compile_is_named(check, name, monkeypatch, tmp_path):
    """It prints its version but cannot compile, like a compiler without headers."""
    script = '#!/bin/sh\ncase "$*" in --version) exit 0;; esac\necho "fatal error: cmath: none" >&2\nexit 1\n'
    (tmp_path / name).write_text(script)
    (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = check()
    assert not found.ok and "does not compile: fatal error: cmath" in found.value and "apt" in found.advice
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert check().ok and "not needed" in check().advice


@needs_linux
def test_kernels_that_were_cut_short_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder = tmp_path / "mlx" / mx.__version__ / "cpu"
    folder.mkdir(parents=True)
    (folder / "a.so").write_bytes(Path(mx.__file__).read_bytes())
    assert doctor.fused_kernels().ok
    (folder / "b.so").write_bytes(Path(mx.__file__).read_bytes()[:5000])
    assert doctor.fused_kernels().ok  # somebody may be writing it
    os.utime(folder / "b.so", (0, 0))
    check = doctor.fused_kernels()
    assert not check.ok and "1 damaged" in check.value and f"delete {folder}" in check.advice


def test_a_kernel_of_another_python_is_named(monkeypatch, tmp_path):
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    spec = {"argv": ["/opt/other/bin/python", "-m", "ipykernel_launcher"], "display_name": "Python 3"}
    (folder / "kernel.json").write_text(json.dumps(spec | {"language": "python"}))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    check = doctor.notebook_kernel()
    assert not check.ok and "starts /opt/other/bin/python" in check.value
    assert "JUPYTER_PREFER_ENV_PATH=1" in check.advice and str(folder) in check.advice
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    assert doctor.notebook_kernel().ok
    assert tools.starts_this_python(sys.executable) and tools.starts_this_python("python3")
    assert not tools.starts_this_python(os.path.realpath("/usr/bin/env"))
