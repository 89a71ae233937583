"""The prompts of this kit: their shape, and that no model of this kit was trained on them; and how files
of prompts are read."""

import json
import re
from pathlib import Path

import pytest

from m2r2kit.common import UserError
from m2r2kit.text import corpus, prompts

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "data" / "prompts"
SHAPES = {
    "code": r"Write a Python function \w+\([\w, ]*\)\. [A-Z].*\.",
    "arithmetic": r"[A-Z].*\d.*\?",
    "shell": r"How do I use the command [\w -]+\? [A-Z].*\.|[A-Z].* with [\w -]+\.",
}


def read(name: str) -> list[dict]:
    file = prompts.TUNING if name == "tuning" else PROMPTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("kind", corpus.KINDS)
def test_each_kind_has_32_prompts_in_the_form_that_training_used(kind):
    found = read(kind)
    assert len(found) == 32
    for p in found:
        assert p.keys() == {"id", "kind", "prompt"} and p["kind"] == kind
        assert re.fullmatch(SHAPES[kind], p["prompt"]), p


def test_all_is_the_three_kinds():
    assert read("all") == [p for kind in corpus.KINDS for p in read(kind)]


def test_tuning_prompts_are_others():
    test, tuning = read("all"), read("tuning")
    assert [p["kind"] for p in tuning] == [kind for kind in corpus.KINDS for _ in range(8)]
    for field in ("id", "prompt"):
        values = [p[field] for p in test + tuning]
        assert len(set(values)) == len(values) == 120


def heads(kind: str) -> set[str]:
    """What must not be in the text: the prompt, and for code already the function's name."""
    asked = [p["prompt"] for p in read("all") + read("tuning") if p["kind"] == kind]
    return {re.match(r"Write a Python function \w+\(", p)[0] for p in asked} if kind == "code" else set(asked)


def occurring(kind: str, text: str) -> list[str]:
    return [head for head in heads(kind) if head in text]


def text_of(documents: list[corpus.Document]) -> str:
    return "\n".join(d.text for d in documents)


def test_no_function_is_in_the_standard_library():
    text = text_of(corpus.code_documents())
    assert occurring("code", text) == []
    assert len(occurring("code", text[:100] + next(iter(heads("code"))))) == 1  # it can fail


@pytest.mark.parametrize("kind", ["arithmetic", "shell"])
def test_no_prompt_is_in_the_corpus(kind):
    folder = ROOT.parent / "shared" / "corpus"
    if not (folder / corpus.TLDR).exists():
        pytest.skip("the corpus is not beside the project, and a test downloads nothing")
    documents = {"arithmetic": corpus.arithmetic_documents, "shell": corpus.shell_documents}[kind](folder)
    assert occurring(kind, text_of(documents)) == []


# --- files of prompts, ours and others' ---------------------------------------------------

