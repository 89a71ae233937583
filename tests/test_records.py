"""Records: complete or absent, without a machine's paths; and the table made from them."""

import json
import os
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

import m2r2kit
from m2r2kit.bench import claims, records, report
from m2r2kit.common import UserError
from m2r2kit.model.hashes import weights_sha256
from m2r2kit.text import prompts


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def add(subject="speculation", figures=None, prompts_sha256=None, **settings):
    return records.append(
        subject,
        command="m2r2kit report",
        settings=settings,
        figures=figures or {"x": 1},
        prompts_sha256=prompts_sha256,
    )


def ours(subject="speculation", figures=None, **changes):
    """A record that the rows of the table accept."""
    file = claims.load("claims.toml")
    asked = file["accepts"][subject]
    settings = {"model_sha256": file["models"][asked["models"][0]][0], **asked["least"]}
    return add(subject, figures, prompts.sha256(prompts.read(prompts.ALL)), **(settings | changes))


# --- records ------------------------------------------------------------------------------


def test_a_record_says_where_it_was_made():
    written = add(exit=3)
    assert records.read("speculation") == [written]
    assert {"date", "commit", "versions", "machine", "command", "prompts_sha256"} <= written.keys()
    assert written["machine"]["cores"] >= 1 and written["versions"]["mlx"]


def test_latest_selects_by_settings():
    add(exit=3, draft=4)
    add(exit=3, draft=5)
    add(exit=4, draft=4)
    assert records.latest("speculation")["settings"] == {"exit": 4, "draft": 4}
    assert records.latest("speculation", exit=3)["settings"]["draft"] == 5
    assert records.latest("speculation", exit=9) is None
    assert records.latest("pretrain") is None


def test_no_path_of_a_machine_is_stored():
    model = str(records.ROOT / "data" / "pocket-dense")
    elsewhere = "/home/someone/secret/prompts.jsonl"
    written = records.append(
        "speculation",
        command=f"m2r2kit bench speculation --model {model} --prompts={elsewhere}",
        settings={"model": model, "page": "https://arxiv.org/abs/2502.02040", "unit": "tokens/s"},
        figures={"files": [elsewhere]},
    )
    text = json.dumps(written)
    assert "someone" not in text and str(records.ROOT) not in text
    assert written["command"] == "m2r2kit bench speculation --model data/pocket-dense --prompts=prompts.jsonl"
    assert written["settings"] == {
        "model": "data/pocket-dense",
        "page": "https://arxiv.org/abs/2502.02040",
        "unit": "tokens/s",
    }


def test_numpy_scalars_are_stored_and_what_is_not_a_number_is_not():
    assert add(figures={"x": np.float32(0.5)})["figures"] == {"x": 0.5}
    with pytest.raises(ValueError):
        add(figures={"x": float("nan")})
    assert len(records.read("speculation")) == 1


FACTS = '"date": "2026-01-01T00:00:00+00:00", "machine": {"chip": "c", "cores": 2}'


@pytest.mark.parametrize(
    "broken",
    [
        '{"settings": {}, "fig',
        "[1]",
        '{"figures": {}}',
        "",
        f'{{{FACTS}, "settings": 1, "figures": {{}}}}',
        f'{{{FACTS}, "settings": {{}}, "figures": []}}',
    ],
)
def test_a_broken_line_is_named_and_nothing_is_added_to_it(broken, folder):
    add()
    with open(folder / "speculation.jsonl", "a") as stream:
        stream.write(broken + "\n")
    before = (folder / "speculation.jsonl").read_bytes()
    for work in (lambda: records.read("speculation"), add):
        with pytest.raises(UserError, match=r"speculation\.jsonl, line 2"):
            work()
    assert (folder / "speculation.jsonl").read_bytes() == before


def test_a_line_cut_off_at_its_end_is_broken(folder):
    add()
    file = folder / "speculation.jsonl"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="line 1"):
        records.read("speculation")


def test_a_failed_write_leaves_the_old_records(folder, monkeypatch):
    add()
    before = (folder / "speculation.jsonl").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        add()
    assert (folder / "speculation.jsonl").read_bytes() == before


def test_a_subject_cannot_leave_the_folder():
    with pytest.raises(UserError):
        records.read("../secrets")


# --- the table ----------------------------------------------------------------------------


