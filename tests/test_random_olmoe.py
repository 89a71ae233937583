"""A model of a requested size, larger than its budget: the same path on tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny_experts

from m2r2kit.__main__ import main
from m2r2kit.bench import memory as bench_memory
from m2r2kit.bench import records
from m2r2kit.cli.shared import MODEL
from m2r2kit.common import UserError
from m2r2kit.experts.packing import pack
from m2r2kit.model.backbone import Backbone
from m2r2kit.pocket import new_model
from m2r2kit.pocket.random_olmoe import LargeConfig, parts, shapes, sized, write


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A model made by the command, and its store."""
    folder = tmp_path_factory.mktemp("large")
    model, store = folder / "model", folder / "store"
    assert main(["make-moe", str(model), "--size", "5MB", "--width", "32"]) == 0
    assert main(["pack", str(model), str(store)]) == 0
    return model, store


# --- the model ------------------------------------------------------------------------------


def test_it_is_as_large_as_asked_and_says_what_it_is_not(tmp_path, capsys):
    assert main(["make-moe", str(tmp_path / "m"), "--size", "4MB", "--width", "32"]) == 0
    said = capsys.readouterr().out
    assert "All weights are random" in said and "favour some experts" in said
    config = sized(4_000_000, width=32)
    each = config.blocks * (config.expert_bytes + 4 * config.width)
    assert 0 <= config.total_bytes - 4_000_000 < each
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert config.total_bytes < size < config.total_bytes + 50_000  # and a header


def test_the_file_holds_what_was_made(made):
    model, _ = made
    config, arrays = sized(5_000_000, width=32), mx.load(str(model / "model.safetensors"))
    assert {name: tuple(w.shape) for name, w in arrays.items()} == dict(shapes(config))
    for number, (name, shape) in enumerate(shapes(config), 1):
        whole = np.concatenate([p.reshape(-1) for p in parts(name, shape, config, number)])
        assert np.array_equal(np.array(arrays[name]).reshape(-1), whole)
    assert Backbone.load(model).depth == 12


def test_more_skew_uses_experts_less_evenly(tmp_path):
    from m2r2kit.experts import registry as methods
    from m2r2kit.experts.decode import ExpertDecoder, StreamedModel
    from m2r2kit.experts.reader import Reader
    from m2r2kit.experts.trace import Trace

    busier = []
    for skew in (0.0, 0.6):
        model, store = tmp_path / f"m{skew}", tmp_path / f"s{skew}"
        write(LargeConfig(width=64, experts=32, blocks=4, skew=skew), model, MODEL)
        pack(model, store)
        streamed = StreamedModel(model, store)
        m = streamed.store.manifest
        trace = Trace(m.blocks, m.experts, m.top_k)
        with Reader(streamed.store, "buffered") as r:
            residency = streamed.residency(32, methods.policy("lru"))
            ExpertDecoder(streamed, residency, r, trace=trace).generate([5, 6, 7], 80)
        trace.save(tmp_path / "t.npz")
        found = bench_memory.skewness(tmp_path / "t.npz")
        busier.append(found["busier_half"] - found["busier_half_by_chance"])
    assert busier[0] > -0.05
    assert busier[1] > busier[0] + 0.1


@pytest.mark.parametrize("size, width, sentence", [("1MB", "32", "has"), ("900GB", "32", "change --size")])
def test_sizes_that_cannot_be_are_one_sentence(tmp_path, size, width, sentence, capsys):
    assert main(["make-moe", str(tmp_path / "m"), "--size", size, "--width", width]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_disk_too_small_or_a_folder_in_use_are_one_sentence_and_leave_nothing(tmp_path, monkeypatch):
    config = LargeConfig(width=32, experts=4)
    monkeypatch.setattr(new_model, "SPARE", 1 << 60)
    with pytest.raises(UserError, match="are free; free some space"):
        write(config, tmp_path / "m", MODEL)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="exists already"):
        write(config, tmp_path, MODEL)


