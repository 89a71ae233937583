"""`m2r2kit generate --experts`: the text of plain decoding, or one error."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_experts

from m2r2kit.__main__ import main
from m2r2kit.cli import values as arguments

K = tiny_experts.K


def test_the_command_streams_what_plain_decoding_says(tmp_path, capsys):
    model, store = str(tiny_experts.model()), str(tiny_experts.store().folder)
    asked = ["generate", "--model", model, "--prompt", "hello", "--raw", "--json", "--max-tokens", "9"]
    assert main([*asked, "--method", "plain"]) == 0
    plain = json.loads(capsys.readouterr().out)
    streamed = [*asked, "--experts", store, "--budget", "50%", "--reads", "buffered"]
    trace = str(tmp_path / "t.npz")
    assert main([*streamed, "--trace", trace]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["tokens"], out["text"]) == (plain["tokens"], plain["text"])
    assert out["resident"] + out["in_time"] + out["late"] + out["missed"] == 9 * K * tiny.BLOCKS
    for more in (["--policy", "belady"], ["--predictor", "oracle", "--distance", "1"]):
        assert main([*streamed, "--known", trace, *more]) == 0
        assert json.loads(capsys.readouterr().out)["tokens"] == plain["tokens"]
    assert main([*streamed, "--temp", "0.7", "--seed", "3"]) == 0
    drawn = json.loads(capsys.readouterr().out)["tokens"]
    assert main([*asked, "--method", "plain", "--temp", "0.7", "--seed", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == drawn


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--budget", "100"], "is too small"),
        (["--policy", "belady"], "needs a routing trace"),
        (["--predictor", "m2r2"], "m2r2kit train predictor"),
        (["--predictor", "direct"], "m2r2kit train predictor"),
        (["--method", "medusa"], "does not work with --method"),
        (["--method", "m2r2"], "does not work with --method"),
        (["--known", "nowhere.npz"], "no trace nowhere.npz"),
        (["--distance", "9"], "looks 1 to 3 blocks ahead"),
    ],
)
def test_what_cannot_be_is_one_sentence(more, sentence, capsys):
    model, store = str(tiny_experts.model()), str(tiny_experts.store().folder)
    base = [
        "generate",
        "--model",
        model,
        "--experts",
        store,
        "--prompt",
        "abc",
        "--raw",
        "--reads",
        "buffered",
    ]
    assert main([*base, *more]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_a_damaged_store_gives_no_wrong_token(tmp_path, capsys):
    store = Path(shutil.copytree(tiny_experts.store().folder, tmp_path / "store"))
    last = store / f"block-{tiny.BLOCKS - 1:02d}.bin"
    content, record = bytearray(last.read_bytes()), tiny_experts.store().manifest.record_bytes
    content[::record] = bytes(byte ^ 1 for byte in content[::record])  # a bit of each expert of a block
    last.write_bytes(content)
    asked = ["generate", "--model", str(tiny_experts.model()), "--experts", str(store), "--prompt", "hello"]
    assert main([*asked, "--raw", "--json", "--reads", "buffered"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "checksum is wrong" in err and err.count("\n") == 1


def test_budgets_are_sizes_or_shares():
    sizes = {"64MB": 64 * 10**6, "1.5GiB": 3 << 29, "4096": 4096, "25%": 0.25, "0.5": 0.5, "100%": 1.0}
    for text, value in sizes.items():
        assert arguments.budget(text) == value and type(arguments.budget(text)) is type(value)
    for text in ("", "MB", "-1MB", "200%", "0", "1XB", "nan"):
        with pytest.raises(argparse.ArgumentTypeError):
            arguments.budget(text)
