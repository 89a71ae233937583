"""The store: what is packed is what the model has, whole or not there at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_experts
from mlx.utils import tree_flatten

from m2r2kit.__main__ import main
from m2r2kit.common import UserError
from m2r2kit.experts import packing
from m2r2kit.experts import store as store_module
from m2r2kit.experts.decode import StreamedModel
from m2r2kit.experts.store import PAGE, Store
from m2r2kit.model.backbone import Backbone


def copy(folder: Path) -> Path:
    """A store that a test may damage."""
    return Path(shutil.copytree(tiny_experts.store().folder, folder))


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("family", tiny_experts.FAMILIES)
def test_records_hold_what_the_model_computes_with(family, bits):
    store, view = tiny_experts.store(family, bits), tiny_experts.resident(family, bits)
    manifest = store.manifest
    assert manifest.record_bytes % PAGE == 0 and manifest.blocks == tuple(range(tiny.BLOCKS))
    assert len(manifest.pieces) == (9 if bits else 3)
    for l in manifest.blocks:
        weights = dict(tree_flatten(view.blocks[l][view.parts.ffn].switch_mlp.parameters()))
        content = store.path(l).read_bytes()
        for e in range(manifest.experts):
            for piece in manifest.pieces:
                start = e * manifest.record_bytes + piece.offset
                right = np.array(weights[piece.name][e].reshape(-1).view(mx.uint8))
                assert content[start : start + piece.nbytes] == right.tobytes()
    assert not store.damaged()


def test_a_model_stored_in_half_precision_is_packed_as_it_is_run(tmp_path):
    folder = Path(shutil.copytree(tiny_experts.model("olmoe"), tmp_path / "half"))
    weights = {name: w.astype(mx.float16) for name, w in mx.load(str(folder / "model.safetensors")).items()}
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    packing.pack(folder, tmp_path / "store")
    view, store = Backbone.load(folder), Store(tmp_path / "store")
    weight = view.blocks[1].mlp.switch_mlp.gate_proj.weight
    piece = store.manifest.pieces[0]
    record = store.path(1).read_bytes()[3 * store.manifest.record_bytes :]
    assert store.manifest.dtype == piece.dtype == str(weight.dtype).split(".")[-1]
    assert record[: piece.nbytes] == np.array(weight[3].reshape(-1).view(mx.uint8)).tobytes()


def test_a_model_without_experts_is_refused(tmp_path):
    with pytest.raises(UserError, match="no mixture of experts"):
        packing.pack(tiny.folder("llama"), tmp_path / "store")
    assert not list(tmp_path.iterdir())


def test_dense_blocks_between_are_left_where_they_are(tmp_path):
    made = tiny.make_folder("qwen3_moe", tmp_path / "model", mlp_only_layers=[1])
    manifest = packing.pack(made, tmp_path / "store")
    assert manifest.blocks == (0, 2, 3)


def test_nothing_is_overwritten(tmp_path):
    out = copy(tmp_path / "store")
    with pytest.raises(UserError, match="exists already"):
        packing.pack(tiny_experts.model(), out)


def test_too_small_a_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "SPARE", 1 << 60)
    with pytest.raises(UserError, match="make room"):
        packing.pack(tiny_experts.model(), tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up_leaves_no_store_and_the_next_run_goes_on(tmp_path):
    out, partial = tmp_path / "store", tmp_path / "store.partial"
    partial.mkdir()
    full = partial / "block-02.bin.new"
    full.symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device"):
        packing.pack(tiny_experts.model(), out)
    assert not out.exists() and (partial / "block-01.bin").exists()
    full.unlink()
    before = (partial / "block-01.bin").stat().st_mtime_ns
    packing.pack(tiny_experts.model(), out)
    assert not Store(out).damaged() and not partial.exists()
    assert (out / "block-01.bin").stat().st_mtime_ns == before  # not written again


def test_killed_while_packing_leaves_no_store_and_the_next_run_goes_on(tmp_path):
    out = tmp_path / "store"
    code = (
        "import os, signal, sys\nfrom m2r2kit.experts.packing import pack\nblocks = []\n"
        "def report(*_):\n    blocks.append(1)\n"
        "    if len(blocks) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "pack(sys.argv[1], sys.argv[2], report)"
    )
    dead = subprocess.run([sys.executable, "-c", code, str(tiny_experts.model()), str(out)])
    assert dead.returncode == -signal.SIGKILL and not out.exists()
    written = tmp_path / "store.partial" / "block-01.bin"
    before = written.stat().st_mtime_ns
    packing.pack(tiny_experts.model(), out)
    assert (out / "block-01.bin").stat().st_mtime_ns == before
    assert (out / "manifest.json").read_text() == (tiny_experts.store().folder / "manifest.json").read_text()
    assert not Store(out).damaged()


def test_what_another_model_left_is_not_gone_on_with(tmp_path):
    out, partial = tmp_path / "store", tmp_path / "store.partial"
    partial.mkdir()
    for file in tiny_experts.store("mixtral").folder.iterdir():
        shutil.copy(file, partial)
    facts = json.loads((partial / "manifest.json").read_text())
    sums = {l: s for l, s in zip(facts["blocks"], facts["sha256"])}
    (partial / packing.PROGRESS).write_text(json.dumps({"facts": facts, "sha256": sums}))
    (partial / "block-99.bin").write_bytes(b"of a deeper model")
    packing.pack(tiny_experts.model("olmoe"), out)
    assert not Store(out).damaged() and len(list(out.iterdir())) == 2 + tiny.BLOCKS


# --- what is not whole ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "harm, sentence",
    [
        (lambda f: (f / "block-02.bin").unlink(), "lacks block-02.bin"),
        (lambda f: (f / "block-02.bin").write_bytes(b"x" * 100), "block-02.bin has 100 bytes"),
        (lambda f: (f / "manifest.json").unlink(), "no expert store"),
        (lambda f: (f / "manifest.json").write_text("{"), "is damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "is damaged"),
        (lambda f: edit(f, record_bytes=4097), "size of its records"),
        (lambda f: edit(f, sha256=[]), "counts do not fit"),
        (lambda f: edit(f, format=2), "another version"),
        (lambda f: edit(f, top_k=99), "counts do not fit"),
    ],
)
def test_a_store_that_is_not_whole_is_one_sentence(tmp_path, harm, sentence):
    folder = copy(tmp_path / "store")
    harm(folder)
    with pytest.raises(UserError, match=sentence) as error:
        Store(folder)
    assert str(error.value).count("\n") == 0


def edit(folder: Path, **changes) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_flipped_byte_is_found(tmp_path):
    folder = copy(tmp_path / "store")
    record = Store(folder).manifest.record_bytes
    flip(folder / "block-03.bin", 5 * record + 17)
    assert Store(folder).damaged() == [(3, 5)]


def test_the_command_packs_and_verifies(tmp_path, capsys):
    out = str(tmp_path / "store")
    model = str(tiny_experts.model())
    assert main(["pack", model, out]) == 0
    assert main(["pack", model, out, "--verify"]) == 0
    assert "32 experts" in capsys.readouterr().out
    assert main(["pack", str(tiny_experts.model("mixtral")), out, "--verify"]) == 2
    flip(tmp_path / "store" / "block-00.bin", 0)
    assert main(["pack", model, out, "--verify"]) == 1
    assert "Expert 0 of block 0 in" in capsys.readouterr().out


# --- which model a store belongs to ---------------------------------------------------------


def test_a_models_hash_is_read_again_only_when_its_files_have_changed(tmp_path, monkeypatch):
    model = Path(shutil.copytree(tiny_experts.model(), tmp_path / "model"))
    packing.pack(model, tmp_path / "store")
    hashed, real = [], store_module.weights_sha256
    monkeypatch.setattr(store_module, "weights_sha256", lambda folder: hashed.append(1) or real(folder))
    StreamedModel(model, tmp_path / "store")
    assert not hashed
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    for _ in range(2):  # the same weights elsewhere: once
        StreamedModel(moved, tmp_path / "store")
    assert len(hashed) == 1
    weights = moved / "model.safetensors"
    before = weights.stat()
    flip(weights, before.st_size - 1)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and time say nothing
    with pytest.raises(UserError, match="packed from another model"):
        StreamedModel(moved, tmp_path / "store")
    (tmp_path / "store" / "model.json").write_text("{")
    StreamedModel(model, tmp_path / "store")
