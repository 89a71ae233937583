"""Shared angles turn queries and keys as MLX's own rotary embedding does."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from m2r2kit.model.compiled import lean_pass

cpu = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="only used on a CPU")


def turned(rope, x, offset):
    """(shared, MLX's own)"""
    with lean_pass():
        mine = rope(x, offset=offset)
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
    with lean_pass():
        first, again, other = nn.RoPE(8)(x, here), nn.RoPE(8)(x, here), nn.RoPE(8)(x, there)
        nn.RoPE(8, base=100)(x, here)
    assert len(tables) == 3
    assert mx.array_equal(first, again) and not mx.allclose(first, other, atol=1e-3)


def test_it_ends_with_the_pass():
    alone = nn.RoPE.__call__
    with pytest.raises(KeyError), lean_pass():
        raise KeyError
    assert nn.RoPE.__call__ is alone
