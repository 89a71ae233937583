"""Make `.venv` in the project's folder and install the locked packages into it.

`ensure()` does nothing if the stamp in `.venv` matches the current lock file; the stamp is
written last. An unfinished or outdated environment is updated. One with a half-copied
package or without a working Python is made again (pip keeps its downloads). Only an
environment that this set-up made is ever deleted; another one is used or refused.

It uses pip, because pip reads the user's configuration (index mirrors, proxies,
certificates). Measured on two busy cores: 80 s with an empty cache; uv takes 20 s, but does
not read pip's configuration.
"""

import errno
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time

try:
    import fcntl
except ImportError:  # Windows, which check_machine refuses
    fcntl = None

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
VENV = os.path.join(ROOT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
LOCK = os.path.join(ROOT, "requirements.lock")
STAMP = os.path.join(VENV, "m2r2kit-stamp.json")
INSTALLED = os.path.join(glob.escape(VENV), "lib", "python*", "site-packages", "*.dist-info")
LOG = os.path.join(VENV, "m2r2kit-setup.log")
OLDEST, NEWEST = (3, 11), (3, 13)
OLDEST_PIP = (21, 3)  # the oldest with editable installs without setup.py
NEEDED_BYTES = 2 << 30  # 0.7 GB installed, as much again for temporary files, and a margin


class SetupError(Exception):
    """The machine cannot be set up; the message is one sentence for the user."""


# --- requirements ---------------------------------------------------------------------------


def check_machine():
    """Refuse an unsupported machine before anything is downloaded.

    Raises:
        SetupError: MLX has no packages for this machine.
    """
    system, machine = platform.system(), platform.machine()
    if system == "Darwin":
        if machine != "arm64":
            raise SetupError(
                "MLX needs a Mac with Apple silicon and an arm64 Python; this Python is for Intel."
            )
        if int(platform.mac_ver()[0].split(".")[0] or 0) < 14:
            raise SetupError(f"MLX needs macOS 14 or newer; this is {platform.mac_ver()[0]}.")
    elif system == "Linux":
        if machine not in ("x86_64", "aarch64", "arm64"):
            raise SetupError(f"MLX has no packages for Linux on {machine}, only for x86-64 and arm64.")
        try:
            glibc = os.confstr("CS_GNU_LIBC_VERSION").split()[-1]
        except (ValueError, OSError, AttributeError, IndexError):
            raise SetupError("MLX needs a Linux with glibc (Debian 12+, Ubuntu 22.04+), not musl.") from None
        if tuple(int(part) for part in glibc.split(".")[:2]) < (2, 35):
            raise SetupError(f"MLX needs glibc 2.35 or newer (Debian 12+, Ubuntu 22.04+); this is {glibc}.")
    else:
        raise SetupError(f"this kit runs on Linux and macOS; on {system} use WSL 2.")


def find_python():
    """A supported Python that can make virtual environments; this one is preferred."""
    names = [f"python3.{minor}" for minor in range(NEWEST[1], OLDEST[1] - 1, -1)] + ["python3"]
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    folders += ["/opt/homebrew/bin", "/usr/local/bin", "/usr/bin", os.path.expanduser("~/.local/bin")]
    candidates = [sys.executable] + [os.path.join(folder, name) for name in names for folder in folders]
    candidates += sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.1[123].*/bin/python3")))
    without_ensurepip = None  # Debian splits it off into python3-venv
    for candidate in dict.fromkeys(candidates):
        if not candidate or not os.access(candidate, os.X_OK):
            continue
        if not _supported(candidate):
            continue
        if _runs([candidate, "-c", "import venv, ensurepip"]):
            return candidate
        without_ensurepip = without_ensurepip or candidate
    if without_ensurepip is not None:
        if _runs([without_ensurepip, "-c", "import venv, pip"]):
            return without_ensurepip
        raise SetupError(
            f"{without_ensurepip} cannot make virtual environments; install its venv package "
            "(Debian and Ubuntu: python3-venv), or put another Python 3.11-3.13 on PATH."
        )
    raise SetupError(
        f"Python {platform.python_version()} is not supported, and no other was found; install Python 3.11, "
        "3.12 or 3.13."
    )


def _supported(python):
    """Whether an interpreter starts (pyenv's shims may not) and has a supported version."""
    test = f"import sys; sys.exit(not {OLDEST} <= sys.version_info[:2] <= {NEWEST})"
    return _runs([python, "-c", test])


def _runs(command):
    try:
        return (
            subprocess.call(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=60,
            )
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


# --- the environment ------------------------------------------------------------------------


def ensure():
    """Make or update `.venv` according to the lock file; quick if it is up to date.

    Raises:
        SetupError: it is not possible (the cause, and what to do).
    """
    check_machine()
    if _stamp() == _wanted():
        return
    try:
        _ensure_alone()
    except PermissionError as error:
        raise SetupError(_unwritable(error.filename or VENV)) from None
    except OSError as error:
        if error.errno == errno.EROFS:
            raise SetupError(_unwritable(error.filename or VENV)) from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SetupError("the disk is full; free 2 GB and run the same command again.") from None
        where = f" ({error.filename})" if error.filename else ""
        raise SetupError(f"the set-up fails: {error.strerror or error}{where}.") from None


def _unwritable(path):
    return (
        f"set-up writes into {VENV}, and {path} cannot be written: let the owner of this folder run the "
        "command once (afterwards it may be read-only), or copy the folder to a place of your own."
    )


def _ensure_alone():
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("Another set-up of this folder is running; waiting for it.", flush=True)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
            except OSError:
                pass  # some network folders have no locks; continue without
        if _stamp() != _wanted():
            _make(folder)
    finally:
        os.close(folder)


def _wanted():
    digest = hashlib.sha256()
    for path in (LOCK, os.path.join(ROOT, "pyproject.toml"), os.path.realpath(__file__)):
        with open(path, "rb") as file:
            digest.update(file.read())
    # the path, because a virtual environment does not work after its folder is moved
    return {"sha256": digest.hexdigest(), "folder": ROOT}


def _stamp():
    """The stamp of `.venv`, or None if it is missing, unfinished or broken."""
    try:
        with open(STAMP, encoding="utf-8") as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return None
    return stamp if _supported(VENV_PYTHON) else None


def _make(folder):
    started = time.monotonic()
    if not _sound():
        _refuse_to_empty()
        if not os.access(VENV if os.path.exists(VENV) else ROOT, os.W_OK):
            raise SetupError(_unwritable(VENV if os.path.exists(VENV) else ROOT))
        if shutil.disk_usage(ROOT).free < NEEDED_BYTES:
            raise SetupError(f"the packages need 2 GB of free disk space in {ROOT}; free some space.")
        python = find_python()
        print(f"Making .venv with {python} ...", flush=True)
        _make_empty(python)
    if os.path.exists(STAMP):
        os.remove(STAMP)
    _renew_pip()

    arguments = ["--no-compile", "--only-binary", ":all:", "--require-hashes", "-r", LOCK]
    _pip(arguments, folder, total=_locked_packages())
    _pip(["--no-deps", "--no-build-isolation", "-e", ROOT], folder, total=1)
    _quiet_jupyterlab()
    _prefer_own_kernel()

    with open(STAMP + ".tmp", "w", encoding="utf-8") as file:
        json.dump(_wanted(), file)
    os.replace(STAMP + ".tmp", STAMP)
    print(f"Set-up took {time.monotonic() - started:.0f} s.", flush=True)


def _remove():
    """Rename `.venv`, then delete it, so that an interruption never leaves a half-deleted `.venv`."""
    for old in glob.glob(os.path.join(glob.escape(ROOT), ".m2r2kit-old-venv-*")):
        shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(VENV):
        old = os.path.join(ROOT, f".m2r2kit-old-venv-{os.getpid()}")
        os.rename(VENV, old)
        shutil.rmtree(old, ignore_errors=True)


def _make_empty(python):
    _remove()
    if _runs([python, "-c", "import ensurepip"]):
        commands = [[python, "-m", "venv", "--clear", VENV]]
    else:  # without ensurepip, this Python's pip installs pip into it
        commands = [
            [python, "-m", "venv", "--clear", "--without-pip", VENV],
            [python, "-m", "pip", "--python", VENV_PYTHON, "install", "pip"],
        ]
    for command in commands:
        # in its own process group: venv starts another Python, which must stop too after an interrupt
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            output, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if process.returncode != 0:
            lines = output.decode(errors="replace").strip().splitlines() or ["no reason given"]
            raise SetupError(f".venv cannot be made: {lines[-1]}")


def _sound():
    """Whether pip can install into `.venv`: its Python works, and no package is half copied."""
    if not _supported(VENV_PYTHON):
        return False
    if os.path.islink(VENV) and not _ours():
        return False  # a link to another environment, which is not changed
    # pip writes INSTALLER after all other files of a package
    if not all(os.path.exists(os.path.join(folder, "INSTALLER")) for folder in glob.glob(INSTALLED)):
        return False
    # pip itself may be cut short before its dist-info exists
    for folder in glob.glob(os.path.dirname(INSTALLED)):
        described = glob.glob(os.path.join(glob.escape(folder), "pip-*.dist-info"))
        if os.path.isdir(os.path.join(folder, "pip")) and not described:
            return False
    # the command that made it ends with its folder; a moved or copied .venv does not work
    made = _made_by()
    return made is not None and (not made or made.endswith(VENV))


def _made_by():
    """The command that made `.venv`; empty if unknown, None if `.venv` is not an environment."""
    try:
        with open(os.path.join(VENV, "pyvenv.cfg"), encoding="utf-8", errors="replace") as file:
            command = re.search(r"^command = .*$", file.read(), re.MULTILINE)
    except OSError:
        return None
    return command.group() if command else ""


def _ours():
    """Whether this set-up made `.venv` or has installed into it."""
    return any(os.path.exists(path) for path in (STAMP, LOG)) or "-m venv --clear" in (_made_by() or "")


def _refuse_to_empty():
    """Refuse to delete an unusable `.venv` that this set-up did not make, unless it has no files."""
    if os.path.islink(VENV):
        raise SetupError(
            f"{VENV} is a link to {os.path.realpath(VENV)}, which is not this kit's environment; remove the "
            "link and run the same command again."
        )
    if not os.path.lexists(VENV) or _ours():
        return
    if not os.path.isdir(VENV) or any(files for _, _, files in os.walk(VENV)):
        raise SetupError(
            f"{VENV} is not a usable environment, and was not made by this set-up; move it away and run the "
            "same command again."
        )


def _renew_pip():
    """Replace a missing or old pip by Python's bundled pip, or else by the newest."""
    version = "tuple(int(n) for n in pip.__version__.split('.')[:2])"
    ask = f"import sys, pip; sys.exit({version} < {OLDEST_PIP})"
    if _runs([VENV_PYTHON, "-c", ask]):
        return
    _runs([VENV_PYTHON, "-m", "ensurepip", "--upgrade"])
    if not _runs([VENV_PYTHON, "-c", ask]):
        _runs([VENV_PYTHON, "-m", "pip", "install", "--upgrade", "pip"])
    if not _runs([VENV_PYTHON, "-c", ask]):
        raise SetupError(
            "the pip in .venv is missing or too old and cannot be upgraded; move .venv away and run the same "
            "command again."
        )


def _quiet_jupyterlab():
    """Turn off JupyterLab's questions about news and updates."""
    settings = os.path.join(VENV, "share", "jupyter", "lab", "settings")
    os.makedirs(settings, exist_ok=True)
    quiet = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
    path = os.path.join(settings, "overrides.json")
    if not os.path.exists(path):  # keep existing settings
        with open(path, "w", encoding="utf-8") as file:
            json.dump(quiet, file)


def _prefer_own_kernel():
    """Let notebooks start this environment's Python, even if the user has a kernel of the same name.

    Jupyter prefers the environment's kernels only for its owner; this extends it to all users.
    A variable that the user sets has priority.
    """
    line = "import os; os.environ.setdefault('JUPYTER_PREFER_ENV_PATH', '1')\n"
    for folder in glob.glob(os.path.dirname(INSTALLED)):
        with open(os.path.join(folder, "m2r2kit_jupyter.pth"), "w", encoding="utf-8") as file:
            file.write(line)


# --- pip, with progress ---------------------------------------------------------------------


def _locked_packages():
    """The number of locked packages for this machine, according to pip's own parser."""
    count = (
        "import sys; from pip._vendor.packaging.requirements import Requirement\n"
        "lines = [l.split(' \\\\')[0] for l in open(sys.argv[1]) if l[0].isalnum()]\n"
        "markers = [Requirement(l).marker for l in lines]\n"
        "print(sum(m is None or m.evaluate() for m in markers))"
    )
    result = subprocess.run(
        [VENV_PYTHON, "-c", count, LOCK], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return int(result.stdout) if result.returncode == 0 else 0


def _pip(arguments, folder, total):
    """Install with pip; if a hash is wrong, try once more.

    A download that was cut short has another hash each time; a package that differs has the same one.
    """
    text = _pip_once(arguments, folder, total)
    if text is None:
        return
    before = _wrong_hashes(text)
    if before:
        print("A package has another hash than the locked one; downloading it again.", flush=True)
        text = _pip_once(arguments, folder, total)
        if text is None:
            return
    raise SetupError(_reason(text, before))


def _pip_once(arguments, folder, total):
    """Run pip; returns its output if it failed, else None."""
    env = dict(os.environ, PIP_USER="0", PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    for name in ("PYTHONHOME", "PYTHONPATH", "PYTHONSAFEPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"):
        env.pop(name, None)
    with open(LOG, "ab") as log:
        log_start = log.tell()
        # pip inherits the lock on the folder, so it is held until pip ends even if this process is killed
        process = subprocess.Popen(
            [VENV_PYTHON, "-u", "-m", "pip", "install", *arguments],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(folder,),
        )
        try:
            _show_progress(process, log_start, total)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return _read_log(log_start) if process.returncode != 0 else None


def _show_progress(process, log_start, total):
    """Show progress: one line that is updated on a terminal, or a new line every 10 s."""
    started, shown = time.monotonic(), 0.0
    on_terminal = sys.stdout.isatty()
    while process.poll() is None:
        time.sleep(0.25)
        now = time.monotonic()
        if now - shown < (0.25 if on_terminal else 10):
            continue
        shown = now
        text = _read_log(log_start)
        found = len(re.findall(r"^(?:Collecting|Requirement already satisfied:) ", text, re.MULTILINE))
        if "Installing collected packages" in text:
            what, done = "installing", len(glob.glob(INSTALLED))
        else:
            what, done = "downloading", found
        if "Retrying (" in text[-600:]:
            what = "the package index does not answer, retrying"
        done = min(done, total)
        bar = ("#" * (24 * done // max(1, total))).ljust(24, ".")
        line = f"[{bar}] {done}/{total} packages, {now - started:3.0f} s, {what}"
        print(f"\r{line[:100]:<100}" if on_terminal else line, end="" if on_terminal else "\n", flush=True)
    if on_terminal and shown:
        print("\r" + " " * 100 + "\r", end="", flush=True)


def _read_log(start):
    with open(LOG, "rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def _wrong_hashes(text):
    """The hashes of downloads that differ from the locked ones."""
    if "DO NOT MATCH THE HASHES" not in text:
        return set()
    return set(re.findall(r"^\s+Got\s+([0-9a-f]{64})", text, re.MULTILINE))


def _reason(text, before=frozenset()):
    """pip's failure as one sentence.

    Args:
        text: pip's output.
        before: wrong hashes of the first try.
    """
    where = f"the complete output is in {os.path.relpath(LOG, ROOT)}"
    cut = f"a download was cut short; check the network and run the same command again ({where})."
    if re.search(r"No space left on device|Errno 28|Disk quota exceeded", text):
        return "the disk is full; free 2 GB and run the same command again."
    if re.search(r"Permission denied|Errno 13|Read-only file system|Errno 30", text):
        return f"pip cannot write its files; {_unwritable(os.path.join(VENV, 'lib'))}"
    if re.search(r"IncompleteRead|[Ii]ncomplete.?[Dd]ownload|not enough bytes were received"
                 r"|Connection broken", text):  # fmt: skip
        return cut
    if re.search(r"Failed to establish a new connection|name resolution|timed out|Connection refused"
                 r"|Retrying \(|ProxyError|SSLError|Network is unreachable", text):  # fmt: skip
        return (
            "the package index cannot be reached; check the network (or pip's index and proxy "
            f"settings) and run the same command again ({where})."
        )
    if "DO NOT MATCH THE HASHES" in text:
        if before and not before & _wrong_hashes(text):
            return cut
        return f"a package differs from the one in requirements.lock, so it was refused ({where})."
    errors = re.findall(r"^ERROR: (.*)$", text, re.MULTILINE)
    return f"pip could not install the packages: {errors[-1] if errors else 'no reason given'} ({where})."
