"""Text that the model writes itself: whole questions, asked together, answered as if asked alone."""

import numpy as np
import tiny

from m2r2kit.speculation import generate
from m2r2kit.text.self_generated import beginnings, continue_greedily, questions

ASKS, ANSWERS = 90, 91


def conversation(lengths, answer=40, seed=0):
    """A long row of turns: questions of these lengths (marks included), answers of 30 and `answer` tokens."""
    rng = np.random.default_rng(seed)
    parts = []
    for i, length in enumerate(lengths):
        parts += [[ASKS], rng.integers(0, 80, length - 2), [ANSWERS]]
        parts.append(rng.integers(0, 80, answer if i % 2 else 30))
    return np.concatenate(parts)


def test_questions_are_whole_and_of_some_use():
    ids = conversation([5, 6, 7, 8, 40, 41] * 4)
    found = questions(ids, ASKS, ANSWERS, 20, longest=20, rng=np.random.default_rng(1))
    assert len(found) == 20
    for question in found:
        assert question[0] == ASKS and question[-1] == ANSWERS and ANSWERS not in question[:-1]
        assert len(question) in (6, 8)  # the others are too long, or their answers too short


def test_no_question_comes_twice_where_there_are_enough():
    ids = conversation([6, 6, 8, 8, 10, 10] * 8)  # every second one has an answer that is long enough
    every = questions(ids, ASKS, ANSWERS, 24, 20, np.random.default_rng(0))
    assert len({question.tobytes() for question in every}) == 24
    assert len(questions(ids, ASKS, ANSWERS, 60, 20, np.random.default_rng(0))) == 60


def test_no_question_gives_none():
    assert questions(np.arange(50), ASKS, ANSWERS, 4, 20, np.random.default_rng(0)) == []


def test_answers_in_a_batch_are_those_of_each_alone():
    view = tiny.backbone()
    starts = beginnings(np.array(tiny.prompt(40)), 4, 9, np.random.default_rng(0))
    starts = [start[:length] for start, length in zip(starts, (6, 6, 7, 9), strict=True)]
    rows = continue_greedily(view, starts, 30)
    assert rows.shape == (4, 30) and rows.dtype == np.int32
    for start, row in zip(starts, rows, strict=True):
        n, alone = len(start), generate(view, start.tolist(), max_tokens=30 - len(start)).tokens
        assert row.tolist()[:n] == start.tolist() and row.tolist()[n : n + len(alone)] == alone
