"""Trained modules on disk: whole or not at all, bound to their base, one sentence for damage."""

import json

import mlx.core as mx
import pytest
import tiny
from mlx.utils import tree_flatten

from m2r2kit.common import UserError
from m2r2kit.stream import checkpoints
from m2r2kit.stream.stream import StreamConfig, load_stream

FILES = ["stream.json", "stream.safetensors"]


def save(folder, size=0.5, **facts):
    stream = tiny.stream(exits=(1, 3), size=size, rate=2)
    checkpoints.save(stream, stream.config, tiny.backbone().sha256, folder, "stream", **facts)
    return stream


def weights(stream):
    return {k: v.astype(mx.float16) for k, v in tree_flatten(stream.trainable_parameters())}


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]) for k in a)


def refused(folder, sentence, view=None):
    with pytest.raises(UserError, match=sentence) as refusal:
        load_stream(view or tiny.backbone(), folder)
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith(".")


def test_a_saved_stream_comes_back(tmp_path):
    stream = save(tmp_path / "new" / "folder", steps=7)
    loaded = load_stream(tiny.backbone(), tmp_path / "new" / "folder")
    assert same(loaded, stream) and loaded.config == stream.config
    assert not same(loaded, tiny.stream(exits=(1, 3), size=0.4, rate=2))
    text = json.loads((tmp_path / "new" / "folder" / "stream.json").read_text())
    assert text["steps"] == 7 and text["kind"] == "AcceleratedStream"
    assert sorted(f.name for f in (tmp_path / "new" / "folder").iterdir()) == FILES


def test_a_module_stored_in_few_bits_comes_back_rounded(tmp_path):
    stream = save(tmp_path / "half")
    save(tmp_path / "few", bits=8)
    loaded = load_stream(tiny.backbone(), tmp_path / "few")
    for name, w in tree_flatten(stream.trainable_parameters()):
        rounded = dict(tree_flatten(loaded.trainable_parameters()))[name]
        assert rounded.dtype == mx.float32 and mx.abs(rounded - w).max() <= mx.abs(w).max() / 100, name
    assert not same(loaded, stream)
    half, few = (checkpoints.trained(tmp_path / f, "stream", StreamConfig) for f in ("half", "few"))
    assert half == few and half["parameters"] == sum(w.size for w in weights(stream).values())
    sizes = [(tmp_path / f / "stream.safetensors").stat().st_size for f in ("half", "few")]
    assert sizes[1] < 0.9 * sizes[0]  # headers, norms and narrow matrices stay


def test_another_base_is_refused(tmp_path):
    save(tmp_path)
    other = tiny.backbone("qwen3")
    refused(tmp_path, f"trained for another model .*this one is {other.sha256[:12]}", other)


def test_nothing_there(tmp_path):
    refused(tmp_path, "There is no trained stream in .*; train one with")


@pytest.mark.parametrize("bytes_", [b"", b"{", b"[]", b"3", b"\xff\xfe\x00", b"{}"])
def test_a_damaged_json(tmp_path, bytes_):
    save(tmp_path)
    (tmp_path / "stream.json").write_bytes(bytes_)
    refused(tmp_path, "stream.json is damaged")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 2}, "another version"),
        ({"config": {"speed": 3}}, "does not know: speed"),
        ({"config": []}, "is damaged"),
        ({"config": {"rank": "many"}}, "is damaged .rank is 'many'"),
        ({"config": {"exits": 3}}, "is damaged"),
        ({"config": {"exits": ["3"]}}, "is damaged"),
        ({"config": {"rate": True}}, "is damaged"),
        ({"config": {"exits": [9]}}, "Exits must increase"),
        ({"config": {"rank": 2.5}}, "is damaged"),
        ({"config": {"ffn_width": 2.5}}, "is damaged"),
        ({"config": {}}, "does not match its JSON"),  # the defaults ask for other shapes
        ({"base_sha256": None}, "is damaged"),
        ({"weights_sha256": 3}, "is damaged"),
    ],
    ids=str,
)
def test_a_json_with_wrong_settings(tmp_path, changes, sentence):
    save(tmp_path)
    file = tmp_path / "stream.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(tmp_path, sentence)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "one bit"])