def speculation(speed=1.7, equal=True):
    spread = {"median": speed, "min": speed - 0.1, "max": speed + 0.1}
    arm = {"equal": equal, "seconds": [1.0] * 5, "speedup_vs_plain": spread}
    arm |= {"acceptance": [0.6, 0.5], "tau": 2.2, "predicted_speedup": speed}
    return {"arms": {"m2r2": arm, "early-exit": {"equal": True, "acceptance": [0.3], "tau": 1.4}}}


def row(name):
    return next(r for r in report.table() if r["id"] == name)


def test_without_records_nothing_is_tested():
    rows = report.table()
    assert {r["verdict"] for r in rows} == {"not tested"}
    assert all(r["reason"] for r in rows)
    assert [r["group"] for r in rows] == sorted((r["group"] for r in rows), key=list(report.GROUPS).index)


@pytest.mark.parametrize(
    ("speed", "verdict"), [(2.8, "reproduced"), (1.7, "direction only"), (1.01, "differs"), (0.9, "differs")]
)
def test_a_speed_up_gets_its_verdict(speed, verdict):
    ours(figures=speculation(speed))
    found = row("speculation-speedup")
    assert found["verdict"] == verdict and found["n"] == 5
    assert found["ratio"] == pytest.approx(speed / 2.8, abs=1e-3)


def test_a_record_of_something_else_fills_no_row():
    ours(figures=speculation(1.7))
    for changes in (
        {"model_sha256": "0" * 64, "model": "pocket-dense"},
        {"model_sha256": None},
        {"prompts": 1},
        {"max_tokens": 2},
        {"repeats": "many"},
    ):
        ours(figures=speculation(2.8), **changes)
    file = claims.load("claims.toml")["models"]["pocket-dense"]
    add(
        "speculation", speculation(2.8), "0" * 64, model_sha256=file[0], prompts=96, max_tokens=128, repeats=5
    )
    assert row("speculation-speedup")["ours"] == 1.7


def test_the_newest_record_is_that_of_the_latest_date(folder):
    for speed in (1.5, 1.6):
        ours(figures=speculation(speed))
    file = folder / "speculation.jsonl"
    first, second = map(json.loads, file.read_text().splitlines())
    first["date"] = "2027-03-01T00:30:00+02:00"
    second["date"] = "2027-02-28T23:00:00+00:00"  # half an hour later
    file.write_text("".join(json.dumps(r) + "\n" for r in (second, first)))
    assert row("speculation-speedup")["ours"] == 1.6
    assert records.latest("speculation")["date"] == second["date"]


@pytest.mark.parametrize("change", ["machine", "date", "NaN", "Infinity"])
def test_an_edited_record_is_named(change, folder):
    written = ours(figures=speculation())
    if change in written:
        del written[change]
    else:
        written["figures"]["arms"]["m2r2"]["tau"] = float(change)
    (folder / "speculation.jsonl").write_text(json.dumps(written) + "\n")
    with pytest.raises(UserError, match=r"speculation\.jsonl, line 1"):
        report.table()


@pytest.mark.parametrize("wrong", ["false", 1, None])
def test_a_word_is_no_answer_to_a_question_of_yes_or_no(wrong):
    ours(figures=speculation(equal=wrong))
    assert row("speculation-lossless")["verdict"] == row("speculation-speedup")["verdict"] == "not tested"


def test_the_models_in_data_are_those_that_rows_accept():
    models = claims.load("claims.toml")["models"]
    for name in ("pocket-dense", "pocket-moe"):
        assert weights_sha256(records.ROOT / "data" / name) in models[name]


def test_every_subject_of_a_row_says_what_it_accepts():
    file = claims.load("claims.toml")
    assert {c["subject"] for c in file["claim"] if "subject" in c} <= file["accepts"].keys()
    for asked in file["accepts"].values():
        assert set(asked["models"]) <= file["models"].keys() and asked["least"]


def test_unequal_output_has_no_speed():
    ours(figures=speculation(3.0, equal=False))
    assert row("speculation-lossless")["verdict"] == "differs"
    found = row("speculation-speedup")
    assert (found["verdict"], found["ours"]) == ("not tested", None)
    assert "not equal" in found["reason"]


def test_a_later_record_of_other_arms_hides_nothing():
    ours(figures=speculation(1.7))
    ours(figures={"arms": {"plain": {"equal": True}}})
    assert row("speculation-speedup")["ours"] == 1.7


