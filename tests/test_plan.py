"""The planner: its arithmetic against published sizes, its limits, and a trace instead of an assumption."""

import pytest

from m2r2kit.__main__ import main
from m2r2kit.bench.plan import CARDS, MACHINES, Card, Machine, check, hits_of_trace, plan
from m2r2kit.experts.trace import sticky

OLMOE, QWEN3, QWEN35 = CARDS


def test_sizes_are_those_that_others_have_published():
    assert OLMOE.expert_bytes(4) == 3_538_944 and OLMOE.token_bytes(4) == pytest.approx(453e6, rel=1e-3)
    assert QWEN35.expert_bytes(4) == 7_077_888 and QWEN35.expert_bytes(2) == 3_932_160
    assert QWEN35.all_bytes(4) == pytest.approx(217.4e9, rel=1e-3)
    for card, weights in ((OLMOE, 6.92e9), (QWEN3, 30.5e9), (QWEN35, 397e9)):
        experts = card.all_bytes(16) / 2
        assert experts + card.others == pytest.approx(weights, rel=0.01)


def test_flash_moe_is_explained_where_it_is_arithmetic():
    for row in check()[:3]:
        assert row.computed == pytest.approx(row.published, rel=0.01)
    serial = next(row for row in check() if "in sequence" in row.what)
    assert serial.computed == pytest.approx(serial.published, rel=0.01)
    assert check()[3].computed == pytest.approx(10.3, abs=0.05)


def test_the_bound_is_kept_and_more_disk_helps_until_it_hides():
    card = Card("c", 10, 32, 4, 256, 256, 1e6, "")
    before = None
    for disk in (1e8, 1e9, 1e10, 1e11):
        found = plan(card, Machine("m", disk, 1e11, 30e6, ""))
        assert 1 <= found.bound <= 2 and found.ahead / found.on_demand == pytest.approx(found.bound)
        assert found.budget <= 30e6
        if before:
            assert found.ahead >= before.ahead and found.share <= before.share
        before = found
    assert before.why == "reads hide" and before.ratio <= 1


def test_what_does_not_fit_is_said():
    assert plan(QWEN35, Machine("m", 1e9, 1e11, 1e9, "")) is None
    assert plan(QWEN35, MACHINES[0]).why == "memory ends"


def test_a_trace_says_what_a_cache_would_find():
    trace = sticky(blocks=2, experts=8, top_k=2, passes=300, stay=0.7, seed=1)
    hits = hits_of_trace(trace)
    assert hits[0] == 0 and len(hits) == 8
    assert hits == sorted(hits) and hits[-1] == 1  # all are read at the beginning
    assert hits[2] > 3 / 8  # better than without preference
    card = Card("c", 2, 8, 2, 256, 256, 1e6, "")
    machine = Machine("m", 1e9, 1e11, 30e6, "")
    assert plan(card, machine, hits=hits).share <= plan(card, machine).share


def test_the_command_prints_the_plans(capsys):
    assert main(["bench", "experts", "--plan"]) == 0
    out = capsys.readouterr().out
    assert all(card.name in out for card in CARDS) and "Flash-MoE" in out and "10.30" in out
    assert main(["bench", "experts", "--plan", "OLMoE-1B-7B"]) == 0
    assert "Qwen3-30B" not in capsys.readouterr().out
    assert main(["bench", "experts", "--plan", "GPT-2"]) == 2
    assert "no plan for 'GPT-2'" in capsys.readouterr().err
