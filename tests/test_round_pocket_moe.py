"""ci/round_pocket_moe.py: a quantised folder with its predictors, and what the rounding changed."""

import importlib.util
import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny_experts
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from m2r2kit.experts import train as learn
from m2r2kit.experts import trained
from m2r2kit.experts.state_predictors import DirectMap
from m2r2kit.model.backbone import Backbone
from m2r2kit.stream import checkpoints

FILE = Path(__file__).parents[1] / "ci" / "round_pocket_moe.py"
spec = importlib.util.spec_from_file_location("round_pocket_moe", FILE)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, Path]:
    """A model with trained predictors, and what the script makes of it."""
    folder = tmp_path_factory.mktemp("rounded")
    model = Path(shutil.copytree(tiny_experts.model(), folder / "model"))
    (model / "generation_config.json").write_text("{}")
    backbone = Backbone.load(model)
    stream = learn.new_stream(backbone, 2.0, ffn_width=64)
    made = {"m2r2": stream, "m2r2-r1": learn.new_stream(backbone, 1.0, ffn_width=64)}
    for kind, module in (made | {"direct": DirectMap.like(stream)}).items():
        where = trained.folder_of(model, kind)
        checkpoints.save(module, module.config, backbone.sha256, where, trained.file_of(kind), steps=3)
    script.rounded(model, folder / "out")
    return model, folder / "out"


def test_mlx_lm_loads_what_it_writes(both):
    model, _ = mlx_lm.load(str(both[1]))
    block = model.layers[1]
    experts = block.mlp.switch_mlp.down_proj
    assert isinstance(experts, QuantizedSwitchLinear) and experts.bits == script.EXPERTS
    assert block.self_attn.q_proj.bits == model.model.embed_tokens.bits == script.OTHERS
    assert "scales" not in block.mlp.gate and block.mlp.gate.weight.dtype == mx.float32  # as it came


def test_the_predictors_belong_to_the_rounded_model_and_are_smaller(both):
    sha256 = Backbone.load(both[1]).sha256
    for kind in (*trained.STREAMS, trained.DIRECT):
        old, new = (trained.folder_of(folder, kind) / trained.file_of(kind) for folder in both)
        text = json.loads(new.with_suffix(".json").read_text())
        assert text["base_sha256"] == sha256 and text["steps"] == 3
        sizes = [file.with_suffix(".safetensors").stat().st_size for file in (old, new)]
        assert sizes[1] < 0.8 * sizes[0]


def test_it_measures_the_same_model_as_equal_and_the_rounded_one_as_close(both):
    rows = np.random.default_rng(0).integers(0, 90, (12, 24))
    (before, old), (after, new) = (script.measure(folder, rows) for folder in both)
    again, same = script.measure(both[0], rows)
    assert again == before and np.array_equal(same, old) and old.shape == rows.shape
    assert 0.5 < (old == new).mean() < 1 and after["loss"] != before["loss"]
    assert abs(after["loss"] - before["loss"]) < 0.2
    assert before["recall"].keys() == {"m2r2", "m2r2-r1", "direct"}
    assert all(0 < share <= 1 for of in after["recall"].values() for share in of.values())
