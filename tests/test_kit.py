"""ci/kit.py: what it refuses, and how it counts. Set-up itself is tested by being run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CI = Path(__file__).resolve().parent.parent / "ci"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(CI))
    import kit
    import setup_venv

    return kit, setup_venv


@pytest.mark.parametrize(
    "system, machine, detail, sentence",
    [
        ("Linux", "x86_64", "glibc 2.31", "glibc 2.35"),
        ("Linux", "riscv64", "glibc 2.39", "riscv64"),
        ("Linux", "x86_64", "", "musl"),
        ("Darwin", "x86_64", "15.1", "Apple silicon"),
        ("Darwin", "arm64", "13.6", "macOS 14"),
        ("Windows", "AMD64", "", "WSL"),
    ],
)
def test_machines_that_cannot_run_it(modules, monkeypatch, system, machine, detail, sentence):
    _, setup = modules
    monkeypatch.setattr(setup.platform, "system", lambda: system)
    monkeypatch.setattr(setup.platform, "machine", lambda: machine)
    monkeypatch.setattr(setup.platform, "mac_ver", lambda: (detail, ("", "", ""), machine))
    monkeypatch.setattr(setup.os, "confstr", lambda name: detail)
    with pytest.raises(setup.SetupError, match=sentence):
        setup.check_machine()


@pytest.mark.parametrize(
    "output, sentence",
    [
        (
            "WARNING: Retrying (Retry(total=4, connect=None)) after connection broken by x",
            "cannot be reached",
        ),
        ("ERROR: Could not install: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "refused"),
        ("ERROR: first\nERROR: No matching distribution found for x", "No matching distribution found for x"),
    ],
)
def test_reasons_in_one_sentence(modules, output, sentence):
    _, setup = modules
    reason = setup._reason(output)
    assert sentence in reason and "\n" not in reason


def test_no_other_python(modules, monkeypatch):
    _, setup = modules
    monkeypatch.setattr(setup, "_supported", lambda python: False)
    with pytest.raises(setup.SetupError, match=r"install Python 3\.11, 3\.12 or 3\.13"):
        setup.find_python()


def test_a_stamp_of_another_lock_or_folder_does_not_count(modules, monkeypatch, tmp_path):
    _, setup = modules
    monkeypatch.setattr(setup, "STAMP", str(tmp_path / "stamp.json"))
    monkeypatch.setattr(setup, "VENV_PYTHON", sys.executable)
    assert setup._stamp() is None
    (tmp_path / "stamp.json").write_text("{half a stam")
    assert setup._stamp() is None
    (tmp_path / "stamp.json").write_text(json.dumps(setup._wanted()))
    assert setup._stamp() == setup._wanted()
    (tmp_path / "stamp.json").write_text(json.dumps(setup._wanted() | {"folder": "/elsewhere"}))
    assert setup._stamp() != setup._wanted()
    monkeypatch.setattr(setup, "VENV_PYTHON", str(tmp_path / "gone"))
    assert setup._stamp() is None


@pytest.mark.parametrize(
    "steps, last, code",
    [
        ([(0, 0), (12, 0), (5, 0)], "17 passed, 0 failed", 0),
        ([(0, 1), (12, 0), (5, 0)], "17 passed, 1 failed", 1),
        ([(0, 0), (11, 1), (4, 1)], "15 passed, 2 failed", 1),
        ([(0, 0), (0, 0), (0, 0)], "0 passed, 0 failed", 1),
    ],
)
def test_the_last_line(modules, monkeypatch, capsys, steps, last, code):
    kit, _ = modules
    for name, result in zip(("lint", "unit_tests", "notebooks"), steps):
        monkeypatch.setattr(kit, name, lambda env, result=result: result)
    assert kit.test() == code
    assert capsys.readouterr().out.splitlines()[-1] == last


@pytest.mark.parametrize(
    "program, counts",
    [
        ("print('notebooks: 5 passed, 0 failed')", (5, 0)),
        ("import sys; print('4 passed, 1 failed'); sys.exit(1)", (4, 1)),
        ("import sys; sys.exit('broke down')", (0, 1)),
    ],
)
def test_notebook_counts(modules, monkeypatch, program, counts):
    kit, _ = modules
    monkeypatch.setattr(kit, "kit", lambda *arguments: [sys.executable, "-c", program])
    assert kit.notebooks(kit.environment()) == counts


def test_bad_arguments():
    for arguments in ([], ["labs"], ["test", "extra"]):
        command = [sys.executable, str(CI / "kit.py"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 2 and result.stderr and "Traceback" not in result.stderr
