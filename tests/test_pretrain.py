"""Training of the pocket model: the same maths as mlx-lm, exact resumption, whole files."""

import json
import os
import resource
import signal
from dataclasses import asdict, replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import load
from mlx_lm.models import llama

from m2r2kit.common import UserError
from m2r2kit.model.cpu.fast_math import (
    attention_weights,
    cross_entropy,
    fast_exp,
    soft_cross_entropy,
    swiglu,
)
from m2r2kit.model.small_llama import causal_bias, hf_config
from m2r2kit.pocket import export as pocket
from m2r2kit.pocket import llama as small_llama
from m2r2kit.pocket import pretrain
from m2r2kit.pocket import tokenizer as tokens
from m2r2kit.pocket.llama import PretrainConfig, mean_loss, new_parameters
from m2r2kit.pocket.pretrain import Run
from m2r2kit.text.corpus import Document

TINY = PretrainConfig(
    blocks=4, width=16, heads=4, kv_heads=2, ffn_width=24, vocabulary=64, context=32, tokens=64 * 6,
    batch_tokens=64, window=16, first_window=8, grow_from=2, grow_at=64 * 3, warmup_tokens=64, seed=3,
)  # fmt: skip


def batches():
    ids = np.random.default_rng(0).integers(0, 64, 500).astype(np.int32)
    return tokens.Batches({"code": ids[:200], "arithmetic": ids[200:350], "shell": ids[350:]})


def weights(run: Run) -> dict:
    return dict(tree_flatten(run.parameters))


def noisy(parameters: dict) -> dict:
    """Weights as after some training: no branch is zero, and attention is sharp."""
    return tree_unflatten([(k, v + 0.3 * mx.random.normal(v.shape)) for k, v in tree_flatten(parameters)])


# --- numerics -----------------------------------------------------------------------------


def test_fast_exp_is_close_and_never_denormal():
    x = np.linspace(-10, 10, 20001, dtype=np.float32)
    assert np.abs(np.array(fast_exp(mx.array(x))) / np.exp(x.astype(np.float64)) - 1).max() < 2e-5
    far = np.array(fast_exp(mx.array([-1e9, -200.0, -85.0])))
    assert (far > np.finfo(np.float32).tiny).all() and (far < 1e-34).all()


def same_gradients(custom, plain, *arguments, wrt):
    """Values and gradients of a custom function against autodiff of the plain formula."""
    weight = mx.random.normal(plain(*arguments).shape)
    for i in wrt:
        value, mine = mx.value_and_grad(lambda *a: (custom(*a) * weight).sum(), argnums=i)(*arguments)
        wanted, theirs = mx.value_and_grad(lambda *a: (plain(*a) * weight).sum(), argnums=i)(*arguments)
        assert abs(value.item() - wanted.item()) < 1e-3
        assert mx.abs(mine - theirs).max().item() < 1e-4 * max(1.0, mx.abs(theirs).max().item())


def test_gradients_are_those_of_the_plain_formulas():
    mx.random.seed(0)
    a, b = mx.random.normal((5, 7)) * 3, mx.random.normal((5, 7))
    same_gradients(swiglu, lambda g, u: g * mx.sigmoid(g) * u, a, b, wrt=(0, 1))
    hidden, embedding = mx.random.normal((1500, 8)), mx.random.normal((33, 8))  # more rows than a piece has
    targets = mx.random.randint(0, 33, (1500,))

    def plain(h, e, t):
        logits = h @ e.T
        return mx.logsumexp(logits, -1) - mx.take_along_axis(logits, t[:, None], 1)[:, 0]

    same_gradients(cross_entropy, plain, hidden, embedding, targets, wrt=(0, 1))
    same_gradients(cross_entropy, plain, 60 * hidden[:5], embedding, targets[:5], wrt=(0, 1))  # hundreds


