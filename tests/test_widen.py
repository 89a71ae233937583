"""Wider experts: more bytes, and nothing else is different."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny_experts
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model

from m2r2kit.__main__ import main
from m2r2kit.experts import train as learn
from m2r2kit.experts import trained
from m2r2kit.experts.packing import pack
from m2r2kit.experts.state_predictors import DirectMap
from m2r2kit.model.backbone import Backbone
from m2r2kit.speculation import generate
from m2r2kit.stream import checkpoints

K = 4


@pytest.fixture(scope="module", params=[0, 4], ids=["float32", "4 bit"])
def both(request, tmp_path_factory) -> tuple[Path, Path]:
    """A model with predictors, and the wide one that the command makes of it."""
    folder = tmp_path_factory.mktemp("wider")
    model, wide = folder / "model", folder / "wide"
    shutil.copytree(tiny_experts.model("olmoe", request.param), model)
    backbone = Backbone.load(model)
    stream = learn.new_stream(backbone, 2.0, ffn_width=8)
    for kind, made in (("m2r2", stream), ("direct", DirectMap.like(stream))):
        where = trained.folder_of(model, kind)
        checkpoints.save(made, made.config, backbone.sha256, where, trained.file_of(kind), steps=3)
    assert main(["make-moe", str(wide), "--widen", str(K), "--model", str(model)]) == 0
    return model, wide


def test_it_says_the_same_and_its_records_are_so_many_times_as_large(both, tmp_path):
    narrow, wide = (Backbone.load(folder) for folder in both)
    tokens = mx.array([[3, 1, 4, 1, 5]])
    a, b = (np.array(view.logits(tokens, view.new_cache(8))) for view in (narrow, wide))
    assert np.allclose(a, b, atol=1e-4) and not np.allclose(a, 0)
    assert generate(narrow, [3, 1, 4], max_tokens=8).tokens == generate(wide, [3, 1, 4], max_tokens=8).tokens
    sizes = [pack(folder, tmp_path / folder.name).slot_bytes for folder in both]
    assert sizes[1] == K * sizes[0]


def test_its_predictors_are_those_of_the_narrow_one_and_belong_to_it(both):
    narrow, wide = (Backbone.load(folder) for folder in both)
    rows = np.arange(12).reshape(2, 6)
    for kind in ("m2r2", "direct"):
        mine = trained.predictor(narrow, both[0], kind), learn.teacher_batch(narrow, rows)
        its = trained.predictor(wide, both[1], kind), learn.teacher_batch(wide, rows)
        assert learn.recall(mine[0], [mine[1]]) == learn.recall(its[0], [its[1]])
        text = json.loads((trained.folder_of(both[1], kind) / f"{trained.file_of(kind)}.json").read_text())
        assert text["base_sha256"] == wide.sha256 and text["steps"] == 3
    assert not trained.folder_of(both[1], "m2r2-r1").exists()


def microscaled(folder: Path) -> Path:
    """A model whose scales are powers of two, stored as integers."""
    net, config = load_model(tiny_experts.model())
    net, config = quantize_model(net, config, 32, 4, "mxfp4")
    shutil.copytree(tiny_experts.model(), folder)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(net.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_cannot_be_widened_is_one_sentence_and_leaves_nothing(both, tmp_path_factory, tmp_path, capsys):
    out = tmp_path / "out"
    for more, sentence in (
        (["--model", str(tmp_path / "none")], "cannot be read as a model"),
        (["--model", str(microscaled(tmp_path_factory.mktemp("mx") / "model"))], "cannot be widened"),
        (["--model", str(tiny_experts.model("mixtral"))], "cannot be widened"),
        (["--model", str(both[0]), "--width", "64"], "leave out --size"),
    ):
        assert main(["make-moe", str(out), "--widen", "2", *more]) == 2
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1 and not list(tmp_path.iterdir())
    assert main(["make-moe", str(out), "--model", str(both[0])]) == 2  # nothing says how wide
    assert "add --widen K" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert main(["make-moe", str(both[1]), "--widen", "2", "--model", str(both[0])]) == 2
    assert "exists already" in capsys.readouterr().err
