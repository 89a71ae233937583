"""`m2r2kit generate`: where prompts come from, how text is printed, and what is refused in a sentence."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from m2r2kit import __main__ as cli
from m2r2kit.cli.printer import Printer
from m2r2kit.common import UserError
from m2r2kit.driver import Segment
from m2r2kit.model.backbone import Backbone

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    """A tiny model with a chat template."""
    folder = Path(shutil.copytree(tiny.folder("llama"), tmp_path_factory.mktemp("chatty") / "model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return folder


def asked(folder, *more) -> list[str]:
    return ["generate", "--model", str(folder), "--method", "plain", "--max-tokens", "6", *more]


def answers(capsys, *words) -> list[dict]:
    assert cli.main([*words, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys, *words) -> str:
    assert cli.main([*words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


# --- prompts --------------------------------------------------------------------------------


def test_a_prompt_from_standard_input(chatty, capsys, monkeypatch):
    (wanted,) = answers(capsys, *asked(chatty, "--prompt", "hello"))
    for mark in (b"", b"\xef\xbb\xbf"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(mark + b"hello\n"), "ascii"))
        (found,) = answers(capsys, *asked(chatty, "--prompt", "-"))
        assert found["tokens"] == wanted["tokens"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert "as UTF-8" in refused(capsys, *asked(chatty, "--prompt", "-"))
    monkeypatch.setattr(sys, "stdin", None)
    assert "input is closed" in refused(capsys, *asked(chatty, "--prompt", "-"))
    assert "use --prompt - only once" in refused(capsys, *asked(chatty, "--prompt", "-", "--prompt", "-"))


def test_several_prompts_are_the_turns_of_a_conversation(chatty, capsys):
    first, second = answers(capsys, *asked(chatty, "--prompt", "one", "--prompt", "two"))
    assert (first["id"], second["id"]) == ("prompt", "prompt.2")
    said = f"u:one;a:{first['text']};u:two;a:"
    (whole,) = answers(capsys, *asked(chatty, "--prompt", said, "--raw"))
    assert whole["tokens"] == second["tokens"]
    assert "chat template" in refused(capsys, *asked(chatty, "--prompt", "a", "--system", "b", "--raw"))


@pytest.mark.parametrize(
    "mode", [["--method", "exits"], ["--method", "plain", "--experts", "store"]], ids=str
)
@pytest.mark.parametrize("option", ["--exit", "--draft"])
def test_options_of_drafting_are_refused_without_drafts(chatty, capsys, mode, option):
    said = refused(capsys, "generate", "--model", str(chatty), "--prompt", "a", *mode, option, "2")
    assert "--exit and --draft are for drafting" in said


def test_a_system_prompt_stands_before_all_turns(chatty, capsys):
    (found,) = answers(capsys, *asked(chatty, "--prompt", "one", "--system", "be brief"))
    (whole,) = answers(capsys, *asked(chatty, "--prompt", "s:be brief;u:one;a:", "--raw"))
    assert found["tokens"] == whole["tokens"]
    with pytest.raises(UserError, match="chat template fails"):
        Backbone.load(chatty).encode_turns([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("turn", [{"role": "user"}, {"content": "x"}, "x"], ids=str)
def test_a_turn_without_role_or_content_is_one_sentence(chatty, turn):
    with pytest.raises(UserError, match="not a dict of role and content"):
        Backbone.load(chatty).encode_turns([{"role": "user", "content": "a"}, turn])


@pytest.mark.parametrize("text", ["caf\udce9", "half \ud83d"], ids=["Latin-1", "half a surrogate"])
@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_text_that_is_no_unicode_is_one_sentence(chatty, capsys, tmp_path, text, raw):
    assert "not valid Unicode at character" in refused(capsys, *asked(chatty, "--prompt", text, *raw))
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"id": "a", "prompt": text}))
    said = refused(capsys, *asked(chatty, "--prompts", str(file), *raw))
    assert "prompts.jsonl, line 1 is not valid Unicode" in said


def test_a_byte_order_mark_before_prompts(chatty, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"id": "a", "prompt": "hello"}\n')
    (found,) = answers(capsys, *asked(chatty, "--prompts", str(file)))
    (wanted,) = answers(capsys, *asked(chatty, "--prompt", "hello"))
    assert found["id"] == "a" and found["tokens"] == wanted["tokens"]


def test_a_raw_text_gets_one_begin_mark():
    made = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<s>": 2}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    wrapped = TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>"))
    view = tiny.backbone()
    view = Backbone(view.model, wrapped, view.config, "")
    for text in ("ab", "<s>ab"):
        assert view.encode(text, chat=False) == [2, 0, 1]


# --- tokens ---------------------------------------------------------------------------------


def test_a_stop_word_ends_the_text(chatty, capsys):
    (whole,) = answers(capsys, *asked(chatty, "--prompt", "hello"))
    word = whole["text"][3:5]
    (cut,) = answers(capsys, *asked(chatty, "--prompt", "hello", "--stop", "nowhere", "--stop", word))
    assert cut["text"] == whole["text"][: whole["text"].index(word)] and cut["stopped"] == "stop"
    assert cut["tokens"] == whole["tokens"][: len(cut["tokens"])] and cut.keys() == whole.keys()
    assert "stop word is empty" in refused(capsys, *asked(chatty, "--prompt", "hello", "--stop", ""))


def test_min_p_of_one_is_greedy(chatty, capsys):
    (wanted,) = answers(capsys, *asked(chatty, "--prompt", "hello"))
    for method in ("plain", "mlx_lm"):
        words = asked(chatty, "--prompt", "hello", "--method", method, "--temp", "2", "--min-p", "1")
        assert answers(capsys, *words)[0]["tokens"] == wanted["tokens"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--min-p", "1.5"], "not a number from 0 to 1"),
        (["--method", "exits", "--temp", "1"], "leave out --temp"),
        (["--method", "exits", "--threshold", "nan"], "'nan' is not a number"),
        (["--trace", "t.npz"], "give their store"),
    ],
)
def test_what_would_do_nothing_is_refused(chatty, capsys, more, sentence):
    assert sentence in refused(capsys, *asked(chatty, "--prompt", "hello", *more))


# --- printing -------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


PIECES = [Segment("a", 1, False), Segment("b", 2, True), Segment("", 3, True), Segment("c", 4, False, 2)]


def test_a_terminal_marks_what_was_drafted_and_what_left_early(monkeypatch):
    for output, wanted in (
        (Terminal(), "a\x1b[4mb\x1b[0m\x1b[38;5;40mc\x1b[2m2\x1b[0m\n"),
        (io.StringIO(), "abc\n"),
    ):
        monkeypatch.setattr(sys, "stdout", output)
        printer = Printer(exits=(2, 3))
        for piece in PIECES:
            printer(piece)
        printer.end("4 tokens")
        assert output.getvalue() == wanted


def test_text_is_printed_as_it_comes_and_the_summary_beside_it(chatty, capsys):
    (wanted,) = answers(capsys, *asked(chatty, "--prompt", "hello"))
    assert cli.main(asked(chatty, "--prompt", "hello")) == 0
    out, err = capsys.readouterr()
    assert out == wanted["text"] + "\n" and err.startswith("6 tokens in 6 steps")


def test_any_text_can_be_printed_to_an_ascii_terminal(monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, "ascii"))
    cli._repair_streams()
    printer = Printer()
    printer(Segment("é🤖 ok", 1, False))
    printer.end("")
    assert content.getvalue() == b"?? ok\n"


OUTPUTS = {">&-": (0, ""), ">&- 2>&-": (0, "")}
if os.path.exists("/dev/full"):
    OUTPUTS["> /dev/full"] = (2, "m2r2kit: the disk is full; free some space and start again\n")


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_closed_or_full_output_gives_no_traceback(output):
    command = f"{sys.executable} -m m2r2kit report --json {output}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == OUTPUTS[output] and done.stdout == ""


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--risk", "0.1"], "--risk has no effect without --method exits"),
        (["--skipped", "linear"], "--skipped has no effect without --method exits"),
        (["--budget", "25%"], "--budget has no effect without --experts STORE"),
        (["--method", "exits", "--policy", "lfu"], "--policy has no effect without --experts STORE"),
    ],
)
def test_options_of_another_method_are_refused(chatty, capsys, more, sentence):
    assert sentence in refused(capsys, *asked(chatty, "--prompt", "hello", *more))
