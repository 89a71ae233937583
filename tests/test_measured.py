"""Records as tables and bars: each cell and each bar is the record's value. Nothing is measured here."""

import copy

import pytest

from m2r2kit.bench import claims, measured, records, report
from m2r2kit.figures.claims import draw_rows
from m2r2kit.figures.style import new_figure, png


def newest(subject):
    return claims.accepted(subject)[-1]


def cells(table):
    return {row[0]: dict(zip(table.heads, row)) for row in table.rows}


def test_an_arm_with_other_text_has_no_speed():
    figures = copy.deepcopy(newest("speculation")["figures"])
    speed = figures["arms"]["m2r2"]["speedup_vs_plain"]["median"]
    arms, kinds = measured.speculation(figures)
    assert cells(arms)["m2r2"]["speed-up"] == f"{speed:.2f}x" and cells(arms)["m2r2"]["equal"] == "yes"
    for kind, found in figures["per_kind"].items():
        assert cells(kinds)["m2r2"][kind] == f"{found['m2r2']['median']:.2f}x"
    assert "plain" not in cells(kinds)
    other = {"equal": False, "mismatches": 1, "ties": 0, "speedup_vs_plain": None, "speedup_vs_mlx_lm": None}
    figures["arms"]["m2r2"] |= other
    shown = cells(measured.speculation(figures)[0])["m2r2"]
    assert (shown["speed-up"], shown["from..to"], shown["x mlx_lm"], shown["equal"]) == ("-", "-", "-", "NO")


def test_experts_one_table_a_budget_and_what_they_ran_on():
    figures = copy.deepcopy(newest("experts")["figures"])
    on, *tables = measured.experts(figures)
    assert f"{figures['disk_bytes_per_second'] / 1e6:.0f} MB/s" in str(on) and "DIFFER" not in str(on)
    for table, budget in zip(tables, figures["budgets"], strict=True):
        assert f"budget {budget['share']:.1%}" in table.caption
        arm = budget["arms"]["m2r2"]
        assert cells(table)["m2r2"]["x lru"] == f"{arm['speedup_vs_lru']['median']:.2f}x"
    figures["resident_equal"] = figures["budgets"][0]["arms"]["m2r2"]["equal"] = False
    on, first, *_ = measured.experts(figures)
    assert "THE TEXTS DIFFER" in str(on) and cells(first)["m2r2"]["tok/s"] == "differs"


def test_exits_come_by_what_they_save():
    figures = newest("exits")["figures"]
    (table,) = measured.exits(figures)
    saved = [figures["methods"][row[0]]["merit"]["0.05"]["saved"] for row in table.rows]
    assert saved == sorted(saved, reverse=True) and len(saved) == len(figures["methods"])


@pytest.mark.parametrize("subject", sorted(measured.SUBJECTS))
def test_a_record_is_folded_under_its_title_with_its_command(subject):
    record = records.latest(subject) | {"command": "m2r2kit bench <all>"}
    seen = measured.Measured(subject, record)
    markup, text = seen._repr_html_(), repr(seen)
    assert markup.startswith(f"<details><summary><b>{seen.title}</b></summary>".replace("'", "&#x27;"))
    assert "<code>m2r2kit bench &lt;all&gt;</code>" in markup and record["date"][:10] in markup
    assert seen.title in text and "m2r2kit bench <all>" in text
    assert all(row[-1] in markup and row[-1] in text for table in seen.tables for row in table.rows)


# --- the paper-and-ours table as bars -----------------------------------------------------------


def row(name, ours, baseline=1.0, **more):
    return {
        "id": name, "unit": "x", "ours": ours, "low": None, "high": None, "baseline": baseline,
        "paper": None, "better": "higher", "verdict": "direction only",
    } | more  # fmt: skip


def test_one_value_of_ours_is_one_bar_above_all_that_it_is_compared_with():
    figure, ax = new_figure()
    rows = [
        row("a", 2.0, 1.5),
        row("b", 2.0, 1.2),
        row("c", 1.1, paper=2.8),
        row("d", None, None, verdict="not tested"),
        row("e", 0.7, unit="share"),
    ]
    said = draw_rows(ax, rows, "x")
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["ours", "a", "b", "ours", "c", "ours", "d"]
    bars = [(bar.get_width(), bool(bar.get_hatch())) for bar in ax.patches]
    assert bars == [(2.0, False), (1.5, True), (1.2, True), (1.1, False), (2.8, True)]
    texts = [text.get_text() for text in ax.texts]
    assert " paper 2.80x" in texts and " baseline 1.20x" in texts and " not tested" in texts
    assert said == "Verdicts on 4 speed-ups: 3 direction only, 1 not tested."
    assert png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("unit", ("x", "share"))
def test_every_row_of_the_table_is_drawn(unit):
    _, ax = new_figure()
    draw_rows(ax, report.table(), unit)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert {name for name in names if name != "ours"} == {
        r["id"] for r in report.table() if r["unit"] == unit
    }
