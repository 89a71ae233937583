"""Measure ways of decoding against each other: equality first, then time, interleaved.

For each prompt every arm decodes in turn (A B C A B C ..), so that whatever else the machine
does meets all arms alike. A speed-up is the median over rounds of the ratio of total times,
with its smallest and largest. Beside it stands the speed-up that follows from what it is made of,
all in plain steps, as measured one by one:

    predicted = (P + n) / (P + s (g c + v))      n  tokens, s  steps that wrote them: tau = n / s
                                                 g  drafts a step on average
                                                 c  one draft, v  one verification
                                                 P  the first pass over the prompts

The first pass is part of both times and gains nothing; without it (long texts) tau / (g c + v) is left.
"""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx

from ..model.backbone import Backbone, crop
from ..speculation import Plain, Sampler, generate
from ..speculation.decode import MOST_DRAFTS, Generation, draft_and_verify, one_token, read_prompt, verify
from ..speculation.drafters.base import Draft, Drafter
from ..speculation.registry import mlx_lm_generate

PLAIN_STEPS = 4  # timed together, because the loop starts each before the last one is read
TIE_ULP = 32  # two logits closer than this many units in the last place are a tie


@dataclass
class Arm:
    """One way of decoding, and what was seen of it."""

    name: str
    drafter: object  # None is mlx-lm's own generation
    drafts: int = 0
    training: dict = field(default_factory=dict)  # what it took, as methods.training says
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)  # a round, all prompts
    prefill_seconds: list[float] = field(default_factory=list)  # of these, for the first passes
    by_kind: dict[str, list[float]] = field(default_factory=dict)
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    mismatches: int = 0
    ties: int = 0

    @property
    def equal(self) -> bool:
        """Whether every text was plain decoding's, ties of rounding apart."""
        return self.mismatches == self.ties

    def decode(self, backbone: Backbone, prompt: list[int], max_tokens: int) -> Generation:
        if self.drafter is None:
            return mlx_lm_generate(backbone, prompt, max_tokens)
        return generate(backbone, prompt, self.drafter, self.drafts, max_tokens)


# --- equality -----------------------------------------------------------------------------


def is_tie(backbone: Backbone, prompt: list[int], one: list[int], other: list[int]) -> bool:
    """Whether two texts part where the model itself is undecided.

    The logits of the two tokens after the common prefix are computed in one pass over it; they
    tie if they differ by less than `TIE_ULP` units in the last place of the larger.
    """
    n = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if n is None:
        return False  # one text is the beginning of the other: no rounding does that
    logits = backbone.logits(mx.array([prompt + one[:n]]))[0, -1]
    a, b = logits[one[n]].item(), logits[other[n]].item()
    unit = mx.finfo(logits.dtype).eps * 2.0 ** math.floor(math.log2(max(abs(a), abs(b), 1e-30)))
    return abs(a - b) <= TIE_ULP * unit


def check_equality(
    backbone: Backbone, arms: list[Arm], prompts: list[list[int]], max_tokens: int, report=None
) -> None:
    """Decode every prompt once with every arm, and count where a text is not plain decoding's."""
    plain = Arm("plain", Plain())
    for prompt in prompts:
        right = plain.decode(backbone, prompt, max_tokens).tokens
        for arm in arms:
            out = arm.decode(backbone, prompt, max_tokens)
            arm.tokens += len(out.tokens)
            arm.accepted += out.accepted
            arm.drafted += out.drafted
            if out.tokens != right:
                arm.mismatches += 1
                arm.ties += is_tie(backbone, prompt, right, out.tokens)
            if report:
                report()


# --- time ---------------------------------------------------------------------------------


def time_arms(
    backbone: Backbone,
    arms: list[Arm],
    prompts: list[list[int]],
    kinds: list[str],
    max_tokens: int,
    repeats: int,
    report=None,
) -> None:
    """Rounds of all arms on all prompts, interleaved; the order of the arms turns each time."""
    for round_ in range(repeats):
        for arm in arms:
            arm.seconds.append(0.0)
            arm.prefill_seconds.append(0.0)
        for i, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
            turn = (round_ + i) % len(arms)
            for arm in arms[turn:] + arms[:turn]:
                out = arm.decode(backbone, prompt, max_tokens)
                arm.seconds[-1] += out.seconds
                arm.prefill_seconds[-1] += out.prefill_seconds
                of_kind = arm.by_kind.setdefault(kind, [0.0] * repeats)
                of_kind[round_] += out.seconds
                if report:
                    report()


