"""ci/kit.py: what it refuses, and how it counts. Set-up itself is tested by being run."""

import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
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


# --- an environment that is not ours --------------------------------------------------------


@pytest.fixture
def other(modules, monkeypatch, tmp_path):
    """The modules, with a project folder of their own: what a set-up does there, it does nowhere else."""
    _, setup = modules
    (tmp_path / "pyproject.toml").write_text("")
    paths = {
        "ROOT": tmp_path,
        "VENV": tmp_path / ".venv",
        "VENV_PYTHON": tmp_path / ".venv" / "bin" / "python",
        "STAMP": tmp_path / ".venv" / "m2r2kit-stamp.json",
        "LOG": tmp_path / ".venv" / "m2r2kit-setup.log",
        "INSTALLED": tmp_path / ".venv" / "lib" / "python*" / "site-packages" / "*.dist-info",
    }
    for name, path in paths.items():
        monkeypatch.setattr(setup, name, str(path))
    return setup


def make_folder(folder):
    """A user's folder with a file in it."""
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")


def make_environment(folder):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)


@pytest.mark.parametrize("make", [make_folder, make_environment, lambda folder: folder.mkdir()])
def test_nothing_behind_a_link_is_deleted_or_installed_into(other, tmp_path, make):
    make(tmp_path / "mine")
    before = sorted(tmp_path.glob("mine/**/*"))
    (tmp_path / ".venv").symlink_to(tmp_path / "mine")
    with pytest.raises(other.SetupError, match=r"is a link to .*mine"):
        other.ensure()
    assert sorted(tmp_path.glob("mine/**/*")) == before


def test_a_link_to_the_kits_own_environment_is_used(other, tmp_path):
    """For example after moving `.venv` to a larger disk and leaving a link."""
    make_environment(tmp_path / ".venv")
    (tmp_path / ".venv" / "m2r2kit-stamp.json").write_text(json.dumps(other._wanted()))
    (tmp_path / ".venv").rename(tmp_path / "disk")
    (tmp_path / ".venv").symlink_to(tmp_path / "disk")
    other.ensure()
    assert other._sound()


def test_a_folder_that_set_up_did_not_make_is_not_emptied(other, tmp_path):
    make_folder(tmp_path / ".venv")
    with pytest.raises(other.SetupError, match="move it away"):
        other.ensure()
    assert (tmp_path / ".venv" / "thesis.txt").read_text() == "precious"


def test_a_file_in_place_of_the_environment_stays(other, tmp_path):
    (tmp_path / ".venv").write_text("precious")
    with pytest.raises(other.SetupError, match="move it away"):
        other.ensure()
    assert (tmp_path / ".venv").read_text() == "precious"


def test_a_making_that_was_cut_short_is_made_again(other, tmp_path):
    (tmp_path / ".venv" / "lib").mkdir(parents=True)  # nothing of anybody's in it
    other._refuse_to_empty()
    (tmp_path / ".venv" / "m2r2kit-setup.log").write_text("")
    (tmp_path / ".venv" / "half").write_text("")  # our own: the log says so
    other._refuse_to_empty()
    other._remove()
    assert not (tmp_path / ".venv").exists() and list(tmp_path.glob(".m2r2kit-*")) == []


def test_an_environment_without_pip_or_with_an_old_one_gets_another(other, tmp_path):
    make_environment(tmp_path / ".venv")
    old = next((tmp_path / ".venv" / "lib").glob("python*/site-packages")) / "pip"
    old.mkdir()
    (old / "__init__.py").write_text("__version__ = '20.0.2'\n")
    assert not other._sound()  # cut short: it is not described yet
    facts = {"METADATA": "Metadata-Version: 2.1\nName: pip\nVersion: 20.0.2\n", "INSTALLER": "pip\n"}
    facts["RECORD"] = "".join(f"{name},,\n" for name in ("pip/__init__.py", "pip-20.0.2.dist-info/RECORD"))
    (old.parent / "pip-20.0.2.dist-info").mkdir()
    for name, text in facts.items():
        (old.parent / "pip-20.0.2.dist-info" / name).write_text(text)
    assert other._sound()
    other._renew_pip()
    ask = "import pip; print(pip.__version__)"
    done = subprocess.run([other.VENV_PYTHON, "-c", ask], capture_output=True, text=True, check=True)
    assert tuple(int(n) for n in done.stdout.split(".")[:2]) >= other.OLDEST_PIP


