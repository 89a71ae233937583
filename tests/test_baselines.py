"""Baseline drafters: the text and the cache are those of plain decoding."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten, tree_map
from speculation_checks import WithEnds, check_cache, check_equal, patched, plain
from test_accept import FEW, check_counts, model_joint, sample_model

from m2r2kit.bench.speculation import step_costs
from m2r2kit.common import UserError
from m2r2kit.model.backbone import crop
from m2r2kit.speculation import EarlyExit, Sampler, generate
from m2r2kit.speculation import decode as loop
from m2r2kit.speculation import trained as baselines
from m2r2kit.speculation.drafters.draft_model import DraftModel, DraftModelConfig
from m2r2kit.speculation.drafters.eagle import Eagle
from m2r2kit.speculation.drafters.lookahead import Lookahead
from m2r2kit.speculation.drafters.parts import OwnPass
from m2r2kit.speculation.drafters.prompt_lookup import PromptLookup, lookup
from m2r2kit.stream.distil import DistilConfig, teacher_batch
from m2r2kit.text import self_generated as own_text

AGAIN = tiny.prompt(4, seed=3) * 3  # a text that repeats itself
PROMPTS = [[7], tiny.prompt(2), tiny.prompt(6), AGAIN]


# --- one drafter of each kind ---------------------------------------------------------------


def prompt_lookup(view):
    return PromptLookup(view)


def shake(w):
    return w + 0.3 * mx.random.normal(w.shape) * w.shape[-1] ** -0.5


def untrained(kind, **settings):
    """A baseline drafter with perturbed parameters, so that its drafts differ from the model's tokens."""

    def make(view):
        config = replace(baselines.KINDS[kind].settings.for_model(view, exit=1), **settings)
        mx.random.seed(0)
        module = baselines.KINDS[kind].module(view, config)
        module.update(tree_map(shake, module.trainable_parameters()))
        return baselines.drafter(view, kind, module)

    make.__name__ = kind
    return make


def lookahead(view):
    return Lookahead(view, window=3, ngram=3, candidates=3)


SURE = {"kangaroo": {"threshold": 0.2}, "deed": {"threshold": 0.2}}  # of some tokens, with shaken weights
MAKERS = [lookahead, prompt_lookup, *(untrained(kind, **SURE.get(kind, {})) for kind in baselines.KINDS)]
each_kind = pytest.mark.parametrize("kind", baselines.KINDS)
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
def test_the_same_draft_can_be_made_again(make):
    """As when its cost is measured."""
    view = tiny.backbone()
    drafter, cache = make(view), view.new_cache(len(AGAIN))
    drafter.begin(AGAIN, len(AGAIN))
    loop.read_prompt(view, drafter, AGAIN, cache)
    made = []
    for _ in range(3):
        made.append(ids(drafter(AGAIN, 3, Sampler(), cache)))
        crop(cache, len(AGAIN) - 1)
    assert made[0] and made[1:] == made[:-1]


@each_drafter
def test_costs_of_a_step_can_be_measured(make):
    c, v = step_costs(tiny.backbone(), make(tiny.backbone()), 3, AGAIN, repeats=1)
    assert np.isfinite(c) and v > 0


@pytest.mark.parametrize("family", ["gemma", "gemma2", "phi3", "olmo2", "qwen3_moe"])
def test_other_families_have_peers_too(family):
    view = tiny.backbone(family)
    for kind in baselines.KINDS:
        check_equal(untrained(kind)(view), 3, view=view, max_tokens=8)


# --- what a drafter remembers -------------------------------------------------------------


def check_memory(make, prompt=PROMPTS[2], drafts=4) -> int:
    """In each step it drafts what a new drafter would that was given the text at once; returns the
    number of different counts of accepted drafts."""
    view = WithEnds(tiny.backbone(), ())
    drafter, made = make(view), []

    class Watched(type(drafter)):
        def __call__(self, text, drafts, sampler, cache):
            draft = super().__call__(text, drafts, sampler, cache)
            made.append((list(text), drafts, ids(draft)))
            return draft

    drafter.__class__ = Watched
    out = generate(view, prompt, drafter, drafts, 24)
    for text, k, drafted in made:
        new, cache = make(view), view.new_cache(len(text))
        new.begin(text, len(text))
        if len(text) > 1:
            loop.read_prompt(view, new, text, cache)
        assert ids(new(text, k, Sampler(), cache)) == drafted, f"after {len(text)} tokens"
    return len(set(out.accepted))


