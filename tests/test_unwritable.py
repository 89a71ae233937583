"""A command checks that it can write its output before it starts, even before it looks for the model."""

import pytest

from m2r2kit import __main__ as cli

MODEL = ["--model", "/there/is/no/model"]
COMMANDS = [
    ["train", "stream", *MODEL, "--out", "OUT"],
    ["train", "drafter", *MODEL, "--kind", "medusa", "--out", "OUT"],
    ["train", "exits", *MODEL, "--out", "OUT"],
    ["train", "predictor", "--model", "OUT"],
    ["train", "backbone", "--out", "OUT"],
    ["train", "backbone", "--out", "RUN", "--to", "OUT"],
    ["calibrate", *MODEL, "--out", "OUT"],
    ["tune", *MODEL, "--stream", "OUT"],
    ["pack", "/there/is/no/model", "OUT"],
    ["make-moe", "OUT"],
    ["make-moe", "OUT", "--widen", "2", *MODEL],
    ["bench", "speculation", *MODEL, "--json", "OUT"],
    ["bench", "experts", *MODEL, "--experts", "/none", "--json", "OUT"],
    ["generate", *MODEL, "--experts", "/none", "--trace", "OUT", "--prompt", "x"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: "-".join(words[:2]))
def test_a_place_that_cannot_be_written_is_found_first(tmp_path, monkeypatch, capsys, words):
    monkeypatch.setenv("M2R2KIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("")
    places = {"OUT": str(tmp_path / "file" / "out"), "RUN": str(tmp_path / "run")}
    assert cli.main([places.get(word, word) for word in words]) == 2
    said = capsys.readouterr().err
    assert "cannot be written: a part of its path is a file; choose another place." in said
    assert str(tmp_path / "file" / "out") in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
