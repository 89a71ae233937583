"""The view of a model: the model's own numbers, to the bit."""

from itertools import pairwise

import mlx.core as mx
import pytest
import tiny

from m2r2kit.common import UserError
from m2r2kit.model.backbone import crop
from m2r2kit.model.families import DENSE, MOE
from m2r2kit.model.hashes import weights_sha256
from m2r2kit.speculation import M2R2, EarlyExit, generate
from m2r2kit.stream.stream import FORMS

FAMILIES = DENSE + MOE


def tokens(length=7, seed=0):
    return mx.array([tiny.prompt(length, seed)])


# --- the model's own numbers --------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model_to_the_bit(family):
    view = tiny.backbone(family)
    cache, theirs = view.new_cache(), view.new_cache()
    for piece in (tokens(7), tokens(1), tokens(3), tokens(1, seed=1)):  # prefill, decode, several rows
        assert mx.array_equal(view.logits(piece, cache), view.model(piece, cache=theirs))
    assert mx.array_equal(view.logits(tokens()), view.model(tokens()))
    for mine, other in zip(cache, theirs, strict=True):
        assert mine.offset == other.offset == 12
        assert all(map(mx.array_equal, mine.keys_and_values(), other.keys_and_values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_make_the_whole(family):
    view = tiny.backbone(family)
    h_0 = view.embed(tokens())
    states = view.states(tokens())
    assert len(states) == tiny.BLOCKS + 1 and mx.array_equal(states[0], h_0)
    for cut in range(tiny.BLOCKS + 1):
        cache = view.new_cache()
        h = view.run(h_0, cache, 0, cut)
        assert mx.array_equal(h, states[cut])
        assert [c.offset for c in cache] == [7] * cut + [0] * (tiny.BLOCKS - cut)
        assert mx.array_equal(view.run(h, cache, cut), states[-1])
    assert mx.array_equal(view.head(states[-1]), view.model(tokens()))
    assert mx.array_equal(view.unembed(view.norm(states[-1])), view.head(states[-1]))
    changed = [(a - b).abs().max().item() for a, b in pairwise(states)]
    assert min(changed) > 0.01  # every block does something, so none could be left out unseen


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_found_tied_or_not(tied):
    view = tiny.backbone("llama", tie_word_embeddings=tied)
    assert ("lm_head" in view.model) != tied
    assert mx.array_equal(view.logits(tokens()), view.model(tokens()))


def test_sizes_and_text():
    view = tiny.backbone("qwen3")
    assert (view.depth, view.width, view.context) == (tiny.BLOCKS, tiny.WIDTH, tiny.CONTEXT)
    assert view.eos == {tiny.EOS} and not view.is_moe and tiny.backbone("olmoe").is_moe
    text = "for i in x: y"
    assert view.decode([*view.encode(text), tiny.EOS]) == text
    with pytest.raises(UserError, match="The prompt is empty"):
        view.encode(" \n")
    assert len(view.encode("x" * (tiny.CONTEXT - 1))) == tiny.CONTEXT - 1
    with pytest.raises(UserError, match=f"The prompt has {tiny.CONTEXT} tokens"):
        view.encode("x" * tiny.CONTEXT)


def test_crop_leaves_shorter_entries():
    view = tiny.backbone()
    cache = view.new_cache()
    view.run(view.embed(tokens(5)), cache)
    view.run(view.embed(tokens(2)), cache, 0, 2)
    crop(cache, 6)
    assert [c.offset for c in cache] == [6, 6, 5, 5]


def test_the_hash_is_of_the_weights_and_of_nothing_else(tmp_path):
    folder = tiny.make_folder("llama", tmp_path / "a")
    first = weights_sha256(folder)
    mx.save_safetensors(str(folder / "stream.safetensors"), {"a": mx.zeros(3)})
    assert weights_sha256(folder) == first == tiny.backbone().sha256
    assert weights_sha256(tiny.make_folder("llama", tmp_path / "b", seed=1)) != first


# --- drafting on each family --------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_drafting_gives_the_tokens_of_plain_decoding(family):
    view, prompt = tiny.backbone(family), tiny.prompt(6)
    plain = generate(view, prompt, max_tokens=9)
    assert len(plain.tokens) == 9 and len(set(plain.tokens)) > 3
    drafters = [EarlyExit(view, 2)]
    drafters += [
        M2R2(view, tiny.stream(family, form=f)) for f in FORMS if not (f == "block" and family in MOE)
    ]
    for drafter in drafters:
        for drafts in range(9) if drafter is drafters[1] else (3,):
            found = generate(view, prompt, drafter, drafts, max_tokens=9)
            assert found.tokens == plain.tokens, (drafter, drafts)
            assert found.drafted[0] == drafts
