"""A lean pass computes what MLX's own functions do, with fewer operations, and only while it is traced."""

import re
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx_lm.models import llama
from mlx_lm.models.base import scaled_dot_product_attention

from m2r2kit.model.compiled import attention, is_lean, lean_pass, product, swiglu
from m2r2kit.model.cpu.fast_math import falling_exp, logistic
from m2r2kit.model.families import DENSE
from m2r2kit.model.view import private
from m2r2kit.stream.fast_block import Merged

cpu = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="only used on a CPU")


def near(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and mx.allclose(a, b, atol=1e-5)


def operations(*arrays, folder) -> int:
    """How many operations a lazy result is made of."""
    mx.export_to_dot(str(folder / "graph.dot"), *arrays)
    return len(re.findall(r"shape ?= ?rectangle", (folder / "graph.dot").read_text()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 5, 8), (2, 3, 8), (4, 8)])
def test_linear(bias, shape):
    layer, x = nn.Linear(8, 6, bias=bias), mx.random.normal(shape)
    with lean_pass():
        mine = private(layer)(x)
    assert near(mine, layer(x))


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 5, 8), (2, 3, 8)])
def test_the_embedding_as_head(shape):
    embedding, x = nn.Embedding(11, 8), mx.random.normal(shape)
    with lean_pass():
        mine = private(embedding).as_linear(x)
    assert near(mine, embedding.as_linear(x))


@pytest.mark.parametrize("heads, shared", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_attention(heads, shared, rows, batch):
    q = mx.random.normal((batch, heads, rows, 8))
    k, v = (mx.random.normal((batch, shared, 10, 8)) for _ in "kv")
    rule = mx.arange(10) <= 4 + mx.arange(rows)[:, None]
    for mask in (rule, rule[0], mx.where(rule, 0.0, -1e9), None, "causal"):
        right = scaled_dot_product_attention(q, k, v, cache=None, scale=0.3, mask=mask)
        with lean_pass():
            mine = attention(q, k, v, cache=None, scale=0.3, mask=mask)
        assert near(mine, right)


def test_heads_that_share_keys_see_their_own_mask():
    """Two masks of one shape in the same pass must not be confused."""
    q, k, v = mx.random.normal((1, 4, 2, 8)), *(mx.random.normal((1, 2, 6, 8)) for _ in "kv")

    def attend(limit):
        mask = mx.arange(6) < limit + mx.arange(2)[:, None]
        return attention(q, k, v, cache=None, scale=0.3, mask=mask)

    with lean_pass():
        mine = [attend(1), attend(4)]
    assert near(mine[0], attend(1)) and near(mine[1], attend(4)) and not near(*mine)


def test_the_ffn_s_activation():
    gate, x = 20 * mx.random.normal((1, 5, 64)), mx.random.normal((1, 5, 64))
    with lean_pass():
        mine = swiglu(gate, x)
    assert mx.allclose(mine, llama.swiglu(gate, x), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("count", [101, 10_001])  # few numbers and many take two ways
def test_exp_and_the_logistic_function_are_exact_enough(count):
    x = mx.linspace(-60, 0, count)
    mine, right = np.array(falling_exp(x), np.float64), np.exp(np.array(x, np.float64))
    assert np.abs(mine - right).max() < 1e-6
    x = mx.linspace(-60, 60, count)
    mine, right = np.array(logistic(x), np.float64), 1 / (1 + np.exp(-np.array(x, np.float64)))
    assert np.abs(mine - right).max() < 1e-6


@cpu
def test_there_are_fewer_operations(tmp_path):
    block, x = tiny.backbone().blocks[0], mx.random.normal((1, 1, tiny.backbone().width))
    mx.eval(x)

    def run():
        mask = mx.ones((1, 1), dtype=mx.bool_)
        mx.eval(mask)
        return operations(mx.compile(lambda x: block(x, mask))(x), folder=tmp_path)

    many = run()
    with lean_pass():
        few = run()
    assert few <= many - 12  # seven products save three each; exp in vector instructions takes some


@cpu
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_it_ends_with_the_pass_and_stays_in_its_thread(error):
    others = []
    with pytest.raises(error), lean_pass():
        with lean_pass():  # inside another, nothing more
            assert is_lean()
        assert is_lean()
        in_a_thread(lambda: others.append(is_lean()))
        raise error
    assert others == [False] and not is_lean()


def in_a_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_product_has_its_gradient_outside():
    w = mx.random.normal((4, 3))
    assert mx.allclose(mx.grad(lambda w: product(mx.ones((1, 2, 4)), w).sum())(w), mx.full((4, 3), 2.0))


@cpu
@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("rank", [4, None])
def test_a_small_block_is_merged_with_its_changes(family, rank):
    view, block = tiny.backbone(family), tiny.stream(family, rank=rank).fast[0]
    merged = block.merged()
    assert any(isinstance(m, Merged) for m in merged.modules())
    x = mx.random.normal((1, 3, view.width))
    assert mx.allclose(merged(x), block._base(x), atol=1e-5)
    assert not mx.allclose(merged(x), block._unchanged(x), atol=1e-2)


@cpu
def test_a_large_or_half_precision_block_is_not_merged(monkeypatch):
    from m2r2kit.stream import fast_block as fast_blocks

    block = tiny.stream().fast[0]
    assert fast_blocks.is_small(block._unchanged)
    monkeypatch.setattr(fast_blocks, "SMALL_BLOCK", 10)
    assert block.merged() is None
    monkeypatch.undo()
    half = nn.Linear(8, 8)
    half.set_dtype(mx.bfloat16)
    assert not fast_blocks.is_small(half)