def test_a_peer_is_held_against_us_in_one_run():
    both = speculation(1.7)
    both["arms"]["eagle"] = {"equal": True, "speedup_vs_plain": {"median": 1.9}}
    ours(figures=both)
    ours(figures=speculation(2.1))  # later, and without that peer
    found = row("speculation-over-eagle")
    assert (found["ours"], found["baseline"], found["verdict"]) == (1.7, 1.9, "differs")
    assert row("speculation-speedup")["ours"] == 2.1


def test_alignment_is_judged_against_its_controls():
    rows = [
        {"form": "bare", "exit": 3, "agreement": 0.28},
        {"form": "block", "exit": 3, "agreement": 0.51},
        {"form": "extra block", "exit": 3, "agreement": 0.53},
        {"form": "R=1 block", "exit": 3, "agreement": 0.505},
    ]
    ours("alignment", {"rows": rows})
    assert row("early-alignment")["verdict"] == "direction only"
    assert row("alignment-equal-size")["verdict"] == "differs"
    assert row("velocity")["verdict"] == "differs"  # better by less than the margin


def experts(m2r2=2.5, direct=1.4, equal=True):
    def arm(speed, recall):
        spread = {"median": speed, "min": speed - 0.1, "max": speed + 0.1}
        return {"equal": equal, "seconds": [1.0] * 5, "recall": recall, "speedup_vs_on_demand": spread,
                "speedup_vs_lru": spread}  # fmt: skip

    arms = {"m2r2": arm(m2r2, 0.9), "direct": arm(direct, 0.8)}
    return {"budgets": [{"share": share, "arms": arms} for share in (0.125, 0.25, 0.5, 0.75)]}


def add_experts(*figures, link=None, sizes=(307200, 1228800)):
    """Records of the pocket mixture, and of the one with wider experts."""
    for nbytes in sizes:
        ours("experts", experts(*figures), link=link, record_bytes=nbytes)


def test_experts_from_a_simulated_link_are_no_disk():
    add_experts(2.9, link=50e6)
    assert row("moe-aot-loading")["ours"] is None and row("moe-recall")["verdict"] == "direction only"
    add_experts(2.5)
    add_experts(3.1, link=50e6)
    found = row("moe-aot-loading")
    assert (found["ours"], found["verdict"], found["n"]) == (2.5, "direction only", 5)
    assert row("moe-aot-over-direct")["baseline"] == 1.4
    assert row("moe-aot-lossless")["verdict"] == "reproduced"
    add_experts(2.5, 1.4, False)
    assert row("moe-aot-loading")["ours"] is None


def test_the_baseline_is_fair_if_mlx_lm_is_not_faster():
    for speed, verdict in ((1.0, "direction only"), (1.3, "differs")):
        arm = {
            "equal": True,
            "speedup_vs_plain": {"median": speed, "min": speed, "max": speed},
            "seconds": [1],
        }
        ours(figures={"arms": {"mlx_lm": arm}})
        assert row("speculation-over-mlx-lm")["verdict"] == verdict


def test_every_form_of_the_table_holds_every_row():
    ours(figures=speculation())
    rows = report.table()
    text = report.as_text(80)
    assert max(map(len, text.splitlines())) <= 90
    for claim in rows:
        assert claim["claim"].split(" (")[0] in report.as_markdown()
    assert report.as_html().count("<details>") == len(rows)
    assert "1.70x (1.60 to 1.80, n = 5, baseline 1.00x)" in report.as_markdown()


def test_claims_and_choices_are_complete():
    names = [r["id"] for r in report.table()]
    assert len(names) == len(set(names))
    for choice in report.choices():
        assert choice.keys() == {"what", "open", "ours", "alternative", "switch", "why"}
        assert all(choice[name] for name in choice if name != "switch")


def test_only_two_numbers_are_the_papers():
    numbers = {r["paper"] for r in report.table() if r["unit"] != "yes"}
    assert numbers == {None, 2.8, 2.9}


def test_a_gpu_is_named(monkeypatch):
    assert records.device() == mx.default_device().type.name or records.device().startswith("gpu: ")
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Some GPU"})
    assert records.device() == "gpu: Some GPU"


def test_a_notebook_says_what_it_runs_on():
    kit, device = records.about().splitlines()
    assert kit.startswith(f"m2r2kit {m2r2kit.__version__} | python 3.") and f"| numpy {np.__version__}" in kit
    assert device == f"device: {records.device()} on {records.chip()}"
