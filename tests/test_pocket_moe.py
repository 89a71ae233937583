"""The pocket mixture in data/: an ordinary quantised folder, which the kit decodes."""

import math
import subprocess
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from m2r2kit.experts.packing import load_without_experts, pieces
from m2r2kit.model.backbone import Backbone
from m2r2kit.pocket.export import evaluate
from m2r2kit.text.corpus import Document

DATA = Path(__file__).parents[1] / "data"
MODEL = DATA / "pocket-moe"


@pytest.fixture(scope="module")
def view() -> Backbone:
    return Backbone.load(MODEL, decode=True)


def test_mlx_lm_loads_it_quantised():
    model, tokenizer = mlx_lm.load(str(MODEL))
    experts = [layer.mlp.switch_mlp.up_proj for layer in model.layers]
    assert all(isinstance(e, QuantizedSwitchLinear) and (e.bits, e.group_size) == (5, 32) for e in experts)
    others = [
        m for _, m in model.named_modules() if isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    ]
    assert len(others) == 1 + 4 * len(model.layers) and {m.bits for m in others} == {8}
    routers = [layer.mlp.gate for layer in model.layers]
    assert all(type(r) is nn.Linear and r.weight.dtype == mx.float16 for r in routers)
    assert Backbone.of(model, tokenizer).sha256 == Backbone.load(MODEL).sha256


def test_an_expert_is_75_pages_in_float32(view):
    _, experts = load_without_experts(MODEL, mx.float32, decode=True)
    for l, each in experts.items():
        parts = pieces(each)
        assert sum(p.nbytes for p in parts) == 75 * 4096 and {p.dtype for p in parts} == {"float32"}
        for name, w in tree_flatten(each.parameters()):
            in_memory = dict(tree_flatten(view.blocks[l].mlp.switch_mlp.parameters()))[name]
            assert mx.array_equal(w, in_memory)


def test_its_held_out_figures_are_of_the_weights_that_the_kit_runs(view):
    text = "How do I list files?\nls -l shows one file in each line, with its size and its owner. " * 12
    documents = [Document("shell", f"page {i}", text) for i in range(200)]
    found = evaluate(MODEL, [d for d in documents if d.held_out][:1], window=32)["shell"]
    ids = np.array(view.tokenizer.encode(text, add_special_tokens=False))
    rows = ids[: found["tokens"] + 1]
    count = found["tokens"] // 32
    logits = view.logits(mx.array(rows[:-1].reshape(count, 32)))
    loss = nn.losses.cross_entropy(logits, mx.array(rows[1:].reshape(count, 32)), reduction="mean").item()
    assert count > 2 and math.isclose(found["loss"], loss, rel_tol=1e-4)


def test_the_checked_out_data_take_at_most_60_mib():
    git = ["git", "-C", str(DATA), "ls-files", "-z", "."]
    names = subprocess.run(git, check=True, capture_output=True, text=True).stdout.split("\0")
    assert sum((DATA / name).stat().st_size for name in names if name) <= 60 << 20
