"""Peers as drafters: whatever drafts, the text and the cache are those of plain decoding."""

import numpy as np
import pytest
import tiny
from test_accept import FEW, check_counts, model_joint, sample_model
from test_speculation import WithEnds, check_cache, check_equal, plain

from m2r2kit.bench import Arm, step_costs
from m2r2kit.speculation import Sampler, generate
from m2r2kit.speculation.prompt_lookup import PromptLookup, lookup

AGAIN = tiny.prompt(4, seed=3) * 3  # a text that repeats itself
PROMPTS = [[7], tiny.prompt(2), tiny.prompt(6), AGAIN]


# --- one drafter of each kind ---------------------------------------------------------------


def prompt_lookup(view):
    return PromptLookup(view)


MAKERS = [prompt_lookup]
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
