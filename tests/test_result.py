"""A result is saved where requested, or elsewhere with a message; never lost."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from m2r2kit.__main__ import main
from m2r2kit.bench import records
from m2r2kit.cli import result
from m2r2kit.common import UserError

FIGURES = {"speed": 1.5}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def asked(json=None, record=False):
    return SimpleNamespace(json=json, record=record)


def test_a_result_goes_where_it_was_asked_for(folder):
    result.keep(asked(folder / "a.json", True), "speculation", {"n": 1}, FIGURES)
    assert json.loads((folder / "a.json").read_text()) == {"settings": {"n": 1}, **FIGURES}
    assert records.latest("speculation", n=1)["figures"] == FIGURES
    result.keep(SimpleNamespace(record=False), "stream", {}, FIGURES)
    assert records.read("stream") == [] and os.listdir() == []


@pytest.mark.parametrize("subject", ["speculation", "map", "exits", "experts", "memory"])
def test_a_folder_is_no_file_and_is_refused_before_anything_is_read(subject, folder, capsys):
    more = ["--experts", "store"] if subject in ("experts", "memory") else []
    assert main(["bench", subject, "--model", "nowhere", *more, "--json", str(folder)]) == 2
    said = capsys.readouterr()
    assert "there is a folder of that name" in said.err and said.out == ""


def test_the_prompts_are_not_replaced_by_the_result(folder, capsys):
    line = '{"id": "a", "prompt": "Hello"}\n'
    (folder / "prompts.jsonl").write_text(line)
    (folder / "link").symlink_to(folder / "prompts.jsonl")
    words = ["bench", "speculation", "--model", "nowhere", "--prompts", str(folder / "prompts.jsonl")]
    assert main([*words, "--json", str(folder / "link")]) == 2
    assert "would replace the prompts" in capsys.readouterr().err
    assert (folder / "prompts.jsonl").read_text() == line


def test_damaged_records_are_found_before_the_work(folder, capsys):
    records.RESULTS.mkdir()
    (records.RESULTS / "stream.jsonl").write_text("{}\n")
    assert main(["train", "stream", "--model", "nowhere", "--record"]) == 2
    assert "stream.jsonl, line 1" in capsys.readouterr().err


@pytest.mark.parametrize("figures", [FIGURES, {"speed": float("nan")}])
def test_what_cannot_be_kept_there_is_kept_elsewhere(figures, folder):
    records.RESULTS.mkdir()
    if figures is FIGURES:  # damaged while it was measured
        (records.RESULTS / "speculation.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"The result is saved in .*\.json\.$") as caught:
        result.keep(asked(record=True), "speculation", {"n": 1}, figures)
    kept = Path(re.search(r"saved in (.*)\.$", str(caught.value)).group(1))
    assert kept.parent == Path.cwd() and json.loads(kept.read_text())["settings"] == {"n": 1}


def test_a_result_is_printed_where_nothing_can_be_written(folder, monkeypatch, capsys):
    monkeypatch.setattr(result.tempfile, "tempdir", str(folder / "gone"))
    os.rmdir(folder / "here")  # the working folder
    with pytest.raises(UserError, match="The result is printed above"):
        result.keep(asked(folder), "speculation", {"n": 1}, FIGURES)
    assert json.loads(capsys.readouterr().out) == {"settings": {"n": 1}, **FIGURES}
