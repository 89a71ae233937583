"""`train exits`, `bench exits` and `generate --method exits` on a tiny model; figures of merit."""

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from test_train_stream import arguments as stream_arguments
from test_train_stream import written  # noqa: F401  (a fixture: little text and few prompts)

from m2r2kit.__main__ import main
from m2r2kit.bench import claims, records
from m2r2kit.bench import exits as bench_exits
from m2r2kit.bench.merit import Curve, crossing, merits
from m2r2kit.cli import bench_exits as bench_command
from m2r2kit.cli import calibrate, train_exits, train_stream
from m2r2kit.common import UserError
from m2r2kit.exits import methods, trained
from m2r2kit.exits.registry import METHODS
from m2r2kit.figures import exits as figures_exits
from m2r2kit.figures.style import new_figure
from m2r2kit.text import prompts, rows

MODEL = {"max_position_embeddings": 512}
FOLDERS = ("m2r2", "m2r2-equal", "lens", "bare", "mixture-of-depths", "shallow")


def training(out, kind, **changes):
    exits = (2,) if kind == "shallow" else (1, 2)
    values = {
        "model": str(tiny.folder("llama", **MODEL)), "kind": [kind], "out": out, "exits": exits, "rows": 16,
        "batch": 8, "steps": 5, "minutes": None, "corpus": out, "seed": 0, "start": None, "calibrate": False,
        "router_only": False, "record": True,
    }  # fmt: skip
    return SimpleNamespace(**(values | changes))


