"""The accelerated stream: where it starts, what it must not change, and that its two modes agree."""

import mlx.core as mx
import numpy as np
import pytest
import tiny

from m2r2kit.common import UserError
from m2r2kit.model.backbone import Backbone, crop
from m2r2kit.model.families import DENSE, MOE
from m2r2kit.stream.distil import chain, distance, needs, teacher_batch
from m2r2kit.stream.stream import FORMS, AcceleratedStream, StreamConfig, intervals, shifted, tau

LENGTH = 7


def close(a, b, tolerance=2e-5):
    """Equal but for rounding, which differs with the number of rows in a product."""
    assert a.shape == b.shape
    assert (a - b).abs().max().item() <= tolerance * b.abs().max().item()


def slow(view, tokens):
    """The slow states and the cache of a sequence."""
    cache = view.new_cache()
    return view.states(mx.array([tokens]), cache), cache


# --- rate and intervals -------------------------------------------------------------------


def test_tau_ends_where_the_rate_says():
    config = StreamConfig(exits=(3, 5, 11))
    assert intervals(config) == [(0, 3), (3, 5), (5, 11)]
    for a, b in intervals(config):
        stands = [tau(l, a, b, 12, None) for l in range(a, b + 1)]
        assert stands[0] == a and stands[-1] == 12 and stands == sorted(set(stands))
        assert [tau(l, a, b, 12, 1) for l in range(a, b + 1)] == list(range(a, b + 1))  # the control
    assert [tau(l, 0, 3, 12, None) for l in range(4)] == [0, 4, 8, 12]
    assert [tau(l, 4, 8, 12, 2) for l in range(4, 9)] == [4, 6, 8, 10, 12]
    assert [tau(l, 6, 11, 12, 2) for l in range(6, 12)] == [6, 8, 10, 12, 12, 12]  # never beyond N


@pytest.mark.parametrize(("deep", "read"), [(0.25, 1), (0.5, 2), (1, 3), (0, None)])
def test_fast_blocks_read_the_keys_at_a_share_of_the_depth(deep, read):
    stream = tiny.stream(exits=(3,), deep=deep, form="adapter")
    assert [block.read for block in stream.fast] == [read] * 3


def test_an_interval_may_be_the_last_blocks_before_its_exit():
    config = StreamConfig(exits=(1, 6, 12), span=2)
    assert intervals(config) == [(0, 1), (4, 6), (10, 12)]
    stream = tiny.stream(exits=(1, 3), span=1, deep=0.5, form="adapter")
    assert len(stream.fast) == 2 and stream.block(2) is stream.fast[1]  # none for block 1
    assert [block.read for block in stream.fast] == [2, 3]  # half of the way from where each interval begins


def test_settings_that_a_model_cannot_have_are_refused():
    for settings, sentence in [
        ({"form": "cube"}, "There is no fast block 'cube'"),
        ({"exits": ()}, "Exits must increase"),
        ({"exits": (0,)}, "between 1 and 3"),
        ({"exits": (tiny.BLOCKS,)}, "between 1 and 3"),
        ({"exits": (2, 2)}, "Exits must increase"),
        ({"exits": (3, 1)}, "Exits must increase"),
        ({"rate": 0.5}, "The rate must be at least 1"),
        ({"rate": float("nan")}, "The rate must be at least 1"),
        ({"span": 0}, "span of an interval must be at least 1; got 0"),
        ({"rank": -1}, "rank and the FFN.s width must be at least 0"),
        ({"ffn_width": -1}, "width must be at least 0"),
        ({"form": "adapter", "ffn_width": 0}, "needs an FFN; give it a width"),
        ({"deep": 1.5}, "must lie between 0 and 1; got 1.5"),
    ]:
        with pytest.raises(UserError, match=sentence):
            tiny.stream(**({"exits": (2,)} | settings))
    for family in MOE:
        with pytest.raises(UserError, match="experts of its own"):
            tiny.stream(family, form="block")
    with pytest.raises(UserError, match="no exit 3; it was trained for 1, 2"):
        tiny.stream(exits=(1, 2)).interval(3)


# --- before training ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "olmo2", "phi3"])
def test_an_untrained_adapter_stays_at_its_start(family):
    stream = tiny.stream(family, (2, 3), size=0, form="adapter")
    states, cache = slow(tiny.backbone(family), tiny.prompt(LENGTH))
    for exit, start in ((2, 0), (3, 2)):
        assert all(mx.array_equal(p, states[start]) for p in stream(states, cache, exit=exit))


