"""Exits: gate 0 is the full model, filling and waiting leave the right cache, the bound holds."""

import mlx.core as mx
import numpy as np
import pytest
import tiny

from m2r2kit.bench import records
from m2r2kit.common import UserError
from m2r2kit.exits import macs as work
from m2r2kit.exits import trained
from m2r2kit.exits.calibrate import (
    Promise,
    binomial_below,
    calibrate,
    holds,
    p_value,
    promised,
    texts_needed,
)
from m2r2kit.exits.decode import ExitDecoder
from m2r2kit.exits.depth_decode import DepthDecoder
from m2r2kit.exits.depths import along
from m2r2kit.exits.fill import Fill, fit_linear
from m2r2kit.exits.gates import Chance, Confidence, Gate, Oracle, Saturation, Schedule, Static
from m2r2kit.exits.readouts import BareReader
from m2r2kit.exits.registry import KINDS
from m2r2kit.exits.teacher_forced import ForcedPass, differing, texts_of
from m2r2kit.exits.train import exits_loss, gate_loss, seen_in
from m2r2kit.speculation.decode import generate
from m2r2kit.stream import checkpoints
from m2r2kit.stream.distil import DistilConfig, teacher_batch

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11]]
NEVER = 2.0


def exits(reader="m2r2", seed=0):
    """Untrained modules, with random values in parameters that start at zero."""
    view = tiny.backbone("llama")
    module = trained.new(view, reader, exits=(1, 2, 3))
    mx.random.seed(seed)
    for part in (module.fill, module.gate):
        part.apply(lambda w: w + 0.1 * mx.random.normal(w.shape))
    return view, module


def plain(view, prompt, tokens=20):
    return generate(view, prompt, max_tokens=tokens).tokens


class At(Gate):
    """Leaves at exits drawn for each position by a seed: the same in any pass over the same text."""

    def __init__(self, seed):
        super().__init__()
        self.numbers = mx.array(np.random.default_rng(seed).random((4, 64)), mx.float32)

    def __call__(self, j, seen):
        at = mx.round(seen.progress * 20).astype(mx.int32)
        return self.numbers[j][at]


# --- decoding -------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["m2r2", "lens"])
@pytest.mark.parametrize("waits", [False, True])
def test_a_threshold_that_nobody_reaches_is_plain_decoding(reader, waits):
    view, module = exits(reader)
    decoder = ExitDecoder(view, module.reader, module.gate, module.fill, waits)
    for prompt in PROMPTS:
        out = decoder.generate(prompt, NEVER, max_tokens=20)
        assert out.tokens == plain(view, prompt)
        assert set(out.depth) == {view.depth}
    state, whole = decoder.read([1, 2, 3], 10), view.new_cache(10)
    view.run(view.embed(mx.array([[1, 2]])), whole)
    decoder.token(3, state, [NEVER] * 3, 0.0)
    view.logits(mx.array([[3]]), whole)
    for mine, true in zip(state.cache, whole, strict=True):  # to the bit
        assert all(
            mx.array_equal(a, b) for a, b in zip(mine.keys_and_values(), true.keys_and_values(), strict=True)
        )


@pytest.mark.parametrize("reader", ["m2r2", "lens"])
@pytest.mark.parametrize("waits", [False, True])
def test_decoding_and_the_forced_pass_take_the_same_ways(reader, waits):
    view, module = exits(reader)
    texts = texts_of(view, PROMPTS, 20)
    gate = At(1)
    forced = ForcedPass(view, module.reader, gate, module.fill, waits)(texts, 0.6, longest=20)
    decoder = ExitDecoder(view, module.reader, gate, module.fill, waits)
    depths = (*module.reader.exits, view.depth)
    some = set()
    for row, prompt in enumerate(PROMPTS):
        at = np.flatnonzero(texts.gated[row])
        given = texts.tokens[row, at + 1].tolist()
        out = decoder.generate(prompt, 0.6, max_tokens=len(given), given=given, longest=20)
        assert out.depth == [depths[e] for e in forced.exit[row, at]]
        assert [a == b for a, b in zip(out.tokens, given, strict=True)] == forced.right[row, at].tolist()
        some |= set(out.depth)
    assert len(some) == 4  # all exits and all blocks were tried


