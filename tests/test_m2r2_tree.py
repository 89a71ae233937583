"""M2R2's tree: what is added to the chain; decoding is lossless with any shape."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from speculation_checks import PROMPT, check_cache, check_equal, patched
from test_accept import FEW, check_counts, model_joint, sample_model
from test_broken_speculation import assert_caught
from test_tree import Hashable, all_seen, shifted

from m2r2kit.bench import tune as tuning
from m2r2kit.bench.tune import Tuned
from m2r2kit.common import UserError
from m2r2kit.model.backbone import Backbone
from m2r2kit.speculation import M2R2, Sampler, generate, tree
from m2r2kit.speculation.drafters import m2r2_tree
from m2r2kit.speculation.drafters.lookahead import Lookahead
from m2r2kit.speculation.drafters.m2r2_tree import M2R2Tree, with_leaves
from m2r2kit.speculation.tree import Tree
from m2r2kit.stream.stream import AcceleratedStream, StreamConfig, load_stream

POCKET = Path(__file__).parents[1] / "data" / "pocket-dense"


def m2r2_with_tree(leaves, exit=2, threshold=0.0, **settings) -> M2R2Tree:
    return M2R2Tree(tiny.backbone(), tiny.stream(exits=(exit,), **settings), None, threshold, leaves)


# --- the shape ----------------------------------------------------------------------------


def test_the_likeliest_of_the_other_tokens_are_the_leaves():
    p = np.array([[0.6, 0.3, 0.08, 0.02], [0.1, 0.5, 0.2, 0.2 + 1e-6], [0.25, 0.05, 0.3, 0.4]])
    # chain 0, 1, 3; others:  .3 .08 .02  |  .06 .12 .12+  |  .075 .015 .09
    logits = np.log(p) + [[3.0], [0.0], [-7.0]]  # softmax does not see what all tokens have in common
    chain = with_leaves(logits, 0)
    assert (chain.tokens, chain.parents) == ([0, 1, 3], [0, 1, 2])
    made = with_leaves(logits, 5)
    assert (made.tokens, made.parents) == ([0, 1, 3, 1, 3, 2, 2, 2], [0, 1, 2, 0, 1, 1, 2, 0])
    assert made.depth == 3
    for leaves in range(5):
        fewer = with_leaves(logits, leaves)
        assert (fewer.tokens, fewer.parents) == (made.tokens[: 3 + leaves], made.parents[: 3 + leaves])
    assert len(with_leaves(logits, 99).tokens) == 12  # every token at every position


def test_the_chain_is_that_of_m2r2():
    view, text, stream = tiny.backbone(), PROMPT, tiny.stream(size=0.1)
    for threshold in (0.0, 0.1):
        made = []
        for drafter in (M2R2(view, stream, None, threshold), M2R2Tree(view, stream, None, threshold, 3)):
            cache = view.new_cache(64)
            view.run(view.embed(mx.array([text[:-1]])), cache)
            made.append(drafter(text, 4, Sampler(), cache))
        chain, grown = made
        K = len(chain.tokens)
        assert grown.tokens[:K] == [t.item() for t in chain.tokens] and grown.parents[:K] == list(range(K))
        assert len(grown.tokens) == K + 3 and grown.depth == K
        assert all(c.offset == len(text) - 1 for c in cache)  # the drafter takes its own rows back


def test_a_tree_shrinks_to_the_context_left(monkeypatch):
    sizes, make = [], m2r2_tree.with_leaves

    def watched(logits, leaves):
        sizes.append((len(logits), leaves))
        return make(logits, leaves)

    monkeypatch.setattr(m2r2_tree, "with_leaves", watched)
    near = tiny.prompt(tiny.CONTEXT - 7, seed=1)
    view = tiny.backbone()
    out, _ = check_equal(m2r2_with_tree(4), 3, near, 50)
    assert sizes[0][1] < 4 or sizes[-1][1] < 4
    assert len(out.tokens) == 7 or out.stopped == "eos"
    longest = tiny.prompt(tiny.CONTEXT - 1)
    assert len(generate(view, longest, m2r2_with_tree(4), 4, 50).tokens) == 1


# --- lossless -----------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", [0, 1, 2, 4])
@pytest.mark.parametrize("carry", [False, True])
def test_every_number_of_drafts_and_of_leaves(leaves, carry):
    drafter = m2r2_with_tree(leaves, carry=carry)
    runs = [check_equal(drafter, drafts, max_tokens=10) for drafts in range(9)]
    assert sum(tie for _, tie in runs) <= 1  # of 9 texts of 10 tokens
    assert [max(out.drafted) for out, _ in runs] == list(range(9))


@pytest.mark.parametrize("exit", [1, 3])
@pytest.mark.parametrize("threshold", [0.02, 0.5])
def test_other_exits_and_drafts_that_stop(exit, threshold):
    drafter = m2r2_with_tree(2, exit, threshold, size=0.1, carry=True)
    check_equal(drafter, 6)
    check_cache(drafter, 6)


@pytest.mark.parametrize("length", [1, 2, 17])
def test_prompt_lengths(length):
    for settings in ({"form": "attention"}, {"carry": True}):
        check_equal(m2r2_with_tree(3, **settings), 3, tiny.prompt(length), 8)


@pytest.mark.parametrize("room", [None, 8])
def test_the_cache_holds_the_accepted_path_only(room):
    check_cache(m2r2_with_tree(3, 3, size=0), 4, room=room)
    check_cache(m2r2_with_tree(3, 3, size=0), 3, sampler=Sampler(1.0, top_k=20, seed=3), room=room)


def test_leaves_are_accepted():
    """Otherwise the tests of equality see only a chain; and each step of the tree is at least as long."""
    chain, _ = check_equal(m2r2_with_tree(0, 3, size=0), 3, max_tokens=30)
    grown, _ = check_equal(m2r2_with_tree(60, 3, size=0), 3, max_tokens=30)
    assert grown.steps < chain.steps and sum(grown.accepted) > sum(chain.accepted)


def test_the_stream_is_told_the_last_states_of_the_accepted_path():
    """After each step: the model's own state of the last token before the pending one."""
    view, drafter = tiny.backbone(), m2r2_with_tree(60, 3, size=0, carry=True)
    lengths, told, learn = [], [], drafter.learn
    drafter.learn = lambda states: (told.append(states[:, -1:]), learn(states))
    out = generate(view, PROMPT, drafter, 3, 30, on_tokens=lambda t, d: lengths.append(len(t)))
    assert max(out.accepted) >= 1
    final = view.states(mx.array([PROMPT + out.tokens]))[-1]
    ends = len(PROMPT) - 2 + np.cumsum([0, *lengths])  # of the prompt's pass, and of each step
    checked = zip(told, ends, strict=False)
    differences = [(h - final[:, end : end + 1]).abs().max().item() for h, end in checked]
    assert len(differences) >= 5 and max(differences) < 1e-3 * final.abs().max().item()