@pytest.fixture
def little(written, monkeypatch):  # noqa: F811
    monkeypatch.setattr(calibrate, "documents", rows.documents)
    monkeypatch.setattr(calibrate, "TEXTS", 120)
    monkeypatch.setattr(calibrate, "TOKENS", 4)
    return written


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A folder with all kinds, untrained: what a method does with them does not depend on that."""
    folder = tmp_path_factory.mktemp("exits")
    view = tiny.backbone("llama", **MODEL)
    for kind in FOLDERS:
        exits = {"shallow": (2,), "mixture-of-depths": None}.get(kind, (1, 2, 3))
        trained.save(trained.new(view, kind.removesuffix(methods.EQUAL), exits), view, folder / kind)
    return folder


@pytest.mark.parametrize("kind", ["m2r2", "shallow"])
def test_a_kind_is_trained_saved_recorded_and_calibrated(kind, tmp_path, little):
    assert train_exits.run(training(tmp_path / kind, kind)) == 0
    ((subject, record),) = little
    assert subject == "exits-training" and record["settings"]["kind"] == kind
    assert record["figures"]["steps"] == 5 and record["figures"]["parameters"]["all"] > 0
    trained.load(tiny.backbone("llama", **MODEL), tmp_path / kind, kind)


def test_exits_are_chosen_and_risks_measured_after_training(tmp_path, little, monkeypatch):
    names = ("m2r2", "m2r2-linear", "m2r2-static", "calm")
    monkeypatch.setattr(calibrate, "METHODS", {name: METHODS[name] for name in names})
    assert train_exits.run(training(tmp_path / "m2r2", "m2r2", calibrate=True)) == 0
    (_, _), (subject, record) = little
    assert subject == "exits-calibration" and set(record["figures"]["losses"]) == {"wait", "linear"}
    _, facts = trained.load(tiny.backbone("llama", **MODEL), tmp_path / "m2r2")
    assert set(facts["use"]) == {"m2r2", "m2r2-linear", "m2r2-static"} and facts["use"]["m2r2-static"] is None
    for way in ("wait", "linear"):
        known = facts["calibration"][way]
        assert len(known["thresholds"]) == len(known["means"]) and known["texts"] == 120
        assert 0 <= record["figures"]["promise"][way]["kept"] <= 1
        assert record["figures"]["free"][way] == known["free"] and known["free_tokens"] == 4
        # the first token that differs changes all tokens after it
        assert all(0 <= free <= 1 for free in known["free"]) and len(known["free"]) == len(known["means"])
        assert np.allclose(np.mean(record["figures"]["losses"][way], axis=1), known["means"], atol=1e-4)


@pytest.mark.parametrize("exits", [(2, 3), (2,), (1, 5), None])
def test_exits_are_trained_on_a_model_of_another_depth(tmp_path, little, exits):
    deep = MODEL | {"num_hidden_layers": 6}
    folder, out = str(tiny.folder("llama", **deep)), tmp_path / "m2r2"
    assert train_exits.run(training(out, "m2r2", exits=exits, model=folder)) == 0
    module, facts = trained.load(tiny.backbone("llama", **deep), out)
    assert facts["steps"] == 5 and module.config.exits == (exits or (1, 2, 4))


def test_exits_begin_with_a_stream_of_the_same_first_interval(tmp_path, little):
    model = str(tiny.folder("llama", **MODEL))
    ready = stream_arguments(tmp_path / "s", exit=1, rank=None, near=False, carry=True, tune=False)
    assert train_stream.run(ready) == 0
    assert train_exits.run(training(tmp_path / "m2r2", "m2r2", start=tmp_path / "s")) == 0
    view = tiny.backbone("llama", **MODEL)
    assert trained.load(view, tmp_path / "m2r2")[1]["steps"] == 5
    other = stream_arguments(tmp_path / "t", exit=2, rank=None, near=False, carry=True, tune=False)
    assert train_stream.run(other) == 0
    with pytest.raises(UserError, match="cannot start from that stream"):
        train_exits.run(training(tmp_path / "x", "m2r2", start=tmp_path / "t", model=model))
    with pytest.raises(UserError, match=r"first interval is blocks 1\.\.2, the stream.s 0\.\.2"):
        train_exits.run(training(tmp_path / "x", "m2r2", exits=(2, 3), start=tmp_path / "t"))
    with pytest.raises(UserError, match="--start is for --kind m2r2 alone"):
        train_exits.run(training(tmp_path / "x", "lens", start=tmp_path / "s"))


def test_a_router_can_be_trained_anew_and_nothing_else_changes(tmp_path, little):
    view, out = tiny.backbone("llama", **MODEL), tmp_path / "m2r2"
    assert train_exits.run(training(out, "m2r2", steps=10)) == 0
    before, facts = trained.load(view, out)
    assert train_exits.run(training(out, "m2r2", exits=None, router_only=True)) == 0
    after, now = trained.load(view, out)
    new = dict(tree_flatten(after))
    same = {name: mx.array_equal(old, new[name]).item() for name, old in tree_flatten(before)}
    assert all(equal for name, equal in same.items() if not name.startswith("gate."))
    assert not same["gate.out"] and not same["gate.said"]
    assert now["steps"] == facts["steps"] and now["router_steps"] == 5
    with pytest.raises(UserError, match="bare has no router"):
        train_exits.run(training(out, "bare", router_only=True))
    with pytest.raises(UserError, match="keeps exits and stream"):
        train_exits.run(training(out, "m2r2", router_only=True))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_draws_a_curve_and_decodes(name, everything, monkeypatch):
    view = tiny.backbone("llama", **MODEL)
    monkeypatch.setattr(methods, "THRESHOLDS", {gate: t[:2] for gate, t in methods.THRESHOLDS.items()})
    method = methods.method(name, view, everything)
    method.thresholds = method.thresholds[:2]
    texts = methods_texts(view)
    curve = bench_exits.measure(method, texts)
    assert curve.right.shape == (len(method.thresholds), 3) and (curve.right <= curve.tokens).all()
    assert (curve.blocks > 0).all() and (curve.macs > 0).all()
    if name not in bench_exits.UNTIMED:
        answer = texts.tokens[0, texts.first[0] + 1 : texts.end[0] + 1].tolist()
        arm = bench_exits.timed(method, method.thresholds[0])
        assert arm.decode(tiny.prompt(4), answer) > 0
        assert arm.tokens == len(answer)
        assert arm.right == curve.right[0, 0]  # it makes the choices that the curve was drawn from


def methods_texts(view):
    from m2r2kit.exits.teacher_forced import texts_of

    return texts_of(view, [tiny.prompt(n) for n in (4, 6, 9)], 10)


def test_bench_measures_times_and_records(everything, capsys, monkeypatch):
    kept = []
    monkeypatch.setattr(records, "append", lambda subject, **f: kept.append((subject, f)))
    some = [
        prompts.Prompt(f"{kind}-{i}", f"{kind} {i}", kind) for kind in ("code", "arithmetic") for i in (3, 4)
    ]
    monkeypatch.setattr(prompts, "read", lambda file: some)
    line = ["bench", "exits", "--model", str(tiny.folder("llama", **MODEL)), "--trained", str(everything)]
    line += ["--methods", "m2r2,m2r2-oracle,m2r2-linear,calm,shallow", "--max-tokens", "8", "--timed", "1"]
    assert main([*line, "--repeats", "1", "--record"]) == 0
    ((subject, record),) = kept
    found = record["figures"]["methods"]
    assert subject == "exits" and set(found) == {"m2r2", "m2r2-oracle", "m2r2-linear", "calm", "shallow"}
    assert found["m2r2"]["timed"] and found["m2r2-oracle"].get("timed") is None
    assert set(found["m2r2"]["merit"]) == {"0.01", "0.05"}
    assert set(record["figures"]["exits"]) == {"m2r2", "lens"}
    assert "saved at 5 %" in capsys.readouterr().out
    for over in ("blocks", "macs", "time"):
        ax = new_figure()[1]
        assert "calm" in figures_exits.draw_curves(ax, record, over)
    assert "m2r2" in figures_exits.draw_merits(new_figure()[1], record)
    monkeypatch.setattr(claims, "accepted", lambda subject: [record])
    assert figures_exits.newest() is record


def test_what_is_taken_back_is_what_the_skipped_blocks_did_not_save():
    assert bench_exits.taken_back({"depth": 6, "speedup": 4.0}, 24) == 0
    assert bench_exits.taken_back({"depth": 6, "speedup": 1.0}, 24) == 1
    assert abs(bench_exits.taken_back({"depth": 6, "speedup": 1 / 0.4}, 24) - 0.2) < 1e-9


def test_bench_without_m2r2_says_so(everything):
    model = str(tiny.folder("llama", **MODEL))
    asked = SimpleNamespace(model=model, trained=everything, methods=["calm"], record=False)
    with pytest.raises(UserError, match="add it to --methods"):
        bench_command.run(asked)


def test_generate_leaves_early_and_keeps_a_promise(everything, capsys, tmp_path, little, monkeypatch):
    model = str(tiny.folder("llama", **MODEL))
    line = ["generate", "--model", model, "--method", "exits", "--prompt", "ab", "--max-tokens", "8"]
    here = ["--trained", str(everything)]
    assert main([*line, *here, "--threshold", "2", "--json"]) == 0
    never = json.loads(capsys.readouterr().out)
    plain = ["plain" if word == "exits" else word for word in line]
    assert main([*plain, "--json"]) == 0
    assert never["tokens"] == json.loads(capsys.readouterr().out)["tokens"] and set(never["depth"]) == {4}
    assert main([*line, *here, "--threshold", "0", "--exits", "2", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["depth"]) == {2}
    for asked, said in (
        (["--exits", "1,7"], "No exit was trained at 7; choose among 1, 2, 3"),
        ([], "not calibrated"),
    ):
        assert main([*line, *here, *asked]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(calibrate, "METHODS", {"m2r2": METHODS["m2r2"]})
    assert train_exits.run(training(tmp_path / "m2r2", "m2r2", calibrate=True)) == 0
    for asked, said in (
        (["--risk", "1"], "must lie between 0 and 1"),
        (["--risk", "0.01"], "120 texts are too few"),
    ):
        assert main([*line, "--trained", str(tmp_path), *asked]) == 2
        assert said in capsys.readouterr().err
    assert main([*line, "--trained", str(tmp_path), "--risk", "0.2"]) == 0
    said = capsys.readouterr().err
    assert "exits after block" in said and (
        "after the same words at most 20%" in said or "no threshold" in said
    )
    for asked, said in (
        (["--threshold", "nan"], "is not a number from 0 to 2"),
        (["--threshold", "-1"], "is not a number from 0 to 2"),
        (
            ["--threshold", "0.5", "--temp", "1"],
            "The method exits decodes greedily; leave out --temp",
        ),
    ):
        assert main([*line, "--trained", str(tmp_path), *asked]) == 2
        assert said in capsys.readouterr().err


# --- merit ----------------------------------------------------------------------------------


def curve(saved, agreement, texts=40, tokens=10.0, depth=10):
    """A method whose texts are equal except for an occasional wrong token."""
    n = np.full(texts, tokens)
    right = np.array([np.full(texts, a * tokens) for a in agreement])
    blocks = np.array([np.full(texts, (1 - s) * depth * tokens) for s in saved])
    return Curve(list(range(len(saved))), right, right * 0, blocks, blocks, n, depth)


def test_a_saving_is_read_off_between_two_points():
    assert crossing(np.array([0.0, 0.2, 0.4]), np.array([1.0, 0.98, 0.92]), 0.95) == pytest.approx(0.3)
    assert crossing(np.array([0.0, 0.2]), np.array([1.0, 0.98]), 0.95) == pytest.approx(0.2)
    assert crossing(np.array([0.0, -0.1]), np.array([1.0, 1.0]), 0.95) == 0
    assert curve([0.2, 0.4], [0.98, 0.92]).saved_at(0.05, np.arange(40)) == pytest.approx(0.3)


def test_a_speed_up_is_read_off_between_two_timed_points():
    points = [{"speedup": 2.0, "agreement": 0.90}, {"speedup": 1.25, "agreement": 1.0}]
    assert bench_exits.speedup_at(points, 0.05) == pytest.approx(1 / (1 - 0.35))
    assert bench_exits.speedup_at([{"speedup": 0.8, "agreement": 1.0}], 0.05) == 1  # plain decoding


def test_methods_are_compared_on_the_same_draws():
    rng = np.random.default_rng(0)
    easy = rng.integers(0, 2, 40)  # half of the texts are easy for both
    good, bad = curve([0.35], [1.0]), curve([0.3], [1.0])
    for each in (good, bad):
        each.blocks = each.blocks - 50 * (easy - 0.5)
    found = merits({"m2r2": good, "peer": bad}, draws=200)
    five = found["peer"]["0.05"]
    assert found["m2r2"]["0.05"]["lead"] == 0
    assert five["lead_from"] == pytest.approx(0.05) == five["lead_to"]  # paired: what they share is gone
    assert found["m2r2"]["0.05"]["from"] < five["to"]  # unpaired, they overlap
