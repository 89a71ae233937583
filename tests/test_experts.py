"""Streamed experts: the tokens of the model in memory with any cache, predictor and disk; live = replay."""

import errno
import itertools
import os

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_experts
from mlx.utils import tree_map

from m2r2kit.common import UserError
from m2r2kit.experts import moe
from m2r2kit.experts import reader as reading
from m2r2kit.experts import registry as methods
from m2r2kit.experts.decode import ExpertDecoder, StreamedModel
from m2r2kit.experts.predictors import Predictor, Random, Recorded
from m2r2kit.experts.reader import PARKED, Reader
from m2r2kit.experts.simulate import replay
from m2r2kit.experts.slots import Bank, budget_of_share, slots_of_budget
from m2r2kit.experts.state_predictors import DirectMap, NextRouter, StreamPredictor, router
from m2r2kit.experts.trace import Trace
from m2r2kit.model.backbone import Backbone
from m2r2kit.speculation.decode import generate
from m2r2kit.stream.stream import AcceleratedStream, StreamConfig

PROMPTS = [tiny.prompt(1), tiny.prompt(6), tiny.prompt(20)]
TOKENS = 14
E, K = tiny_experts.E, tiny_experts.K
_MODELS: dict = {}
_RIGHT: dict = {}


def streamed(family="olmoe", bits=0, decode=False) -> StreamedModel:
    if (family, bits, decode) not in _MODELS:
        _MODELS[family, bits, decode] = StreamedModel(
            tiny_experts.model(family, bits), tiny_experts.store(family, bits, decode)
        )
    return _MODELS[family, bits, decode]


def right(family="olmoe", bits=0, decode=False) -> list[list[int]]:
    """What the model in memory answers to the prompts."""
    if (family, bits, decode) not in _RIGHT:
        view = tiny_experts.resident(family, bits, decode)
        _RIGHT[family, bits, decode] = [generate(view, p, max_tokens=TOKENS).tokens for p in PROMPTS]
    return _RIGHT[family, bits, decode]


def trace_of(model: StreamedModel) -> Trace:
    m = model.store.manifest
    return Trace(m.blocks, m.experts, m.top_k)


def run(model, policy="lru", predictor=None, slots=4, shared=False, trace=None, reader=None, given=None):
    """All prompts through one decoder: (token ids of each, its residency, the last answer)."""
    make = methods.policy(policy, given)
    residency = model.residency(slots, make, shared)
    with reader or Reader(model.store, "buffered") as r:
        decoder = ExpertDecoder(model, residency, r, predictor, trace)
        outs = [decoder.generate(p, TOKENS) for p in PROMPTS]
    return [out.tokens for out in outs], residency, outs


def stream(
    model: StreamedModel, form="attention", rate=2.0, exits=(2, 3), rank=4, **settings
) -> AcceleratedStream:
    """With random parameters, so that its predictions differ from the routers."""
    mx.random.seed(3)
    config = StreamConfig(form=form, exits=exits, rate=rate, rank=rank, ffn_width=8, **settings)
    made = AcceleratedStream(model.backbone, config)
    made.update(tree_map(lambda w: w + 0.3 * mx.random.normal(w.shape), made.parameters()))
    return made


# --- equality -------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "decode"), [(0, False), (4, False), (4, True)])
@pytest.mark.parametrize("family", tiny_experts.FAMILIES)
def test_tokens_are_those_of_the_model_in_memory(family, bits, decode):
    model = streamed(family, bits, decode)
    for slots, shared in ((K, False), (E, False), (3 * K, True)):
        tokens, residency, _ = run(model, predictor=NextRouter(model.backbone, 2), slots=slots, shared=shared)
        assert tokens == right(family, bits, decode)
    assert residency.counts.recall > 0


@pytest.mark.parametrize("policy", methods.POLICIES)
def test_whatever_the_policy_and_the_replay_counts_the_same(policy):
    model = streamed()
    given = trace_of(model)
    run(model, trace=given)
    trace = trace_of(model)
    tokens, live, _ = run(model, policy, NextRouter(model.backbone, 1), trace=trace, given=given)
    assert tokens == right()
    again = replay(trace, model.residency(4, methods.policy(policy, given)), Recorded(trace))
    assert again == live.counts and live.counts.missed > 0 and live.counts.ahead > 0


