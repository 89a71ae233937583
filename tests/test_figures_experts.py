"""Figures about experts show their data, and their captions state it."""

import numpy as np
import pytest
import tiny_experts

from m2r2kit.bench import claims
from m2r2kit.bench import plan as planner
from m2r2kit.bench.disk import Speed
from m2r2kit.experts.generation import Event
from m2r2kit.figures import disk as disk
from m2r2kit.figures import experts as experts
from m2r2kit.figures import routing as routing
from m2r2kit.figures.style import new_figure, png

CHOSEN = np.array([[0, 3], [3, 5], [3, 1]])  # (T, k)


@pytest.fixture
def ax():
    figure, ax = new_figure()
    yield ax
    assert png(figure).startswith(b"\x89PNG")  # what was drawn can be shown


def labels(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


# --- routing ----------------------------------------------------------------------------------


def test_those_that_run_are_hatched(ax):
    said = routing.draw_router(ax, np.array([0.1, 0.4, 0.2, 0.3]), 2, "x")
    assert [bool(bar.get_hatch()) for bar in ax.patches] == [False, True, False, True]
    assert said == "After 'x' experts 1, 3 run (hatched); the router gave them 70%."


def test_a_roll_tells_named_from_missed_and_needless(ax):
    assert routing.draw_roll(ax, CHOSEN, 6, list("abc")).startswith("3 tokens; 50% of the experts")
    said = routing.draw_roll(ax, CHOSEN, 6, list("abc"), np.array([[0, 3], [3, 4], [2, 4]]))
    right, missed, needless = (set(zip(*line.get_data())) for line in ax.lines)
    assert right == {(0, 0), (0, 3), (1, 3)} and missed == {(1, 5), (2, 3), (2, 1)}
    assert needless == {(1, 4), (2, 2), (2, 4)} and "3 were predicted (50%)" in said


def test_loads_are_sorted_and_compared_with_an_even_share(ax):
    said = routing.draw_load(ax, np.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]))
    assert list(ax.lines[0].get_ydata()) == pytest.approx([1.6, 1.2, 0.8, 0.4])
    assert "serves 1.3 times an even share, the idlest 0.70; the busiest quarter serves 32%" in said


def test_curves_of_hits_have_a_mark_that_moves(ax):
    curves = routing.HitCurves(ax, [2, 4], {"LRU": [0.3, 0.6]}, 8)
    assert curves.move(5) == "With 4 of 8 slots, hit rates: LRU 60%; with random routing 50%."
    assert list(curves.mark.get_xdata()) == [4, 4]


def test_other_pictures_of_routing_say_their_numbers(ax):
    assert "in order 40%" in routing.draw_return(ax, {"in order": [0.4, 0.3]}, 0.1)
    assert "2 others" in routing.draw_distances(ax, [1, 2, 3], 8)
    assert routing.draw_bars(ax, {"a": 0.5, "b": 0.25}, "share", 0.1) == "a 0.50; b 0.25."
    said = routing.draw_recall(ax, {"M2R2": {1: 0.9, 5: 0.5}, "direct": {2: 0.8}}, 0.125)
    assert "M2R2 0.90 at 1; direct 0.80 at 2" in said and len(ax.lines) == 3


# --- timelines --------------------------------------------------------------------------------


def token(at, wait):
    return [
        Event("compute", 0, at, at + 1),
        Event("wait", 0, at + 1, at + 1 + wait),
        Event("demand", 0, at + 1, at + 1 + wait, 3),
        Event("compute", 1, at + 1 + wait, at + 2 + wait),
        Event("ahead", 1, at + 0.5, at + 1, 2),
    ]


def test_a_timeline_is_cut_at_the_first_block_and_has_no_gap_at_its_end():
    tokens = experts.by_token([*token(10, 2), *token(15, 1), *token(19, 1)])
    assert len(tokens) == 2 and [experts.seconds_of(t) for t in tokens] == [5, 4]
    assert tokens[0][0] == Event("compute", 0, 0, 1) and tokens[0][-1] == Event("compute", 2, 4, 5)
    quiet = experts.by_token([*token(0, 0), *token(3, 0), *token(6, 0)])
    assert experts.computing(quiet) == pytest.approx([1, 1, 1]) and sum(experts.computing(quiet)) == 3


def test_a_timeline_has_two_rows_a_way_and_frames_a_block(ax):
    (one, *_) = experts.by_token([*token(0, 2), *token(5, 1)])
    said = experts.draw_timelines(ax, {"on demand": one, "LRU": one}, block=1)
    assert labels(ax) == ["on demand", "its reads", "LRU", "its reads"]
    assert said == (
        "One token: on demand 5000.0 ms, LRU 5000.0 ms. Framed: block 1, and the reads of its experts."
    )
    framed = [c for c in ax.collections if c.get_linewidth()[0] == 2]
    assert len(framed) == 4  # block 1 and its read, in both ways


