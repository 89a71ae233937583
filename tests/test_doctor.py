"""What `m2r2kit doctor` prints, for people and for programs. No speed is asserted."""

import json
import sys

import pytest

from m2r2kit import common as paths
from m2r2kit.cli import doctor
from m2r2kit.model.cpu import threads as runtime

NAMES = {
    "Python", "m2r2kit", "mlx", "mlx-lm", "numpy", "system", "MLX device", "BLAS", "products", "memory",
    "disk space", "disk reads", "C compiler", "fused kernels", "notebook kernel",
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """All checks, run once; the disk check leaves nothing behind."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M2R2KIT_CACHE", str(cache))
        checks = doctor.checks()
    assert list(cache.iterdir()) == []
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
    code = doctor.run(as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] == all(check.ok for check in found) == (code == 0)
    assert {"mlx_gflops", "numpy_gflops", "ratio", "disk_read_mb_s"} <= printed.keys()
    assert [check["name"] for check in printed["checks"]] == [check.name for check in found]
    assert all({"name", "value", "ok", "advice"} <= check.keys() for check in printed["checks"])


@pytest.mark.parametrize("ok, code, word", [(True, 0, "OK "), (False, 1, "FIX")])
def test_table(ok, code, word, monkeypatch, capsys):
    check = doctor.Check("thing", "broken", ok, "mend it")
    monkeypatch.setattr(doctor, "checks", lambda: [check])
    assert doctor.run(as_json=False) == code
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
