"""The built wheel, used without a clone: what works, and the message when something is missing."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import tiny

from m2r2kit.common import ROOT

CLONE = "`git clone --depth 1` the project"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package from its wheel; what it depends on is this environment's."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()  # built in a copy, because a build leaves its files beside the sources
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "m2r2kit", source / "m2r2kit", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    alone = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *alone, "--no-build-isolation", "-w", work, source], check=True, timeout=300
    )
    (wheel,) = work.glob("m2r2kit-*.whl")
    subprocess.run([*pip, "install", *alone, "--target", work / "site", wheel], check=True, timeout=300)
    return work / "site", wheel


def run(installed, cwd, *command, program=()):
    """Python with the installed package, away from the clone."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(installed[0]), str(ROOT / "tests")]),
        "M2R2KIT_CACHE": str(cwd / "cache"),
    }
    words = program or ("-m", "m2r2kit", *map(str, command))
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def test_it_holds_the_whole_package_and_nothing_else(installed):
    tracked = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "m2r2kit"], capture_output=True, text=True, check=True
    ).stdout.split()
    inside = set(zipfile.ZipFile(installed[1]).namelist())
    assert {name for name in tracked if (ROOT / name).exists()} <= inside
    assert {name.split("/")[0].split("-")[0] for name in inside} == {"m2r2kit"}
    assert (installed[0] / "bin" / "m2r2kit").exists()


def test_every_part_of_it_can_be_imported(installed, tmp_path):
    program = (
        "import importlib, pkgutil, sys, m2r2kit\n"
        "found = [m.name for m in pkgutil.walk_packages(m2r2kit.__path__, 'm2r2kit.')]\n"
        "for name in found:\n    importlib.import_module(name)\n"
        "print(m2r2kit.__file__, len(found))"
    )
    done = run(installed, tmp_path, program=("-c", program))
    assert done.returncode == 0, done.stderr
    file, count = done.stdout.split()
    assert file.startswith(str(installed[0])) and int(count) > 50
    assert list(tmp_path.glob("*")) in ([], [tmp_path / "cache"])


def test_the_command_knows_its_version_and_the_machine(installed, tmp_path):
    assert run(installed, tmp_path, "--version").stdout.startswith("m2r2kit ")
    done = run(installed, tmp_path, "doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["kit folder"]["ok"] and CLONE in checks["kit folder"]["advice"]


def test_it_generates_with_a_model_of_ones_own(installed, tmp_path):
    model = tiny.make_folder("llama", tmp_path / "model")
    asked = ("--model", model, "--raw", "--prompt", "abc", "--max-tokens", "4", "--method", "plain", "--json")
    done = run(installed, tmp_path, "generate", *asked)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["tokens"]) == 4


TRAIN = """\
import sys
from m2r2kit import __main__ as cli
from m2r2kit.text import rows
from m2r2kit.text.corpus import Document

rows.documents = lambda folder: [
    Document(kind, f"{kind} {i}", f"{kind} {i}: {'abcdefgh'[i % 8] * 40} and so on")
    for kind in ("code", "arithmetic", "shell") for i in range(200)
]
rows.HELD_OUT_ROWS = 8
sys.exit(cli.main(sys.argv[1:]))
"""


def test_it_trains_a_stream_and_says_where_the_record_is(installed, tmp_path):
    model = tiny.make_folder("llama", tmp_path / "model", max_position_embeddings=512)
    asked = ["train", "stream", "--model", str(model), "--steps", "2", "--rows", "16", "--batch", "8"]
    asked += ["--no-tune", "--record"]
    done = run(installed, tmp_path, program=("-c", TRAIN, *asked, "--corpus", str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert (model / "stream" / "stream.json").exists()
    record = tmp_path / "cache" / "results" / "stream.jsonl"
    assert f"The record is in {record}." in done.stderr
    assert json.loads(record.read_text())["figures"]["steps"] == 2
    assert not (installed[0] / "data").exists()


NEEDS = [
    ("generate", "--prompt", "hi"),
    ("bench", "speculation", "--model", "MODEL"),
    ("notebooks", "run"),
    ("report",),
    ("make-moe", "out", "--widen", "2"),
    ("make-moe", "out"),
]
EACH = """\
import json, sys
from m2r2kit import __main__ as cli

for command in json.loads(sys.argv[1]):
    print(cli.main(command), file=sys.stderr)
"""


def test_what_needs_the_project_says_how_to_get_it(installed, tmp_path):
    model = str(tiny.make_folder("llama", tmp_path / "model"))
    commands = [[model if word == "MODEL" else word for word in command] for command in NEEDS]
    done = run(installed, tmp_path, program=("-c", EACH, json.dumps(commands)))
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 0 and len(lines) == 2 * len(NEEDS), done.stderr
    for command, sentence, code in zip(NEEDS, lines[::2], lines[1::2]):
        assert code == "2" and CLONE in sentence, command