def made(name, model):
    """The module that a predictor of this name needs, or None."""
    if name == "direct":
        return DirectMap.like(stream(model))
    slow = stream(model, exits=(1, 2, 3), rate=1.0, rank=0, deep=0.0, carry=False)
    streams = {"m2r2": (stream(model), None, slow), "m2r2-r1": (slow,)}
    return StreamPredictor(*streams[name]) if name in streams else None


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", methods.PREDICTORS)
def test_whatever_the_predictor_and_the_replay_counts_the_same(name, shared):
    model, slots = streamed(), 12 if shared else 4
    known = trace_of(model)
    run(model, trace=known)
    others = {"trace": known, "made": made(name, model)}
    predictor, trace = methods.predictor(name, model, 2, **others), trace_of(model)
    tokens, live, outs = run(model, "lru", predictor, slots, shared, trace)
    assert tokens == right()
    fresh = model.residency(slots, methods.policy("lru"), shared)
    if name in ("previous", "static", "random", "oracle", "nothing"):  # those that need no model
        assert replay(trace, fresh, methods.predictor(name, model, 2, **others)) == live.counts
    else:
        assert replay(trace, fresh, Recorded(trace)) == live.counts
    for out in outs:
        assert out.experts.in_time + out.experts.late == out.experts.counts.ahead
        assert out.experts.counts.accesses == len(out.tokens) * K * tiny.BLOCKS
    if name in ("self", "oracle"):
        assert live.counts.recall == 1
    if name == "oracle" and not shared:
        assert sum(out.experts.counts.missed for out in outs) == 0


@pytest.mark.parametrize("form, settings", [
    ("attention", {"deep": 0.5, "carry": True}),
    ("attention", {"deep": 0.0, "carry": False, "rate": 1.0}),
    ("adapter", {"deep": 0.0, "carry": True, "rate": 1.5}),
    ("attention", {"exits": (3,), "rate": None, "deep": 0.0, "carry": False}),
])  # fmt: skip
def test_whatever_the_stream(form, settings):
    model = streamed("mixtral")
    tokens, residency, _ = run(model, predictor=StreamPredictor(stream(model, form, **settings)))
    assert tokens == right("mixtral") and residency.counts.predicted > 0


def test_dense_blocks_between_run_along(tmp_path):
    from m2r2kit.experts.packing import pack

    folder = tiny.make_folder("qwen3_moe", tmp_path / "model", **tiny_experts.SIZES, mlp_only_layers=[0, 2])
    pack(folder, tmp_path / "store")
    view, model = Backbone.load(folder), StreamedModel(folder, tmp_path / "store")
    assert model.store.manifest.blocks == (1, 3)
    for predictor in (NextRouter(model.backbone, 1), StreamPredictor(stream(model))):
        tokens, *_ = run(model, predictor=predictor)
        assert tokens == [generate(view, p, max_tokens=TOKENS).tokens for p in PROMPTS]


def test_whatever_the_disk(tmp_path):
    model = streamed()
    readers = [Reader(model.store, "buffered", threads=4), Reader(model.store, "buffered", link=20e6)]
    try:
        readers.append(Reader(model.store, "direct", threads=1))
    except UserError:
        pass  # the tests' disk knows no direct reads
    for r in readers:
        assert run(model, "none", NextRouter(model.backbone, 2), reader=r)[0] == right()


def test_reads_that_nobody_wants_any_more_do_not_land_over_others():
    """Wrong predictions wait in a long queue; demand reads overtake them and take their slots."""
    model = streamed()
    guess = Random(model.store.manifest.blocks, 3, E, K)
    slow = Reader(model.store, "buffered", threads=1, link=20e6)
    tokens, residency, _ = run(model, predictor=guess, slots=K, reader=slow)
    assert tokens == right() and residency.counts.unused > 100


