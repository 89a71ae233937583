"""The pictures of all arms show what the record holds, and their sentences say it."""

import pytest
from test_arms import PLAIN, arm, record

from m2r2kit.bench import claims
from m2r2kit.bench.arms import newest
from m2r2kit.common import UserError
from m2r2kit.figures.arms import draw_acceptance, draw_map, draw_predicted, draw_speeds
from m2r2kit.figures.style import new_figure, png


@pytest.fixture
def ax():
    figure, ax = new_figure()
    yield ax
    assert png(figure).startswith(b"\x89PNG")  # what was drawn can be shown


def names(ax) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def bars(ax) -> list:
    return [box for box in ax.patches if box.get_height()]


SEEN = record(
    plain=PLAIN | {"acceptance": []},
    eagle=arm(None, acceptance=[0.9]),
    m2r2=arm(1.6, predicted_speedup=1.65, acceptance=[0.7, 0.8]),
    medusa=arm(1.2, predicted_speedup=1.5, acceptance=[0.3]),
)


def test_a_bar_is_as_long_as_its_speed_and_its_error_bar_spans_the_rounds(ax):
    said = draw_speeds(ax, SEEN, paper=2.8)
    assert names(ax) == ["m2r2", "medusa", "plain", "eagle"]
    assert [bar.get_width() for bar in bars(ax)] == [1.6, 1.2, 1.0]
    assert [bool(bar.get_hatch()) for bar in bars(ax)] == [True, False, False]
    ends = ax.containers[1].lines[2][0].get_segments()[0][:, 0]
    assert list(ends) == pytest.approx([1.5, 1.7])
    verticals = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() in ("--", "-.")]
    assert verticals == [1, 2.8] and ax.get_xlim()[1] > 2.8
    assert "m2r2 1.60, medusa 1.20, plain 1.00." in said and said.endswith("the text changed: eagle.")


def test_each_arm_that_drafts_has_a_line_that_no_other_looks_like(ax):
    said = draw_acceptance(ax, SEEN)
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.7, 0.8], [0.3], [0.9]]
    assert ax.lines[0].get_linewidth() > ax.lines[1].get_linewidth()  # ours
    assert said.startswith("Acceptance of the first draft: eagle 0.90, m2r2 0.70, medusa 0.30.")
    many = record(**{f"arm{i}": arm(1.0 + i, acceptance=[0.5]) for i in range(12)})
    draw_acceptance(ax, many)
    assert len({line.get_marker() for line in ax.lines}) == len(ax.lines) == 12


def test_what_lies_outside_the_band_is_named(ax):
    said = draw_predicted(ax, SEEN)
    assert names(ax) == ["m2r2", "medusa"]  # plain drafts nothing, eagle has no speed
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars(ax)]
    assert spans == [pytest.approx((0.9 * p, 1.1 * p)) for p in (1.65, 1.5)]
    assert (
        said == "Measured within 10% of the prediction: 1 of 2 arms. Outside: medusa (1.20, predicted 1.50)."
    )
    assert [text.get_text() for text in ax.texts] == ["outside"]


@pytest.mark.parametrize("draw", [draw_acceptance, draw_predicted])
def test_a_record_without_drafts_is_refused_in_a_sentence(ax, draw):
    with pytest.raises(UserError, match="`m2r2kit bench speculation"):
        draw(ax, record(plain=PLAIN | {"acceptance": []}))


@pytest.mark.parametrize("draw", [draw_speeds, draw_acceptance, draw_predicted])
def test_the_committed_records_can_be_drawn(ax, draw):
    assert "m2r2 " in draw(ax, newest()) or draw is draw_predicted


MAP = {
    "settings": {"method": "early-exit"},
    "figures": {
        "drafts": [1, 2, 3],
        "rows": [
            {"exit": 1, "predicted_speedup": [1.1, 1.3, 1.2]},
            {"exit": 2, "predicted_speedup": None},  # its text was not plain decoding's
            {"exit": 4, "predicted_speedup": [0.9, 0.8, 0.7]},
        ],
    },
}


def test_a_map_says_each_number_and_frames_the_best(ax):
    said = draw_map(ax, MAP)
    assert [text.get_text() for text in ax.texts] == ["1.10", "1.30", "1.20", "0.90", "0.80", "0.70"]
    assert ax.patches[0].get_xy() == (0.5, -0.5)
    assert names(ax) == ["1", "4"] and said.endswith("at best 1.30x, with exit 1 and 2 drafts.")


def test_without_a_map_the_command_is_named(ax, monkeypatch):
    monkeypatch.setattr(claims, "accepted", lambda subject: [])
    with pytest.raises(UserError, match="`m2r2kit bench map --record`"):
        draw_map(ax)
