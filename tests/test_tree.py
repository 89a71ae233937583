"""A tree in one masked pass: each row as if alone, the best path accepted, decoding lossless."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from speculation_checks import PROMPT, check_cache, check_equal, patched, plain
from test_accept import FEW, V, check_counts, joint, model_joint, probabilities, sample_model, tables
from test_broken_speculation import assert_caught

from m2r2kit.common import UserError
from m2r2kit.model import tree_pass as masked_pass
from m2r2kit.model.families import DENSE
from m2r2kit.speculation import Drafter, Sampler, generate, tree
from m2r2kit.speculation.accept import accept_sampled
from m2r2kit.speculation.drafters.lookahead import Lookahead
from m2r2kit.speculation.tree import Tree, best_path, sampled_path, verify_tree


class Scripted(Drafter):
    """Offers the right continuation as one path among wrong ones, and odd rows beside them."""

    def __init__(self, text, wrong=(0, 2, 1)):
        self.text, self.wrong = text, wrong

    def __call__(self, text, drafts, sampler, cache):
        right = self.text[len(text) :][:drafts]
        chains = [right[:n] + [(t + 1) % tiny.EOS for t in right[n:]] for n in self.wrong]
        chains.insert(1, right)
        return Tree.of_chains(chains, [5, 6], [1, 2], np.tri(2, dtype=bool))

    def look(self, choices):
        assert len(choices) == 2


def right_text():
    return PROMPT + plain(max_tokens=30).tokens


# --- the masked pass ----------------------------------------------------------------------


def check_rows(view, room):
    """The logits of each row are those of a fresh pass over the text and the rows that it sees."""
    among = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]]) > 0
    made = Tree([3, 4, 5, 9, 8], [0, 1, 2, 1, 0], [11, 12, 13], [1, 2, 2], among)
    seen = [[], [3], [3, 4], [3, 4, 5], [3, 9], [8], [11], [11, 12], [11, 13]]
    cache = view.new_cache(room)
    view.run(view.embed(mx.array([PROMPT[:-1]])), cache)
    found, last = verify_tree(view, made, PROMPT[-1], cache)
    assert len(found) == len(seen) and cache[0].offset == len(PROMPT) - 1 + len(seen)
    for row, h, tokens in zip(found, last[0], seen, strict=True):
        states = view.states(mx.array([PROMPT + tokens]))[-1][:, -1:]
        for mine, wanted in ((h, states[0, 0]), (row, view.head(states)[0, 0])):
            assert (mine - wanted).abs().max().item() < 1e-4 * wanted.abs().max().item()


@pytest.mark.parametrize("room", [None, 8])
@pytest.mark.parametrize("family", [*DENSE, "qwen3_moe"])
def test_each_row_is_as_if_it_stood_alone(family, room):
    check_rows(tiny.backbone(family), room)


def test_positions_that_are_no_plain_rotation():
    """Other rotary embeddings go through `mx.fast.rope`, where each row becomes a text of its own."""
    rope = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}  # fmt: skip
    view = tiny.backbone("llama", rope_scaling=Hashable(rope))
    assert type(view.blocks[0].self_attn.rope).__name__ == "Llama3RoPE"
    for room in (None, 8):
        check_rows(view, room)


class Hashable(dict):
    def __hash__(self):
        return hash(tuple(self.items()))

    def __str__(self):
        return "scaled"


# --- lossless -----------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [1, 4, 8])
def test_the_best_path_is_accepted(drafts):
    out, _ = check_equal(Scripted(right_text()), drafts)
    assert out.accepted == out.drafted and out.drafted[0] == drafts
    out, _ = check_equal(Scripted([(t + 1) % tiny.EOS for t in right_text()]), drafts, max_tokens=6)
    assert set(out.accepted) <= {0, 1}


@pytest.mark.parametrize("room", [None, 8])
def test_the_cache_holds_the_accepted_path_only(room):
    assert 5 in check_cache(Scripted(right_text()), 4, room=room)
    half = PROMPT + [t if i % 3 else (t + 1) % tiny.EOS for i, t in enumerate(plain(max_tokens=30).tokens)]
    assert {1, 3} <= set(check_cache(Scripted(half), 4, room=room))
    check_cache(Scripted(right_text()), 3, sampler=Sampler(1.0, top_k=20, seed=3), room=room)


def shifted(self, pending, position):
    tokens, positions, mask = rows(self, pending, position)
    return tokens, [positions[0], *(p + 1 for p in positions[1:])], mask


def all_seen(self, pending, position):
    tokens, positions, _ = rows(self, pending, position)
    return tokens, positions, np.tri(len(tokens), dtype=bool)


rows = Tree.rows


@pytest.mark.parametrize("broken", [shifted, all_seen])
def test_wrong_positions_and_a_wrong_mask_are_caught(broken):
    checks = [
        lambda: check_equal(Scripted(right_text(), wrong=(0, 1, 0)), 4),
        lambda: check_cache(Scripted(right_text()), 4),
    ]
    for check in checks:
        check()
    with patched(Tree, "rows", broken):
        assert_caught(checks, at_least=1)
        with pytest.raises(AssertionError):
            check_rows(tiny.backbone(), 8)


def test_keeping_the_rows_of_another_path_is_caught():
    keep = masked_pass.keep_positions

    def first(cache, start, kept):
        keep(cache, start, list(range(len(kept))))

    with patched(tree, "keep_positions", first), pytest.raises(AssertionError):
        check_cache(Scripted(right_text()), 4)


# --- the rules ----------------------------------------------------------------------------


def test_chains_that_begin_alike_share_their_beginning():
    made = Tree.of_chains([[1, 2], [1, 3, 4], [7], [1, 2]])
    assert (made.tokens, made.parents) == ([1, 2, 3, 4, 7], [0, 1, 1, 3, 0])
    assert (made.depths, made.depth) == ([0, 1, 2, 2, 3, 1], 3)
    chain = Tree.of_chains([[5, 5, 6]])
    assert (chain.tokens, chain.parents) == ([5, 5, 6], [0, 1, 2])
    tokens, positions, mask = chain.rows(4, 10)
    assert (tokens, positions) == ([4, 5, 5, 6], [10, 11, 12, 13])
    assert (mask == np.tri(4, dtype=bool)).all()


def test_what_is_no_tree_is_refused():
    for tokens, parents in ([1, 2], [0]), ([1], [1]), ([1, 2], [2, 0]), ([1], [-1]):
        with pytest.raises(UserError, match="needs a parent"):
            Tree(tokens, parents)
    with pytest.raises(UserError, match="must differ"):
        Tree([1, 2, 1], [0, 1, 0])


def test_a_tree_larger_than_the_context_left_is_refused():
    view = tiny.backbone()
    text = tiny.prompt(tiny.CONTEXT - 2)
    cache = view.new_cache(tiny.CONTEXT)
    view.run(view.embed(mx.array([text[:-1]])), cache)
    with pytest.raises(UserError, match=r"depth 3 does not fit .* 2 tokens left"):
        verify_tree(view, Tree([1, 2, 3], [0, 1, 2]), text[-1], cache)
    logits, _ = verify_tree(view, Tree([1, 2, 3], [0, 1, 0]), text[-1], cache)
    assert len(logits) == 4


def test_greedy_takes_the_path_that_agrees_longest():
    made = Tree([1, 2, 3, 4, 7], [0, 1, 1, 3, 0], [9], [1], np.ones((1, 1), dtype=bool))
    #       pending | 1  2  3  4  7 | 9
    assert best_path(made, [1, 3, 0, 4, 6, 0, 0]) == ([1, 3, 4, 6], [0, 1, 3, 4])
    assert best_path(made, [1, 2, 8, 0, 0, 0, 0]) == ([1, 2, 8], [0, 1, 2])
    assert best_path(made, [7, 0, 0, 0, 0, 5, 0]) == ([7, 5], [0, 5])
    assert best_path(made, [0, 0, 0, 0, 0, 0, 0]) == ([0], [0])
    assert best_path(Tree([], []), [4]) == ([4], [0])


CHAINS = [[0, 1], [0, 2], [3], [0, 2], [1, 1]]


def sample_trees(samples: int, rule) -> np.ndarray:
    """Three tokens, many times: the first ones by the rule, what is left plainly, all from the tables' p."""
    sampler, made = Sampler(temperature=1.0, seed=7), Tree.of_chains(CHAINS)
    p, prefixes = probabilities(1, sampler), [()]
    for token, parent in zip(made.tokens, made.parents, strict=True):
        prefixes.append((*prefixes[parent], token))
    table = np.stack([p[x] for x in prefixes])
    counts = np.zeros((V,) * 3, dtype=int)
    for _ in range(samples):
        text = tuple(rule(made, table, sampler)[0])
        while len(text) < 3:
            text += (sampler.draw(p[text]),)
        counts[text] += 1
    return counts


