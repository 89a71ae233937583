"""The map of exits: short drafts derived from long ones, costs and equality at each exit."""

import pytest
import tiny

from m2r2kit import __main__ as cli
from m2r2kit.bench import exit_map, records
from m2r2kit.bench.costs import speedup
from m2r2kit.common import UserError
from m2r2kit.speculation import EarlyExit, generate
from m2r2kit.text import prompts

ASKED = [tiny.prompt(5), tiny.prompt(7)]


@pytest.fixture
def costs(monkeypatch):
    """A draft costs 0.1, a verification of k drafts 1 + k / 10, in plain steps."""
    monkeypatch.setattr(exit_map, "smooth", lambda *_: (0.1, (0.1, 1.0)))


def test_short_drafts_are_the_beginnings_of_long_ones():
    found = exit_map.predicted([0, 1, 3, 0], [3, 3, 3, 1], 0.1, [1.1, 1.2, 1.3])  # the short step is left out
    taus = [1 + 2 / 3, 1 + 3 / 3, 1 + 4 / 3]
    assert found == pytest.approx([tau / (0.1 * k + 1 + k / 10) for k, tau in enumerate(taus, 1)])
    with pytest.raises(UserError, match="No step drafted 3 tokens"):
        exit_map.predicted([0], [1], 0.1, [1.1, 1.2, 1.3])


def test_a_map_has_a_row_an_exit(costs):
    view = tiny.backbone()
    figures = exit_map.exit_map(view, {E: EarlyExit(view, E) for E in (1, 3)}, ASKED, 3, 12)
    assert figures["drafts"] == [1, 2, 3] and [row["exit"] for row in figures["rows"]] == [1, 3]
    for row in figures["rows"]:
        assert row["equal"] and row["verify_cost"] == pytest.approx([1.1, 1.2, 1.3])
        outs = [generate(view, prompt, EarlyExit(view, row["exit"]), 3, 12) for prompt in ASKED]
        right = [n for out in outs for n, d in zip(out.accepted, out.drafted, strict=True) if d == 3]
        first = sum(n >= 1 for n in right) / len(right)
        assert row["predicted_speedup"][0] == pytest.approx(speedup(first, 1, 0.1, 1.1))


def test_an_exit_that_changes_the_text_has_no_speed(costs, monkeypatch):
    monkeypatch.setattr(exit_map.Arm, "equal", False)
    view = tiny.backbone()
    rows = exit_map.exit_map(view, {2: EarlyExit(view, 2)}, ASKED, 2, 6)["rows"]
    assert rows[0]["predicted_speedup"] is None and not rows[0]["equal"]


def test_the_command_prints_and_records(costs, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(prompts, "read", lambda path: [prompts.Prompt("a", "abc", "x")])
    command = ["bench", "map", "--model", str(tiny.folder("llama")), "--exits", "1,2", "--drafts", "2"]
    assert cli.main([*command, "--max-tokens", "9", "--record"]) == 0
    found = records.latest("speculation-map", method="early-exit")
    assert [row["exit"] for row in found["figures"]["rows"]] == [1, 2]
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["1", "0.10"]
    assert cli.main([*command[:-4], "--exits", "9"]) == 2
    assert "exit must lie between 1 and 3" in capsys.readouterr().err