def ids(draft):
    return [t if isinstance(t, int) else t.item() for t in draft.tokens]


@pytest.mark.parametrize("make", MAKERS[1:], ids=lambda make: make.__name__)  # lookahead's is of its passes
def test_memory_is_that_of_the_text(make):
    for prompt in PROMPTS:
        check_memory(make, prompt)


def all_right(kind):
    """Makes a baseline that is trained on one text, so that its drafts are often accepted."""
    view = tiny.backbone()
    module = new(view, kind)
    baselines.train(
        module, batches(view, module.depths), DistilConfig(steps=150, warmup=10, learning_rate=1e-2)
    )
    return lambda view: baselines.drafter(view, kind, module)


@pytest.mark.parametrize("kind", ["eagle", "kangaroo"])
def test_a_memory_that_is_not_cropped_is_caught_though_it_changes_no_text(kind):
    make = all_right(kind)
    assert max(check_memory(make, start) for start in STARTS[:4].tolist()) > 1
    with patched(OwnPass, "crop", lambda self, length: None):
        with pytest.raises(AssertionError, match="after"):
            for start in STARTS[:4].tolist():
                check_memory(make, start)
        for start in STARTS[:4].tolist():
            check_equal(make(tiny.backbone()), 3, start)


def test_the_states_of_other_rows_are_caught():
    make, learn = untrained("eagle"), Eagle.learn
    with patched(Eagle, "learn", lambda self, states: learn(self, mx.roll(states, 1, axis=1))):
        check_equal(make(tiny.backbone()), 3)
        with pytest.raises(AssertionError, match="after"):
            check_memory(make)


# --- trained ------------------------------------------------------------------------------


STARTS = np.random.default_rng(5).integers(0, tiny.EOS, (16, 2))


def batches(view, depths, length=24):
    """Text generated by the tiny model, and teacher batches of it."""
    text = own_text.continue_greedily(view, STARTS, length)
    return [teacher_batch(view, text[i : i + 8], depths, set()) for i in range(0, len(text), 8)]


def tokens_a_step(view, drafter, drafts=3) -> float:
    """On the text of the batches, which is all that so small a baseline can learn."""
    outs = [generate(view, start, drafter, drafts, 22) for start in STARTS[:6].tolist()]
    return sum(len(out.tokens) for out in outs) / sum(out.steps for out in outs)


def new(view, kind):
    """A baseline with enough capacity to learn; the default size of a tiny model is too small."""
    if kind == "draft-model":
        return DraftModel(view, DraftModelConfig(1, 32, 4, 2, 64, tiny.VOCABULARY, tiny.CONTEXT))
    return baselines.new(view, kind, exit=1)


@each_kind
def test_the_loss_compares_as_many_positions_as_the_settings_ask(kind):
    module, draws = new(tiny.backbone(), kind), tiny.Draws()
    (batch, *_) = batches(tiny.backbone(), module.depths)
    module.loss(batch, DistilConfig(positions=3), draws)
    assert set(draws.sizes) == {3 * len(batch.tokens)}


@each_kind
def test_training_lowers_the_loss_and_raises_acceptance(kind):
    view = tiny.backbone()
    module = new(view, kind)
    text = batches(view, module.depths)
    loss = baselines.mean_loss(module, text, DistilConfig())
    tokens = tokens_a_step(view, baselines.drafter(view, kind, module))
    baselines.train(module, text, DistilConfig(steps=150, warmup=10, learning_rate=1e-2))
    assert baselines.mean_loss(module, text, DistilConfig()) < loss - 0.5
    assert tokens_a_step(view, baselines.drafter(view, kind, module)) > tokens + 0.15