@pytest.mark.parametrize("family", DENSE)
def test_an_untrained_block_walks_with_the_slow_stream(family):
    stream = tiny.stream(family, (2, 3), size=0, deep=0, ffn_width=0)
    states, cache = slow(tiny.backbone(family), tiny.prompt(LENGTH))
    for exit, start in ((2, 0), (3, 2)):
        for l, p in enumerate(stream(states, cache, exit=exit), start):
            close(p, states[l])
    trained = tiny.stream(family, (2, 3), deep=0, ffn_width=0)(states, cache)
    assert (trained[-1] - states[2]).abs().max().item() > 0.1  # the comparison can fail


def test_what_is_trained_is_the_changes_and_not_the_base():
    expected = 0
    for inputs, outputs in ((32, 32), (32, 32), (32, 48), (32, 48), (48, 32)):  # q, o, gate, up, down
        expected += 4 * (inputs + outputs)
    expected += 32 + 32 * 12 + 12 * 32  # the small FFN and its norm
    expected += 32 + 2 * 32 * 32  # deep attention and its norm
    assert tiny.stream().parameter_count() == 2 * expected


def test_a_full_change_has_as_many_numbers_as_the_matrices():
    matrices = 2 * 32 * 32 + 3 * 32 * 48  # q and o; gate, up and down
    assert tiny.stream(rank=None, ffn_width=None, deep=0).parameter_count() == 2 * matrices


# --- what it may not touch ----------------------------------------------------------------


def contents(cache, length):
    return [(mx.array(c.keys[..., :length, :]), mx.array(c.values[..., :length, :])) for c in cache]


