"""Prompts are read in chunks: the same states, keys and text, in no more memory than mlx-lm takes."""

import mlx.core as mx
import pytest
import tiny
from mlx_lm.generate import generate_step
from speculation_checks import m2r2
from test_baselines import untrained

from m2r2kit.model import cache as fixed_cache
from m2r2kit.model.backbone import Backbone
from m2r2kit.model.families import DENSE, MOE
from m2r2kit.speculation import generate

PROMPT = tiny.prompt(45)


def near(a, b):
    return a.shape == b.shape and (a - b).abs().max().item() <= 2e-5 * max(1.0, b.abs().max().item())


def state(view, capacity):
    cache = view.new_cache(capacity)
    h = view.run(view.embed(mx.array([PROMPT])), cache)
    return [h, *(x for c in cache for x in (c.keys[..., :45, :], c.values[..., :45, :]))], cache[0].offset


@pytest.mark.parametrize("capacity", [None, 8])
@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_chunks_are_the_whole(family, capacity, monkeypatch):
    view = tiny.backbone(family)
    whole, _ = state(view, capacity)
    monkeypatch.setattr(fixed_cache, "CHUNK", 20)
    chunked, offset = state(view, capacity)
    assert offset == 45 and all(map(near, chunked, whole))


@pytest.mark.parametrize("kind", ["eagle", "kangaroo", "draft-model", "medusa", "deed", "m2r2"])
def test_drafters_learn_the_same_from_a_long_prompt(kind, monkeypatch):
    def text():
        drafter = m2r2() if kind == "m2r2" else untrained(kind)(tiny.backbone())
        out = generate(tiny.backbone(), PROMPT, drafter, 3, 12)
        return out.tokens, out.drafted, out.accepted

    whole = text()
    monkeypatch.setattr(fixed_cache, "CHUNK", 20)
    assert text() == whole


@pytest.mark.parametrize("kind", [None, "eagle", "kangaroo", "draft-model"])
def test_a_long_prompt_takes_no_more_memory_than_in_mlx_lm(kind, tmp_path):
    view = Backbone.load(tiny.make_folder("llama", tmp_path / "long", max_position_embeddings=6000))
    drafter = untrained(kind)(view) if kind else None
    prompt = tiny.prompt(3000)

    def peak(run):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        run()
        return mx.get_peak_memory() - before

    theirs = peak(lambda: list(generate_step(mx.array(prompt), view.model, max_tokens=2)))
    ours = peak(lambda: generate(view, prompt, drafter, 3, 4))
    assert ours <= theirs