QUESTION = {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Now in prose."]}
TASK = {"id": "task_0", "motivation_app": "none", "instruction": "Say it shorter."}
TASK |= {"instances": [{"input": "It is very, very big.", "output": "It is huge."}]}


def file_of(tmp_path, *lines, name="set.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_our_own_files(tmp_path):
    lines = {"id": 1, "prompt": "Hello", "kind": "greeting"}, {"id": "b", "prompt": "Who?", "instruction": ""}
    assert prompts.read(file_of(tmp_path, *lines)) == [
        prompts.Prompt("1", "Hello", "greeting"),
        prompts.Prompt("b", "Who?", "set"),  # without a kind, the file's name
    ]


def test_published_sets_are_told_by_their_fields(tmp_path):
    with_reference = QUESTION | {"question_id": 111, "category": "math", "reference": ["6", "36"]}
    assert prompts.read(file_of(tmp_path, QUESTION, with_reference)) == [
        prompts.Prompt("81", "Write a poem.", "writing", ("Now in prose.",)),
        prompts.Prompt("111", "Write a poem.", "math", ("Now in prose.",)),
    ]
    bare = TASK | {"id": "task_1", "instances": [{"input": "", "output": "Yes."}]}
    assert prompts.read(file_of(tmp_path, TASK, bare, name="self_instruct.jsonl")) == [
        prompts.Prompt("task_0", "Say it shorter.\n\nIt is very, very big.", "self_instruct"),
        prompts.Prompt("task_1", "Say it shorter.", "self_instruct"),
    ]
    koala = {"id": "koala_0", "prompt": "List five films."}
    assert prompts.read(file_of(tmp_path, koala, name="koala.jsonl")) == [
        prompts.Prompt("koala_0", "List five films.", "koala")
    ]


def test_the_first_of_each_kind(tmp_path):
    kinds = ["math", "writing", "math", "math", "writing"]
    lines = [QUESTION | {"question_id": i, "category": kind} for i, kind in enumerate(kinds)]
    found = prompts.read(file_of(tmp_path, *lines))
    assert [p.id for p in prompts.first_of_each_kind(found, 1)] == ["0", "1"]
    assert [p.id for p in prompts.first_of_each_kind(found, 2)] == ["0", "1", "2", "4"]
    assert prompts.first_of_each_kind(found, None) == found


def without(line: dict, field: str) -> dict:
    return {key: value for key, value in line.items() if key != field}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2 is not a JSON object with 'id' and 'prompt'."),
        ("81", "line 2 is not a JSON object with 'id' and 'prompt'."),
        ({"id": "a", "prompt": 3}, "line 2 is not a JSON object with 'id' and 'prompt'."),
        ({"id": "a", "prompt": " "}, "line 2 has an empty prompt; write one, or delete the line."),
        (without(QUESTION, "category"), "line 2 is not a JSON object with 'question_id', 'category' and"),
        (without(QUESTION, "question_id"), "line 2 is not a JSON object with 'question_id', 'category' and"),
        (
            without(QUESTION, "turns"),
            "line 2 is not a JSON object with 'question_id', 'category' and 'turns'.",
        ),
        (QUESTION | {"turns": []}, "line 2 is not a JSON object with 'question_id', 'category' and 'turns'."),
        (
            QUESTION | {"turns": "Why?"},
            "line 2 is not a JSON object with 'question_id', 'category' and 'turns'.",
        ),
        (QUESTION | {"turns": ["a", 1]}, "line 2 is not a JSON object with 'question_id', 'category' and"),
        (QUESTION | {"turns": ["Why?", ""]}, "line 2 has an empty prompt; write one, or delete the line."),
        (without(TASK, "id"), "line 2 is not a JSON object with 'id', 'instruction' and 'instances'."),
        (without(TASK, "instances"), "line 2 is not a JSON object with 'id', 'instruction' and 'instances'."),
        (TASK | {"instances": []}, "line 2 is not a JSON object with 'id', 'instruction' and 'instances'."),
        (TASK | {"instances": {}}, "line 2 is not a JSON object with 'id', 'instruction' and 'instances'."),
        (
            TASK | {"instances": ["a"]},
            "line 2 is not a JSON object with 'id', 'instruction' and 'instances'.",
        ),
        (TASK | {"instruction": 5}, "line 2 is not a JSON object with 'id', 'instruction' and 'instances'."),
        ({"id": "a", "prompt": "half \ud83d"}, "line 2 is not valid Unicode at character 6 of a text;"),
        ({"id": "\ud83d", "prompt": "Why?"}, "line 2 is not valid Unicode at character 1 of a text;"),
        ({"id": "first", "prompt": "Again?"}, "gives two prompts the same id."),
    ],
    ids=str,
)
def test_a_bad_line_is_one_sentence(tmp_path, line, sentence):
    path = file_of(tmp_path, {"id": "first", "prompt": "Hello"}, line)
    with pytest.raises(UserError) as raised:
        prompts.read(path)
    message = str(raised.value)
    assert message.startswith(str(path)) and sentence in message and message.count(". ") == 0


def test_a_missing_or_an_empty_file_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        prompts.read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no prompt"):
        prompts.read(file_of(tmp_path, "", " "))
