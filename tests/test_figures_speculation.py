"""The pictures of notebooks 02 and 04 show what they are given, and their sentences say it."""

import re

import pytest
from matplotlib.patches import Rectangle

from m2r2kit.bench.costs import speedup
from m2r2kit.figures.speculation import (
    draw_accept_rule,
    draw_rates,
    draw_readouts,
    draw_speedup,
    draw_streams,
)
from m2r2kit.figures.style import new_figure, png


@pytest.fixture
def ax():
    figure, ax = new_figure()
    yield ax
    assert png(figure).startswith(b"\x89PNG")  # what was drawn can be shown


def words(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


@pytest.mark.parametrize("depth, exit", [(24, 2), (12, 6), (4, 1)])
def test_streams_end_where_the_model_and_the_exit_are(ax, depth, exit):
    said = draw_streams(ax, depth, exit)
    assert any(f"$h_{{{depth}}}$" in w for w in words(ax)) and any(
        f"$p_{{{exit}}}$, then" in w for w in words(ax)
    )
    assert f"passes {depth} blocks" in said and f"passes {exit}," in said


def test_rates_are_drawn_as_given(ax):
    said = draw_rates(ax, 12, 3, [0, 4, 8, 12])
    slow, fast = ax.lines[:2]
    assert list(slow.get_ydata()) == list(range(13))
    assert list(fast.get_ydata()) == [0, 4, 8, 12]
    assert "9 blocks ahead" in said
    assert "control" in draw_rates(ax, 12, 3, [0, 1, 2, 3])


def test_a_bar_is_as_long_as_its_agreement(ax):
    rows = [
        {"form": "bare", "agreement": 0.2, "parameters": 0},
        {"form": "block", "agreement": 0.5, "parameters": 4000},
    ]
    said = draw_readouts(ax, rows)
    assert [bar.get_width() for bar in ax.patches] == [0.2, 0.5]
    assert [bool(bar.get_hatch()) for bar in ax.patches] == [False, True]
    assert said.endswith("Highest: block.") and "bare 0.20" in said


def test_the_areas_of_the_accept_rule_are_probabilities(ax):
    p, q = [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]
    said = draw_accept_rule(ax, p, q, ["a", "b", "c"])
    bars = [b.get_height() for b in ax.patches if isinstance(b, Rectangle)][:12]
    assert sum(bars) == pytest.approx(2)  # p and q, in whatever parts
    assert "with probability 0.60" in said and "between them is 0.40" in said


def test_the_prediction_and_the_measurement_stand_side_by_side(ax):
    curve = [speedup(0.7, g, 0.1) for g in range(9)]
    said = draw_speedup(ax, range(9), curve, 3, (3, 1.5))
    assert list(ax.lines[0].get_ydata()) == curve
    best = int(re.search(r"best length is (\d)", said)[1])
    assert curve[best] == max(curve) and "1.50x, measured with 3" in said
    assert "Not drafting is best." in draw_speedup(ax, range(9), [1 - 0.1 * g for g in range(9)], 1, None)


def test_the_papers_line_stands_where_its_value_is(ax):
    draw_speedup(ax, range(1, 4), [1.1, 1.2, 1.3], 2, (2.66, 1.7), 2.8)
    flat = {tuple(line.get_ydata()): line.get_label() for line in ax.lines}
    assert flat[2.8, 2.8] == "paper: up to 2.8x"
    assert not any("paper" in line.get_label() for line in _redrawn(ax).lines)


def _redrawn(ax):
    draw_speedup(ax, range(1, 4), [1.1, 1.2, 1.3], 2, None)
    return ax