def same_contents(cache, other, length):
    return all(
        mx.array_equal(a, b)
        for mine, theirs in zip(contents(cache, length), contents(other, length), strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_pass_over_a_sequence_writes_nothing(form):
    view, tokens = tiny.backbone(), tiny.prompt(LENGTH)
    states, cache = slow(view, tokens)
    _, untouched = slow(view, tokens)
    mx.eval(tiny.stream(form=form)(states, cache))
    assert [c.offset for c in cache] == [LENGTH] * tiny.BLOCKS
    assert same_contents(cache, untouched, LENGTH)


@pytest.mark.parametrize("settings", [{"form": "adapter"}, {"form": "block", "near": False}])
def test_a_step_that_reads_deep_keys_only_writes_nothing(settings):
    view, (*tokens, last) = tiny.backbone(), tiny.prompt(LENGTH + 1)
    h_0, stream = view.embed(mx.array([[last]])), tiny.stream(**settings)
    for cache in (slow(view, tokens)[1], view.new_cache(LENGTH + 1)):
        if cache[0].offset == 0:
            view.logits(mx.array([tokens]), cache)
        before = contents(cache, LENGTH)
        h, p = stream.step(h_0, cache, LENGTH)
        assert [c.offset for c in cache] == [LENGTH] * tiny.BLOCKS and mx.array_equal(h, h_0)
        for mine, old in zip(contents(cache, LENGTH), before, strict=True):
            assert mx.array_equal(mine[0], old[0]) and mx.array_equal(mine[1], old[1])
        assert not mx.allclose(p, h_0)


def test_an_untrained_block_without_its_own_keys_is_the_base_ffn():
    """Deep attention begins as zero; what is left of the block is its second half."""
    view = tiny.backbone()
    states, cache = slow(view, tiny.prompt(LENGTH))
    p = tiny.stream(exits=(1,), size=0, near=False, ffn_width=0)(states, cache)[-1]
    block = view.blocks[0]
    close(p, states[0] + block.mlp(block.post_attention_layernorm(states[0])))


@pytest.mark.parametrize("form", ["block", "attention"])
def test_a_step_writes_one_slow_position_below_the_exit(form):
    view, (*tokens, last) = tiny.backbone(), tiny.prompt(LENGTH + 1)
    _, cache = slow(view, tokens)
    plain_cache = slow(view, tokens)[1]
    before = contents(cache, LENGTH)
    h_0 = view.embed(mx.array([[last]]))
    h, p = tiny.stream(form=form).step(h_0, cache, LENGTH)
    plain = view.run(h_0, plain_cache, 0, 1)
    end = view.run(plain, plain_cache, 1, 2)
    mx.eval(h, p)
    assert [c.offset for c in cache] == [LENGTH + 1] * 2 + [LENGTH] * 2
    assert (p - end).abs().max().item() > 0.1  # p went its own way; its keys would show
    close(h, plain)
    for mine, other in zip(cache[:2], plain_cache[:2], strict=True):
        for a, b in zip(mine.keys_and_values(), other.keys_and_values(), strict=True):
            close(a, b)
    for mine, old in zip(cache, before, strict=True):  # what was there stays
        assert mx.array_equal(mine.keys[..., :LENGTH, :], old[0])
        assert mx.array_equal(mine.values[..., :LENGTH, :], old[1])


# --- a step equals the sequence -----------------------------------------------------------


def step_equals_sequence(family, stream, exit, drafted, length=LENGTH):
    """Drive `step` over the last `drafted` + 1 of `length` tokens, as drafting does, the others
    being verified, and compare h_{E-1} and p_E with those of the pass over the whole sequence."""
    view, tokens = tiny.backbone(family), tiny.prompt(length)
    known = length - drafted - 1
    states, whole = slow(view, tokens)
    verified = mx.minimum(mx.arange(length), known)
    before = mx.random.normal((1, length, view.width)) if stream.config.carry else None
    wanted = stream(states, whole, verified, exit, before)[-1]
    cache = view.new_cache()
    if known:
        view.run(view.embed(mx.array([tokens[:known]])), cache)
    for i in range(known, length):
        last = None if before is None else before[:, i : i + 1]
        h, p = stream.step(view.embed(mx.array([[tokens[i]]])), cache, known, exit, last, i)
        close(h[:, 0], states[stream.slow_depth(exit)][:, i], 1e-4)
        close(p[:, 0], wanted[:, i], 1e-4)


CASES = [
    ("llama", {"form": "block"}),
    ("llama", {"form": "block", "deep": 0, "ffn_width": 0}),
    ("llama", {"form": "block", "rank": None, "ffn_width": None}),
    ("llama", {"form": "attention", "rank": None}),
    ("llama", {"form": "adapter"}),
    ("llama", {"form": "block", "carry": True}),
    ("llama", {"form": "attention", "carry": True}),
    ("llama", {"form": "block", "rate": 1}),
    ("llama", {"form": "block", "rank": 0}),
    ("llama", {"form": "block", "near": False}),
    ("llama", {"form": "block", "near": False, "rank": None, "ffn_width": None, "carry": True}),
    ("olmo2", {"form": "block", "near": False}),
    ("phi3", {"form": "block", "near": False}),
    ("phi3", {"form": "block"}),
    ("olmo2", {"form": "block"}),
    ("olmo2", {"form": "attention"}),
    ("gemma", {"form": "attention"}),
    ("gemma2", {"form": "attention"}),
    ("gemma2", {"form": "block", "near": False}),
    ("gemma2", {"form": "block"}),
    ("mixtral", {"form": "attention"}),
    ("qwen3_moe", {"form": "adapter"}),
]


@pytest.mark.parametrize(("family", "settings"), CASES, ids=str)
def test_steps_equal_the_sequence(family, settings):
    stream = tiny.stream(family, (1, 3), **settings)
    for exit in (1, 3):
        for drafted in (0, 3):
            step_equals_sequence(family, stream, exit, drafted)


@pytest.mark.parametrize("form", FORMS)
def test_steps_equal_the_sequence_from_the_second_token(form):
    """With one verified token before it, which is also the one that stands in for none."""
    step_equals_sequence("llama", tiny.stream(form=form), 2, drafted=0, length=2)
    step_equals_sequence("llama", tiny.stream(form=form), 2, drafted=2, length=4)


def test_the_very_first_token_needs_no_deep_keys():
    view, stream = tiny.backbone(), tiny.stream()
    fresh, used = view.new_cache(), slow(view, tiny.prompt(3))[1]
    crop(used, 0)  # allocated, and empty: what was in it must not be seen
    h_0 = view.embed(mx.array([[5]]))
    (h, p), (h_used, p_used) = stream.step(h_0, fresh, 0), stream.step(h_0, used, 0)
    assert mx.array_equal(p, p_used) and mx.array_equal(h, h_used) and mx.isfinite(p).all()


def test_a_chain_is_what_drafting_does():
    """The drafts of training, at all tokens at once, against steps: of a chain that begins at token t
    the first knows h_N of the token before and all keys before t, the others the p_E before them."""
    view, stream, tokens = tiny.backbone(), tiny.stream(carry=True), tiny.prompt(LENGTH)
    batch = teacher_batch(view, np.array([tokens]), *needs(stream))
    states, _ = slow(view, tokens)
    drafts = [p[-1] for p in chain(stream, batch, 3)]
    for start in (2, 4):
        cache = view.new_cache()
        view.run(view.embed(mx.array([tokens[:start]])), cache)
        before = states[view.depth][:, start - 1 : start]
        for j, draft in enumerate(drafts):
            token = view.embed(mx.array([[tokens[start + j]]]))
            _, before = stream.step(token, cache, start, before=before)
            close(before[:, 0], draft[:, start + j], 1e-4)
    given = stream(batch.states, batch.cache, before=shifted(batch.states[view.depth]))[-1]
    assert mx.array_equal(stream(batch.states, batch.cache)[-1], given)


def test_unverified_deep_keys_are_not_seen():
    """Deep keys at or after `verified` may hold anything."""
    view, stream, tokens = tiny.backbone(), tiny.stream(), tiny.prompt(LENGTH)
    h_0, found = view.embed(mx.array([[5]])), []
    for noise, verified in ((0, 4), (100, 4), (100, LENGTH), (0, LENGTH)):
        _, cache = slow(view, tokens)
        for c in cache[2:]:
            c.keys[..., 4:LENGTH, :] = c.keys[..., 4:LENGTH, :] + noise
            c.values[..., 4:LENGTH, :] = c.values[..., 4:LENGTH, :] + noise
        found.append(stream.step(h_0, cache, verified)[1])
    assert mx.array_equal(found[0], found[1])
    assert not mx.allclose(found[2], found[3])  # and the verified ones are


def test_a_position_off_by_one_is_noticed(monkeypatch):
    monkeypatch.setattr("m2r2kit.stream.fast_block.SharedKV.__init__", off_by_one)
    with pytest.raises(AssertionError):
        step_equals_sequence("llama", tiny.stream(form="attention"), 2, drafted=1)


def off_by_one(self, slow, rows):
    self.slow, self.offset = slow, slow.offset - rows + (rows == 1)


def test_keys_of_p_in_the_cache_are_noticed(monkeypatch):
    """The keys that p writes beside the slow ones have the next token's position."""

    def writes(self, keys, values):
        return self.slow.update_and_fetch(keys, values)

    monkeypatch.setattr("m2r2kit.stream.fast_block.SharedKV.update_and_fetch", writes)
    with pytest.raises(AssertionError):
        step_equals_sequence("llama", tiny.stream(), 2, drafted=1)


@pytest.mark.parametrize("form", FORMS)
def test_each_interval_starts_again_at_the_slow_stream(form):
    view, stream = tiny.backbone(), tiny.stream(exits=(1, 3), form=form)
    states, cache = slow(view, tiny.prompt(LENGTH))
    first, second = stream(states, cache, exit=1), stream(states, cache, exit=3)
    assert (len(first), len(second)) == (2, 3)
    assert mx.array_equal(first[0], states[0]) and mx.array_equal(second[0], states[1])
    assert mx.array_equal(stream(states, cache)[-1], first[-1])  # the first exit is the default
    assert not mx.allclose(first[1], states[1])


def test_half_precision_keeps_the_slow_stream_in_half_precision():
    """A stream in float32 must not widen the model's own numbers, or they are no longer the model's."""
    view = Backbone.load(tiny.folder("llama"), dtype=mx.bfloat16)
    for form in FORMS:
        stream = tiny.stream(form=form)
        half = AcceleratedStream(view, stream.config)
        half.update(stream.parameters())
        _, cache = slow(view, tiny.prompt(4))
        h, p = half.step(view.embed(mx.array([[5]])), cache, 4)
        assert h.dtype == p.dtype == cache[1].keys.dtype == mx.bfloat16


@pytest.mark.parametrize("size", [1, 90, 1e3, 1e4])
def test_the_loss_is_finite_for_logits_of_any_size(size):
    mx.random.seed(0)
    student, teacher = mx.random.normal((5, 40)) * size, mx.random.normal((5, 40)) * size

    def plain(s):
        p = mx.softmax(teacher, -1)
        return (mx.logsumexp(s, -1) - (p * s).sum(-1)).sum()

    value, gradient = mx.value_and_grad(lambda s: distance(s, teacher).sum())(student)
    wanted, right = mx.value_and_grad(plain)(student)
    assert abs(value.item() - wanted.item()) <= 1e-4 * max(1.0, abs(wanted.item()))
    assert mx.abs(gradient - right).max().item() < 1e-3


def test_a_later_interval_asks_for_none_but_its_own_states():
    view, stream, tokens = tiny.backbone(), tiny.stream(exits=(1, 3), carry=True), tiny.prompt(LENGTH)
    states, cache = slow(view, tokens)
    path = stream({1: states[1]}, cache, exit=3)
    assert mx.array_equal(path[-1], stream(states, cache, exit=3)[-1])
