"""Expert predictors that read states: which blocks they predict and when, and which predict the same."""

import mlx.core as mx
import numpy as np
import pytest
import test_experts as t
import tiny
from mlx.utils import tree_flatten

from m2r2kit.common import UserError
from m2r2kit.experts.state_predictors import DirectMap, NextRouter, StreamPredictor, router
from m2r2kit.stream.stream import AcceleratedStream, StreamConfig


def test_a_predictor_names_each_block_with_experts_in_good_time():
    model = t.streamed()
    for distance in (1, 2, 3):
        p = NextRouter(model.backbone, distance)
        named = [(l, m) for l in range(tiny.BLOCKS) for m in p.targets(l)]
        assert sorted(m for _, m in named) == [1, 2, 3] and all(m - l <= distance for l, m in named)
    p = StreamPredictor(t.stream(model, exits=(3,), rate=2.0, deep=0.0, carry=False))
    assert [p.targets(l) for l in range(4)] == [[1, 2, 3], [], [], []]
    p = StreamPredictor(t.stream(model, exits=(3,), rate=1.0, deep=0.0, carry=False))
    assert [p.targets(l) for l in range(4)] == [[1], [2], [3], []]


def test_the_stream_untrained_names_what_the_next_router_names():
    """It starts as h: at rate 1 with nothing changed, p_{l+1} is h_l, and with `adapter` stays h_0."""
    model = t.streamed()
    config = StreamConfig(form="adapter", exits=(1, 2, 3), rate=1.0, ffn_width=8, deep=0.0, carry=False)
    plain = t.trace_of(model)
    t.run(model, predictor=StreamPredictor(AcceleratedStream(model.backbone, config)), trace=plain)
    state = t.trace_of(model)
    t.run(model, predictor=EntryRouter(model.backbone, 1), trace=state)
    assert [p.predicted for p in plain.passes] == [p.predicted for p in state.passes]


class EntryRouter(NextRouter):
    """The next router on what enters a block, in the place of what leaves its attention."""

    def ahead(self, l, h, u, p, cache, mask, before):
        return p, [h] * len(self.targets(l))


def test_the_direct_map_begins_as_the_next_router_and_has_the_size_it_is_given():
    model = t.streamed()
    against = t.stream(model, exits=(1, 2, 3), rate=1.0)
    direct = DirectMap.like(against)
    size = sum(w.size for _, w in tree_flatten(direct.trainable_parameters()))
    assert abs(size - against.parameter_count()) <= 3 * tiny.WIDTH
    one, other = t.trace_of(model), t.trace_of(model)
    t.run(model, predictor=direct, trace=one)
    t.run(model, predictor=NextRouter(model.backbone, 1), trace=other)
    assert [p.predicted for p in one.passes] == [p.predicted for p in other.passes]
    for like in (against, t.stream(model)):
        mine, its = DirectMap.like(like), StreamPredictor(like)
        assert [mine.targets(l) for l in range(tiny.BLOCKS)] == [its.targets(l) for l in range(tiny.BLOCKS)]


def test_what_no_fast_p_can_name_in_time_the_first_interval_of_a_slow_one_does():
    model, found = t.streamed(), []
    fast, slow = (t.stream(model, exits=(1, 2, 3), rate=r, rank=0, deep=0.0, carry=False) for r in (2.0, 1.0))
    for predictor in (StreamPredictor(fast, 4, slow), StreamPredictor(fast, 4), StreamPredictor(slow, 4)):
        trace = t.trace_of(model)
        tokens, _, _ = t.run(model, predictor=predictor, trace=trace)
        assert tokens == t.right()
        found.append([{m: experts for m, experts in p.predicted[1]} for p in trace.passes if not p.prompt])
    both, alone, opening = found
    assert [named[1] for named in both] == [named[1] for named in opening]
    assert [named[1] for named in both] != [named[1] for named in alone]
    assert [named[2] for named in both] == [named[2] for named in alone]
    with pytest.raises(UserError, match="state after attention"):
        StreamPredictor(fast, None, t.stream(model, exits=(1,), deep=0.25))


def test_block_0_is_named_when_the_token_comes_by_its_router_on_the_embedding():
    model = t.streamed()
    backbone, trace, none = model.backbone, t.trace_of(model), t.trace_of(model)
    tokens, _, _ = t.run(model, predictor=NextRouter(backbone, 1, 3), trace=trace)
    assert tokens == t.right()
    answers = [p for p in trace.passes if not p.prompt]
    fed = [token for prompt, out in zip(t.PROMPTS, tokens) for token in [prompt[-1], *out[:-1]]]
    for token, p in zip(fed, answers, strict=True):
        logits = np.array(router(backbone, 0, backbone.embed(mx.array([[token]]))))[0, 0]
        assert p.predicted[0] == [(0, np.argsort(-logits)[:3].tolist())]
    t.run(model, predictor=NextRouter(backbone, 0), trace=none)
    assert all(p.predicted[0] == [] for p in none.passes if not p.prompt)


def test_a_shuffled_predictor_names_others():
    model = t.streamed()
    _, informed, _ = t.run(model, predictor=NextRouter(model.backbone, 1))
    _, shuffled, _ = t.run(model, predictor=NextRouter(model.backbone, 1).shuffle())
    assert shuffled.counts.recall < informed.counts.recall
    assert shuffled.counts.predicted == informed.counts.predicted