def ratios(plain: list[float], other: list[float]) -> dict:
    """Median, smallest and largest of the rounds' ratios plain / other."""
    each = [p / o for p, o in zip(plain, other, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


# --- what a speed-up is made of -----------------------------------------------------------


def prefill_steps(plain: Arm) -> float:
    """P: the first passes over all prompts, in plain steps; the median of the rounds."""
    rounds = zip(plain.prefill_seconds, plain.seconds, strict=True)
    return statistics.median(plain.tokens * first / (whole - first) for first, whole in rounds)


def acceptance(accepted: list[int], drafted: list[int]) -> list[float]:
    """a_1, a_2, ..: share of the drafts at each position that were right, of those whose
    predecessors were."""
    a = []
    for position in range(1, max(drafted, default=0) + 1):
        offered = sum(d >= position and n >= position - 1 for n, d in zip(accepted, drafted, strict=True))
        right = sum(n >= position for n in accepted)
        if offered:
            a.append(right / offered)
    return a


@contextmanager
def not_stopping(drafter: Drafter):
    """A drafter that stops by itself drafts on for a while, at the same cost, however unsure it is."""
    before, drafter.threshold = drafter.threshold, min(drafter.threshold, 1e-30)
    try:
        yield
    finally:
        drafter.threshold = before


def step_costs(
    backbone: Backbone,
    drafter: Drafter,
    K: int,
    prompt: list[int],
    repeats: int = 15,
    accepted: int | None = None,
) -> tuple[float, float]:
    """(c, v) in plain steps: one draft of K, and one verification of K + 1 rows.

    Timed in turn after the same prompt, as the loop runs them: some plain steps, a whole step of
    drafts and verification, and the verification alone; medians. The drafts are the difference.
    Who looks drafts up may find too few in this prompt; K + 1 rows are verified all the same.
    Of a prompt that ends too near the end of the context the beginning is taken.

    Args:
        accepted: drafts that the step before has accepted, K / 2 by default. A drafter with a cache of its
            own reads them all with its first draft.
    """
    kept = 1 + (K // 2 if accepted is None else accepted)
    with not_stopping(drafter):
        return _step_costs(
            backbone, drafter, K, prompt[: max(1, backbone.context - MOST_DRAFTS)], repeats, kept
        )


def _step_costs(backbone, drafter, K, prompt, repeats, kept):
    cache = backbone.new_cache(len(prompt) + MOST_DRAFTS)
    pending, length, greedy = prompt[-1], len(prompt) - 1, Sampler()
    drafter.begin(prompt, len(prompt) + MOST_DRAFTS)
    if length > 1:  # first the step before, so that its drafter stands as in the midst of a text
        kept = min(kept, length - 1)
        read_prompt(backbone, drafter, prompt[:-kept], cache)
        draft_and_verify(backbone, drafter, prompt[:-kept], K, greedy, cache)
        crop(cache, length - kept)
        _, states = verify(backbone, drafter, Draft(prompt[-kept:-1]), prompt[-kept - 1], cache)
        if drafter.learns is not None:
            drafter.learn(states)
    elif length:
        read_prompt(backbone, drafter, prompt, cache)

    def plain():
        token, ahead = pending, None
        for i in range(PLAIN_STEPS):
            (token,), ahead = one_token(backbone, token, ahead, i + 1 < PLAIN_STEPS, greedy, cache)

    def whole():
        draft_and_verify(backbone, drafter, prompt, K, greedy, cache)

    def check():
        mx.eval(verify(backbone, drafter, drafted, pending, cache)[0].argmax(-1))

    def full():
        short = isinstance(drafted, Draft) and not drafted.states and drafted.depth < K
        rows = Draft([pending] * K) if short else drafted
        mx.eval(verify(backbone, drafter, rows, pending, cache)[0].argmax(-1))

    times: dict[str, list[float]] = {"plain": [], "whole": [], "check": [], "full": []}
    for i in range(repeats + 2):  # the first two warm up
        for part in (plain, whole, check, full):
            if part in (check, full):
                drafted = drafter(prompt, K, greedy, cache)
                if isinstance(drafted, Draft):
                    mx.eval(drafted.tokens, drafted.states)
            begun = time.perf_counter()
            part()
            if i >= 2:
                times[part.__name__].append(time.perf_counter() - begun)
            crop(cache, length)
    unit, step, checked, v = (statistics.median(times[k]) for k in ("plain", "whole", "check", "full"))
    unit /= PLAIN_STEPS
    made = max(1, drafted.depth)  # a pool or a text may have none to offer
    return (step - checked) / made / unit, v / unit


# --- the whole ----------------------------------------------------------------------------


def compare(
    backbone: Backbone,
    arms: list[Arm],
    prompts: list[list[int]],
    kinds: list[str],
    max_tokens: int = 128,
    repeats: int = 5,
    report: Callable | None = None,
) -> dict:
    """Figures of all arms, in the form of the records in `data/results/speculation.jsonl`.

    An arm whose texts are not plain decoding's gets no speed.
    """
    check_equality(backbone, arms, prompts, max_tokens, report)
    time_arms(backbone, arms, prompts, kinds, max_tokens, repeats, report)
    plain = next(a for a in arms if a.name == "plain")
    mlx_lm = next((a for a in arms if a.name == "mlx_lm" and a.equal), None)
    prefill = prefill_steps(plain)
    figures: dict = {"arms": {}, "per_kind": {}, "prefill": prefill}
    for arm in arms:
        steps = len(arm.drafted)
        tau = (len(arm.accepted) + sum(arm.accepted)) / steps
        c, v, predicted = 0.0, 1.0, 1.0
        if made := sum(arm.drafted) / steps:  # fewer than K where a drafter stops by itself
            c, v = step_costs(backbone, arm.drafter, max(1, round(made)), prompts[0], accepted=round(tau) - 1)
            predicted = (prefill + arm.tokens) / (prefill + steps * (made * c + v))
        figures["arms"][arm.name] = {
            "tokens": arm.tokens,
            "seconds": arm.seconds,
            "speedup_vs_plain": ratios(plain.seconds, arm.seconds) if arm.equal else None,
            "speedup_vs_mlx_lm": ratios(mlx_lm.seconds, arm.seconds) if arm.equal and mlx_lm else None,
            **arm.training,
            "drafts": arm.drafts,
            "drafted": made,
            "acceptance": acceptance(arm.accepted, arm.drafted),
            "draft_cost": c,
            "verify_cost": v,
            "tau": tau,
            "predicted_speedup": predicted if arm.name != "mlx_lm" else None,
            "equal": arm.equal,
            "mismatches": arm.mismatches,
            "ties": arm.ties,
        }
        if arm.equal:
            for kind, seconds in arm.by_kind.items():
                of_kind = figures["per_kind"].setdefault(kind, {})
                of_kind[arm.name] = ratios(plain.by_kind[kind], seconds)
    return figures