def test_wrong_guesses_do_not_take_the_disk_from_right_ones():
    """Pending predictions for a block that has run are not read."""
    model = streamed()
    guess = Random(model.store.manifest.blocks, 1, E, 4)
    with Reader(model.store, "buffered", threads=1, link=2e6) as r:
        residency = model.residency(6, methods.policy("lru"))
        decoder = ExpertDecoder(model, residency, r, guess)
        out = decoder.generate(PROMPTS[1], 6)
        asked = residency.counts.reads
        decoder.settle()
        assert out.tokens == right()[1][:6] and r.reads < asked
        assert any(request.rank == PARKED and not request.done for request in decoder.reads.pending.values())


def test_a_long_prompt_is_read_in_chunks(monkeypatch):
    from m2r2kit.experts import decode as loader

    monkeypatch.setattr(loader, "CHUNK", 7)
    assert run(streamed())[0] == right()


def test_a_token_may_be_drawn_by_the_caller():
    model = streamed()
    with Reader(model.store, "buffered") as r:
        decoder = ExpertDecoder(model, model.residency(4, methods.policy("lru")), r)
        out = decoder.generate(PROMPTS[1], 5, choose=lambda logits: mx.argmin(logits).item())
        assert len(set(out.tokens) & set(right()[1])) < 5
        assert decoder.generate(PROMPTS[1], TOKENS).tokens == right()[1]  # and another text after it


# --- broken on purpose ----------------------------------------------------------------------


def test_a_read_that_returns_the_wrong_expert_is_seen(monkeypatch):
    """Without checksums, only the comparison of tokens can notice."""
    monkeypatch.setattr(Reader, "_read", wrong_expert)
    assert run(streamed())[0] != right()


def wrong_expert(self, request, buffer):
    start = (request.expert + 1) % E * self.size
    buffer[:] = np.frombuffer(self.store.path(request.block).read_bytes(), np.uint8)[
        start : start + self.size
    ]


def test_a_read_that_lands_in_the_wrong_slot_is_seen(monkeypatch):
    real = Bank.write
    monkeypatch.setattr(Bank, "write", lambda self, slot, record: real(self, (slot + 1) % 4, record))
    assert run(streamed())[0] != right()


def test_not_waiting_for_reads_is_seen(monkeypatch):
    monkeypatch.setattr(Reader, "wait", lambda self, requests: None)
    reader = Reader(streamed().store, "buffered", link=1e6)
    assert run(streamed(), reader=reader)[0] != right()


# --- faults ---------------------------------------------------------------------------------


def test_a_read_error_ends_the_text_and_the_decoder(monkeypatch):
    model = streamed()
    real, calls = os.preadv, itertools.count()

    def preadv(file, buffers, offset):
        if next(calls) >= 60:
            raise OSError(errno.EIO, "Input/output error")
        return real(file, buffers, offset)

    monkeypatch.setattr(reading.os, "preadv", preadv)
    with Reader(model.store, "buffered") as r:
        decoder = ExpertDecoder(model, model.residency(K, methods.policy("none")), r)
        emitted = []
        with pytest.raises(UserError, match=r"Expert \d of block \d cannot be read"):
            decoder.generate(PROMPTS[1], TOKENS, on_tokens=lambda t, _: emitted.extend(t))
        assert 0 < len(emitted) < TOKENS and emitted == right()[1][: len(emitted)]  # no wrong token
        monkeypatch.setattr(reading.os, "preadv", real)
        with pytest.raises(UserError, match="stopped by an error"):
            decoder.generate(PROMPTS[1], TOKENS)


def test_a_store_of_another_model_is_refused():
    with pytest.raises(UserError, match="packed from another model"):
        StreamedModel(tiny_experts.model("mixtral"), tiny_experts.store("olmoe"))


def test_a_prompt_that_does_not_fit_is_refused():
    model = streamed()
    with Reader(model.store, "buffered") as r:
        decoder = ExpertDecoder(model, model.residency(4, methods.policy("lru")), r)
        for prompt in ([], tiny.prompt(tiny.CONTEXT)):
            with pytest.raises(UserError):
                decoder.generate(prompt)
        assert decoder.generate(PROMPTS[0], TOKENS).tokens == right()[0]


