"""The public API: what `mlx_lm.load` returns goes in, and mlx-lm's own tokens and responses come out."""

import copy
import gc
import json
import subprocess
import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
import tiny_experts
from mlx_lm.generate import GenerationResponse
from test_train_stream import untuned, written  # noqa: F401

import m2r2kit as m2
from m2r2kit import api
from m2r2kit.__main__ import main
from m2r2kit.common import UserError

CONTEXT = 512
PROMPT = "hello"


def folder():
    return str(tiny.folder("llama", max_position_embeddings=CONTEXT))


def mlx_lms(model, tokenizer, prompt=PROMPT, max_tokens=24):
    return list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens))


@pytest.fixture
def stream_folder(tmp_path):
    """A stream of the tiny model whose changes are not zero, with tuned settings."""
    made = tiny.stream("llama", size=0.1)
    view = tiny.backbone("llama", max_position_embeddings=CONTEXT)
    stream = m2.TrainedStream(type(made)(view, made.config), {"drafts": 3, "threshold": 0.0})
    stream.module.update(made.trainable_parameters())
    stream.save(tmp_path / "stream")
    return tmp_path / "stream"


# --- the three uses of the API -------------------------------------------------------------


def test_train_a_stream_and_generate_with_it(written, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("m2r2kit.bench.tune.tune_stream", lambda *found: ({"drafts": 3, "threshold": 0.2}, 1))
    model, tokenizer = mlx_lm.load(folder())
    stream = m2.train_stream(model, tokenizer, exits=(2,), steps=3, rows=16, corpus=tmp_path, rank=4)
    text, drafted = "", 0
    for r in m2.stream_generate(model, tokenizer, PROMPT, stream=stream):
        text += r.text
        drafted += r.from_draft
    assert text == mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=128)
    out = m2.generate(model, tokenizer, PROMPT, stream=stream)
    assert sum(out.from_draft) == drafted and out.drafted[0] <= 3 and out.text == text
    # saved, and loaded beside another object of the same model, or on the command line
    stream.save(tmp_path / "stream")
    model, tokenizer = mlx_lm.load(folder())
    again = m2.load_stream(tmp_path / "stream", model)
    assert again.facts == stream.facts and again.facts["drafts"] == 3 and again.facts["steps"] == 3
    assert m2.generate(model, tokenizer, PROMPT, stream=again).tokens == out.tokens
    asked = ["generate", "--model", folder(), "--stream", str(tmp_path / "stream"), "--prompt", PROMPT]
    assert main([*asked, "--raw", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == out.tokens


def test_a_loaded_stream_drafts_as_it_was_tuned(stream_folder):
    model, tokenizer = mlx_lm.load(folder())
    stream = m2.load_stream(stream_folder, model)
    responses = list(m2.stream_generate(model, tokenizer, PROMPT, 24, stream=stream))
    theirs = mlx_lms(model, tokenizer)
    assert [r.token for r in responses] == [r.token for r in theirs]
    assert "".join(r.text for r in responses) == "".join(r.text for r in theirs)
    assert all(type(r) is GenerationResponse for r in responses)
    out = m2.generate(model, tokenizer, PROMPT, 24, stream=stream)
    assert out.drafted[0] == 3 and [r.from_draft for r in responses] == out.from_draft
    assert m2.generate(model, tokenizer, PROMPT, 24, stream=stream, drafts=5).drafted[0] == 5
    assert m2.generate(model, tokenizer, PROMPT, 24, stream=stream_folder).drafted == out.drafted
    assert m2.generate(folder(), None, PROMPT, 24, stream=stream).tokens == out.tokens


def test_pack_load_and_generate_with_experts_on_disk(tmp_path):
    name, store = tiny_experts.model(), tmp_path / "store"
    assert m2.pack(name, store).experts == tiny_experts.E
    model, tokenizer = m2.load(name, experts=store, budget="25%", predictor="next-router", reads="buffered")
    out = m2.generate(model, tokenizer, PROMPT, 9)
    whole, tokenizer = m2.load(name)
    assert out.tokens == m2.generate(whole, tokenizer, PROMPT, 9).tokens
    assert out.experts.counts.missed > 0 and m2.generate(whole, tokenizer, PROMPT, 9).experts is None
    drawn = m2.generate(model, tokenizer, PROMPT, 9, temp=0.7, seed=3)
    assert drawn.tokens == m2.generate(whole, tokenizer, PROMPT, 9, temp=0.7, seed=3).tokens
    with pytest.raises(UserError, match="does not draft"):
        m2.generate(model, tokenizer, PROMPT, method="prompt-lookup")
    reader = model.__dict__[api.KEPT].experts.reader
    assert reader._threads
    del model, out
    gc.collect()
    assert not any(thread.is_alive() for thread in reader._threads)


# --- in the shape of mlx-lm -----------------------------------------------------------------


def test_responses_are_those_of_mlx_lm():
    model, tokenizer = mlx_lm.load(folder())
    for limit in (1, 2, 24):
        theirs = mlx_lms(model, tokenizer, max_tokens=limit)
        ours = list(m2.stream_generate(model, tokenizer, PROMPT, limit))
        for a, b in zip(ours, theirs, strict=True):
            names = ("token", "text", "from_draft", "prompt_tokens", "generation_tokens", "finish_reason")
            assert [getattr(a, n) for n in names] == [getattr(b, n) for n in names]
            assert a.prompt_tps > 0 and a.generation_tps > 0 and a.peak_memory > 0


def test_a_prompt_has_many_forms():
    model, tokenizer = mlx_lm.load(folder())
    ids = tokenizer.encode(PROMPT)
    wanted = m2.generate(model, tokenizer, PROMPT, 8)
    for form in (ids, tuple(ids), mx.array(ids), np.array(ids)):
        assert m2.generate(model, tokenizer, form, 8).tokens == wanted.tokens
    assert m2.generate(model, tokenizer._tokenizer, PROMPT, 8).tokens == wanted.tokens
    turns = [{"role": "user", "content": PROMPT}]
    with pytest.raises(UserError, match="chat template"):
        m2.generate(model, tokenizer, turns)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}>"
    tokenizer.has_chat_template = True
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    assert m2.generate(model, tokenizer, turns, 8).tokens == m2.generate(model, tokenizer, asked, 8).tokens


@pytest.mark.parametrize("method", ["plain", "mlx_lm", "prompt-lookup", "lookahead", "early-exit"])
def test_methods_that_need_no_training(method):
    model, tokenizer = mlx_lm.load(folder())
    wanted = [r.token for r in mlx_lms(model, tokenizer)]
    exit = 2 if method == "early-exit" else None
    assert m2.generate(model, tokenizer, PROMPT, 24, method=method, exit=exit).tokens == wanted


def test_a_stop_word_and_verbose(capsys):
    model, tokenizer = mlx_lm.load(folder())
    whole = m2.generate(model, tokenizer, PROMPT, 24)
    word = whole.text[5:7]
    out = m2.generate(model, tokenizer, PROMPT, 24, stop=word, verbose=True)
    assert str(out) == whole.text[: whole.text.index(word)] and out.stopped == "stop"
    assert capsys.readouterr().out == out.text + "\n"
    last = list(m2.stream_generate(model, tokenizer, PROMPT, 24, stop=[word]))[-1]
    assert last.finish_reason == "stop"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"drafts": 17, "method": "prompt-lookup"}, "between 0 and 16"),
        ({"method": "m2r2"}, "needs a trained stream"),
        ({"method": "eagle"}, "needs the folder"),
        ({"method": "magic"}, "There is no method magic"),
        ({"method": "early-exit"}, "give an exit"),
        ({"temp": -1}, "Temperature"),
        ({"min_p": 2}, "Min-p"),
        ({"stop": [""]}, "stop word is empty"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number; got 2.5"),
        ({"max_tokens": None}, "max_tokens must be a whole number; got None"),
        ({"prompt": b"abc"}, "A prompt is a text, token ids or the turns"),
        ({"prompt": None}, "A prompt is a text, token ids or the turns"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [1, 10**9]}, "ids of a prompt must be whole numbers from 0 to"),
        ({"prompt": [-1]}, "ids of a prompt must be"),
        ({"prompt": [1.5]}, "ids of a prompt must be"),
        ({"prompt": ["a"]}, "ids of a prompt must be"),
        ({"prompt": "x" * 600}, "shorten it"),
        ({"prompt": "half \ud83d"}, "not valid Unicode at character 6"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_one_sentence(settings, sentence):
    model, tokenizer = mlx_lm.load(folder())
    with pytest.raises(UserError, match=sentence):
        m2.generate(model, tokenizer, **({"prompt": PROMPT} | settings))


def test_other_models_and_settings_are_refused(stream_folder, tmp_path):
    other, tokenizer = mlx_lm.load(str(tiny.folder("qwen3")))
    stream = m2.load_stream(stream_folder, other)  # without the tokenizer it is compared at its first use
    with pytest.raises(UserError, match="another model"):
        m2.generate(other, tokenizer, PROMPT, stream=stream)
    with pytest.raises(UserError, match="another model"):
        m2.load_stream(stream_folder, other, tokenizer)
    with pytest.raises(UserError, match="no setting 'speed'"):
        m2.train_stream(other, tokenizer, exits=(2,), speed=3)
    with pytest.raises(UserError, match="Exits must increase"):
        m2.train_stream(other, tokenizer, exits=(99,))
    for number in ({"steps": 0}, {"batch": 0}):
        with pytest.raises(UserError, match="at least 1 step and 1 row a batch"):
            m2.train_stream(other, tokenizer, exits=(2,), **number)
    own, tokenizer = mlx_lm.load(folder())
    with pytest.raises(UserError, match="no exit 0"):
        m2.generate(own, tokenizer, PROMPT, stream=m2.load_stream(stream_folder, own, tokenizer), exit=0)
    with pytest.raises(UserError, match="give an expert store too"):
        m2.load(folder(), policy="lru")
    with pytest.raises(UserError, match="leave out the adapter"):
        m2.load(tiny_experts.model(), experts=tiny_experts.store().folder, adapter=tmp_path)
    with pytest.raises(UserError, match="adapter"):
        m2.load(folder(), adapter=tmp_path)
    with pytest.raises(UserError, match="neither a size"):
        m2.load(tiny_experts.model(), experts=tiny_experts.store().folder, budget="much")
    with pytest.raises(UserError, match="The model must be what"):
        m2.generate(object(), None, PROMPT)


# --- a model object stays as it is ----------------------------------------------------------


def test_a_model_object_is_viewed_once_and_freed(stream_folder):
    model, tokenizer = mlx_lm.load(folder())
    m2.generate(model, tokenizer, PROMPT, 4)
    view = model.__dict__[api.KEPT]
    m2.generate(model, tokenizer, PROMPT, 4)
    assert model.__dict__[api.KEPT] is view
    twin = copy.deepcopy(model)
    assert m2.generate(twin, tokenizer, PROMPT, 4).tokens == m2.generate(model, tokenizer, PROMPT, 4).tokens
    assert twin.__dict__[api.KEPT] is not view
    seen = api.finalize(model, lambda: None)
    del model, view, twin
    gc.collect()
    assert not seen.alive


def test_changed_weights_give_the_changed_models_text():
    model, tokenizer = mlx_lm.load(folder())
    before = m2.generate(model, tokenizer, PROMPT, 12).tokens
    model.update({"lm_head": {"weight": -model.lm_head.weight}})
    after = m2.generate(model, tokenizer, PROMPT, 12).tokens
    assert after != before and after == [r.token for r in mlx_lms(model, tokenizer, max_tokens=12)]


def test_half_precision_is_trained_for_in_a_copy():
    model, tokenizer = mlx_lm.load(folder())
    model.set_dtype(mx.bfloat16)
    view = api._view(model, tokenizer).backbone
    copied = api._in_float32(view)
    assert model.lm_head.weight.dtype == mx.bfloat16 and copied.model.lm_head.weight.dtype == mx.float32
    assert api._in_float32(copied) is copied


def test_importing_it_is_light_and_help_is_worth_reading():
    code = "import m2r2kit, sys; print('mlx_lm' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
    for name in m2.__all__[1:]:
        found = getattr(m2, name)
        assert len(found.__doc__) > 100 and name in dir(m2)
        assert "UserError" in found.__doc__ or name in (*api_types(), "restore")
    with pytest.raises(AttributeError):
        m2.nothing  # noqa: B018


def api_types():
    return ("Generation", "Manifest", "StreamConfig", "TrainedStream")


def test_settings_of_experts_on_disk_need_a_store():
    for settings in ({"budget": "25%"}, {"predictor": "nothing"}, {"threads": 1}):
        (name,) = settings
        with pytest.raises(UserError, match=f"{name} needs experts on disk"):
            m2.load(tiny.folder("olmoe"), **settings)