def test_sampled_paths_have_the_model_s_distribution():
    exact = joint(lambda prefix: tables(1)[prefix], V, temperature=1.0)
    check_counts(sample_trees(20_000, sampled_path), exact)


def forgetful(made, p, sampler):
    """Uses the full p again for each further candidate and for the last draw."""

    class Whole(np.ndarray):
        def __setitem__(self, key, value):
            pass

        def copy(self):
            return self

    return sampled_path(made, p.view(Whole), sampler)


def best_of_first(made, p, sampler):
    """The rule for drafts drawn from q, though these were not."""
    q = [np.full(V, 1 / V)] * len(CHAINS[0])
    return accept_sampled(CHAINS[0], q, p[: len(q) + 1], sampler), []


@pytest.mark.parametrize("rule", [forgetful, best_of_first])
def test_a_broken_rule_is_caught(rule):
    exact = joint(lambda prefix: tables(1)[prefix], V, temperature=1.0)
    with pytest.raises(AssertionError, match="chi-square"):
        check_counts(sample_trees(20_000, rule), exact)


def test_generation_with_a_tree_has_the_model_s_distribution():
    class Any(Drafter):
        def __call__(self, text, drafts, sampler, cache):
            return Tree.of_chains([c[:drafts] for c in ([0, 1], [1, 1], [1, 2])])

        def look(self, choices):
            assert choices == []

    settings = {"temperature": 2.0}
    check_counts(sample_model(300, Any(), **settings), model_joint(**settings))
    assert tiny.backbone("llama", **FEW).depth == 2


