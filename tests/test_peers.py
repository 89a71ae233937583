"""Peers as drafters: whatever drafts, the text and the cache are those of plain decoding."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten, tree_map
from test_accept import FEW, check_counts, model_joint, sample_model
from test_speculation import WithEnds, check_cache, check_equal, plain

from m2r2kit import own_text
from m2r2kit.bench import Arm, step_costs
from m2r2kit.errors import UserError
from m2r2kit.speculation import Sampler, generate, peers
from m2r2kit.speculation.draft_model import DraftModel, DraftModelConfig
from m2r2kit.speculation.prompt_lookup import PromptLookup, lookup
from m2r2kit.training import DistilConfig, teach

AGAIN = tiny.prompt(4, seed=3) * 3  # a text that repeats itself
PROMPTS = [[7], tiny.prompt(2), tiny.prompt(6), AGAIN]


# --- one drafter of each kind ---------------------------------------------------------------


def prompt_lookup(view):
    return PromptLookup(view)


def shake(w):
    return w + 0.3 * mx.random.normal(w.shape) * w.shape[-1] ** -0.5


def untrained(kind):
    """A drafter of a peer whose every number was shaken, so that it drafts something of its own."""

    def make(view):
        module = peers.new(view, kind, exit=1)
        module.update(tree_map(shake, module.trainable_parameters()))
        return peers.drafter(view, kind, module)

    make.__name__ = kind
    return make


MAKERS = [prompt_lookup, *map(untrained, peers.KINDS)]
each_kind = pytest.mark.parametrize("kind", peers.KINDS)
each_drafter = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


# --- lossless -----------------------------------------------------------------------------


@each_drafter
def test_greedy_text_is_that_of_plain_decoding(make):
    view = tiny.backbone()
    drafter = make(view)
    for prompt in PROMPTS:  # one drafter for all: it must forget the text before
        for drafts in (0, 1, 3, 8):
            check_equal(drafter, drafts, prompt, max_tokens=16)


@each_drafter
def test_the_cache_after_each_step(make):
    drafter = make(tiny.backbone())
    for prompt in PROMPTS[::2]:
        for room in (None, 8):
            check_cache(drafter, 4, prompt, room=room)
    check_cache(drafter, 3, AGAIN, sampler=Sampler(1.0, top_k=20, seed=3))


@each_drafter
def test_end_of_text_inside_a_draft(make):
    tokens = plain(AGAIN, 20).tokens
    for end in dict.fromkeys(tokens[1:6]):
        view = WithEnds(tiny.backbone(), {end})
        out, _ = check_equal(make(view), 8, AGAIN, view=view)
        assert out.stopped == "eos"


@each_drafter
def test_the_end_of_the_context(make):
    view = WithEnds(tiny.backbone(), ())
    near = tiny.prompt(tiny.CONTEXT - 7, seed=1)
    out, _ = check_equal(make(view), 8, near, 50, view)
    assert len(out.tokens) == 7


@each_drafter
def test_sampled_text_has_the_model_s_distribution(make):
    drafter = make(tiny.backbone("llama", **FEW))
    check_counts(sample_model(300, drafter, temperature=2.0), model_joint(temperature=2.0))


@each_drafter
def test_costs_of_a_step_can_be_measured(make):
    c, v = step_costs(tiny.backbone(), Arm("peer", make(tiny.backbone()), 3), AGAIN, repeats=1)
    assert np.isfinite(c) and v > 0


# --- trained ------------------------------------------------------------------------------


STARTS = np.random.default_rng(5).integers(0, tiny.EOS, (16, 2))


def lessons(view, depths, length=24):
    """Text that the tiny model wrote itself, and what the model says of it."""
    text = own_text.continue_greedily(view, STARTS, length)
    return [teach(view, text[i : i + 8], depths, set()) for i in range(0, len(text), 8)]


def tokens_a_step(view, drafter, drafts=3) -> float:
    """On the text of the lessons, which is all that so small a peer can learn."""
    outs = [generate(view, start, drafter, drafts, 22) for start in STARTS[:6].tolist()]
    return sum(len(out.tokens) for out in outs) / sum(out.steps for out in outs)


def new(view, kind):
    """A peer with room to learn; a tenth of a tiny model has next to none."""
    if kind == "draft-model":
        return DraftModel(view, DraftModelConfig(1, 32, 4, 2, 64, tiny.VOCABULARY, tiny.CONTEXT))
    return peers.new(view, kind, exit=1)


@each_kind
def test_training_lowers_the_loss_and_raises_acceptance(kind):
    view = tiny.backbone()
    module = new(view, kind)
    text = lessons(view, module.depths)
    loss, tokens = peers.mean_loss(module, text), tokens_a_step(view, peers.drafter(view, kind, module))
    peers.train(module, text, DistilConfig(steps=150, warmup=10, learning_rate=1e-2))
    assert peers.mean_loss(module, text) < loss - 0.5
    assert tokens_a_step(view, peers.drafter(view, kind, module)) > tokens + 0.3


@each_kind
def test_a_saved_peer_comes_back_to_its_own_model_only(kind, tmp_path):
    view = tiny.backbone()
    module = peers.new(view, kind, exit=1)
    peers.save(module, view, tmp_path, drafts=3)
    loaded, facts = peers.load(view, kind, tmp_path)
    assert facts["drafts"] == 3 and loaded.config == module.config
    saved, found = (dict(tree_flatten(m.trainable_parameters())) for m in (module, loaded))
    assert saved.keys() == found.keys()
    assert all(mx.allclose(found[name], saved[name], atol=1e-2) for name in saved)
    other = tiny.backbone("qwen3")
    with pytest.raises(UserError, match=f"trained for another model .*{other.sha256[:12]}") as refusal:
        peers.load(other, kind, tmp_path)
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="There is no trained drafter in"):
        peers.load(view, kind, tmp_path / "nothing")


# --- the draft model ----------------------------------------------------------------------


def test_a_draft_model_has_a_tenth_of_the_parameters():
    view = tiny.backbone("llama", vocab_size=512, num_hidden_layers=24)
    models = view.model, peers.new(view, "draft-model")
    large, small = (sum(w.size for _, w in tree_flatten(m.parameters())) for m in models)
    assert 0.05 < small / large <= 0.1  # widths go in steps of 8


def test_a_draft_model_with_other_tokens_is_refused():
    with pytest.raises(UserError, match="knows 4096 tokens and the model 96; they must share a tokenizer"):
        DraftModel(tiny.backbone(), DraftModelConfig())


# --- prompt lookup ------------------------------------------------------------------------


def test_lookup_takes_the_longest_suffix_and_of_equals_the_first():
    #       0  1  2  3  4  5  6  7  8  9
    text = [1, 2, 3, 9, 2, 3, 4, 1, 2, 3]
    assert lookup(text, 3, 4) == [9, 2, 3, 4]  # 1 2 3 stood at 0
    assert lookup(text, 2, 1) == [9]  # 2 3 at 1, not at 4
    assert lookup([*text, 2], 3, 9) == [3, 9, 2, 3, 4, 1, 2, 3, 2]  # 2 alone, at 1
    assert lookup([5, 5], 3, 4) == [5] and lookup([5, 6], 3, 4) == [] and lookup([5], 3, 4) == []


def test_a_text_without_a_match_is_decoded_plainly():
    view = tiny.backbone()
    assert generate(view, AGAIN, PromptLookup(view), 4, 6).drafted[0] == 4
    fresh = generate(view, list(range(8)), PromptLookup(view), 4, 6)
    assert fresh.drafted[0] == 0 and fresh.tokens == plain(list(range(8)), 6).tokens