def test_a_taught_loss_does_not_overflow():
    mx.random.seed(0)
    hidden, embedding = mx.random.normal((6, 8)) * 100, mx.random.normal((33, 8))
    taught, head, targets = mx.random.normal((6, 8)) * 100, mx.random.normal((33, 8)), mx.arange(6)
    share = 0.3

    def plain(h, e):
        logits, wanted = h @ e.T, mx.softmax(taught @ head.T, -1)
        nats = mx.logsumexp(logits, -1) - share * (wanted * logits).sum(-1)
        return (nats - (1 - share) * mx.take_along_axis(logits, targets[:, None], 1)[:, 0]).mean()

    assert mx.abs(hidden @ embedding.T).max() > 500
    same_gradients(
        lambda h, e: soft_cross_entropy(h, e, targets, taught, head, share),
        plain,
        hidden,
        embedding,
        wrt=(0,),
    )


def test_attention_weights_do_not_overflow():
    mx.random.seed(0)
    bias = mx.where(mx.tri(6) > 0, 0.0, -1e9)
    v = mx.random.normal((6, 3))

    def attend(scores):
        e = attention_weights(scores, bias)
        return e @ v / e.sum(-1, keepdims=True)

    for size in (1, 40, 400):  # e^88 is the largest float32
        scores = mx.random.normal((6, 6)) * size
        same_gradients(attend, lambda s: mx.softmax(s + bias, -1) @ v, scores, wrt=(0,))


# --- the model ----------------------------------------------------------------------------


def test_the_loss_is_that_of_mlx_lm():
    parameters = noisy(new_parameters(TINY, 4))
    windows = mx.array(batches()(0, 4, 17))
    mine = mean_loss(parameters, windows, causal_bias(4, 16, TINY), TINY)
    model = llama.Model(llama.ModelArgs.from_dict(hf_config(TINY, 4)))
    model.load_weights(tree_flatten(parameters))
    logits = model(windows[:, :-1])
    right = mx.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0]
    assert abs(mine.item() - (mx.logsumexp(logits, -1) - right).mean().item()) < 1e-4
    # and not for a model that looks ahead
    ahead = mean_loss(parameters, windows, 0 * causal_bias(4, 16, TINY), TINY)
    assert abs(mine.item() - ahead.item()) > 1e-3


def test_growth_stacks_copies():
    small = new_parameters(TINY, 2)
    large = small_llama.grow(small, 4)
    assert len(large["model"]["layers"]) == 4
    for i, layer in enumerate(large["model"]["layers"]):
        for (name, a), (_, b) in zip(
            tree_flatten(layer), tree_flatten(small["model"]["layers"][i % 2]), strict=True
        ):
            assert mx.array_equal(a, b) and a is not b, name


def test_scores_are_capped_and_nothing_else():
    parameters = noisy(new_parameters(TINY, 2))
    parameters["model"]["layers"][1]["self_attn"]["q_proj"]["weight"] *= 0.001
    before = {k: mx.array(v) for k, v in tree_flatten(parameters)}
    for name, weight in tree_flatten(pretrain.cap_scores(parameters)):
        size = mx.sqrt((before[name] ** 2).mean()).item()
        capped = ("q_proj" in name or "k_proj" in name) and size > pretrain.SCORE_CAP
        wanted = before[name] * (pretrain.SCORE_CAP / size if capped else 1)
        assert mx.allclose(weight, wanted, rtol=1e-5), name


def test_the_rate_warms_up_stays_and_falls():
    config = PretrainConfig(tokens=1000, warmup_tokens=100, decay_share=0.2)
    rates = [pretrain.rate(seen, config) for seen in (0, 50, 100, 800, 900, 1000)]
    assert np.allclose(rates, [0.01, 0.51, 1, 1, 0.5, 0])


def test_settings_that_do_not_fit_are_one_sentence():
    with pytest.raises(UserError, match="heads must be a multiple of kv_heads"):
        PretrainConfig(heads=4, kv_heads=3)


# --- the run ------------------------------------------------------------------------------


def stop_after(steps):
    """A report that sends this process an interrupt after so many steps."""
    left = [steps]

    def report(run, loss, rate):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)

    return report