@pytest.mark.parametrize("waits", [False, True])
def test_decoding_takes_arlas_second_look_as_the_forced_pass_does(waits):
    view, module = exits()
    mx.random.seed(5)
    gate = module.gate
    gate.out, gate.sure = (2 * mx.random.normal(w.shape) for w in (gate.out, gate.sure))
    gate.said = mx.random.normal(gate.said.shape)
    texts = texts_of(view, PROMPTS, 20)
    parts = (view, module.reader, gate, module.fill, waits)
    forced, blind = (ForcedPass(*parts[:2], g, *parts[3:])(texts, 0.6) for g in (gate, gate.blind()))
    decoder, depths = ExitDecoder(*parts), (*module.reader.exits, view.depth)
    for row, prompt in enumerate(PROMPTS):
        at = np.flatnonzero(texts.gated[row])
        given = texts.tokens[row, at + 1].tolist()
        out = decoder.generate(prompt, 0.6, max_tokens=len(given), given=given)
        assert out.depth == [depths[e] for e in forced.exit[row, at]]
    assert forced.wasted[texts.gated].sum() > 0  # heads that were read and did not convince
    assert (forced.exit[texts.gated] != blind.exit[texts.gated]).any()


def test_exits_not_in_use_need_not_be_computed():
    view, module = exits()
    texts = texts_of(view, PROMPTS, 20)
    parts, levels = (view, module.reader, At(1), module.fill, True), [NEVER, 0.6, NEVER]
    every = ForcedPass(*parts)(texts, levels, longest=20)
    one = ForcedPass(*parts, use=(1,))(texts, levels, longest=20)
    assert np.array_equal(every.exit, one.exit) and np.allclose(every.nats, one.nats, atol=1e-4)
    assert (one.exit[texts.gated] == 1).any() and (one.exit[texts.gated] == 3).any()


def test_tokens_that_wait_get_the_keys_of_the_full_run():
    view, module = exits()
    decoder = ExitDecoder(view, module.reader, At(2), module.fill, waits=True)
    text = plain(view, PROMPTS[1], 20)
    state = decoder.read(PROMPTS[1], 40)
    token, left = PROMPTS[1][-1], 0
    for i, following in enumerate(text):
        _, number = decoder.token(token, state, [0.6] * 3, i / 20)
        left += number < 3
        token = following
    _, number = decoder.token(token, state, [NEVER] * 3, 1.0)
    assert number == 3 and 0 < left < 20
    whole = view.new_cache(40)
    view.run(view.embed(mx.array([PROMPTS[1] + text])), whole)
    for mine, true in zip(state.cache, whole, strict=True):
        assert mine.offset == true.offset
        for a, b in zip(mine.keys_and_values(), true.keys_and_values(), strict=True):
            assert mx.allclose(a, b, atol=1e-4)


def test_a_fill_puts_the_keys_of_its_state_in_the_skipped_blocks():
    view, module = exits()
    decoder = ExitDecoder(view, module.reader, Static(), Fill("p"))
    state = decoder.read([5, 6], 10)
    decoder.token(6, state, [0, 0, 0], 0.0)
    entry = state.cache[2]
    whole = view.new_cache(10)
    view.run(view.embed(mx.array([[5]])), whole)
    view.blocks[2](state.before, whole[2].make_mask(1), cache=whole[2])  # what was read, p, enters block 2
    assert mx.allclose(entry.keys[..., :2, :], whole[2].keys[..., :2, :], atol=1e-5)


# --- gates ----------------------------------------------------------------------------------