def test_damaged_weights(tmp_path, damage):
    save(tmp_path)
    file = tmp_path / "stream.safetensors"
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])
        file.write_bytes({"empty": b"", "truncated": whole[:-9], "one bit": flipped}[damage])
    refused(tmp_path, "missing, damaged or does not match")


def disk_full(*_):
    raise RuntimeError("[write] Unable to write 9 bytes to file.")


@pytest.mark.parametrize("victim", ["mlx.core.save_safetensors", "pathlib.Path.write_text"])
def test_a_full_disk_leaves_the_old_pair_and_nothing_else(tmp_path, monkeypatch, victim):
    old = save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(victim, disk_full)
        with pytest.raises(UserError, match="cannot be written: the disk is full"):
            save(tmp_path, size=0.1)
    assert sorted(f.name for f in tmp_path.iterdir()) == FILES
    assert same(load_stream(tiny.backbone(), tmp_path), old)


def test_an_interrupt_leaves_the_old_pair_and_nothing_else(tmp_path, monkeypatch):
    old = save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, size=0.1)
    assert sorted(f.name for f in tmp_path.iterdir()) == FILES
    assert same(load_stream(tiny.backbone(), tmp_path), old)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written: a part of its path is a file"):
        save(tmp_path / "file")


def test_a_crash_between_the_two_files_is_found(tmp_path, monkeypatch):
    save(tmp_path)
    done = []

    class Crash(BaseException):
        """Ends the process, as far as `save` can tell."""

    replace = type(tmp_path).replace

    def crash_at_the_second(path, target):
        if done:
            raise Crash
        done.append(target.name)
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "replace", crash_at_the_second)
        with pytest.raises(Crash):
            save(tmp_path, size=0.1)
    assert done == ["stream.safetensors"]
    refused(tmp_path, "does not match its JSON")


@pytest.mark.parametrize(
    "facts",
    [
        {"drafts": -1}, {"drafts": 10**9}, {"drafts": "5"}, {"drafts": True}, {"drafts": 2.5},
        {"threshold": 1.5}, {"threshold": float("nan")}, {"threshold": None},
        {"tree": 3}, {"tree": {"drafts": 4, "threshold": -1, "leaves": 0}}, {"tree": {"leaves": 1e400}},
        {"steps": -3}, {"train_seconds": float("inf")}, {"train_seconds": "long"},
        {"use": {"m2r2": []}}, {"use": {"m2r2": [0, -1]}}, {"use": [1]},
        {"calibration": {"wait": {"thresholds": [0.5], "means": [float("nan")], "texts": 3}}},
        {"calibration": {"wait": {"thresholds": [0.5, 0.6], "means": [0.1], "texts": 3}}},
        {"calibration": {"wait": {"thresholds": [0.5], "means": [0.1]}}},
        {"calibration": {"wait": {"thresholds": 1, "means": 1, "texts": 3}}},
        {"calibration": {"wait": {"thresholds": [0.5], "means": [0.1], "texts": 3, "free": [0.1, 0.2]}}},
        {"calibration": {"wait": {"thresholds": [0.5], "means": [0.1], "texts": 3, "free": [2]}}},
    ],
)  # fmt: skip
def test_facts_that_no_command_writes_are_refused(tmp_path, facts):
    save(tmp_path, **facts)
    refused(tmp_path, "stream.json is damaged")


def test_facts_that_commands_write_are_taken(tmp_path):
    known = {"thresholds": [0.3, 0.995], "means": [0.5, 0], "texts": 240}
    save(
        tmp_path, steps=4000, train_seconds=397.5, drafts=5, threshold=0.0,
        tree={"drafts": 4, "threshold": 0.1, "leaves": 0}, use={"m2r2": [0, 3], "static": None},
        calibration={"wait": known, "linear": known}, router_steps=0, more={"any": "thing"},
    )  # fmt: skip
    assert load_stream(tiny.backbone(), tmp_path)


def test_settings_that_are_no_numbers_or_nested_without_end_are_refused(tmp_path):
    save(tmp_path)
    good = (tmp_path / "stream.json").read_text()
    for bad in (good.replace('"rate": 2', '"rate": NaN'), good.replace('"rate": 2', '"rate": 1e999')):
        assert bad != good
        (tmp_path / "stream.json").write_text(bad)
        refused(tmp_path, "stream.json is damaged")
    (tmp_path / "stream.json").write_text('{"format": ' + "[" * 100_000)
    refused(tmp_path, "stream.json is damaged")
