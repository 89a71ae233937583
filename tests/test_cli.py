"""The command line without a model: help, bad arguments, exit codes, JSON."""

import json

import pytest

from m2r2kit import __main__ as cli
from m2r2kit.cli import report
from m2r2kit.common import UserError
from m2r2kit.speculation.registry import METHODS


@pytest.mark.parametrize("command", [(), *map(str.split, cli.COMMANDS)], ids=" ".join)
def test_help_describes_every_command(command, capsys):
    assert cli.main([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: m2r2kit {' '.join(command)}".rstrip())
    if not command:
        assert all(name in text for name in ("doctor", "notebooks", "generate", "bench", "train", "report"))


@pytest.mark.parametrize("command", ["generate", "bench speculation", "train drafter"])
def test_help_says_what_each_method_is(command, capsys):
    assert cli.main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"eagle                 {METHODS['eagle'].about}\n" in text
    assert all(len(line) < 130 for line in text.splitlines()[1:] if "{" not in line)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["generate"], "one of the arguments --prompt --prompts is required"),
        (["generate", "--prompt", "a", "--prompts", "b"], "not allowed with argument"),
        (["generate", "--prompt", "a", "--draft", "-1"], "'-1' is not a whole number from 0"),
        (["generate", "--prompt", "a", "--max-tokens", "0"], "'0' is not a whole number from 1"),
        (["generate", "--prompt", "a", "--temp", "nan"], "'nan' is not a number from 0"),
        (["generate", "--prompt", "a", "--top-p", "0"], "'0' is not a number above 0 to 1"),
        (["generate", "--prompt", "a", "--method", "magic"], "invalid choice: 'magic'"),
        (["bench", "speculation", "--methods", "plain,magic"], "there is no magic"),
        (["bench", "speculation", "--methods", ","], "the list is empty"),
        (["bench", "map", "--exits", "2,x"], "'x' is not a whole number from 1"),
        (["train", "backbone"], "required: --out"),
        (["train", "stream", "--form", "cube"], "invalid choice: 'cube'"),
        (["train", "drafter"], "required: --kind"),
        (["train", "drafter", "--kind", "magic"], "there is no magic"),
        (["notebooks", "eat"], "invalid choice: 'eat'"),
        (["report", "--json", "--markdown"], "not allowed with argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, sentence, capsys):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and sentence in err and err.startswith("m2r2kit")


def test_defaults_are_those_that_programs_rely_on():
    generate = cli.parser().parse_args(["generate", "--prompt", "a"])
    assert (generate.method, generate.max_tokens, generate.temp) == (
        None,
        128,
        0.0,
    )  # m2r2, with --experts plain
    assert generate.model.endswith("data/pocket-dense")
    bench = cli.parser().parse_args(["bench", "speculation", "--methods", "plain, m2r2"])
    assert (bench.methods, bench.repeats, bench.max_tokens) == (["plain", "m2r2"], 5, 128)
    for command in (["bench", "experts"], ["bench", "memory", "--experts", "a"], ["train", "predictor"]):
        assert cli.parser().parse_args(command).model.endswith("data/pocket-moe")  # a mixture


def test_the_trained_drafters_of_the_registry_are_those_that_can_be_made():
    from m2r2kit.speculation import registry, trained  # the registry names them without importing them

    assert registry.TRAINED == tuple(trained.KINDS)
    assert {entry.needs for entry in registry.METHODS.values()} == {"", "train stream", "train drafter"}


@pytest.mark.parametrize(
    ("raised", "code", "sentence"),
    [
        (UserError("the model\nis missing"), 2, "m2r2kit: the model is missing\n"),
        (KeyboardInterrupt(), 130, "m2r2kit: interrupted; nothing half-written is left\n"),
        (
            OSError(28, "No space left on device"),
            2,
            "m2r2kit: the disk is full; free some space and start again\n",
        ),
    ],
    ids=["bad input", "interrupt", "full disk"],
)
def test_what_a_command_raises_becomes_one_line(raised, code, sentence, monkeypatch, capsys):
    def fail(args):
        raise raised

    monkeypatch.setattr(report, "run", fail)
    assert cli.main(["report"]) == code
    assert capsys.readouterr().err == sentence


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(report, "run", lambda args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["report"])


def test_a_working_folder_that_is_gone_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.main(["generate", "--prompt", "a"]) == 2
    assert capsys.readouterr().err == "m2r2kit: The working folder is gone; change to another one.\n"
    assert cli.main(["--help"]) == 0


@pytest.mark.parametrize("columns", ["1", "6", "nonsense"])
def test_a_narrow_terminal_gets_narrow_lines(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    for asked in (["--help"], ["bench", "exits", "--help"], ["report"]):
        assert cli.main(asked) == 0
    assert "reproduced" in capsys.readouterr().out


def test_an_interrupt_while_a_command_is_imported_is_one_sentence(monkeypatch, capsys):
    def interrupt(name, package=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupt)
    assert cli.main(["generate", "--prompt", "a"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_failed_check_is_exit_code_1(monkeypatch):
    monkeypatch.setattr(report, "run", lambda args: 1)
    assert cli.main(["report"]) == 1


def test_report_speaks_json(capsys):
    assert cli.main(["report", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"id", "claim", "paper", "ours", "verdict", "reason", "command"} <= rows[0].keys()


def test_an_unknown_notebook_is_named(capsys):
    assert cli.main(["notebooks", "run", "99"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
