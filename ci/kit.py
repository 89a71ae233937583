#!/usr/bin/env python3
"""The two commands of this project, on a bare machine with Python 3.11 or newer:

    python3 ci/kit.py lab               set up, then open JupyterLab on the first notebook
    python3 ci/kit.py lab --headless    set up, execute the notebooks, print the table
    python3 ci/kit.py test              set up, then lint, unit tests and notebook checks

What follows `lab` is passed on: to JupyterLab (`--no-browser --port 8899`), or with
`--headless` to `m2r2kit notebooks run` (names of notebooks).

Only the standard library is used, and the syntax of Python 3.7, so that an old Python
gets a sentence instead of a syntax error. Set-up itself is in ci/setup_venv.py.
"""

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

from setup_venv import ROOT, VENV, VENV_PYTHON, SetupError, ensure

FIRST_NOTEBOOK = os.path.join("notebooks", "00_start_here.ipynb")
COUNTS = re.compile(r"(\d+) passed, (\d+) failed")


def environment():
    """The variables under which everything in the virtual environment runs."""
    env = dict(os.environ)
    for name in ("PYTHONHOME", "PYTHONPATH", "MPLBACKEND"):
        env.pop(name, None)  # they would bring in another Python's packages, or hide figures
    env["VIRTUAL_ENV"] = VENV
    env["PATH"] = os.path.dirname(VENV_PYTHON) + os.pathsep + env.get("PATH", os.defpath)
    env["PYTHONNOUSERSITE"] = "1"
    env["JUPYTER_PLATFORM_DIRS"] = "1"
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    # On a machine of many cores, small products only wait for each other: 8 threads are enough.
    threads = str(min(8, os.cpu_count() or 1))
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        env.setdefault(name, threads)
    return env


def kit(*arguments):
    return [VENV_PYTHON, "-m", "m2r2kit", *arguments]


# --- lab ------------------------------------------------------------------------------------


def lab(arguments):
    env = environment()
    if "--headless" in arguments:
        names = [argument for argument in arguments if argument != "--headless"]
        code = subprocess.call(kit("notebooks", "run", *names), cwd=ROOT, env=env)
        if code != 0:
            return code
        return subprocess.call(kit("report"), cwd=ROOT, env=env)
    command = [VENV_PYTHON, "-m", "jupyterlab", FIRST_NOTEBOOK, *arguments]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # in a container there is often nobody else
    os.chdir(ROOT)
    os.execve(VENV_PYTHON, command, env)  # Ctrl-C then reaches JupyterLab alone


# --- test -----------------------------------------------------------------------------------


def test():
    """Every step runs even if one before it failed, so that one run tells everything."""
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
    """Lint counts only when it fails: a clean file is not a test."""
    failed = 0
    for arguments in (["check"], ["format", "--check"]):
        command = [VENV_PYTHON, "-m", "ruff", *arguments, "."]
        failed += subprocess.call(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL) != 0
    return 0, failed


def unit_tests(env):
    with tempfile.TemporaryDirectory(prefix="m2r2kit-") as folder:
        report = os.path.join(folder, "junit.xml")
        command = [VENV_PYTHON, "-m", "pytest", "--color=no", f"--junit-xml={report}"]
        code = subprocess.call(command, cwd=ROOT, env=dict(env, MPLBACKEND="Agg"), stdin=subprocess.DEVNULL)
        try:
            suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
        except (OSError, ElementTree.ParseError):
            suites = []  # pytest itself broke down
    number = {
        key: sum(int(suite.get(key, 0)) for suite in suites)
        for key in ("tests", "failures", "errors", "skipped")
    }
    failed = number["failures"] + number["errors"]
    passed = max(0, number["tests"] - failed - number["skipped"])
    # pytest's code 5, no test found, is a failure too
    return passed, max(failed, int(code != 0))


def notebooks(env):
    """`m2r2kit notebooks check` says how many notebooks passed in its last such line."""
    process = subprocess.Popen(
        kit("notebooks", "check"),
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        universal_newlines=True,
    )
    passed = failed = 0
    for line in process.stdout:
        print(line, end="", flush=True)
        counts = COUNTS.search(line)
        if counts:
            passed, failed = int(counts.group(1)), int(counts.group(2))
    code = process.wait()
    return passed, max(failed, int(code != 0))


def main(arguments):
    if not arguments or arguments[0] not in ("lab", "test"):
        asked_for_help = bool(arguments) and arguments[0] in ("-h", "--help")
        print(__doc__.strip(), file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    if arguments[0] == "test" and len(arguments) > 1:
        print("`test` takes no arguments; for some of the tests run .venv/bin/pytest.", file=sys.stderr)
        return 2
    try:
        ensure()
        return lab(arguments[1:]) if arguments[0] == "lab" else test()
    except SetupError as error:
        sys.stdout.flush()
        print(f"\nkit: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("\nkit: stopped; the same command goes on from here.", file=sys.stderr, flush=True)
        return 130
    if arguments[0] == "test":
        print("0 passed, 1 failed", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