def test_sampling_with_leaves_has_the_model_s_distribution():
    view = tiny.backbone("llama", **FEW)
    mx.random.seed(1)
    stream = AcceleratedStream(view, StreamConfig(exits=(1,), rank=2, ffn_width=4))
    for leaves, settings in ((1, {"temperature": 2.0}), (2, {"temperature": 3.0, "top_k": 2})):
        drafter = M2R2Tree(view, stream, leaves=leaves)
        check_counts(sample_model(300, drafter, **settings), model_joint(**settings))


def test_the_pocket_model_says_what_it_says():
    view = Backbone.load(POCKET)
    stream, prompt = load_stream(view, POCKET / "stream"), view.encode("Show the size of each folder.")
    wanted = generate(view, prompt, max_tokens=24).tokens
    chain = generate(view, prompt, M2R2(view, stream), 4, 24)
    for leaves in (0, 2):
        out = generate(view, prompt, M2R2Tree(view, stream, leaves=leaves), 4, 24)
        assert out.tokens == wanted == chain.tokens
        assert out.steps <= chain.steps


# --- broken on purpose, and caught --------------------------------------------------------


def checks():
    drafter = m2r2_with_tree(60, 3, size=0)
    return [lambda: check_equal(drafter, 3, max_tokens=30), lambda: check_cache(drafter, 3, max_tokens=20)]