def test_reads_that_overlap_lie_in_lanes():
    reads = [Event("demand", 0, a, b, 0) for a, b in ((0, 2), (1, 3), (2, 4), (2.5, 5))]
    assert [[e.start for e in lane] for lane in experts._lanes(reads)] == [[0, 2], [1], [2.5]]


# --- gains ------------------------------------------------------------------------------------

FOUND = {"resident": 0.5, "in_time": 0.3, "late": 0.1, "missed": 0.1}


def test_what_an_access_found_adds_up(ax):
    said = experts.draw_found(ax, {"lru": FOUND})
    assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(1) and "lru 20%" in said


def test_ways_and_the_bound(ax):
    assert experts.draw_ways(ax, {"lru": (0.01, 0.02)}, 0.02) == "Milliseconds per token: lru 30.0."
    said = experts.draw_bound(ax, {"oracle": [(1.0, 1.8), (4.0, 1.1)], "early, live": [(2.0, 1.2)]})
    assert "oracle 1.80x at I/C 1.00; early, live 1.20x" in said
    x, y = ax.lines[0].get_data()
    assert y.max() == pytest.approx(2, abs=0.05) and y[0] < 1.1 and y[-1] < 1.1 and x[0] < 0.05


def record(simulated=False, arms=("lru", "m2r2"), nbytes=1024):
    speed = {"median": 2.0, "min": 1.8, "max": 2.2}
    arm = {"speedup_vs_on_demand": speed, "speedup_vs_lru": speed}
    wrong = {"speedup_vs_on_demand": None, "speedup_vs_lru": None}
    budget = {"share": 0.25, "io_over_compute": 1.3, "arms": {name: arm for name in arms} | {"bad": wrong}}
    figures = {"simulated": simulated, "budgets": [budget, budget]}
    return {"figures": figures, "settings": {"record_bytes": nbytes}}


def test_a_record_is_drawn_without_what_changed_the_text():
    figure, axes = new_figure(columns=2)
    said = experts.draw_budgets(axes, record())
    assert labels(axes[0]) == ["lru", "m2r2"] and "25.0% of the experts in memory: lru 2.00x" in said
    assert png(figure)
    assert experts.record_points(record(), "m2r2") == [(1.3, 2.0)] * 2
    assert experts.record_points(record(), "bad") == experts.record_points(record(), "none") == []


def test_the_record_of_a_real_disk_with_most_arms_is_taken(monkeypatch):
    few, many, link = record(arms=("lru",)), record(), record(True, ("a", "b", "c"))
    for found, best in (([], None), ([link], link), ([many, few, link], many), ([many, record()], 1)):
        monkeypatch.setattr(claims, "accepted", lambda _, found=found: found)
        assert experts.newest() is (found[1] if best == 1 else best)


def test_sizes_of_experts_are_drawn_from_the_newest_record_of_each(monkeypatch, ax):
    small, large = record(), record(nbytes=4096)
    found = [large, record(), record(True, nbytes=9), small, record(arms=("lru",))]
    monkeypatch.setattr(claims, "accepted", lambda _: found)
    assert [id(r) for r in experts.sizes()] == [id(small), id(large)]
    assert experts.newest(4096) is large and experts.newest(7) is None
    said = experts.draw_sizes(ax, experts.sizes(), 0.25)
    assert said.startswith("25.0% in memory, experts of 1, 1, 4, 4 KiB: lru 2.00x") and "oracle" in said
    named = [text.get_text() for text in ax.get_legend().get_texts()]
    assert named == ["lru", "next-router", "m2r2", "oracle"]


# --- the disk ---------------------------------------------------------------------------------


def test_speeds_show_what_the_system_read(ax):
    said = disk.draw_speeds(ax, {"direct": Speed(1e9, 1e9), "warm": Speed(5e9, 0.0), "mac": Speed(2e9, None)})
    assert said == "direct 1,000 MB/s, of them 100% disk; warm 5,000 MB/s, of them 0% disk; mac 2,000 MB/s."
    assert len(labels(ax)) == 3


def test_sizes_and_records(ax):
    said = disk.draw_sizes(ax, [4096, 1 << 20], {1: [1e7, 5e8], 2: [2e7, 1e9]})
    assert "50 times" in said and "1,000 MB/s with 2 threads and 1024 KiB" in said
    manifest = tiny_experts.store().manifest
    assert f"{manifest.record_bytes // 4096} pages" in disk.draw_record(ax, manifest)
    assert sum(bar.get_width() for bar in ax.patches) * 4096 == manifest.slot_bytes // len(manifest.blocks)


def test_plans_and_checks(ax):
    plans = [
        planner.Plan(s, 0, s, 1.0, 2 * (1 - s), 1 / (3 - 2 * s), 1 / max(1, 2 - 2 * s), "") for s in (0, 0.5)
    ]
    said = disk.draw_plan(ax, plans, 1, 0.7)
    assert "I/C 1.00; 0.5 tokens/s on demand, 1.0 ahead of time (2.00 times)" in said
    assert "4 of 7 published figures" in disk.draw_checks(ax, planner.check())