def test_a_folder_of_the_users_own_stays_as_it_is(tmp_path, capsys):
    mine = tmp_path / "m.partial"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    assert main(["make-moe", str(tmp_path / "m"), "--size", "900GB", "--width", "4096"]) == 2
    assert main(["make-moe", str(tmp_path / "m"), "--size", "4MB", "--width", "32"]) == 0
    assert [f.name for f in mine.iterdir()] == ["notes.txt"]
    names = {"config.json", "model.safetensors", *new_model.TOKENIZER}
    assert {f.name for f in (tmp_path / "m").iterdir()} == names


def test_a_tokenizer_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json to copy"):
        write(LargeConfig(width=32, experts=4), tmp_path / "m", tmp_path)
    assert not list(tmp_path.iterdir())


# --- the measurement ------------------------------------------------------------------------


def memory(made: tuple[Path, Path]) -> list[str]:
    return ["bench", "memory", "--model", str(made[0]), "--experts", str(made[1]), "--reads", "buffered"]


def test_it_decodes_in_a_fresh_process_and_says_its_peak(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    asked = [*memory(made), "--budget", "50%"]
    assert main([*asked, "--max-tokens", "6", "--most", "2GB", "--record"]) == 0
    assert "6 tokens, same text" in capsys.readouterr().out
    found = json.loads((tmp_path / "experts-large.jsonl").read_text())["figures"]
    assert found["equal"] and found["tokens"] == 6
    for arm in (found["streamed"], found["whole"]):
        assert 30e6 < arm["peak_bytes"] < 2e9 and arm["tokens_per_second"] > 0
    assert main([*asked, "--max-tokens", "1", "--most", "20MB"]) == 1  # no Python is so small


def test_texts_that_differ_are_a_failure(made, monkeypatch, capsys):
    """The model in memory gives another text, as if streaming had used a wrong expert."""
    real = bench_memory.generate

    def generate(words):
        return real(["A" if word == "B" and "plain" in words else word for word in words])

    monkeypatch.setattr(bench_memory, "generate", generate)
    asked = [*memory(made), "--budget", "50%", "--max-tokens", "3", "--most", "2GB", "--prompt", "B"]
    assert main(asked) == 1
    assert "DIFFER" in capsys.readouterr().out


def test_what_goes_wrong_in_the_other_process_is_one_sentence(made, capsys):
    assert main([*memory(made), "--budget", "1KB"]) == 2
    assert "is too small" in capsys.readouterr().err
    assert main(memory((made[0], tiny_experts.store().folder))) == 2
    assert "packed from another model" in capsys.readouterr().err


# --- memory ---------------------------------------------------------------------------------


def peak_of(code: str, *words: str) -> list[int]:
    """The whole numbers that a program prints."""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_the_peak_is_the_processes_own_and_grows_with_what_it_takes():
    held = np.ones(1 << 26)  # 512 MiB of this process
    before, after = peak_of(
        "from m2r2kit.common import peak_bytes\nprint(peak_bytes())\nb = bytearray(100_000_000)\n"
        "b[::4096] = b'x' * len(b[::4096])\nprint(peak_bytes())"
    )
    assert before < held.nbytes / 2 and 90e6 < after - before < 130e6


def test_making_and_packing_hold_little_of_a_model(tmp_path):
    """A hundred megabytes: of it packing holds a block (8 MB), and making holds an expert."""
    config = LargeConfig(width=256, experts=10)
    made = str(tmp_path / "model")
    before, after = peak_of(
        "import sys\nfrom pathlib import Path\nfrom m2r2kit.common import peak_bytes\n"
        "from m2r2kit.pocket.random_olmoe import LargeConfig, write\nprint(peak_bytes())\n"
        "write(LargeConfig(width=256, experts=10), Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "print(peak_bytes())",
        made, str(MODEL),
    )  # fmt: skip
    assert config.total_bytes > 95e6 and after - before < 30e6
    before, after = peak_of(
        "import sys\nfrom m2r2kit.common import peak_bytes\nfrom m2r2kit.experts.packing import pack\n"
        "pack(sys.argv[1], sys.argv[2])\nprint(peak_bytes())\n"
        "pack(sys.argv[3], sys.argv[4])\nprint(peak_bytes())",
        str(tiny_experts.model()), str(tmp_path / "small"), made, str(tmp_path / "store"),
    )  # fmt: skip
    assert after - before < 60e6