def test_the_checks_pass_when_nothing_is_broken():
    for check in checks():
        check()


def no_rows_moved(cache, start, rows):
    for entry in cache:
        entry.offset = start + len(rows)


@pytest.mark.parametrize(
    ("where", "name", "broken"),
    [
        (Tree, "rows", shifted),
        (Tree, "rows", all_seen),
        (tree, "keep_positions", no_rows_moved),
        (m2r2_tree, "crop", lambda cache, length: None),
    ],
    ids=["positions", "mask", "cache not compacted", "draft's rows left in the cache"],
)
def test_what_is_broken_is_caught(where, name, broken):
    with patched(where, name, broken):
        assert_caught(checks())
        with pytest.raises(AssertionError):
            checks()[1]()


def test_a_refused_child_kept_in_p_is_caught():
    class Whole(np.ndarray):
        def __setitem__(self, key, value):
            pass

        def copy(self):
            return self

    view, sampled_path = tiny.backbone("llama", **FEW), tree.sampled_path

    def forgetful(made, p, sampler):
        return sampled_path(made, p.view(Whole), sampler)

    mx.random.seed(1)
    stream = AcceleratedStream(view, StreamConfig(exits=(1,), rank=2, ffn_width=4))
    drafter, settings = M2R2Tree(view, stream, leaves=4), {"temperature": 8.0}  # refusals are common
    check_counts(sample_model(1000, drafter, **settings), model_joint(**settings))
    with patched(tree, "sampled_path", forgetful), pytest.raises(AssertionError, match="chi-square"):
        check_counts(sample_model(1000, drafter, **settings), model_joint(**settings))


# --- what is refused, and how it is tuned -------------------------------------------------


def test_a_model_whose_positions_depend_on_length_is_refused():
    rope = Hashable({"rope_type": "dynamic", "factor": 2.0})
    view = tiny.backbone("llama", rope_scaling=rope)
    stream = AcceleratedStream(view, StreamConfig(exits=(2,), rank=2, ffn_width=4))
    for make in (lambda: M2R2Tree(view, stream), lambda: Lookahead(view)):
        with pytest.raises(UserError, match="cannot verify a tree"):
            make()
    check_equal(M2R2(view, stream), 3, view=view)  # the chain is served


def test_a_negative_number_of_leaves_is_refused():
    with pytest.raises(UserError, match="at least 0; got -1"):
        m2r2_with_tree(-1)


def test_the_best_number_of_leaves_is_taken(monkeypatch):
    worth, drafter = {0: 1.2, 1: 1.5, 2: 1.7, 4: 1.6}, m2r2_with_tree(3)
    monkeypatch.setattr(tuning, "tune", lambda backbone, tree: Tuned(5, 0.1, worth[tree.leaves]))
    found = tuning.tune_tree(tiny.backbone(), drafter)
    assert found == Tuned(5, 0.1, 1.7, leaves=2) and drafter.leaves == 2


def test_a_stream_without_a_tree_is_tuned_all_the_same(monkeypatch, capsys):
    view = tiny.backbone("llama", rope_scaling=Hashable({"rope_type": "dynamic", "factor": 2.0}))
    stream = AcceleratedStream(view, StreamConfig(exits=(2,), rank=2, ffn_width=4))
    monkeypatch.setattr(tuning, "tune", lambda *found: Tuned(3, 0.2, 1.5))
    assert tuning.tune_stream(view, stream) == ({"drafts": 3, "threshold": 0.2}, 1.5)
    assert "No tree: This model's rotary positions" in capsys.readouterr().out