def test_gates_leave_as_their_names_say():
    view, module = exits()
    texts = texts_of(view, PROMPTS, 20)

    def run(gate, threshold, fill="p"):
        out = ForcedPass(view, module.reader, gate, Fill(fill))(texts, threshold, longest=20)
        return out, out.exit[out.gated]

    out, taken = run(Confidence(), NEVER)
    assert (taken == 3).all() and out.agreement == 1
    assert (run(Static(), [np.inf, 0.5, np.inf])[1] == 1).all()
    assert (run(Confidence(), 0.0)[1] == 0).all()
    assert 0.3 < (run(Chance(), 0.5)[1] == 0).mean() < 0.7
    assert not (run(Saturation(), 0.99)[1] == 0).any()
    out, taken = run(Oracle(), 0.5)
    assert out.right[out.gated][taken < 3].all() and (taken < 3).any()
    out, _ = run(Schedule(view.depth, module.reader.exits), 1.0)
    for row, gated in zip(out.exit, out.gated, strict=True):
        assert (np.diff(row[gated]) <= 0).all()  # never deeper again


def test_arla_counts_what_it_has_and_answers_with_a_probability():
    view, module = exits()
    batch = teacher_batch(view, np.array([[1, 2, 3, 4, 5, 6, 7, 8]]), *module.needs())
    seen = seen_in(module.reader, batch, None, None, view.head)
    for j in range(3):
        score = module.gate(j, seen)
        assert score.shape == (1, 8, 1) and 0 < score.min().item() and score.max().item() < 1
        assert module.gate.macs(j) > 2 * view.width * 64  # two states projected, and more the later the exit
    assert module.gate.macs(0) < module.gate.macs(1) < module.gate.macs(2)


# --- training -------------------------------------------------------------------------------


def test_losses_compare_as_many_positions_as_the_settings_ask():
    view, module = exits()
    batch = teacher_batch(view, np.array([tiny.prompt(8), tiny.prompt(8, 1)]), *module.needs())
    settings, readers, router = DistilConfig(positions=3), tiny.Draws(), tiny.Draws()
    exits_loss(module.reader, batch, settings, readers, Fill("p"))
    gate_loss(module.gate, module.reader, batch, settings, router, Fill("p"))
    assert readers.sizes == [6, 6, 6] and router.sizes == [3]


def test_a_linear_fill_finds_a_map_that_is_there():
    view, module = exits()
    rows = np.random.default_rng(0).integers(1, 90, (12, 32))
    depths, blocks = module.needs()
    texts = [teacher_batch(view, rows, depths | set(range(view.depth + 1)), blocks)]
    small, large = (fit_linear(module.reader, texts, view.depth, view.width, r) for r in (2, 96))
    batch = texts[0]
    from m2r2kit.exits.fill import unit
    from m2r2kit.stream.distil import shifted

    before = shifted(batch.states[view.depth])

    def off(fill, l):
        guess = fill(0, batch.states[0], module.reader.over(0, batch), before)(l)
        return ((guess - unit(batch.states[l])) ** 2).mean().item()

    assert off(large, 0) < 1e-3  # h_0 itself is among what it sees
    assert off(large, 2) < off(small, 2) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_comes_back_from_disk(kind, tmp_path):

    view = tiny.backbone("llama")
    module = trained.new(
        view, kind, exits=(2,) if kind == "shallow" else (1, 2) if kind in ("m2r2", "lens", "bare") else None
    )
    rows = np.stack(
        [np.array((PROMPTS[i % 4] + plain(view, PROMPTS[i % 4], 30) + [0] * 40)[:24]) for i in range(16)]
    )
    losses = []
    trained.train(
        view, module, rows, DistilConfig(steps=40, positions=8), report=lambda s, l: losses.append((s, l))
    )
    first = [l for s, l in losses if s < 4]
    last = [l for s, l in losses if 12 <= s < 16]
    if kind != "bare":  # has only a fill to learn, for eight of the steps
        assert np.mean(last) < np.mean(first)
    trained.save(module, view, tmp_path)
    again, _ = trained.load(view, tmp_path, kind)
    assert type(again) is type(module) and again.config == module.config
    others = {"m2r2": "lens", "lens": "bare", "bare": "m2r2"}
    if kind in others:
        with pytest.raises(UserError, match="holds no"):
            trained.load(view, tmp_path, others[kind])


