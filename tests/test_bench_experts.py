"""`bench experts`: what is counted, and that a wrong arm gets no speed. No speed is asserted."""

import json

import pytest
import tiny
import tiny_experts

from m2r2kit.__main__ import main
from m2r2kit.bench import experts as bench_experts
from m2r2kit.bench import records
from m2r2kit.bench.experts import Disk, compare
from m2r2kit.experts.decode import StreamedModel
from m2r2kit.experts.slots import Bank

PROMPTS = [tiny.prompt(3, 1), tiny.prompt(9, 2)]


def figures(**changes):
    model = StreamedModel(tiny_experts.model("mixtral"), tiny_experts.store("mixtral"))
    asked = {"shares": [0.5], "disk": Disk("buffered"), "max_tokens": 8, "repeats": 2, "say": lambda _: None}
    return compare(model, tiny_experts.model("mixtral"), PROMPTS, **(asked | changes))


def test_arms_are_measured_and_counted():
    said = []
    found = figures(say=said.append)
    assert [s.split(".")[0] for s in said] == ["Left out: direct", "Left out: m2r2", "Left out: m2r2-r1"]
    (budget,) = found["budgets"]
    arms = budget["arms"]
    assert budget["slots"] == 4 and list(arms) == ["on-demand", "lru", "next-router", "oracle"]
    record = tiny_experts.store("mixtral").manifest.record_bytes
    for arm in arms.values():
        assert arm["equal"] and len(arm["seconds"]) == 2
        shares = [arm[key] for key in ("resident", "in_time", "late", "missed")]
        assert sum(shares) == pytest.approx(1)
        assert arm["useful_bytes_per_token"] <= arm["bytes_per_token"]
    assert arms["on-demand"]["missed"] == 1
    assert arms["on-demand"]["bytes_per_token"] == tiny.BLOCKS * tiny_experts.K * record
    assert arms["oracle"]["missed"] == 0 and arms["oracle"]["recall"] == 1
    assert arms["oracle"]["useful_bytes_per_token"] > 0
    assert 1 <= budget["bound"] <= 2


def test_an_arm_whose_text_differs_gets_no_speed(monkeypatch):
    real, banks = Bank.write, []

    def write(self, slot, record):  # of the second arm one slot is not written
        if self not in banks:
            banks.append(self)
        if banks.index(self) < 2 * tiny.BLOCKS or slot:
            real(self, slot, record)

    monkeypatch.setattr(Bank, "write", write)
    arms = figures()["budgets"][0]["arms"]
    assert arms["on-demand"]["equal"]
    assert not arms["lru"]["equal"] and arms["lru"]["tokens_per_second"] is None


def test_a_resident_model_that_says_otherwise_is_noticed():
    found = figures(whole=tiny_experts.resident("olmoe"))
    assert found["resident_equal"] is False
    assert not any(arm["equal"] for arm in found["budgets"][0]["arms"].values())


def test_with_the_model_in_memory_its_overhead_is_measured():
    found = figures(whole=tiny_experts.resident("mixtral"))
    assert found["resident_equal"] and all(arm["equal"] for arm in found["budgets"][0]["arms"].values())
    for name, more, less in (("resident", "whole", "plain"), ("stops", "compute", "whole")):
        ratio = found[f"overhead_{name}"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert ratio["min"] <= found[f"{more}_seconds"] / found[f"{less}_seconds"] <= ratio["max"]


def test_without_it_the_arms_are_compared_with_each_other_and_less_is_held(monkeypatch):
    held, real = [], StreamedModel.residency
    monkeypatch.setattr(
        StreamedModel, "residency", lambda self, slots, *more: held.append(slots) or real(self, slots, *more)
    )
    found = figures(shares=[0.25, 0.5])
    assert found["resident_equal"] is found["overhead_resident"] is None
    assert found["compute_seconds"] > 0 and "4 slots per block" in found["compute_from"]
    assert max(held) == 4  # never more than the largest budget
    assert all(arm["equal"] for budget in found["budgets"] for arm in budget["arms"].values())


def test_the_command_prints_a_table_and_records_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"id": "a", "prompt": "hello"}\n{"id": "b", "prompt": "q"}\n')
    store = str(tiny_experts.store().folder)
    asked = [
        "bench", "experts", "--model", str(tiny_experts.model()), "--experts", store,
        "--prompts", str(prompts), "--budgets", "25%,50%", "--max-tokens", "6", "--repeats", "1",
        "--reads", "buffered", "--link", "50MB", "--record",
    ]  # fmt: skip
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert "disk (simulated)" in out and "budget 25.0% (2 slots per block)" in out
    record = json.loads((tmp_path / "experts.jsonl").read_text())
    assert record["settings"]["link"] == 50_000_000 and len(record["figures"]["budgets"]) == 2
    assert main([*asked[:-1], "--budgets", "10%"]) == 2
    assert "does not hold them" in capsys.readouterr().err
    assert main([*asked[:-1], "--json", str(prompts / "f.json")]) == 2
    assert "a part of its path is a file" in capsys.readouterr().err
    assert main(["bench", "experts"]) == 2


def test_every_arm_has_a_policy_and_a_predictor():
    from m2r2kit.experts import registry

    for policy, predictor in bench_experts.ARMS.values():
        assert policy in registry.POLICIES
        assert predictor in registry.PREDICTORS
