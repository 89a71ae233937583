"""Training of a mixture of experts: the same maths as mlx-lm, and what it takes from its dense start."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import load
from mlx_lm.models import olmoe
from test_pretrain import TINY, batches, noisy, stop_after, weights
from tokenizers import Tokenizer

from m2r2kit.bench import records
from m2r2kit.cli import train_backbone as train
from m2r2kit.common import UserError
from m2r2kit.model.cpu.fast_math import soft_cross_entropy
from m2r2kit.model.small_llama import causal_bias
from m2r2kit.pocket import export as pocket
from m2r2kit.pocket import olmoe as small_olmoe
from m2r2kit.pocket import tokenizer as tokens
from m2r2kit.pocket.expert_tiles import TILE, expert_sum, tiles
from m2r2kit.pocket.olmoe import OlmoeConfig
from m2r2kit.pocket.pretrain import Run
from m2r2kit.text.corpus import Document

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


def mixture() -> tuple[dict, olmoe.Model]:
    """Weights of a mixture, and mlx-lm's model with the same."""
    parameters = noisy(small_olmoe.new_parameters(MIXTURE, 2))
    model = olmoe.Model(olmoe.ModelArgs.from_dict(small_olmoe.hf_config(MIXTURE, 2)))
    model.load_weights(tree_flatten(parameters))
    return parameters, model


def test_the_loss_is_that_of_mlx_lm_and_the_routers():
    parameters, model = mixture()
    windows = mx.array(batches()(0, 4, 17))
    logits = model(windows[:, :-1])
    right = mx.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0]
    wanted = (mx.logsumexp(logits, -1) - right).mean().item()
    routed = []  # each block's router, asked about what mlx-lm gives it

    class Listener(nn.Module):
        def __init__(self, gate):
            super().__init__()
            self.gate = gate

        def __call__(self, x):
            routed.append(self.gate(x))
            return routed[-1]

    for block in model.layers:
        block.mlp.gate = Listener(block.mlp.gate)
    mx.eval(model(windows[:, :-1]))
    for logits in routed:
        shares = np.array(mx.softmax(logits, -1))
        use = np.zeros(6)
        for row in shares:
            use[np.argsort(row)[-3:]] += 1 / (3 * len(shares))
        z = np.array(mx.logsumexp(logits, -1))
        wanted += (0.5 * 6 * (use * shares.mean(0)).sum() + 0.001 * (z * z).mean()) / 2
    mine = small_olmoe.loss(MIXTURE)(parameters, windows, causal_bias(4, 16, MIXTURE))
    assert abs(mine.item() - wanted) < 1e-4


def test_all_experts_and_routers_learn():
    run = Run("unused", MIXTURE, batches())
    before = {name: mx.array(w) for name, w in weights(run).items()}
    for _ in range(3):
        run.train_step()
    for name, weight in weights(run).items():
        changed = mx.abs(weight - before[name])
        assert (changed.max((1, 2)) if weight.ndim == 3 else changed.max()).min().item() > 0, name


# --- the dense start ----------------------------------------------------------------------

DENSE = replace(TINY, blocks=4, grow_from=4)


@pytest.fixture
def start(tmp_path):
    """A trained dense model's folder: the blocks are no identities, and its norms are not 1."""
    run = Run(tmp_path / "dense-run", DENSE)
    run.parameters = noisy(run.parameters)
    pocket.export(run, tokens.train_tokenizer(["a"], 64), tmp_path / "dense")
    return tmp_path / "dense"


def test_experts_as_wide_as_all_they_come_from_compute_the_same(start):
    config = replace(MIXTURE, ffn_width=2 * DENSE.ffn_width, start=str(start))
    mixture = small_olmoe.new_parameters(config, 2)["model"]["layers"][1]
    dense = tree_unflatten(
        [(k, w.astype(mx.float32)) for k, w in mx.load(str(start / "model.safetensors")).items()]
    )
    x = mx.random.normal((3, 5, 16))

    def normed(block):
        return mx.fast.rms_norm(x, block["post_attention_layernorm"]["weight"], 1e-5)

    mine, _ = small_olmoe._mixture(mixture["mlp"], normed(mixture), config)
    theirs = 0
    for block in dense["model"]["layers"][2:]:
        gate, up, down = (block["mlp"][f"{name}_proj"]["weight"].T for name in ("gate", "up", "down"))
        theirs = theirs + (nn.silu(normed(block) @ gate) * (normed(block) @ up)) @ down
    assert mx.allclose(mine, theirs, rtol=1e-3, atol=1e-3)


def test_a_start_gives_all_weights_and_different_experts(start):
    mine = dict(tree_flatten(small_olmoe.new_parameters(replace(MIXTURE, start=str(start)), 2)))
    plain = dict(tree_flatten(small_olmoe.new_parameters(MIXTURE, 2)))
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in plain.items()}
    experts = np.array(mine["model.layers.0.mlp.switch_mlp.up_proj.weight"])
    assert len({e.tobytes() for e in experts}) == len(experts) == 6
    dense = mx.load(str(start / "model.safetensors"))
    name = "model.layers.{}.self_attn.v_proj.weight"
    assert mx.allclose(mine[name.format(1)], dense[name.format(2)].astype(mx.float32))


