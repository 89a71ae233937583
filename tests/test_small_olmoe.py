"""Training of a mixture of experts: the same maths as mlx-lm, and what it takes from its dense start."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import olmoe
from test_pretrain import TINY, batches, noisy, weights

from m2r2kit import pretrain, small_llama, small_olmoe
from m2r2kit.errors import UserError
from m2r2kit.expert_rows import TILE, expert_sum, tiles
from m2r2kit.numerics import soft_cross_entropy
from m2r2kit.pretrain import Run
from m2r2kit.small_olmoe import OlmoeConfig

MIXTURE = OlmoeConfig(
    blocks=2, width=16, heads=4, kv_heads=2, ffn_width=12, vocabulary=64, context=32, tokens=64 * 6,
    batch_tokens=64, window=16, first_window=8, long_from=64 * 3, grow_from=2, warmup_tokens=64, seed=3,
    experts=6, top=3,
)  # fmt: skip


def gradients(function, *arguments, wrt):
    """A function's value and gradients, weighted at random so that no symmetry hides an error."""
    weight = mx.random.normal(function(*arguments).shape, key=mx.random.key(7))
    return mx.value_and_grad(lambda *a: (function(*a) * weight).sum(), argnums=wrt)(*arguments)


def assert_same(custom, plain):
    for mine, theirs in zip(tree_flatten(custom), tree_flatten(plain), strict=True):
        assert mx.abs(mine[1] - theirs[1]).max().item() < 1e-4 * max(1.0, mx.abs(theirs[1]).max().item()), (
            mine[0]
        )


# --- many rows at once --------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 50, 300])  # less than a tile, about one, several
def test_the_sum_over_experts_and_its_gradients_are_the_plain_formulas(n):
    mx.random.seed(0)
    E, D, F, k = 6, 8, 10, 3
    chosen = mx.argsort(mx.random.normal((n, E)) + mx.arange(E) * 0.7, -1)[:, :k]  # uneven
    x, scores = mx.random.normal((n, D)), mx.random.uniform(shape=(n, k))
    stacks = [mx.random.normal(shape) for shape in ((E, F, D), (E, F, D), (E, D, F))]

    def custom(x, scores, *w):
        names = ("gate_proj", "up_proj", "down_proj")
        return expert_sum(x, scores, chosen, {name: {"weight": v} for name, v in zip(names, w, strict=True)})

    def plain(x, scores, gate, up, down):
        g, u = (mx.einsum("nd,nkfd->nkf", x, w[chosen]) for w in (gate, up))
        return (mx.einsum("nkf,nkdf->nkd", g * mx.sigmoid(g) * u, down[chosen]) * scores[..., None]).sum(1)

    wrt = tuple(range(5))
    assert_same(gradients(custom, x, scores, *stacks, wrt=wrt), gradients(plain, x, scores, *stacks, wrt=wrt))


def test_a_tile_belongs_to_one_expert():
    chosen = mx.array([[5, 1], [1, 5], [5, 0]] * 40)  # 40 rows for 0, 80 for 1, 120 for 5
    slot, choice, owner, segments = (np.array(a) for a in tiles(chosen, 6))
    assert len(choice) == TILE * len(owner) == TILE * (240 // TILE + 6)
    assert sorted(slot.ravel()) == sorted(np.flatnonzero(choice < 240))  # no place twice
    assert (choice[slot.ravel()] == np.arange(240)).all()
    assert (owner[slot // TILE] == np.array(chosen)).all()
    for (start, stop), rows in zip(segments, (40, 80, 0, 0, 0, 120), strict=True):
        assert (choice[start:stop] < 240).sum() == rows and (stop - start) % TILE == 0


def test_a_teacher_is_part_of_the_target():
    mx.random.seed(0)
    h, e, t, w = (mx.random.normal(s) for s in ((1500, 8), (33, 8), (1500, 5), (33, 5)))
    targets = mx.random.randint(0, 33, (1500,))

    def plain(h, e):
        right = mx.eye(33)[targets]
        wanted = 0.7 * right + 0.3 * mx.softmax(t @ w.T, -1)
        return -(wanted * (h @ e.T - mx.logsumexp(h @ e.T, -1, keepdims=True))).sum(-1).mean()

    custom = gradients(lambda h, e: soft_cross_entropy(h, e, targets, t, w, 0.3), h, e, wrt=(0, 1))
    assert_same(custom, gradients(plain, h, e, wrt=(0, 1)))


# --- the model ----------------------------------------------------------------------------


def mixture(config=MIXTURE) -> tuple[dict, olmoe.Model]:
    """Weights of a mixture, and mlx-lm's model with the same."""
    parameters = noisy(small_olmoe.new_parameters(config, config.blocks))
    model = olmoe.Model(olmoe.ModelArgs.from_dict(small_olmoe.hf_config(config, config.blocks)))
    model.load_weights(tree_flatten(parameters))
    return parameters, model


def test_the_states_are_those_of_mlx_lm():
    parameters, model = mixture()
    inputs = mx.array(batches()(0, 4, 16))
    mine, _ = small_olmoe.hidden_states(parameters, inputs, small_llama.causal_bias(4, 16, MIXTURE), MIXTURE)
    assert mx.abs(mine - model.model(inputs)).max().item() < 1e-3
