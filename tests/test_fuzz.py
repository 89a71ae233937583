"""Argument lists drawn from the parser itself, most of them wrong: a sentence or a result, no traceback."""

import os
import random
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest

from m2r2kit import __main__ as cli
from m2r2kit.bench import records

LISTS = int(os.environ.get("M2R2KIT_FUZZ", 300))
NUMBERS = (
    *("0", "-1", "1", "3", "0.5", "1_0", "0x10", "١", "1e400", "1e-320", "-inf", "inf", "nan"),
    *(str(2**64), "9" * 400, "9" * 5000),
)
SIZES = (
    *("64MB", "25%", "0%", "101%", "GB", "%", "5 TB", "12.5%,", ",,"),
    *("1e400GB", "1e-17%", "1e308%", "1e308GB", "infMB", "nan%"),
)
WORDS = (
    *("", " ", "--", "-", "=", "x", "all", "x,y", ",", "é", "\udc80", "a\nb", "{", "%s %(prog)s"),
    *("x" * 300, "[" * 3000),
)
UNSAFE = ("doctor", "notebooks", "fetch", "report", "chat")  # without a model, or with the net or a terminal
PLACES = ("model", "out", "to", "prompts", "json", "trace", "corpus")  # nothing found, nothing written there


def leaves(parser, words=()):
    """Every command that needs a model: its words and its own parser."""
    for action in parser._subparsers._group_actions if parser._subparsers else ():
        for name, child in action.choices.items():
            if child.file and name not in UNSAFE:
                child.build()
                yield (*words, name), child
            elif not child.file:
                yield from leaves(child, (*words, name))


def value(action, places, chance):
    """A value for an argument: of its kind or not."""
    if action.dest in PLACES:
        return chance.choice(places)
    kinds = [NUMBERS, SIZES, WORDS, places]
    if action.choices:
        kinds.append(tuple(map(str, action.choices)))
    return chance.choice(chance.choice(kinds))


def arguments(words, parser, places, chance):
    """One list: some options, each joined to its value or before it, and sometimes a stray word."""
    found = list(words)
    for action in parser._actions:
        often = {"help": 0.01, "model": 1, "corpus": 1, "processes": 0}.get(
            action.dest, 0.9 if action.required else 0.25
        )
        if not action.option_strings:
            found.append(value(action, places, chance))
        elif chance.random() < often:
            name = chance.choice(action.option_strings)
            if action.nargs == 0:
                found.append(name)
            else:
                given = value(action, places, chance)
                found += [f"{name}={given}"] if chance.random() < 0.5 else [name, given]
    return [*found, chance.choice(WORDS)] if chance.random() < 0.1 else found


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Paths at which no model is and nothing can be written: below a file, a folder of something else, .."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("M2R2KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("no JSON")
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": ' + "[" * 5000)
    return (
        f"{file}/below",
        str(folder),
        str(file),
        "nobody/nothing",
        "x" * 300,
        "",
        "/proc",
        "\udc80",
        "a\nb",
    )


def test_any_list_of_arguments_ends_in_a_sentence_or_a_result(places, tmp_path):
    chance = random.Random(0)
    commands = list(leaves(cli.parser()))
    assert len(commands) > 10
    codes = set()
    for number in range(LISTS):
        asked = arguments(*commands[number % len(commands)], places, chance)
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                codes.add(code := cli.main(asked))
            except BaseException as error:
                pytest.fail(f"{asked}: {type(error).__name__}: {error}")
        assert code in (0, 1, 2), asked
        if code == 2:
            assert err.getvalue().count("\n") == 1 and len(err.getvalue()) < 2000, (asked, err.getvalue())
    assert codes >= {0, 2}  # the help, and a sentence
    left = {path.name for path in tmp_path.iterdir()} - {"cache"}
    assert left == {"file", "folder"}  # nothing is left behind


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["generate", "--prompt", "a", "--seed", str(2**64)], "too large"),
        (["generate", "--prompt", "a", "--method=--"], "'--' is not a value"),
        (["generate", "--prompt", "a", "--experts", "s", "--budget", "inf"], "neither a size such as 64MB"),
        (["make-moe", "out", "--size", "1e400"], "neither a size such as 64MB"),
        (["pack", "x" * 300, "out"], "is too long; choose a shorter one"),
        (["generate", "--prompt", "a", "--model", "x" * 300], "is too long; choose a shorter one"),
        (["train", "exits", "--exits", "9" * 5000], "is not a whole number"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_numbers_and_names_beyond_all_bounds_are_refused(line, sentence, capsys):
    assert cli.main(line) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and len(said) < 2000


def test_a_prompt_that_is_nested_too_deeply_is_named(tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": "a", "prompt": ' + "[" * 100_000)
    assert cli.main(["generate", "--prompts", str(file)]) == 2
    assert "line 1 is not a JSON object" in capsys.readouterr().err
