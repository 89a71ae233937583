"""Shared angles turn queries and keys as MLX's own rotary embedding does."""

from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.rope_utils import Llama3RoPE

from m2r2kit.model.compiled import lean_pass
from m2r2kit.model.view import private

cpu = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="only used on a CPU")


SCALED = {"factor": 2.0, "original_max_position_embeddings": 32}


def turned(rope, x, offset):
    """(shared, MLX's own)"""
    with lean_pass():
        mine = private(rope, "rope")(x, offset=offset)
    return mine, rope(x, offset=offset)


@pytest.mark.parametrize(
    "rope", [nn.RoPE(8), nn.RoPE(8, base=500_000, scale=0.5), nn.RoPE(8, traditional=True), nn.RoPE(4)]
)
@pytest.mark.parametrize("offset", [0, 7, 900])
def test_it_is_mlx_s_own(rope, offset):
    x = mx.random.normal((2, 3, 5, 8))
    for at in (offset, mx.array(offset), mx.array([offset])):
        mine, right = turned(rope, x, at)
        assert mine.dtype == right.dtype and mx.allclose(mine, right, atol=1e-4)
    half, right = turned(rope, x.astype(mx.bfloat16), mx.array([offset]))
    assert half.dtype == right.dtype == mx.bfloat16 and mx.allclose(half, right, atol=0.05)


@cpu
def test_the_angles_are_computed_once(monkeypatch):
    from m2r2kit.model import rotation

    tables = []
    table = rotation._table
    monkeypatch.setattr(rotation, "_table", lambda *a: tables.append(a) or table(*a))
    x, here, there = mx.random.normal((1, 2, 3, 8)), mx.array([4]), mx.array([5])
    one, two, third = (private(nn.RoPE(8, base=base), "rope") for base in (10_000, 10_000, 100))
    with lean_pass():
        first, again, other = one(x, here), two(x, here), two(x, there)
        third(x, here)
    assert len(tables) == 3
    assert mx.array_equal(first, again) and not mx.allclose(first, other, atol=1e-3)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(
    "rope", [nn.RoPE(8), nn.RoPE(8, traditional=True), nn.RoPE(4), Llama3RoPE(8, scaling_config=SCALED)]
)
def test_positions_may_be_given_one_by_one(rope, lean):
    x, positions = mx.random.normal((1, 2, 3, 8)), [7, 2, 7]
    with lean_pass() if lean else nullcontext():
        mine = private(rope, "rope")(x, offset=mx.array(positions))
    alone = [rope(x[:, :, i : i + 1], offset=at) for i, at in enumerate(positions)]
    assert mx.allclose(mine, mx.concatenate(alone, axis=2), atol=1e-5)
