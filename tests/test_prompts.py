"""The prompts of this kit: their shape, and that no model of this kit was trained on them."""

import json
import re
from pathlib import Path

import pytest

from m2r2kit import corpus

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "data" / "prompts"
SHAPES = {
    "code": r"Write a Python function \w+\([\w, ]*\)\. [A-Z].*\.",
    "arithmetic": r"[A-Z].*\d.*\?",
    "shell": r"How do I use the command [\w -]+\? [A-Z].*\.|[A-Z].* with [\w -]+\.",
}


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", corpus.KINDS)
def test_each_kind_has_32_prompts_in_the_form_that_training_used(kind):
    prompts = read(kind)
    assert len(prompts) == 32
    for p in prompts:
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
    prompts = [p["prompt"] for p in read("all") + read("tuning") if p["kind"] == kind]
    return (
        {re.match(r"Write a Python function \w+\(", p)[0] for p in prompts}
        if kind == "code"
        else set(prompts)
    )


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