def test_every_user_of_the_environment_gets_its_kernel(other, tmp_path):
    make_environment(tmp_path / ".venv")
    other._prefer_own_kernel()
    env = {name: value for name, value in os.environ.items() if name != "JUPYTER_PREFER_ENV_PATH"}
    ask = [other.VENV_PYTHON, "-c", "import os; print(os.environ['JUPYTER_PREFER_ENV_PATH'])"]
    assert subprocess.run(ask, capture_output=True, text=True, env=env).stdout == "1\n"
    env["JUPYTER_PREFER_ENV_PATH"] = "0"
    assert subprocess.run(ask, capture_output=True, text=True, env=env).stdout == "0\n"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    make_kit(tmp_path)
    tmp_path.chmod(0o555)
    command = [sys.executable, str(tmp_path / "ci" / "kit.py"), "lab"]
    if os.geteuid() == 0:  # root may write everywhere
        powers = [
            "--inh-caps=+dac_read_search",
            "--ambient-caps=+dac_read_search",
        ]
        command = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", *powers, *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    tmp_path.chmod(0o755)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot be written: let the owner" in done.stderr


# --- downloads ------------------------------------------------------------------------------


class Index(http.server.BaseHTTPRequestHandler):
    """A package index with one wheel, whose first `cut` downloads end early."""

    def do_GET(self):
        server = self.server
        if not self.path.endswith(".whl"):
            digest = hashlib.sha256(server.wheel).hexdigest()
            self.answer(
                f'<a href="/tiny-1.0-py3-none-any.whl#sha256={digest}">tiny</a>'.encode(), "text/html"
            )
            return
        server.downloads += 1
        short = server.downloads <= server.cut
        self.answer(server.wheel[: -40 * server.downloads] if short else server.wheel, "application/zip")

    def answer(self, content, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def index(other, tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as wheel:
        wheel.writestr("tiny.py", "x = 1\n" * 100)
        wheel.writestr(
            "tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    server.wheel, server.downloads, server.cut = content.getvalue(), 0, 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(other, "VENV_PYTHON", sys.executable)
    (tmp_path / ".venv").mkdir()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def install(setup, server, tmp_path, digest=None):
    """Install the server's package by its hash; returns the sentence of a failure."""
    digest = digest or hashlib.sha256(server.wheel).hexdigest()
    (tmp_path / "lock").write_text(f"tiny==1.0 --hash=sha256:{digest}\n")
    arguments = ["--target", str(tmp_path / "target"), "--require-hashes", "-r", str(tmp_path / "lock")]
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        setup._pip(arguments, folder, total=1)
    except setup.SetupError as error:
        return str(error)
    finally:
        os.close(folder)


def test_a_download_that_was_cut_is_tried_again(other, index, tmp_path):
    index.cut = 1
    assert install(other, index, tmp_path) is None
    assert (tmp_path / "target" / "tiny.py").exists() and index.downloads == 2


def test_a_download_that_is_cut_each_time_is_called_so(other, index, tmp_path):
    index.cut = 9
    assert "a download was cut short" in install(other, index, tmp_path)


def test_a_package_that_differs_is_called_so(other, index, tmp_path):
    assert "differs from the one in requirements.lock" in install(other, index, tmp_path, "0" * 64)


# --- as others start it ---------------------------------------------------------------------


def make_kit(folder):
    """What `ci/kit.py` needs before it sets anything up."""
    shutil.copytree(CI, folder / "ci", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(CI.parent / name, folder / name)


@pytest.mark.parametrize("more", [{"PYTHONSAFEPATH": "1"}, {"LANG": "C", "LC_ALL": "C"}, {"PYTHONUTF8": "0"}])
def test_other_environments(more, tmp_path):
    folder = tmp_path / "a folder with spaces, ü and 字"
    folder.mkdir()
    make_kit(folder)
    (folder / ".venv").write_text("in the way")  # so that it ends before it downloads
    command = [sys.executable, str(folder / "ci" / "kit.py"), "test"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **more}, timeout=120)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert b"move it away" in done.stderr and done.stdout.endswith(b"0 passed, 1 failed\n")


@pytest.mark.parametrize("home", [None, "/", "/nowhere/at/all", "relative"])
def test_a_home_that_cannot_be_written_gets_a_stand_in(modules, monkeypatch, tmp_path, home):
    kit, _ = modules
    monkeypatch.setattr(kit.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(kit.os, "access", lambda path, mode: os.path.exists(path) and path != "/")
    monkeypatch.setattr(kit.os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    folder = Path(kit.environment()["HOME"])
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    assert kit.environment()["HOME"] == str(folder)  # the same one the next time
    folder.chmod(0o777)
    assert kit.environment()["HOME"] != str(folder)  # anybody could have put something into it


CHILD = """\
import pathlib, sys, time
try:
    pathlib.Path(sys.argv[1]).write_text('begun')
    time.sleep(60)
finally:
    time.sleep(1)
    pathlib.Path(sys.argv[1]).write_text('cleaned up')
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stop_lets_a_step_clean_up(number, tmp_path):
    file = tmp_path / "file"
    program = (
        f"import sys; sys.path.insert(0, {str(CI)!r}); import kit\n"
        "kit.ensure = lambda: None\n"
        f"kit.lab = lambda _: kit.call([sys.executable, '-c', {CHILD!r}, {str(file)!r}])\n"
        "sys.exit(kit.main(['lab']))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "kit: stopped" in said
    assert file.read_text() == "cleaned up"
