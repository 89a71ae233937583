"""A tree of drafts is drawn with its path, and an impossible tree is refused."""

import pytest

from m2r2kit.figures.style import new_figure, png
from m2r2kit.figures.trees import draw_tree

TOKENS, PARENTS = [" a", " b", "c", "d", "e"], [-1, -1, 0, 0, 1]


@pytest.fixture
def ax():
    figure, ax = new_figure()
    yield ax
    assert png(figure).startswith(b"\x89PNG")


def test_the_path_is_told_by_signs_and_by_thickness(ax):
    said = draw_tree(ax, TOKENS, PARENTS, [0, 3], "def", "z")
    assert [t.get_text() for t in ax.texts] == ["def", "= ·a", "·b", "c", "= d", "e", "+ z"]
    assert [line.get_linewidth() > 1 for line in ax.lines] == [True, False, False, True, False, True]
    assert "5 drafts in a tree of depth 2: 6 positions" in said and "accepts 2 of them (' ad', =)" in said
    assert said.endswith("3 emitted.")


def test_depth_goes_to_the_right_and_no_two_boxes_share_a_place(ax):
    draw_tree(ax, TOKENS, PARENTS, [], "def", "z")
    at = [text.get_position() for text in ax.texts]
    assert [x for x, _ in at[:-1]] == [0, 1, 1, 2, 2, 2]
    assert len(set(at)) == len(at)
    left, right, bottom, top = *ax.get_xlim(), *ax.get_ylim()
    assert all(left < x < right and bottom < y < top for x, y in at)


def test_a_chain_is_a_tree_of_width_one(ax):
    said = draw_tree(ax, ["a", "b"], [-1, 0], [], "def", "z")
    assert len({y for _, y in (t.get_position() for t in ax.texts[:-1])}) == 1
    assert "accepts none of them" in said and said.endswith("1 emitted.")


@pytest.mark.parametrize(
    "parents, path", [([-1, 2, 0], []), ([-1, 0], []), ([-1, 0, 0], [1]), ([-1, 0, 0], [0, 0])]
)
def test_what_is_no_tree_or_no_path_is_refused(ax, parents, path):
    with pytest.raises(ValueError):
        draw_tree(ax, ["a", "b", "c"], parents, path, "def", "z")
