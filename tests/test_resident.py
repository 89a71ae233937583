"""All experts in memory: read once at the beginning, no stop at any block, the same tokens and counts."""

import mlx.core as mx
import pytest
import test_experts as t
import tiny
import tiny_experts

from m2r2kit.experts import registry as methods
from m2r2kit.experts.decode import ExpertDecoder
from m2r2kit.experts.predictors import Recorded
from m2r2kit.experts.reader import Reader
from m2r2kit.experts.simulate import replay
from m2r2kit.experts.slots import Bank
from m2r2kit.experts.state_predictors import NextRouter, StreamPredictor

E, K, ALL = tiny_experts.E, tiny_experts.K, tiny_experts.E * tiny.BLOCKS


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("family", tiny_experts.FAMILIES)
def test_tokens_are_those_of_the_model_in_memory(family, bits, shared):
    model = t.streamed(family, bits)
    tokens, residency, outs = t.run(model, slots=ALL if shared else E, shared=shared)
    assert tokens == t.right(family, bits) and residency.whole
    counts = residency.counts
    assert (counts.filled, counts.missed, counts.speculated) == (ALL, 0, 0)
    assert counts.resident == counts.accesses
    assert [out.experts.prefill.filled for out in outs] == [ALL, 0, 0]  # once, before the first text


@pytest.mark.parametrize("name", ["previous", "next-router", "self", "direct", "m2r2"])
def test_what_is_predicted_is_counted_as_in_the_replay_and_as_with_stops(name):
    model = t.streamed()
    predictor, trace = methods.predictor(name, model, 2, made=t.made(name, model)), t.trace_of(model)
    tokens, live, _ = t.run(model, "lru", predictor, E, trace=trace)
    assert tokens == t.right() and live.counts.predicted > 0
    fresh = model.residency(E, methods.policy("lru"))
    assert replay(trace, fresh, Recorded(trace)) == live.counts
    cut, residency = t.trace_of(model), model.residency(E, methods.policy("lru"))
    with Reader(model.store, "buffered") as r:
        predictor.new_text()
        decoder = ExpertDecoder(model, residency, r, predictor, cut)
        decoder.cut = True
        assert [decoder.generate(p, t.TOKENS).tokens for p in t.PROMPTS] == t.right()
    assert residency.counts == live.counts and cut.passes == trace.passes
    if name == "self":
        assert live.counts.recall == 1


def test_there_is_one_pass_a_token_and_a_token_may_be_drawn():
    model, events = t.streamed(), []
    with Reader(model.store, "buffered") as r:
        residency = model.residency(E, methods.policy("lru"))
        decoder = ExpertDecoder(model, residency, r, StreamPredictor(t.stream(model)), timeline=events)
        drawn = decoder.generate(t.PROMPTS[1], 5, choose=lambda logits: mx.argmax(logits).item())
        assert drawn.tokens == t.right()[1][:5]
        assert [e.kind for e in events if e.kind != "demand"] == ["compute"] * 5
    assert len(decoder.whole_pass.segments) == 1


def test_a_cache_that_keeps_nothing_is_never_whole():
    tokens, residency, _ = t.run(t.streamed(), "none", slots=E)
    assert tokens == t.right() and not residency.whole and residency.counts.missed > 0


def test_dense_blocks_between_run_along(tmp_path):
    from m2r2kit.experts.decode import StreamedModel
    from m2r2kit.experts.packing import pack
    from m2r2kit.model.backbone import Backbone
    from m2r2kit.speculation.decode import generate

    folder = tiny.make_folder("qwen3_moe", tmp_path / "model", **tiny_experts.SIZES, mlp_only_layers=[0, 2])
    pack(folder, tmp_path / "store")
    view, model, trace = Backbone.load(folder), StreamedModel(folder, tmp_path / "store"), None
    for predictor in (None, NextRouter(model.backbone, 1), StreamPredictor(t.stream(model))):
        trace = t.trace_of(model)
        tokens, live, _ = t.run(model, predictor=predictor, slots=E, trace=trace)
        assert tokens == [generate(view, p, max_tokens=t.TOKENS).tokens for p in t.PROMPTS]
        fresh = model.residency(E, methods.policy("lru"))
        assert replay(trace, fresh, Recorded(trace)) == live.counts


def test_an_expert_in_another_slot_is_seen(monkeypatch):
    real = Bank.write
    monkeypatch.setattr(Bank, "write", lambda self, slot, record: real(self, (slot + 1) % E, record))
    assert t.run(t.streamed(), slots=E)[0] != t.right()
