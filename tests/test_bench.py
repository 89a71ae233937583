"""What `bench` counts and concludes; the clock is replaced by figures that can be checked by hand."""

import time

import numpy as np
import pytest
import tiny

from m2r2kit.bench import speculation as bench
from m2r2kit.bench.rounds import rounds
from m2r2kit.bench.speculation import Arm, compare
from m2r2kit.cli.bench_speculation import drafts_at
from m2r2kit.common import UserError
from m2r2kit.speculation import M2R2, EarlyExit, Plain, generate
from m2r2kit.speculation import decode as loop
from m2r2kit.speculation.drafters.base import Draft, Drafter
from m2r2kit.speculation.drafters.prompt_lookup import PromptLookup
from m2r2kit.speculation.registry import training
from m2r2kit.stream import checkpoints
from m2r2kit.stream.stream import StreamConfig

PROMPTS = [tiny.prompt(5), tiny.prompt(7)]
TRAINED = {"parameters": 12, "train_steps": 3, "train_seconds": 4}


@pytest.fixture
def figures(monkeypatch):
    """Of plain and an early exit, as if plain took 10 s, of which 2 s over the prompts."""

    def clocked(arms, prompts, repeats, seconds, first, report):
        rounds(arms, prompts, 0, seconds, first, report)
        return [np.array([[[10.0, 2.0], [0.0, 0.0]]]) * (1 if a.name == "plain" else 0.8) for a in arms]

    monkeypatch.setattr(bench, "rounds", clocked)
    monkeypatch.setattr(bench, "step_costs", lambda *_, **__: (0.1, 1.5))
    view = tiny.backbone()
    arms = [Arm("plain", Plain()), Arm("early-exit", EarlyExit(view, 3), 3, TRAINED)]
    return compare(view, arms, PROMPTS, ["", ""], max_tokens=12, repeats=1)


def test_the_prediction_counts_the_first_pass_over_the_prompts(figures):
    outs = [generate(tiny.backbone(), p, EarlyExit(tiny.backbone(), 3), 3, 12) for p in PROMPTS]
    tokens = sum(len(out.tokens) for out in outs)
    steps, drafts = sum(out.steps for out in outs), sum(sum(out.drafted) for out in outs)
    prefill = 2.0 / (8.0 / tokens)  # a plain step takes 8 s / tokens
    arm = figures["arms"]["early-exit"]
    assert figures["prefill"] == pytest.approx(prefill)
    assert arm["predicted_speedup"] == pytest.approx(
        (prefill + tokens) / (prefill + 0.1 * drafts + 1.5 * steps)
    )
    assert arm["predicted_speedup"] != pytest.approx(arm["tau"] / (arm["drafted"] * 0.1 + 1.5), rel=0.01)
    assert figures["arms"]["plain"]["predicted_speedup"] == 1


def test_an_arm_says_what_its_training_took_and_how_much_it_drafts(figures):
    arm = figures["arms"]["early-exit"]
    assert {key: arm[key] for key in TRAINED} == TRAINED
    assert 1 < arm["drafted"] <= 3 and figures["arms"]["plain"]["drafted"] == 0


def test_rounds_add_up_the_first_passes():
    arm = Arm("plain", Plain())
    bench.run_arms(tiny.backbone(), [arm], PROMPTS, 3, repeats=2)
    assert len(arm.prefill_seconds) == 2
    assert all(0 < first < whole for first, whole in zip(arm.prefill_seconds, arm.seconds, strict=True))


def test_the_first_pass_is_timed_apart(monkeypatch):
    read = loop.read_prompt
    monkeypatch.setattr(loop, "read_prompt", lambda *args: (read(*args), time.sleep(0.2)))
    long = generate(tiny.backbone(), PROMPTS[0], None, 0, 2)
    assert 0.2 <= long.prefill_seconds < long.seconds
    assert generate(tiny.backbone(), PROMPTS[0][:1], None, 0, 2).prefill_seconds < 0.2


def test_training_is_read_from_beside_the_weights(tmp_path):
    stream = tiny.stream()
    checkpoints.save(stream, stream.config, "0" * 64, tmp_path, "stream", steps=7, train_seconds=60)
    wanted = {"parameters": stream.parameter_count(), "train_steps": 7, "train_seconds": 60}
    assert training("m2r2", tmp_path, tmp_path) == training("m2r2-tree", tmp_path, tmp_path) == wanted
    assert set(training("early-exit", tmp_path, tmp_path).values()) == {0}
    with pytest.raises(UserError, match="no trained drafter"):
        training("eagle", tmp_path, tmp_path)
    (tmp_path / "stream.safetensors").unlink()
    with pytest.raises(UserError, match=r"stream\.safetensors is missing"):
        checkpoints.trained(tmp_path, "stream", StreamConfig)


@pytest.mark.parametrize("offered", [0, 2, 5])
def test_the_rows_of_a_verification_are_timed_also_where_too_few_drafts_are_found(offered, monkeypatch):
    class Finds(Drafter):
        def __call__(self, text, drafts, sampler, cache):
            return Draft([1] * min(offered, drafts))

    verify, rows = bench.verify, []
    monkeypatch.setattr(bench, "verify", lambda *args: (rows.append(args[2].depth), verify(*args))[1])
    _, v = bench.step_costs(tiny.backbone(), Finds(), 5, PROMPTS[0], repeats=1)
    assert rows[-2:] == [offered, 5] and v > 0  # the drafts that were found, then as many as were asked for


@pytest.mark.parametrize("accepted", [0, 1, 3])
def test_the_step_before_has_accepted_so_many_drafts(accepted, monkeypatch):
    view, text = tiny.backbone(), tiny.prompt(12)
    verify, rows = bench.verify, []
    monkeypatch.setattr(bench, "verify", lambda *args: (rows.append(args[2].depth), verify(*args))[1])
    learnt = []

    class Learns(EarlyExit):
        learns = view.depth

        def learn(self, states):
            learnt.append(states.shape[1])

    bench.step_costs(view, Learns(view, 2), 4, text, repeats=1, accepted=accepted)
    assert rows[0] == accepted and learnt[-1] == accepted + 1  # and the token of the model's own


def test_the_exit_of_a_record_is_where_p_is_read():
    view = tiny.backbone()
    arms = [Arm("mlx_lm", None), Arm("plain", Plain()), Arm("lookup", PromptLookup(view), 4)]
    assert [drafts_at(arm) for arm in arms] == [0, 0, 0]
    assert drafts_at(Arm("m2r2", M2R2(view, tiny.stream()), 4)) == 2
    assert drafts_at(Arm("early-exit", EarlyExit(view, 3), 4)) == 3