def test_resuming_is_exact_also_across_growth(tmp_path):
    whole = Run(tmp_path / "whole", TINY, batches())
    whole.train()
    assert (whole.step, whole.seen, whole.blocks) == (6, 64 * 6, 4)
    for steps in (2, 1, 3):  # growth comes before the fourth step, just after resuming
        parts = Run(tmp_path / "parts", TINY, batches())
        parts.train(report=stop_after(steps))
    assert parts.step == 6
    for name, weight in weights(whole).items():
        assert mx.array_equal(weight, weights(parts)[name]), name
    state = dict(tree_flatten(whole.optimizer.state))
    for name, value in tree_flatten(parts.optimizer.state):
        assert mx.array_equal(value, state[name]), name


def test_an_interrupt_saves(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run = Run(tmp_path, TINY, batches())
    run.train(report=stop_after(1))
    assert run.stopped and run.step == 1
    assert signal.getsignal(signal.SIGINT) is before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["run.json", "state-1.safetensors"]


@pytest.fixture
def saved(tmp_path):
    run = Run(tmp_path, TINY, batches())
    run.train_step()
    run.save()
    return run


def test_a_full_disk_keeps_the_old_state(saved):
    files = {f.name: f.read_bytes() for f in saved.folder.iterdir()}
    saved.train_step()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(UserError, match=r"state-2.safetensors cannot be written: .*; free some space"):
            saved.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {f.name: f.read_bytes() for f in saved.folder.iterdir()} == files
    assert Run(saved.folder).step == 1


def test_a_half_copied_run_is_one_sentence(saved):
    state = saved.folder / "state-1.safetensors"
    content = state.read_bytes()
    for broken in (content[:-10], content[:100], b"", None):
        state.unlink() if broken is None else state.write_bytes(broken)
        with pytest.raises(UserError, match=r"state-1\.safetensors is missing or truncated; restore"):
            Run(saved.folder)
    settings = saved.folder / "run.json"
    for broken in (settings.read_text()[:-20], "{}", '{"step": 1}'):
        settings.write_text(broken)
        with pytest.raises(UserError, match=r"run\.json cannot be read as a training run; restore"):
            Run(saved.folder)


def test_only_the_end_of_a_run_may_be_moved(saved):
    assert Run(saved.folder, replace(TINY, tokens=640)).config.tokens == 640
    with pytest.raises(UserError, match="has seed = 3, not 4; start a new run"):
        Run(saved.folder, replace(TINY, seed=4))


def test_a_loss_that_is_not_a_number_ends_the_run_and_is_not_saved(saved):
    saved.batches = batches()
    saved.parameters["model"]["norm"]["weight"] = mx.full((16,), mx.nan)
    with pytest.raises(UserError, match="the loss is not finite at step 2"):
        saved.train()
    assert Run(saved.folder).step == 1


# --- the model's folder -------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path):
    config = replace(TINY, vocabulary=300)
    run = Run(tmp_path / "run", config)
    run.parameters = noisy(run.parameters)
    texts = [f"<|user|>What is {i}?<|assistant|>It is {i}." for i in range(100)]
    tokenizer = tokens.train_tokenizer(texts, 300)
    documents = [Document("code", f"{i}", text) for i, text in enumerate(texts)]
    return run, tokenizer, documents, pocket.export(run, tokenizer, tmp_path / "model")


def test_the_folder_is_one_that_mlx_lm_loads(exported):
    run, tokenizer, _, folder = exported
    model, wrapped = load(str(folder))
    assert {f.name for f in folder.iterdir()} == pocket.FILES
    assert {k: v.dtype for k, v in tree_flatten(model.parameters())} == dict.fromkeys(
        weights(run), mx.float16
    )
    for name, weight in tree_flatten(model.parameters()):
        assert mx.array_equal(weight, weights(run)[name].astype(mx.float16)), name
    assert wrapped.eos_token_ids == {0}
    messages = [{"role": "user", "content": " What is 2? "}]
    prompt = wrapped.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == tokenizer.encode("<|user|>What is 2?<|assistant|>").ids
    messages += [{"role": "assistant", "content": "It is 2."}, {"role": "user", "content": "And 3?"}]
    text = wrapped.apply_chat_template(messages, tokenize=False)
    assert text == "<|user|>What is 2?<|assistant|>It is 2.<|endoftext|><|user|>And 3?"


def test_a_new_export_replaces_the_model_and_leaves_the_rest(exported, tmp_path):
    run, tokenizer, _, folder = exported
    (folder / "stream").mkdir()
    old = (folder / "model.safetensors").read_bytes()
    run.parameters = noisy(run.parameters)
    pocket.export(run, tokenizer, folder)
    assert (folder / "model.safetensors").read_bytes() != old
    assert {f.name for f in folder.iterdir()} == pocket.FILES | {"stream"}
    assert {f.name for f in tmp_path.iterdir()} == {"model"}


def test_a_folder_of_something_else_is_left_alone(exported, tmp_path):
    run, tokenizer, _, _ = exported
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="exists and is not a model"):
        pocket.export(run, tokenizer, tmp_path / "home")
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_an_export_that_fails_leaves_the_old_model(exported, tmp_path):
    run, tokenizer, _, folder = exported
    old = {f.name: f.read_bytes() for f in folder.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written: .*; free some space"):
            pocket.export(run, tokenizer, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == old
    assert {f.name for f in tmp_path.iterdir()} == {"model"}


def test_held_out_figures_are_those_of_the_float16_weights(exported):
    run, tokenizer, documents, folder = exported
    figures = pocket.evaluate(folder, documents * 20, window=16)
    assert figures.keys() == {"code"}
    held_out = [d for d in documents * 20 if d.held_out]
    ids = tokens.encode(tokenizer, held_out)["code"]
    count = (len(ids) - 1) // 16
    rows = ids[: count * 16 + 1]
    windows = mx.array(np.stack([rows[i * 16 : i * 16 + 17] for i in range(count)]))
    half = tree_unflatten([(k, v.astype(mx.float16).astype(mx.float32)) for k, v in weights(run).items()])
    loss = mean_loss(half, windows, causal_bias(count, 16, run.config), run.config).item()
    assert abs(figures["code"]["loss"] - loss) < 1e-3
    assert figures["code"]["tokens"] == count * 16
    text = tokenizer.decode(rows[1:], skip_special_tokens=True)
    bits = loss * count * 16 / np.log(2) / len(text.encode())
    assert abs(figures["code"]["bits_per_byte"] / bits - 1) < 1e-3


def test_a_finished_run_is_exported_evaluated_and_recorded(tmp_path, monkeypatch, capsys):
    from m2r2kit.bench import records
    from m2r2kit.cli import train_backbone as train

    documents = [
        Document(kind, f"{kind} {i}", f"<|user|>What is {i}?<|assistant|>It is {i}.")
        for kind in ("code", "arithmetic", "shell")
        for i in range(200)
    ]
    written = []
    monkeypatch.setattr(train, "documents", lambda folder: documents)
    monkeypatch.setattr(records, "append", lambda subject, **fields: written.append((subject, fields)))
    (tmp_path / "tiny.json").write_text(json.dumps({**asdict(TINY), "vocabulary": 300, "tokens": 64 * 1000}))
    out = tmp_path / "run"
    args = SimpleNamespace(
        out=out,
        corpus=tmp_path,
        type=None,
        start=None,
        tokens=None,
        minutes=1e-9,
        to=None,
        config=tmp_path / "tiny.json",
        processes=1,
        record=True,
    )
    assert train.run(args) == 0
    assert (
        "Saved after 64 of 64,000 tokens; resume with: m2r2kit train backbone --out"
        in capsys.readouterr().out
    )
    args = SimpleNamespace(
        out=out,
        corpus=tmp_path,
        type=None,
        start=None,
        tokens=64 * 3,
        minutes=None,
        to=None,
        config=None,
        processes=1,
        record=True,
    )
    assert train.run(args) == 0
    ((subject, record),) = written
    assert subject == "pretrain" and record["settings"]["tokens_seen"] == 64 * 3
    assert record["figures"].keys() == {"code", "arithmetic", "shell"}
    assert (out / "model" / "config.json").exists()
