#!/usr/bin/env python3
"""The two commands of this project, for a machine with Python 3.11 or newer and nothing else:

    python3 ci/kit.py lab               set up, then open JupyterLab on the first notebook
    python3 ci/kit.py lab --headless    set up, execute the notebooks, print the table
    python3 ci/kit.py test              set up, then lint, unit tests and notebook checks

Arguments after `lab` are passed to JupyterLab (`--no-browser --port 8899`), or with
`--headless` to `m2r2kit notebooks run` (names of notebooks).

It uses only the standard library and the syntax of Python 3.7, so that an old Python
prints a message and not a syntax error. The set-up is in ci/setup_venv.py.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # missing with PYTHONSAFEPATH

from setup_venv import ROOT, VENV, VENV_PYTHON, SetupError, ensure

FIRST_NOTEBOOK = os.path.join("notebooks", "00_start_here.ipynb")
COUNTS = re.compile(r"(\d+) passed, (\d+) failed")
PATIENCE = 20  # seconds for an interrupted step to clean up


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which stop this program like Ctrl-C."""


def environment():
    """The environment variables of all programs in the virtual environment."""
    env = dict(os.environ)
    for name in ("PYTHONHOME", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONOPTIMIZE", "MPLBACKEND"):
        env.pop(name, None)  # they add another Python's packages, or disable assertions or inline figures
    env["VIRTUAL_ENV"] = VENV
    env["PATH"] = os.path.dirname(VENV_PYTHON) + os.pathsep + env.get("PATH", os.defpath)
    env["PYTHONNOUSERSITE"] = "1"
    env["JUPYTER_PLATFORM_DIRS"] = "1"
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    # small products do not get faster with more than 8 threads
    threads = str(min(8, os.cpu_count() or 1))
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        env.setdefault(name, threads)
    if not _writable_home(env):
        env["HOME"] = _temporary_home()
    return env


def _writable_home(env):
    home = env.get("HOME") or os.path.expanduser("~")
    return os.path.isabs(home) and os.access(home, os.W_OK | os.X_OK)


def _temporary_home():
    """A private folder for the settings of Jupyter and others, for a user without a home folder."""
    number = os.getuid()
    folder = os.path.join(tempfile.gettempdir(), f"m2r2kit-home-{number}")
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        found = os.lstat(folder)
        if os.path.islink(folder) or found.st_uid != number or found.st_mode & 0o077:
            folder = tempfile.mkdtemp(prefix="m2r2kit-home-")  # it belongs to another user
    print(f"There is no writable home folder; {folder} is used instead.", flush=True)
    return folder


def call(command, **options):
    """Run a step; an interrupted step gets time to stop its children and remove its files."""
    process = subprocess.Popen(command, cwd=ROOT, **options)
    try:
        return process.wait()
    except KeyboardInterrupt as interrupt:
        end(process, interrupt)
        raise


def end(process, interrupt):
    """Interrupt a step, unless it got the Ctrl-C from the terminal itself, and wait for its end."""
    informed = not isinstance(interrupt, Stopped)
    for patience in (5 if informed else 0, PATIENCE):
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        except KeyboardInterrupt:
            break  # a second Ctrl-C
    process.kill()
    process.wait()


def kit(*arguments):
    return [VENV_PYTHON, "-m", "m2r2kit", *arguments]


# --- lab ------------------------------------------------------------------------------------


def lab(arguments):
    env = environment()
    if "--headless" in arguments:
        names = [argument for argument in arguments if argument != "--headless"]
        code = call(kit("notebooks", "run", *names), env=env)
        if code != 0:
            return code
        return call(kit("report"), env=env)
    if not os.access(os.path.join(ROOT, "notebooks"), os.W_OK):
        print(f"{ROOT} cannot be written: to keep your changes, save a notebook in another folder.",
              flush=True)  # fmt: skip
    command = [VENV_PYTHON, "-m", "jupyterlab", FIRST_NOTEBOOK, *arguments]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # usual in a container
    os.chdir(ROOT)
    os.execve(VENV_PYTHON, command, env)  # so that only JupyterLab gets Ctrl-C


# --- test -----------------------------------------------------------------------------------


def test():
    """Run all steps, even after a failure, so that one run reports all failures."""
    env = environment()
    env["HF_HUB_OFFLINE"] = "1"  # a test never waits for the network
    passed = failed = 0
    for title, step in (
        ("Lint", lint),
        ("Unit tests", unit_tests),
        ("Notebooks", notebooks),
    ):
        print(f"\n== {title} ==", flush=True)
        step_passed, step_failed = step(env)
        passed += step_passed
        failed += step_failed
    sys.stderr.flush()
    print(f"\n{passed} passed, {failed} failed", flush=True)  # the last line, read by programs
    return 1 if failed or not passed else 0


def lint(env):
    """Lint counts as failed steps only; a clean run is not a passed test."""
    failed = 0
    for arguments in (["check"], ["format", "--check"]):
        command = [VENV_PYTHON, "-m", "ruff", *arguments, "."]
        failed += call(command, env=env, stdin=subprocess.DEVNULL) != 0
    return 0, failed


def unit_tests(env):
    with tempfile.TemporaryDirectory(prefix="m2r2kit-") as folder:
        report = os.path.join(folder, "junit.xml")
        command = [VENV_PYTHON, "-m", "pytest", "--color=no", f"--junit-xml={report}"]
        code = call(command, env=dict(env, MPLBACKEND="Agg"), stdin=subprocess.DEVNULL)
        try:
            suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
        except (OSError, ElementTree.ParseError):
            suites = []  # pytest crashed
    number = {
        key: sum(int(suite.get(key, 0)) for suite in suites)
        for key in ("tests", "failures", "errors", "skipped")
    }
    failed = number["failures"] + number["errors"]
    passed = max(0, number["tests"] - failed - number["skipped"])
    # a non-zero exit code, such as 5 (no test found), is a failure too
    return passed, max(failed, int(code != 0))


def notebooks(env):
    """Run `m2r2kit notebooks check`; its last line with counts has the result."""
    process = subprocess.Popen(
        kit("notebooks", "check"),
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        universal_newlines=True,
    )
    passed = failed = 0
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            counts = COUNTS.search(line)
            if counts:
                passed, failed = int(counts.group(1)), int(counts.group(2))
        code = process.wait()
    except KeyboardInterrupt as interrupt:
        end(process, interrupt)
        raise
    return passed, max(failed, int(code != 0))


def stop(number, frame):
    raise Stopped(number)


def main(arguments):
    if not arguments or arguments[0] not in ("lab", "test"):
        asked_for_help = bool(arguments) and arguments[0] in ("-h", "--help")
        print(__doc__.strip(), file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    if arguments[0] == "test" and len(arguments) > 1:
        print("`test` takes no arguments; run single tests with .venv/bin/pytest.", file=sys.stderr)
        return 2
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, stop)
    try:
        ensure()
        return lab(arguments[1:]) if arguments[0] == "lab" else test()
    except SetupError as error:
        sys.stdout.flush()
        print(f"\nkit: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt as interrupt:
        print("\nkit: stopped; run the same command to continue.", file=sys.stderr, flush=True)
        return 128 + (interrupt.args[0] if isinstance(interrupt, Stopped) else signal.SIGINT)
    if arguments[0] == "test":
        print("0 passed, 1 failed", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