def test_the_timeline_shows_every_read_that_was_used_and_where_it_was_waited_for():
    model, events = streamed(), []
    with Reader(model.store, "buffered", link=20e6) as r:
        residency = model.residency(4, methods.policy("none"))
        decoder = ExpertDecoder(model, residency, r, NextRouter(model.backbone, 1), timeline=events)
        out = decoder.generate(PROMPTS[0], 5)
    kinds = [e.kind for e in events]
    assert kinds.count("compute") == 5 * tiny.BLOCKS
    assert (
        kinds.count("demand") == out.experts.counts.missed
        and kinds.count("ahead") == out.experts.counts.ahead
    )
    assert all(e.start <= e.end for e in events)
    waits = {(e.block, e.end): e for e in events if e.kind == "wait"}
    for e in events:
        if e.kind in ("demand", "ahead"):  # through before the wait for its block was
            assert any(block == e.block and end >= e.end for block, end in waits)
    assert sum(e.end - e.start for e in waits.values()) == pytest.approx(out.experts.stall_seconds)


# --- memory ---------------------------------------------------------------------------------


def test_experts_are_not_read_when_the_model_is_loaded():
    """Asking for them without slots raises an error."""
    model = streamed()
    with pytest.raises((AttributeError, TypeError)):
        mx.eval(model.backbone.logits(mx.array([[1, 2]])))


def test_a_budget_is_kept():
    model = streamed()
    manifest = model.store.manifest
    for share in (0.25, 0.5, 1.0):
        buffers = 2 * manifest.record_bytes
        budget = budget_of_share(manifest, share, buffers)
        slots = slots_of_budget(manifest, budget, buffers)
        assert slots == share * E
        with Reader(model.store, "buffered", threads=2) as r:
            decoder = ExpertDecoder(model, model.residency(slots, methods.policy("lru")), r)
            assert decoder.bank_bytes + r.buffer_bytes <= budget
    with pytest.raises(UserError, match="too small"):
        slots_of_budget(manifest, budget_of_share(manifest, 0.1, 0), 0)
    assert slots_of_budget(manifest, 1 << 40, 0) == E  # more than all is all


# --- parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_experts.FAMILIES)
def test_routing_taken_apart_is_the_models_own(family):
    view = tiny_experts.resident(family)
    mx.random.seed(0)
    u = mx.random.normal((1, 5, view.width))
    block, parts = view.blocks[1], view.parts
    switch = block[parts.ffn].switch_mlp
    x, ids, weights = moe.route(view, 1, u)
    assert block[parts.ffn].switch_mlp is switch  # put back
    ours = moe.combine(u, switch(x, ids), weights)
    assert mx.array_equal(ours, u + block[parts.ffn](block[parts.ffn_norm](u)))
    top = mx.argsort(-router(view, 1, u)[0], axis=-1)[:, :K]
    assert np.array_equal(np.sort(np.array(ids)), np.sort(np.array(top)))


def test_names_that_nobody_knows_are_one_sentence():
    model = streamed()
    for asked in (
        ("nobody", 1, None),
        ("random", 9, None),
        ("random", 1, 99),
        ("oracle", 1, None),
        ("m2r2", 1, None),
    ):
        with pytest.raises(UserError):
            methods.predictor(asked[0], model, *asked[1:])
    for policy in ("nothing", "belady"):
        with pytest.raises(UserError):
            methods.policy(policy)
    assert type(methods.predictor("nothing", model)) is Predictor


def test_an_oracle_with_the_trace_of_another_text_is_one_sentence():
    model = streamed()
    known = trace_of(model)
    run(model, trace=known)
    with Reader(model.store, "buffered") as r:
        oracle = methods.predictor("oracle", model, 1, trace=known)
        decoder = ExpertDecoder(model, model.residency(4, methods.policy("lru")), r, oracle)
        with pytest.raises(UserError, match="trace is of another text"):
            decoder.generate(PROMPTS[2], TOKENS)
        short = Trace(known.blocks, known.experts, known.top_k, known.passes[:2])
        oracle = methods.predictor("oracle", model, 1, trace=short)
        decoder = ExpertDecoder(model, model.residency(4, methods.policy("lru")), r, oracle)
        with pytest.raises(UserError, match="trace is of another text"):
            decoder.generate(PROMPTS[0], TOKENS)