# --- baselines without exits ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixture-of-depths", "shallow"])
def test_peers_decode_as_they_say_along_a_text(kind):
    view = tiny.backbone("llama")
    module = trained.new(view, kind, exits=(2,) if kind == "shallow" else None)
    mx.random.seed(3)
    for block in module.blocks:
        block.apply(lambda w: w + 0.1 * mx.random.normal(w.shape))
    if kind == "mixture-of-depths":
        module.routers = mx.random.normal(module.routers.shape)
        module.bias = mx.zeros(module.bias.shape)
    texts = texts_of(view, PROMPTS, 20)
    forced, decoder = along(view, module, texts), DepthDecoder(view, module)
    for row, prompt in enumerate(PROMPTS):
        at = np.flatnonzero(texts.gated[row])
        given = texts.tokens[row, at + 1].tolist()
        out = decoder.generate(prompt, 0.5, max_tokens=len(given), given=given)
        assert out.depth == forced.blocks[row, at].tolist()
        assert [a == b for a, b in zip(out.tokens, given, strict=True)] == forced.right[row, at].tolist()
    assert len(set(forced.blocks[texts.gated])) == (1 if kind == "shallow" else 3)


# --- work and promise -----------------------------------------------------------------------


def test_work_is_counted_whole():
    view, module = exits()
    parts = work.by_exit(view, module.reader, module.gate, module.fill)
    whole = work.whole(view)
    assert [p.blocks for p in parts] == [
        l * work.block_macs(view) for l in (*module.reader.starts, view.depth)
    ]
    assert parts[-1].fill == 0 and parts[0].fill > parts[1].fill > 0
    assert parts[-1].total > whole.total  # gates and readers come on top
    probing = work.by_exit(view, module.reader, Confidence(), module.fill)
    assert [p.heads // work.head_macs(view) for p in probing] == [1, 2, 3, 4]
    waiting = work.by_exit(view, module.reader, module.gate, module.fill, waits=True)
    assert all(p.blocks == whole.blocks for p in waiting)
    assert 0 < waiting[0].fill < parts[0].fill  # only what the reader looks at
    monotone = work.by_exit(view, BareReader(view, (1, 2, 3)), Schedule(view.depth, (1, 2, 3)), module.fill)
    assert all(p.fill == 0 for p in monotone)
    one = work.by_exit(view, module.reader, module.gate, module.fill, use=(2,))
    assert one[3].readers == module.reader.macs(2) < parts[3].readers
    assert work.mean(parts, np.array([0, 0, 3, 3])).blocks == (parts[0].blocks + parts[3].blocks) / 2


def test_p_values_are_those_of_a_binomial_and_a_promise_is_kept_on_fresh_texts():
    assert abs(binomial_below(3, 10, 0.5) - 176 / 1024) < 1e-12
    assert p_value(0.2, 50, 0.1) == 1
    assert p_value(0.0, 50, 0.1) < p_value(0.02, 50, 0.1) < p_value(0.06, 50, 0.1)
    rng = np.random.default_rng(0)
    thresholds = [0.9, 0.8, 0.7, 0.6, 0.5]
    losses = np.stack([rng.beta(40 * m, 40 * (1 - m), 400) for m in (0.01, 0.02, 0.035, 0.06, 0.1)])
    assert calibrate(thresholds, losses.mean(1), 400, 0.05, 0.95) in (0.8, 0.7)
    share, loss = holds(thresholds, losses, 0.05, 0.95)
    assert share >= 0.95 and 0.01 < loss < 0.05


@pytest.mark.parametrize("risk", [1e-17, 1e-320])
def test_a_risk_next_to_none_needs_more_texts_than_there_are(risk):
    with pytest.raises(UserError, match="are too few"):
        calibrate([0.9], [0.0], 10**6, risk, 0.95)


def test_the_promise_of_the_exits_that_come_with_the_kit_holds_on_fresh_texts():
    record = records.latest("exits-calibration", kind="m2r2")["figures"]
    folder = records.ROOT / "data" / "pocket-dense" / "exits" / "m2r2"
    known = checkpoints.read_settings(folder, "exits", trained.ExitsConfig)[1]["calibration"]
    for way, losses in record["losses"].items():
        losses = np.array(losses)  # text by text, of documents that no training has seen
        assert np.allclose(losses.mean(1), known[way]["means"], atol=1e-4)  # `generate` chooses from these
        kept, _ = holds(record["thresholds"], losses, 0.05, 0.95, times=100, seed=1)
        assert kept >= 0.95


@pytest.mark.parametrize(("risk", "confidence", "texts", "said"), [
    (0, 0.95, 100, "The risk must lie between 0 and 1"),
    (1.5, 0.95, 100, "The risk must lie between 0 and 1"),
    (0.05, 1.0, 100, "The confidence must lie"),
    (0.05, 0.95, 20, "20 texts are too few .* at least 59"),
])  # fmt: skip
def test_a_promise_that_cannot_be_given_is_refused(risk, confidence, texts, said):
    with pytest.raises(UserError, match=said):
        calibrate([0.9], [0.0], texts, risk, confidence)
    assert texts_needed(0.05, 0.95) == 59


def test_a_promise_is_worded_as_it_was_measured():
    known = {
        "thresholds": [0.5, 0.9],
        "means": [0.3, 0.0],
        "texts": 4000,
        "free": [0.9, 0.25],
        "free_tokens": 40,
    }
    promise = promised(known, 0.025, 0.995)
    assert promise.threshold == 0.9 and promise.free == 0.25
    assert str(promise) == (
        "after the same words at most 2.5% of the tokens differ from the whole model's, with a confidence of "
        "99.5%; in freely decoded answers of 40 tokens 25% of the tokens differed"
    )
    assert promised(known, 0.025, 0.9999999).threshold and "99.99999%" in str(
        promised(known, 0.025, 0.9999999)
    )
    del known["free"]
    assert str(promised(known, 0.05, 0.95)).endswith("a confidence of 95%")
    assert promised(known | {"means": [0.3, 0.2]}, 0.05, 0.95).threshold is None
    assert "promised" in str(Promise(0.7)) and "nothing" in str(Promise(0.7))
    with pytest.raises(UserError, match="not calibrated"):
        promised(None, 0.05, 0.95)
    with pytest.raises(UserError, match="4000 texts are too few"):
        promised(known, 1e-17, 0.95)


@pytest.mark.parametrize("fill", ["p", "copy"])
def test_the_free_difference_is_that_of_decoded_answers(fill):
    view, module = exits()
    prompts = [tiny.prompt(5, seed) for seed in range(6)]
    texts = texts_of(view, prompts, 12)
    found = differing(ForcedPass(view, module.reader, Confidence(), Fill(fill)), texts, 0.2)
    decoder = ExitDecoder(view, module.reader, Confidence(), Fill(fill))
    for row, prompt in enumerate(prompts):
        own = texts.tokens[row, texts.first[row] + 1 : texts.end[row] + 1].tolist()
        other = decoder.generate(prompt, 0.2, int((texts.end - texts.first).max())).tokens
        same = sum(a == b for a, b in zip(own, other, strict=False))
        assert found[row] == pytest.approx(1 - same / max(len(own), len(other)))
    assert 0 < found.mean() < 1
    whole = differing(ForcedPass(view, module.reader, Confidence(), Fill(fill)), texts, NEVER)
    assert (whole == 0).all()


def test_exits_that_a_model_cannot_have_are_refused():
    with pytest.raises(UserError, match="between 1 and 3"):
        trained.new(tiny.backbone("llama"), "m2r2", exits=(2, 4))
    with pytest.raises(UserError, match="1 to 3 blocks; got 4"):
        trained.new(tiny.backbone("llama"), "shallow", exits=(4,))
    assert BareReader(tiny.backbone("llama"), (1, 2)).macs(0) == 0
