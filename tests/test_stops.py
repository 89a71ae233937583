"""A stopped command leaves nothing behind: no process, no temporary or connection file."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def start(program: str, folder: Path, **more) -> subprocess.Popen:
    """Python, with its temporary and runtime files in a folder of its own."""
    runtime = {name: str(folder / name) for name in ("TMPDIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    for path in runtime.values():
        Path(path).mkdir()
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, env={**os.environ, **runtime}, stderr=subprocess.PIPE, text=True, **more)


def wait_for(file: Path, process: subprocess.Popen) -> None:
    while not file.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


def is_over(number: int) -> bool:
    """Whether a process has ended within some seconds."""
    end = time.monotonic() + 20
    while psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_stopped_run_of_notebooks_leaves_nothing(number, tmp_path):
    folder, told = tmp_path / "notebooks", tmp_path / "told"
    folder.mkdir()
    source = f"import os, time\nopen({str(told)!r} + '.tmp', 'w').write(str(os.getpid()))\n"
    source += f"os.rename({str(told)!r} + '.tmp', {str(told)!r})\ntime.sleep(100)"
    nbformat.write(new_notebook(cells=[new_code_cell(source)]), folder / "00_slow.ipynb")
    process = start(
        "import sys\nfrom pathlib import Path\n"
        "from m2r2kit.cli import notebooks\nimport m2r2kit.__main__ as m\n"
        f"notebooks.FOLDER = Path({str(folder)!r})\nsys.exit(m.main(['notebooks', 'run']))",
        tmp_path,
    )
    wait_for(told, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 128 + number and said.strip().endswith("nothing half-written is left")
    assert "Traceback" not in said
    assert is_over(int(told.read_text()))
    assert list((tmp_path / "TMPDIR").glob("m2r2kit-*")) == []
    assert list((tmp_path / "JUPYTER_RUNTIME_DIR").iterdir()) == []


STEP = """\
import sys
import m2r2kit.__main__ as m
from m2r2kit.cli import doctor
from m2r2kit.common import whole
from pathlib import Path
import time

def run(args):
    with whole({out!r}) as new:
        new.mkdir()
        (new / "half").write_text("half")
        Path({told!r}).write_text("")
        time.sleep(100)

doctor.run = run
sys.exit(m.main(["doctor"]))
"""


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_what_was_half_written_goes(number, tmp_path):
    out, told = tmp_path / "out" / "store", tmp_path / "told"
    process = start(STEP.format(out=str(out), told=str(told)), tmp_path)
    wait_for(told, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in said
    assert not out.parent.exists()


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """As under `nohup`."""
    out, told = tmp_path / "store", tmp_path / "told"
    program = STEP.format(out=str(out), told=str(told)).replace("sleep(100)", "sleep(3)")
    process = start("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + program, tmp_path)
    wait_for(told, process)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert (out / "half").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name)
def test_processes_that_train_together_end_with_the_one_that_launched_them(number, tmp_path):
    child = (
        "import os, time\n"
        f"file = os.path.join({str(tmp_path)!r}, os.environ['MLX_RANK'])\n"
        "open(file + '.tmp', 'w').write(str(os.getpid()))\n"
        "os.rename(file + '.tmp', file)\n"
        "time.sleep(100)"
    )
    (tmp_path / "child.py").write_text(child)
    (tmp_path / "python").write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path / 'child.py'}\n")
    (tmp_path / "python").chmod(0o755)
    program = (
        "import sys\nfrom m2r2kit.model.cpu import parallel\n"
        f"sys.executable = {str(tmp_path / 'python')!r}\nsys.exit(parallel.launch(2, []))"
    )
    process = start(program, tmp_path)
    for rank in "01":
        wait_for(tmp_path / rank, process)
    process.send_signal(number)
    process.communicate(timeout=60)
    for rank in "01":
        assert is_over(int((tmp_path / rank).read_text()))
