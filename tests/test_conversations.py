"""A chat model generates questions and answers; its text is cached, extended and read again."""

import json

import mlx.core as mx
import numpy as np
import pytest
import tiny

from m2r2kit.common import UserError
from m2r2kit.model.backbone import Backbone
from m2r2kit.text import conversations as c

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LENGTH = 60


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Backbone:
    folder = tiny.make_folder("llama", tmp_path_factory.mktemp("chat") / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
    return Backbone.load(folder)


def test_a_template_is_taken_apart(chat):
    parts = c.template(chat)
    text = [chat.tokenizer.decode(list(p)) for p in (parts.opening, parts.answer, parts.again)]
    assert text == ["<user>", ";<assistant>", ";<user>"]


def test_a_model_without_a_template_is_told(tmp_path):
    with pytest.raises(UserError, match="no chat template"):
        c.template(tiny.backbone())


def test_answers_are_the_models_own_and_questions_are_not(chat):
    rows = c.converse(chat, 3, LENGTH, seed=1)
    parts, answer = c.template(chat), False
    assert len({tuple(row.tokens) for row in rows}) == 3  # sampled questions differ
    for row in rows:
        assert len(row.tokens) == LENGTH and tuple(row.tokens[: len(parts.opening)]) == parts.opening
        greedy = mx.argmax(chat.logits(mx.array([row.tokens]))[0], axis=-1).tolist()
        text = chat.tokenizer.decode(row.tokens)
        if "<assistant>" not in text:
            continue
        start = next(
            i + len(parts.answer)
            for i in range(LENGTH)
            if tuple(row.tokens[i : i + len(parts.answer)]) == parts.answer
        )
        for i in range(start, LENGTH):
            if row.tokens[i] != greedy[i - 1]:  # the answer was ended: by its end, or because it looped
                cut = greedy[i - 1] in chat.eos or c.loops(row.tokens[start:i])
                assert cut and row.tokens[i] == parts.again[0]
                break
        answer |= start < LENGTH
    assert answer


def test_two_turns_then_a_new_conversation():
    end, row = 9, c.Row(c.Template(opening=(1, 2), answer=(3,), again=(4,)))
    for chosen in (0, 0, 50, end, 60, end, 51, end, 61, end, 0, 0, 52):
        row.take(chosen, {end})
    assert row.tokens == [1, 2, 50, 3, 60, 4, 51, 3, 61, end, 1, 2, 52]
    assert row.questions == [[50], [51]]


@pytest.mark.parametrize(
    ("said", "looping"),
    [
        ([7] * 12, True),
        ([7] * 11, False),
        ([1, 2, 3, 4, 5] * 3, True),
        ([9, 8, *[1, 2, 3, 4, 5] * 3], True),
        ([1, 2, 3, 4, 5] * 2, False),
        (list(range(200)), False),
        (list(range(c.PERIOD)) * 3, True),
        (list(range(c.PERIOD + 1)) * 3, False),
    ],
)
def test_loops(said, looping):
    assert c.loops(said) is looping


def test_rows_are_kept_and_gone_on_with(chat, tmp_path):
    file = tmp_path / "deep" / "rows.jsonl"
    computed = []
    c.write(chat, 4, LENGTH, 2, file, computed.append)
    first = file.read_text()
    rows = c.load(file, 10)
    assert rows.shape == (4, LENGTH) and rows.dtype == np.int32 and len(computed) >= 2 * (LENGTH - 1)
    c.write(chat, 4, LENGTH, 2, file)
    assert file.read_text() == first  # nothing to do
    file.write_text(first[: len(first) - 30])  # stopped in the midst of a line
    c.write(chat, 5, LENGTH, 2, file)
    again = c.load(file, 10)
    assert again.shape == (5, LENGTH) and np.array_equal(again[:3], rows[:3])
    questions = [q for row in c.read(file) for q in row["asked"]]
    assert len(questions) == len(set(questions))


def test_damaged_rows_are_generated_again(chat, tmp_path):
    file = tmp_path / "rows.jsonl"
    c.write(chat, 3, LENGTH, 3, file)
    good = file.read_bytes().splitlines(keepends=True)
    row = json.loads(good[1])
    for bad in (
        good[1].replace(b'"tokens"', b'"tok\xe5ns"'),  # one flipped bit, not UTF-8 any more
        json.dumps({"tokens": row["tokens"]}).encode() + b"\n",
        json.dumps(row | {"asked": [1]}).encode() + b"\n",
        json.dumps(row | {"tokens": ["1"] * LENGTH}).encode() + b"\n",
    ):
        file.write_bytes(good[0] + bad + good[2])
        assert len(c.load(file, 10)) == 2
        c.write(chat, 3, LENGTH, 3, file)
        assert c.load(file, 10).shape == (3, LENGTH)


def test_a_model_that_asks_the_same_again_and_again_is_told(chat, tmp_path, monkeypatch):
    monkeypatch.setattr(c, "asked", lambda text: "the same")
    with pytest.raises(UserError, match="1 of 3 rows"):
        c.write(chat, 3, LENGTH, 2, tmp_path / "rows.jsonl")
    assert len(c.load(tmp_path / "rows.jsonl", 10)) == 1


def test_a_file_that_cannot_be_written_is_named(chat, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        c.write(chat, 1, LENGTH, 1, tmp_path / "file" / "rows.jsonl")
