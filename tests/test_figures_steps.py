"""A drafting step is drawn as it happened, and readable without colours."""

from itertools import pairwise

import pytest

from m2r2kit.figures.steps import Step, draw_step, draw_steps
from m2r2kit.figures.style import new_figure, png

STEP = Step([" a", " b", " c", " d"], [" a", " b", " x"], "def")


@pytest.fixture
def ax():
    figure, ax = new_figure()
    yield ax
    assert png(figure).startswith(b"\x89PNG")  # what was drawn can be shown


def words(ax) -> list[str]:
    return [text.get_text() for text in ax.texts if text.get_text()]  # arrows are empty texts


def test_steps_tell_accepted_rejected_and_never_asked(ax):
    steps = [Step([" a", " b", " c"], [" a", " x"]), Step(["d"], ["d", "e"])]
    said = draw_steps(ax, steps)
    assert [w[0] for w in words(ax)] == ["s", "=", "x", "?", "+", "s", "=", "+"]
    assert "4 tokens were drafted, 2 accepted, and 4 emitted" in said


def test_a_step_ends_with_its_signs_and_tokens(ax):
    said = draw_step(ax, STEP)
    drafts, answers = ["def", "= ·a", "= ·b", "x ·c", "? ·d"], ["·a", "same", "·b", "same", "·x", "differs"]
    assert words(ax)[3:] == [*drafts, *answers, "..", "..", "= ·a", "= ·b", "+ ·x"]
    assert "Draft 3 is not the model's token (x)" in said and "Emitted in this step: 3." in said


def test_before_the_pass_nothing_is_judged(ax):
    assert "2 of 4 tokens are drafted" in draw_step(ax, STEP, 2)
    assert words(ax)[3:] == ["def", "·a", "·b"]
    assert "One pass over 5 tokens" in draw_step(ax, STEP, 5)
    assert not any(w[0] in "=x?+" for w in words(ax))


def test_each_moment_adds_something(ax):
    drawn = [draw_step(ax, STEP, moment) and words(ax) for moment in range(STEP.moments + 1)]
    assert len(drawn) == 9 and all(a != b for a, b in pairwise(drawn))
    draw_step(ax, STEP, 99)
    assert words(ax) == drawn[-1]


def test_all_right_gives_one_token_more(ax):
    said = draw_step(ax, Step(["a", "b"], ["a", "b", "c"], "d"))
    assert "All 2 drafts were right" in said and words(ax)[-1] == "+ c"
    assert not {"x", "?"} & {w[0] for w in words(ax)}


@pytest.mark.parametrize("emitted", [[], ["b", "c"], ["a", "b", "c", "d"]])
def test_a_step_that_cannot_be_is_refused(emitted):
    with pytest.raises(ValueError, match="not the first of"):
        Step(["a", "b"], emitted)