# --- lookahead ----------------------------------------------------------------------------


def test_the_window_fills_and_then_moves_on():
    drafter = Lookahead(tiny.backbone(), window=3, ngram=4, candidates=2)
    drafter.begin([1, 1, 1], 8)
    assert drafter.levels == [[1] * 5] and drafter.pool == {}
    drafter.look([10, 11, 12, 13, 14])  # what follows each of the five
    assert drafter.levels == [[1] * 4, [11, 12, 13, 14]]
    drafter.look([0, 0, 0, 0, 20, 21, 22, 23])  # only what follows the last level counts
    assert drafter.levels == [[1] * 3, [12, 13, 14], [21, 22, 23]]
    drafter.look([0] * 6 + [30, 31, 32])
    assert drafter.pool == {1: [(13, 22, 31), (14, 23, 32)]}  # of three, the two newest
    assert drafter.levels == [[12, 13, 14], [21, 22, 23], [30, 31, 32]]


def test_each_row_of_the_window_sees_its_own_past():
    drafter = Lookahead(tiny.backbone(), window=3, ngram=3, candidates=2)
    drafter.begin([1, 2, 3, 1, 2, 4], 8)
    drafter.levels = [[50, 51, 52], [60, 61, 62]]
    made = drafter([9, 1], 2, Sampler(), None)
    assert (made.tokens, made.parents) == ([2, 4, 3], [0, 1, 1])  # the newest first
    assert made.distance == [1, 2, 3, 2, 3, 4]
    extra, seen = (
        np.array(made.extra),
        [[50], [50, 51], [50, 51, 52], [50, 60], [50, 51, 61], [50, 51, 52, 62]],
    )
    assert made.extra == [50, 51, 52, 60, 61, 62]
    assert [extra[row].tolist() for row in made.among] == seen


def test_lookahead_finds_what_the_model_will_say():
    """In a text that repeats itself, its own n-grams are right."""
    view = tiny.backbone()
    prompt = next(p for p in (tiny.prompt(4, seed) for seed in range(40)) if circles(view, p))
    out, _ = check_equal(Lookahead(view), 3, prompt, 40)
    assert sum(out.accepted) > 0


def circles(view, prompt):
    tokens = generate(view, prompt, max_tokens=40).tokens
    return len(tokens) == 40 and len(set(tokens[20:])) < 12


def test_settings_that_cannot_be_are_refused():
    for settings in ({"window": 0}, {"ngram": 1}, {"candidates": 0}):
        with pytest.raises(UserError, match="n-grams of at least 2"):
            Lookahead(tiny.backbone(), **settings)
