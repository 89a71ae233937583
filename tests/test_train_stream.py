"""`m2r2kit train stream`: trained, measured, saved and recorded; resumed; initialised from another."""

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

from m2r2kit.bench import records
from m2r2kit.bench import tune as tuning
from m2r2kit.bench.tune import Tuned
from m2r2kit.cli import train_drafter, train_stream, training, tune
from m2r2kit.common import UserError
from m2r2kit.model.backbone import Backbone
from m2r2kit.speculation import registry as methods
from m2r2kit.speculation.drafters.medusa import MedusaConfig
from m2r2kit.stream import checkpoints
from m2r2kit.stream.stream import StreamConfig, load_stream
from m2r2kit.text import prompts, rows
from m2r2kit.text.corpus import Document


@pytest.fixture
def written(monkeypatch, tmp_path):
    """Little text and few prompts; the records that would have been appended."""
    documents = [
        Document(kind, f"{kind} {i}", f"{kind} {i}: {'abcdefgh'[i % 8] * 40} and so on")
        for kind in ("code", "arithmetic", "shell")
        for i in range(200)
    ]
    found, read = [], prompts.read
    monkeypatch.setattr(rows, "documents", lambda folder: documents)
    monkeypatch.setattr(rows, "HELD_OUT_ROWS", 8)
    monkeypatch.setenv("M2R2KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prompts, "read", lambda file: read(file)[:2])
    monkeypatch.setattr(records, "append", lambda subject, **f: found.append((subject, f)))
    return found


@pytest.fixture
def untuned(monkeypatch):
    """The search for the best number of drafts takes most of the time; one test of it is enough."""
    monkeypatch.setattr(train_stream, "tune_stream", lambda *found: ({"drafts": 3, "threshold": 0.2}, 1.0))


LONG = {"max_position_embeddings": 512}


def arguments(out, **changes):
    values = {
        "model": str(tiny.folder("llama", **LONG)), "out": out, "form": "block",
        "exit": 2, "rate": None, "rank": 4, "ffn_width": None, "deep": None, "rows": 16, "compare": False,
        "steps": 3, "minutes": None, "corpus": out, "seed": 0, "start": None, "processes": 1, "carry": False,
        "near": True, "batch": 8, "tune": True, "record": True,
    }  # fmt: skip
    return SimpleNamespace(**(values | changes))


def weights(folder, model=None):
    view = tiny.backbone("llama", max_position_embeddings=512)
    return dict(tree_flatten(load_stream(model or view, folder).trainable_parameters()))


def same(a, b):
    return all(mx.array_equal(a[name], b[name]) for name in a)


def test_a_stream_is_trained_saved_and_recorded(tmp_path, written):
    assert train_stream.run(arguments(tmp_path)) == 0
    ((subject, record),) = written
    assert subject == "stream" and record["figures"]["steps"] == 3
    assert 0 <= record["figures"]["agreement"] <= 1 and record["figures"]["drafts"] >= 1
    assert any(mx.abs(w).max() > 0 for name, w in weights(tmp_path).items() if name.endswith("b"))
    assert not (tmp_path / "unfinished").exists()


def test_a_mixture_gets_the_form_that_needs_no_experts(tmp_path):
    for family, form in (("llama", "block"), ("olmoe", "attention")):
        asked = train_stream.settings(arguments(tmp_path, form=None), tiny.backbone(family))
        assert asked.form == form
    asked = train_stream.settings(arguments(tmp_path, form="adapter"), tiny.backbone("olmoe"))
    assert asked.form == "adapter"


def test_a_cache_that_cannot_be_written_does_not_stop_a_training(
    tmp_path, written, untuned, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("M2R2KIT_CACHE", str(tmp_path / "file" / "cache"))
    assert train_stream.run(arguments(tmp_path / "out")) == 0
    said = capsys.readouterr().err
    assert "The training text is not kept" in said and "set M2R2KIT_CACHE to another folder" in said
    assert (tmp_path / "out" / "stream.json").exists()


@pytest.fixture
def interrupted(monkeypatch):
    """A training that is interrupted after its second step."""
    distil = train_stream.distillation.distil

    def until_the_second(module, loss, batches, settings, report, seconds):
        def stop(step, value):
            report(step, value)
            if step == 1:
                raise KeyboardInterrupt

        return distil(module, loss, batches, settings, stop, seconds)

    def run(asked):
        with monkeypatch.context() as patch:
            patch.setattr(train_stream.distillation, "distil", until_the_second)
            assert train_stream.run(asked) == 1

    return run


def test_an_interrupted_training_goes_on(tmp_path, written, untuned, interrupted, capsys):
    interrupted(arguments(tmp_path))
    assert "saved after 2 steps" in capsys.readouterr().out and not written
    with pytest.raises(UserError, match="unfinished stream with other settings"):
        train_stream.run(arguments(tmp_path, rank=8))
    assert train_stream.run(arguments(tmp_path)) == 0
    assert "Resuming after 2 steps." in capsys.readouterr().out
    assert not (tmp_path / "unfinished").exists() and len(written) == 1


def test_seconds_of_an_interrupted_training_add_up(tmp_path, written, untuned, interrupted):
    interrupted(arguments(tmp_path))
    unfinished = json.loads((tmp_path / "unfinished" / "stream.json").read_text())
    assert 0 < unfinished["train_seconds"] < 300
    checkpoints.note(tmp_path / "unfinished", "stream", train_seconds=1000.0)
    assert train_stream.run(arguments(tmp_path)) == 0
    facts = json.loads((tmp_path / "stream.json").read_text())
    assert 1000 <= facts["train_seconds"] < 1300 and facts["steps"] == 3
    interrupted(arguments(tmp_path))
    checkpoints.note(tmp_path / "unfinished", "stream", train_seconds=1000.0)
    assert train_stream.run(arguments(tmp_path, minutes=10)) == 0  # which are over
    assert json.loads((tmp_path / "stream.json").read_text())["steps"] == 2


def test_an_interrupted_training_goes_on_with_nothing_else(tmp_path, written, interrupted, monkeypatch):
    interrupted(arguments(tmp_path))
    for changes, said in (
        ({"rows": 24}, "has rows 16, not 24"),
        ({"seed": 1}, "has seed 0, not 1"),
        ({"batch": 4}, "has batch 8, not 4"),
        ({"steps": 5}, "has steps 3, not 5"),
    ):
        with pytest.raises(UserError, match=said):
            train_stream.run(arguments(tmp_path, **changes))
    documents = rows.documents
    monkeypatch.setattr(rows, "documents", lambda folder: documents(folder)[:300])
    with pytest.raises(UserError, match="has other text; repeat its command"):
        train_stream.run(arguments(tmp_path))
    assert (tmp_path / "unfinished" / "stream.json").exists() and not written


def test_a_resumed_training_leaves_the_files_of_others(tmp_path, written, interrupted):
    interrupted(arguments(tmp_path))
    other = tmp_path / "unfinished" / ".DS_Store"
    other.touch()
    assert train_stream.run(arguments(tmp_path)) == 0
    assert written and list((tmp_path / "unfinished").iterdir()) == [other]


def test_an_interrupted_tuning_keeps_what_was_trained(tmp_path, written, monkeypatch):
    def stop(*found):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_stream, "tune_stream", stop)
    with pytest.raises(KeyboardInterrupt):
        train_stream.run(arguments(tmp_path))
    assert weights(tmp_path) and not (tmp_path / "unfinished").exists()
    monkeypatch.setattr(train_drafter, "tune_baseline", stop)
    asked = arguments(tmp_path / "medusa", kind=["medusa"], model=str(tiny.folder("llama", **LONG)))
    with pytest.raises(KeyboardInterrupt):
        train_drafter.run(asked)
    assert checkpoints.trained(tmp_path / "medusa", "drafter", MedusaConfig)["train_steps"] == 3


def test_a_place_that_cannot_be_written_is_found_before_the_training(tmp_path, written, monkeypatch):
    monkeypatch.setattr(train_stream, "for_training", lambda model: pytest.fail("it went on"))
    monkeypatch.setattr(train_drafter, "for_training", lambda model: pytest.fail("it went on"))
    (tmp_path / "file").write_text("in the way")
    for run, more in ((train_stream.run, {}), (train_drafter.run, {"kind": ["eagle"]})):
        with pytest.raises(UserError, match="cannot be written: a part of its path is a file"):
            run(arguments(tmp_path / "file", **more))


def test_a_stream_may_begin_with_that_of_another_model(tmp_path, written, untuned):
    old, new = tmp_path / "old", tmp_path / "new"
    other = tiny.make_folder("llama", tmp_path / "other", seed=9, max_position_embeddings=512)
    train_stream.run(arguments(old, model=str(other)))
    view = Backbone.load(other)
    with pytest.raises(UserError, match="was trained for another model"):
        weights(old)
    # a training of no length leaves what it began with
    train_stream.run(arguments(new, start=old, minutes=1e-9))
    assert same(weights(new), weights(old, view))
    with pytest.raises(UserError, match="has other settings"):
        train_stream.run(arguments(new, start=old, rank=8))


def test_a_stream_that_carries_may_begin_with_one_that_does_not(tmp_path, written, untuned):
    old, new = tmp_path / "old", tmp_path / "new"
    train_stream.run(arguments(old))
    train_stream.run(arguments(new, start=old, carry=True, minutes=1e-9))
    assert same(weights(old), weights(new)) and not weights(new)["carry.matrix"].any()
    train_stream.run(arguments(new, start=new, carry=True))
    assert weights(new)["carry.matrix"].any()
    with pytest.raises(UserError, match="has other settings"):
        train_stream.run(arguments(old, start=new))


def test_tuning_changes_how_long_drafts_are_and_nothing_else(tmp_path, written, untuned, monkeypatch, capsys):
    train_stream.run(arguments(tmp_path))
    before, trained = checkpoints.read_settings(tmp_path, "stream", StreamConfig)[1], weights(tmp_path)
    monkeypatch.setattr(tuning, "tune", lambda *found: Tuned(5, 0.4, 1.0))
    monkeypatch.setattr(tuning, "tune_tree", lambda *found: Tuned(6, 0.4, 1.0, leaves=4))
    assert tune.run(SimpleNamespace(model=arguments(tmp_path).model, stream=tmp_path, drafters=tmp_path)) == 0
    after = checkpoints.read_settings(tmp_path, "stream", StreamConfig)[1]
    tree = {"drafts": 6, "threshold": 0.4, "leaves": 4}
    assert before["drafts"] == 3 and after == before | {"drafts": 5, "threshold": 0.4, "tree": tree}
    said = capsys.readouterr().out
    assert same(weights(tmp_path), trained) and "5 drafts" in said and "6 drafts and 4 leaves" in said
    view = tiny.backbone("llama", max_position_embeddings=512)
    found, drafts = methods.ready("m2r2", view, tmp_path)
    assert (found.threshold, drafts) == (0.4, 5)
    found, drafts = methods.ready("m2r2-tree", view, tmp_path)
    assert (found.threshold, found.leaves, drafts) == (0.4, 4, 6)
    assert methods.ready("prompt-lookup", view, tmp_path)[1] == 5
    checkpoints.note(tmp_path, "stream", tree={"drafts": 2, "threshold": 0.0, "leaves": 0})
    assert methods.ready("m2r2-tree", view, tmp_path)[0].leaves == 0
    found, drafts = methods.ready("m2r2", view, tmp_path, drafts=7)  # as many as asked for
    assert (found.threshold, drafts) == (0.0, 7)


def test_the_settings_of_a_stream_are_read_once(tmp_path, written, untuned, monkeypatch):
    train_stream.run(arguments(tmp_path))
    real, asked = checkpoints.read_settings, []
    monkeypatch.setattr(checkpoints, "read_settings", lambda *args: asked.append(args) or real(*args))
    view = tiny.backbone("llama", max_position_embeddings=512)
    for method in ("m2r2", "m2r2-tree", "early-exit", "prompt-lookup"):
        asked.clear()
        assert methods.ready(method, view, tmp_path)[1] == 3
        assert len(asked) == 1


def test_rows_are_token_ids_even_beside_an_empty_text():
    ids = np.concatenate([[], np.arange(300) % 50])
    text = rows.windows(tiny.backbone(), {"code": ids}, 8, own=0)
    assert text.shape == (8, rows.WINDOW) and text.dtype == np.int32


def test_a_comparison_runs_in_one_process(tmp_path, written):
    with pytest.raises(UserError, match="leave out --processes"):
        train_stream.run(arguments(tmp_path, compare=True, processes=2))


def test_text_is_written_once(written, monkeypatch, tmp_path):
    view, made = tiny.backbone("llama", max_position_embeddings=512), []
    write = rows.write
    monkeypatch.setattr(rows, "write", lambda *asked: made.append(asked) or write(*asked))
    first = rows.text(view, tmp_path, 16, 0)
    again = rows.text(view, tmp_path, 16, 0)
    assert len(made) == 1 and all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    rows.text(view, tmp_path, 16, 1)
    assert len(made) == 2  # other rows were asked for
    (file, *_) = sorted((tmp_path / "cache").glob("text-*.npz"))
    for kept in (tmp_path / "cache").glob("text-*.npz"):
        kept.write_bytes(file.read_bytes()[:99])  # cut short
    again = rows.text(view, tmp_path, 16, 0)
    assert len(made) == 3 and all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    (file,) = [f for f in (tmp_path / "cache").glob("text-*.npz") if f.stat().st_size > 99]
    monkeypatch.setattr(rows, "write", lambda *asked: first)
    sound = file.read_bytes()
    for place in range(0, len(sound), len(sound) // 60):  # made again whatever is damaged
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
        again = rows.text(view, tmp_path, 16, 0)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not list((tmp_path / "cache").glob("*.*.npz"))  # nothing half-written


def test_untuned_streams_and_peers_say_so(written, monkeypatch, tmp_path):
    assert train_stream.run(arguments(tmp_path / "stream", tune=False)) == 0
    facts = json.loads((tmp_path / "stream" / "stream.json").read_text())
    assert facts["drafts"] == training.UNTUNED and "threshold" not in facts
    (_, record) = written[-1]
    assert "predicted_speedup" not in record["figures"] and record["settings"]["batch"] == 8
