"""The store holds the model's experts, completely or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import test_experts
import tiny
import tiny_experts
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model

from m2r2kit.__main__ import main
from m2r2kit.common import UserError
from m2r2kit.experts import packing
from m2r2kit.experts import registry as methods
from m2r2kit.experts import store as store_module
from m2r2kit.experts.decode import StreamedModel
from m2r2kit.experts.slots import budget_of_share, slots_of_budget
from m2r2kit.experts.state_predictors import NextRouter
from m2r2kit.experts.store import PAGE, Store
from m2r2kit.model.backbone import Backbone
from m2r2kit.speculation.decode import generate


def copy(folder: Path) -> Path:
    """A store that a test may damage."""
    return Path(shutil.copytree(tiny_experts.store().folder, folder))


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(("bits", "decode"), [(0, False), (4, False), (4, True)])
@pytest.mark.parametrize("family", tiny_experts.FAMILIES)
def test_records_hold_what_the_model_computes_with(family, bits, decode):
    store, view = tiny_experts.store(family, bits, decode), tiny_experts.resident(family, bits, decode)
    manifest = store.manifest
    assert manifest.record_bytes % PAGE == 0 and manifest.blocks == tuple(range(tiny.BLOCKS))
    assert manifest.quantized == (bits and not decode)
    assert len(manifest.pieces[0]) == (9 if manifest.quantized else 3)
    for l in manifest.blocks:
        weights = dict(tree_flatten(view.blocks[l][view.parts.ffn].switch_mlp.parameters()))
        content = store.path(l).read_bytes()
        for e in range(manifest.experts):
            for piece in manifest.pieces_of(l):
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
    piece = store.manifest.pieces_of(1)[0]
    record = store.path(1).read_bytes()[3 * store.manifest.record_bytes :]
    assert store.manifest.dtype == piece.dtype == str(weight.dtype).split(".")[-1]
    assert record[: piece.nbytes] == np.array(weight[3].reshape(-1).view(mx.uint8)).tobytes()


def test_a_small_quantised_model_is_packed_as_it_is_run(tmp_path):
    packing.pack(tiny_experts.model("olmoe", 4), tmp_path / "store")
    view, store = Backbone.load(tiny_experts.model("olmoe", 4)), Store(tmp_path / "store")
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    assert store.manifest.quantized == (not on_cpu) == ("scales" in view.blocks[0].mlp.switch_mlp.gate_proj)


def test_a_model_without_experts_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a mixture of experts"):
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
    with pytest.raises(UserError, match="free some space"):
        packing.pack(tiny_experts.model(), tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up_leaves_no_store_and_the_next_run_goes_on(tmp_path):
    out, partial = tmp_path / "store", tmp_path / "store.packing"
    partial.mkdir()
    full = partial / "block-02.bin.new"
    full.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"the disk is full.*goes on from there"):
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
    written = tmp_path / "store.packing" / "block-01.bin"
    before = written.stat().st_mtime_ns
    packing.pack(tiny_experts.model(), out)
    assert (out / "block-01.bin").stat().st_mtime_ns == before
    assert (out / "manifest.json").read_text() == (tiny_experts.store().folder / "manifest.json").read_text()
    assert not Store(out).damaged()


def test_what_another_model_left_is_not_gone_on_with(tmp_path):
    out, partial = tmp_path / "store", tmp_path / "store.packing"
    partial.mkdir()
    for file in tiny_experts.store("mixtral").folder.iterdir():
        shutil.copy(file, partial)
    facts = json.loads((partial / "manifest.json").read_text())
    sums = {l: s for l, s in zip(facts["blocks"], facts["sha256"])}
    (partial / packing.LOCK).touch()
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
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be used"),
        (lambda f: (f / "manifest.json").write_text("[]"), "cannot be used"),
        (lambda f: edit(f, sha256=[]), "changed after it was written"),
        (lambda f: edit(f, format=1), "another version"),
        (lambda f: edit(f, dtype="bfloat16"), "changed after it was written"),
        (lambda f: edit(f, signed=True, sha256=[]), "counts are inconsistent"),
        (lambda f: edit(f, signed=True, top_k=99), "counts are inconsistent"),
        (lambda f: edit(f, signed=True, dtype="int8"), "arithmetic is int8"),
        (lambda f: edit(f, signed=True, blocks=[0, 1, 2, 7]), "lacks block-07.bin"),
    ],
)
def test_a_store_that_is_not_whole_is_one_sentence(tmp_path, harm, sentence):
    folder = copy(tmp_path / "store")
    harm(folder)
    with pytest.raises(UserError, match=sentence) as error:
        Store(folder)
    assert str(error.value).count("\n") == 0


def edit(folder: Path, signed: bool = False, **changes) -> None:
    """Change facts of a manifest, by hand or, `signed`, with its checksum."""
    file = folder / "manifest.json"
    value = json.loads(file.read_text()) | changes
    if signed:
        del value["checksum"]
        value["checksum"] = store_module._checksum(value)
    file.write_text(json.dumps(value))


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


# --- whose folder, and whose turn -----------------------------------------------------------


def test_a_folder_of_the_users_own_is_neither_used_nor_deleted(tmp_path):
    for name in ("store.packing", "store.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a folder of an interrupted packing"):
        packing.pack(tiny_experts.model(), tmp_path / "store")
    assert (tmp_path / "store.packing" / "notes.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "store.packing")
    packing.pack(tiny_experts.model(), tmp_path / "store")
    assert [f.name for f in (tmp_path / "store.partial").iterdir()] == ["notes.txt"]


def test_a_packing_that_fails_at_once_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "SPARE", 1 << 60)
    with pytest.raises(UserError, match="free some space"):
        packing.pack(tiny_experts.model(), tmp_path / "store")
    assert not list(tmp_path.iterdir())


def test_of_two_that_pack_the_same_store_the_second_uses_what_the_first_wrote(tmp_path):
    """The first stops half-way until the second has begun; neither breaks what the other does."""
    out, begun, go_on = tmp_path / "store", threading.Event(), threading.Event()
    found, errors = [], []

    def first(*_):
        begun.set()
        go_on.wait(60)

    def run(report=None):
        try:
            found.append(packing.pack(tiny_experts.model(), out, report))
        except BaseException as error:
            errors.append(error)

    one, other = threading.Thread(target=run, args=(first,)), threading.Thread(target=run)
    one.start()
    assert begun.wait(60)
    other.start()
    other.join(1)  # it waits
    assert other.is_alive() and not out.exists()
    go_on.set()
    one.join(60)
    other.join(60)
    assert not errors and len(found) == 2 and found[0] == found[1] == Store(out).manifest
    assert [f.name for f in tmp_path.iterdir()] == ["store"] and not (out / packing.LOCK).exists()


def test_a_store_is_kept_in_the_cache_folder_once(tmp_path, monkeypatch):
    monkeypatch.setenv("M2R2KIT_CACHE", str(tmp_path / "cache"))
    store = packing.kept(tiny_experts.model())
    before = store.path(0).stat().st_mtime_ns
    assert packing.kept(tiny_experts.model()).path(0).stat().st_mtime_ns == before
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("M2R2KIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="M2R2KIT_CACHE"):
        packing.kept(tiny_experts.model())


# --- whether a store is that of a model -----------------------------------------------------


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"dtype": "float16"}, "layout of a record"),
        ({"top_k": 3}, "number of experts that run for a token"),
        ({"family": "mixtral"}, "type"),
        ({"model_sha256": "0" * 64}, "packed from another model"),
    ],
)
def test_what_a_manifest_says_is_compared_with_the_model(tmp_path, change, sentence):
    folder = copy(tmp_path / "store")
    edit(folder, signed=True, **change)
    with pytest.raises(UserError, match=sentence):
        StreamedModel(tiny_experts.model(), folder)


def test_more_experts_for_a_token_than_when_it_was_packed_is_one_sentence(tmp_path):
    model = Path(shutil.copytree(tiny_experts.model(), tmp_path / "model"))
    packing.pack(model, tmp_path / "store")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 4}))
    with pytest.raises(UserError, match="number of experts that run for a token"):
        StreamedModel(model, tmp_path / "store")


# --- stores that were harmed at random ------------------------------------------------------

CASES = 24  # 300 were tried


def harm(folder: Path, rng: np.random.Generator) -> None:
    """One random harm to one random file of a store."""
    files = sorted(folder.iterdir())
    file = files[rng.integers(len(files))]
    content = bytearray(file.read_bytes())
    at, length = int(rng.integers(len(content))), int(rng.integers(1, 5000))
    match rng.integers(6):
        case 0:
            content[at] ^= 1 << rng.integers(8)
        case 1:
            content = content[:at]
        case 2:
            content[at : at + length] = bytes(len(content[at : at + length]))
        case 3:
            other = files[rng.integers(len(files))].read_bytes()
            content[at : at + length] = other[at : at + length]
        case 4:
            content += content[:length]
        case 5:
            digits = [i for i, c in enumerate(content) if chr(c).isdigit()] or [at]
            content[digits[rng.integers(len(digits))]] = ord(str(rng.integers(10)))
    file.write_bytes(content)


@pytest.mark.parametrize("seed", range(CASES))
def test_a_store_harmed_at_random_is_named_or_gives_the_same_tokens(tmp_path, seed):
    folder = copy(tmp_path / "store")
    harm(folder, np.random.default_rng(seed))
    try:
        model = StreamedModel(tiny_experts.model(), folder)
        tokens, *_ = test_experts.run(model, "none")
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    else:
        assert tokens == test_experts.right()


# --- blocks that differ ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A model whose block 1 has experts in 8 bits and block 2 in full, the others in 4."""
    folder = tmp_path_factory.mktemp("mixed") / "model"
    tiny.make_folder("olmoe", folder, **tiny_experts.SIZES | {"intermediate_size": 256})
    net, config = load_model(folder)

    def bits(path, module):
        if not hasattr(module, "to_quantized") or ".2.mlp.switch_mlp" in path:
            return False
        return {"group_size": 32, "bits": 8 if ".1.mlp.switch_mlp" in path else 4}

    net, config = quantize_model(net, config, 32, 4, quant_predicate=bits)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(net.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_blocks_of_different_bits_have_records_of_different_sizes(mixed, tmp_path):
    manifest = packing.pack(mixed, tmp_path / "store", decode=False)
    sizes = [manifest.record_size(block) for block in manifest.blocks]
    assert sizes[0] == sizes[3] < sizes[1] < sizes[2] == manifest.record_bytes
    assert manifest.total_bytes == 8 * sum(sizes)
    model, right = StreamedModel(mixed, tmp_path / "store"), Backbone.load(mixed, decode=False)
    tokens, residency, _ = test_experts.run(model, predictor=NextRouter(model.backbone, 2))
    assert tokens == [generate(right, p, max_tokens=14).tokens for p in test_experts.PROMPTS]
    assert residency.counts.ahead and residency.counts.missed
    assert slots_of_budget(manifest, budget_of_share(manifest, 0.5, 100), 100) == 4
    with pytest.raises(UserError, match="cannot share slots"):
        model.residency(12, methods.policy("lru"), shared=True)
    flip(tmp_path / "store" / "block-02.bin", 3 * sizes[2] + 5)
    assert Store(tmp_path / "store").damaged() == [(2, 3)]