def test_a_start_that_does_not_fit_is_one_sentence(start, tmp_path):
    def refused(match, **changes):
        with pytest.raises(UserError, match=match):
            Run(tmp_path / "run", replace(MIXTURE, **{"start": str(start), **changes}))

    refused("nowhere cannot be read as a model of train backbone", start=str(tmp_path / "nowhere"))
    refused("has kv_heads = 2, not 4", kv_heads=4)
    refused("cannot be divided evenly", ffn_width=13)
    refused("cannot be divided evenly", blocks=3, grow_from=3)
    content = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(content | {"model_type": "qwen3"}))
    refused("is not a llama with tied embeddings")
    with pytest.raises(UserError, match=r"top must be between 1 and experts \(6\), not 7"):
        replace(MIXTURE, top=7)


def test_resuming_a_mixture_is_exact(start, tmp_path):
    config = replace(MIXTURE, start=str(start))
    whole = Run(tmp_path / "whole", config, batches())
    whole.train()
    for steps in (2, 4):  # the windows become long at step 3
        parts = Run(tmp_path / "parts", None if steps == 4 else config, batches())
        parts.train(report=stop_after(steps))
    assert parts.step == whole.step == 6
    for name, weight in weights(whole).items():
        assert mx.array_equal(weight, weights(parts)[name]), name


def test_the_teacher_and_its_states_pull(start):
    windows, bias = mx.array(batches()(0, 4, 17)), causal_bias(4, 16, MIXTURE)
    config = replace(MIXTURE, start=str(start), taught=0.0, near=0.0)
    parameters = small_olmoe.new_parameters(config, 2)

    def loss(**changes):
        return small_olmoe.loss(replace(config, **changes))(parameters, windows, bias).item()

    assert abs(loss() - loss(start="")) < 1e-4
    assert loss(near=2.0) - loss() == pytest.approx(2 * (loss(near=1.0) - loss()), rel=1e-3)
    assert loss(near=1.0) > loss() + 1e-3
    assert abs(loss(taught=1.0) - loss()) > 1e-3


# --- the folder and the command -----------------------------------------------------------


def test_a_mixture_is_trained_exported_and_its_experts_counted(start, tmp_path, monkeypatch, capsys):
    documents = [
        Document(kind, f"{kind} {i}", f"<|user|>What is {i}?<|assistant|>It is {i}.")
        for kind in ("code", "arithmetic", "shell")
        for i in range(100)
    ]
    tokenizer = tokens.train_tokenizer([d.text for d in documents], 300)
    run = Run(tmp_path / "dense-run-2", replace(DENSE, vocabulary=300))
    dense = pocket.export(run, tokenizer, tmp_path / "dense-2")
    written = []
    monkeypatch.setattr(train, "documents", lambda folder: documents)
    monkeypatch.setattr(records, "append", lambda subject, **fields: written.append(fields))
    settings = {**asdict(MIXTURE), "vocabulary": 300, "tokens": 64 * 2}
    del settings["type"], settings["start"]
    (tmp_path / "tiny.json").write_text(json.dumps(settings))
    args = SimpleNamespace(
        out=tmp_path / "run", corpus=tmp_path, type="olmoe", start=dense, tokens=None, minutes=None,
        to=tmp_path / "moe", config=tmp_path / "tiny.json", processes=1, record=True,
    )  # fmt: skip
    assert train.run(args) == 0
    assert "times an even share of the tokens" in capsys.readouterr().out
    model, wrapped = load(str(tmp_path / "moe"))
    assert model.model_type == "olmoe" and {w.dtype for _, w in tree_flatten(model.parameters())} == {
        mx.float16
    }
    assert wrapped.encode("What is 2?") == tokenizer.encode("What is 2?").ids
    (record,) = written
    assert record["settings"]["type"] == "olmoe" and record["settings"]["experts"] == 6
    use = record["figures"]["experts"]
    assert np.allclose(np.sum(use["share"], 1), 1, atol=1e-3) and np.shape(use["share"]) == (2, 6)
    assert len(use["entropy"]) == 2 and max(use["entropy"]) < np.log2(6) + 1e-3
    args.type, args.config = None, None
    with pytest.raises(UserError, match="--start needs a mixture of experts; add --type olmoe"):
        train.run(args)


def test_expert_use_counts_what_mlx_lm_chooses(tmp_path):
    run = Run(tmp_path / "run", replace(MIXTURE, vocabulary=300))
    run.parameters = noisy(run.parameters)
    documents = [Document("code", f"{i}", f"It is {i}.") for i in range(2000)]
    folder = pocket.export(run, tokens.train_tokenizer([d.text for d in documents], 300), tmp_path / "moe")
    model, _ = load(str(folder))
    model.set_dtype(mx.float32)
    use = pocket.evaluate(folder, documents, most=161, window=16)["experts"]
    ids = tokens.encode(
        Tokenizer.from_file(str(folder / "tokenizer.json")), [d for d in documents if d.held_out]
    )
    counts, switch = [], model.layers[0].mlp.switch_mlp

    class Counter(nn.Module):
        def __call__(self, x, chosen):
            counts.append(np.bincount(np.array(chosen).ravel(), minlength=6))
            return switch(x, chosen)

    model.layers[0].mlp.switch_mlp = Counter()
    mx.eval(model(mx.array(ids["code"][:160].reshape(10, 16))))
    assert np.allclose(use["share"][0], sum(counts) / 480, atol=1e-4)
