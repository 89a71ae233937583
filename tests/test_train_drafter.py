"""`m2r2kit train drafter`: each kind is trained, saved, recorded and found by its name."""

import json
from types import SimpleNamespace

import pytest
import tiny
from test_train_stream import written  # noqa: F401  (a fixture: little text and few prompts)

from m2r2kit.bench import tune as tuning
from m2r2kit.bench.tune import Tuned
from m2r2kit.cli import train_drafter, tune
from m2r2kit.common import UserError
from m2r2kit.speculation import generate
from m2r2kit.speculation import registry as methods
from m2r2kit.speculation import trained as baselines

MODEL = {"max_position_embeddings": 512}


def arguments(out, **changes):
    values = {
        "model": str(tiny.folder("llama", **MODEL)), "kind": ["draft-model"], "out": out, "exit": 1,
        "rows": 16, "steps": 2, "minutes": None, "corpus": out, "seed": 0, "batch": 8, "tune": True,
        "record": True,
    }  # fmt: skip
    return SimpleNamespace(**(values | changes))


@pytest.mark.parametrize("kind", baselines.KINDS)
def test_a_peer_is_trained_saved_recorded_and_found(kind, tmp_path, written, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tuning, "tune", lambda *found: Tuned(3, 0.0, 1.0))
    assert train_drafter.run(arguments(tmp_path / kind, kind=[kind])) == 0
    ((subject, record),) = written
    assert subject == "drafters" and record["settings"]["kind"] == kind
    assert record["figures"]["steps"] == 2 and record["figures"]["parameters"] > 0
    view = tiny.backbone("llama", **MODEL)
    drafter, drafts = methods.ready(kind, view, drafters=tmp_path)
    assert drafts == 3
    plain = generate(view, tiny.prompt(6), max_tokens=8)
    assert generate(view, tiny.prompt(6), drafter, 3, 8).tokens == plain.tokens


def test_drafts_are_tuned_on_the_tuning_prompts(tmp_path, written):  # noqa: F811
    train_drafter.run(arguments(tmp_path))
    ((_, record),) = written
    assert 1 <= record["figures"]["drafts"] <= 8 and record["figures"]["predicted_speedup"] > 0


@pytest.mark.parametrize("kind", ["kangaroo", "deed"])
def test_a_threshold_of_confidence_is_tuned_too(kind, monkeypatch):
    view, worth = tiny.backbone("llama", **MODEL), {0.2: 1.1, 0.4: 1.5, 0.6: 1.4, 0.8: 0.9}
    module = baselines.new(view, kind, exit=1)
    tuned = {t: Tuned(4, 0.0, worth[t]) for t in worth}
    monkeypatch.setattr(tuning, "tune", lambda *found: tuned[module.config.threshold])
    assert tuning.tune_baseline(view, kind, module).estimate == 1.5
    assert module.config.threshold == 0.4


def test_trained_peers_are_tuned_again_with_the_stream(tmp_path, written, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tuning, "tune", lambda *found: Tuned(3, 0.0, 1.0))
    train_drafter.run(arguments(tmp_path / "kangaroo", kind=["kangaroo"]))
    monkeypatch.setattr(tune, "tune_stream", lambda *found: ({}, 1.0))
    monkeypatch.setattr(tune, "load_stream", lambda *found: None)
    told = []
    monkeypatch.setattr(tune.checkpoints, "note", lambda *place, **facts: told.append((place, facts)))
    model = str(tiny.folder("llama", **MODEL))
    monkeypatch.setattr(tuning, "tune", lambda *found: Tuned(6, 0.0, 1.0))
    assert tune.run(SimpleNamespace(model=model, stream=tmp_path / "stream", drafters=tmp_path)) == 0
    (_, (place, facts)) = told
    assert place == (tmp_path / "kangaroo", "drafter") and facts["drafts"] == 6
    assert facts["config"]["threshold"] == tuning.BASELINE_THRESHOLDS[0]


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="3 rows of text do not fill one batch"):
        train_drafter.run(arguments(tmp_path, rows=3))


def test_several_kinds_learn_from_the_same_rows(tmp_path, written, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tuning, "tune", lambda *found: Tuned(3, 0.0, 1.0))
    monkeypatch.setattr(train_drafter, "drafters_folder", lambda *_: tmp_path)
    assert train_drafter.run(arguments(None, kind=["medusa", "deed"], corpus=tmp_path)) == 0
    assert [record["settings"]["kind"] for _, record in written] == ["medusa", "deed"]
    with pytest.raises(UserError, match="one kind at a time"):
        train_drafter.run(arguments(tmp_path, kind=["medusa", "deed"]))


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("draft-model", {"ffn_width": 0}), ("draft-model", {"blocks": -1}),
        ("medusa", {"heads": -1}), ("deed", {"hidden": -1}),
    ],
)  # fmt: skip
def test_settings_that_no_drafter_can_have_are_named(kind, setting, tmp_path):
    backbone = tiny.backbone()
    baselines.save(baselines.new(backbone, kind), backbone, tmp_path)
    file = tmp_path / "drafter.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {"config": facts["config"] | setting}))
    with pytest.raises(UserError, match=r"drafter\.json is damaged"):
        baselines.load(backbone, kind, tmp_path)
