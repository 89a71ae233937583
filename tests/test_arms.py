"""The table of arms shows what a record holds, also where it does not hold everything."""

import pytest

from m2r2kit.bench import claims
from m2r2kit.bench.arms import HEADS, ArmsTable, newest, parts
from m2r2kit.bench.costs import speedup
from m2r2kit.common import UserError
from m2r2kit.speculation.registry import METHODS


def arm(speed, drafts=4, c=0.1, v=1.2, tau=2.5, **more):
    ratio = speed and {"median": speed, "min": speed - 0.1, "max": speed + 0.1}
    return {"speedup_vs_plain": ratio, "drafts": drafts, "draft_cost": c, "verify_cost": v, "tau": tau,
            "predicted_speedup": tau / (drafts * c + v), "equal": speed is not None} | more  # fmt: skip


def record(**arms):
    names = {name.replace("_", "-"): each for name, each in arms.items()}
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "command": "m2r2kit bench speculation",
        "settings": {"prompts": 3},
        "figures": {"arms": names},
        "machine": {"chip": "Chip <1>"},
    }


PLAIN = arm(1.0, 0, 0.0, 1.0, 1.0)


def test_the_fastest_comes_first_and_a_changed_text_last():
    table = ArmsTable(record(eagle=arm(None), plain=PLAIN, m2r2=arm(1.8), new_way=arm(0.7)))
    assert [row[0] for row in table.rows] == ["m2r2", "plain", "new-way", "eagle"]
    assert table.rows[0][1:7] == ("1.80x", "1.70..1.90", "1.56x", "2.50", "0.10", "1.20")
    assert ArmsTable(record(plain=PLAIN, lookahead=arm(1.1, c=-0.001))).rows[0][5] == "0.00"
    assert table.rows[3][1:3] == ("other text", "-")


def test_parameters_and_training_may_be_missing_or_none():
    arms = {
        "deed": arm(1.1),
        "eagle": arm(1.5, parameters=None, train_steps=None, train_seconds=None),
        "m2r2": arm(1.8, parameters=451040, train_steps=1500, train_seconds=600),
        "medusa": arm(1.2, parameters=0, train_steps=1500),
    }
    cells = {row[0]: row[-2:] for row in ArmsTable(record(**arms)).rows}
    assert cells["deed"] == cells["eagle"] == ("-", "-")
    assert cells["m2r2"] == ("451 k", "10 min (1,500 steps)") and cells["medusa"] == ("0", "1,500 steps")


def test_the_three_forms_hold_the_same_cells_and_escape_what_they_quote():
    table = ArmsTable(record(plain=PLAIN, m2r2=arm(1.8)))
    markup, markdown, text = table._repr_html_(), table.as_markdown(), repr(table)
    for cell in [*HEADS, *table.rows[0]]:
        assert cell in markup and cell in markdown and cell in text
    assert "Chip &lt;1&gt;" in markup and "Chip <1>" in text
    assert "<b>m2r2</b>" in markup and str(METHODS["m2r2"]) in text


def test_newest_takes_the_most_arms_then_the_last(monkeypatch, tmp_path):
    found = [record(plain=PLAIN, m2r2=arm(s)) for s in (1.1, 1.2)] + [record(plain=PLAIN)]
    monkeypatch.setattr(claims, "accepted", lambda subject: found)
    assert newest() is found[1]
    monkeypatch.setattr(claims, "accepted", lambda subject: [])
    with pytest.raises(UserError, match="no record yet"):
        newest()


def test_parts_put_together_give_the_prediction():
    found = parts(record(m2r2=arm(1.8, drafts=4)), "m2r2")
    assert found["g"] == pytest.approx(4) and found["measured"] == 1.8
    assert speedup(found["a"], 4, found["c"], found["v"]) == pytest.approx(found["predicted"])


@pytest.mark.parametrize("bad", [PLAIN, arm(None), arm(1.0) | {"predicted_speedup": None}])
def test_an_arm_without_drafts_or_speed_has_no_parts(bad):
    with pytest.raises(UserError):
        parts(record(bad=bad), "bad")


def test_the_drafts_are_taken_as_counted_where_the_record_has_them():
    assert parts(record(m2r2=arm(1.8, drafts=4, drafted=2.25)), "m2r2")["g"] == 2.25


def test_an_arm_that_never_had_a_draft_has_no_parts():
    with pytest.raises(UserError, match="never drafted a token"):
        parts(record(lookup=arm(1.0, tau=1.0, drafted=0.0)), "lookup")


def test_an_arm_that_was_not_measured_is_named_in_a_sentence():
    with pytest.raises(UserError, match=r"no arm m2r2, only plain, eagle; .*--methods all"):
        parts(record(plain=PLAIN, eagle=arm(1.2)), "m2r2")


def test_the_committed_records_can_be_shown():
    table = ArmsTable(newest())
    assert len(table.rows) == len(newest()["figures"]["arms"]) and "m2r2" in repr(table)
