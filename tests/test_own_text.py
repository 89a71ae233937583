"""Text that the model writes itself: whole questions, asked together, answered as if asked alone."""

import numpy as np
import tiny

from m2r2kit.own_text import beginnings, continue_greedily, questions
from m2r2kit.speculation import generate

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


def test_questions_of_one_length_come_together():
    lengths = [6, 6, 8, 8, 10, 10] * 8  # every second one has an answer that is long enough
    ids = conversation(lengths)
    found = questions(ids, ASKS, ANSWERS, 10, 20, np.random.default_rng(0), together=5)
    sizes = [len(question) for question in found]
    assert len(set(sizes[:5])) == len(set(sizes[5:])) == 1
    every = questions(ids, ASKS, ANSWERS, 24, 20, np.random.default_rng(0), together=5)
    assert len({question.tobytes() for question in every}) == 24  # none twice where there are enough


def test_no_question_gives_none():
    assert questions(np.arange(50), ASKS, ANSWERS, 4, 20, np.random.default_rng(0)) == []


def test_answers_in_a_batch_are_those_of_each_alone():
    view = tiny.backbone()
    starts = beginnings(np.array(tiny.prompt(40)), 3, 6, np.random.default_rng(0))
    rows = continue_greedily(view, np.stack(starts), 30)
    assert rows.shape == (3, 30) and rows.dtype == np.int32
    for start, row in zip(starts, rows, strict=True):
        alone = generate(view, start.tolist(), max_tokens=24).tokens
        assert row.tolist()[:6] == start.tolist() and row.tolist()[6 : 6 + len(alone)] == alone