@each_kind
def test_a_saved_peer_comes_back_to_its_own_model_only(kind, tmp_path):
    view = tiny.backbone()
    module = baselines.new(view, kind, exit=1)
    baselines.save(module, view, tmp_path, drafts=3)
    loaded, facts = baselines.load(view, kind, tmp_path)
    assert facts["drafts"] == 3 and loaded.config == module.config
    saved, found = (dict(tree_flatten(m.trainable_parameters())) for m in (module, loaded))
    assert saved.keys() == found.keys()
    assert all(mx.allclose(found[name], saved[name], atol=1e-2) for name in saved)
    other = tiny.backbone("qwen3")
    with pytest.raises(UserError, match=f"trained for another model .*{other.sha256[:12]}") as refusal:
        baselines.load(other, kind, tmp_path)
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="There is no trained drafter in"):
        baselines.load(view, kind, tmp_path / "nothing")


# --- the draft model ----------------------------------------------------------------------


def test_a_draft_model_has_a_tenth_of_the_parameters():
    view = tiny.backbone("llama", vocab_size=512, num_hidden_layers=24)
    models = view.model, baselines.new(view, "draft-model")
    large, small = (sum(w.size for _, w in tree_flatten(m.parameters())) for m in models)
    assert 0.05 < small / large <= 0.1  # widths go in steps of 8


def test_a_draft_model_with_other_tokens_is_refused():
    with pytest.raises(UserError, match="has 4096 tokens and the model 96; both must use the same tokenizer"):
        DraftModel(tiny.backbone(), DraftModelConfig())


# --- confidence ---------------------------------------------------------------------------


def drafted(drafter, text, drafts=5):
    view = tiny.backbone()
    cache = view.new_cache(len(text))
    drafter.begin(text, len(text))
    loop.read_prompt(view, drafter, text, cache)
    return ids(drafter(text, drafts, Sampler(), cache)), cache


def test_kangaroo_stops_where_it_is_not_sure():
    view = tiny.backbone()
    counts = {t: len(drafted(untrained("kangaroo", threshold=t)(view), AGAIN)[0]) for t in (0.0, 1.0)}
    assert counts == {0.0: 5, 1.0: 1}


@pytest.mark.parametrize(("threshold", "exit"), [(0.0, 1), (1.1, 3)])
def test_deed_drafts_at_its_first_or_at_its_last_exit(threshold, exit):
    """Before training its exits read what a bare early exit reads."""
    view = tiny.backbone()
    module = baselines.new(view, "deed", exit=1)
    assert module.config.exits == (1, 2, 3)
    module.config = replace(module.config, threshold=threshold)
    deed = baselines.drafter(view, "deed", module)
    found, cache = drafted(deed, AGAIN)
    assert found == drafted(EarlyExit(view, exit), AGAIN)[0]
    assert [c.offset for c in cache] == [len(AGAIN) + 4] + [len(AGAIN) - 1] * 3


def test_deed_computes_deeper_states_of_tokens_that_left_early():
    """Each draft equals the exit's token after a fresh pass over the text: none attends to a gap."""
    view, exits = tiny.backbone(), set()
    module = baselines.new(view, "deed", exit=1)
    for threshold in (0.3, 0.5, 0.7):
        module.config = replace(module.config, threshold=threshold)
        for text in PROMPTS[1:]:
            tokens = list(text)
            for token in drafted(baselines.drafter(view, "deed", module), text)[0]:
                h = view.states(mx.array([tokens]))
                for exit in (1, 2, 3):
                    p = mx.softmax(view.head(h[exit])[0, -1])
                    if p.max().item() >= threshold:
                        break
                assert token == p.argmax().item()
                exits.add(exit)
                tokens.append(token)
    assert exits == {1, 2, 3}


def test_exits_that_a_model_does_not_have_are_refused():
    for kind in ("kangaroo", "deed"):
        with pytest.raises(UserError, match="The exit must lie between 1 and 3; got 9"):
            baselines.new(tiny.backbone(), kind, exit=9)


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
