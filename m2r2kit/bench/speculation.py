"""Compare decoding methods, in rounds (`rounds.py`).

The measured speed-up is compared with a prediction from its separately measured factors, in plain steps:

    predicted = (P + n) / (P + s (g c + v))      n  tokens, s  steps: tau = n / s
                                                 g  mean drafts per step
                                                 c  one draft, v  one verification
                                                 P  prefill of the prompts

The prefill is part of both times and gains nothing; without it (long texts) this is tau / (g c + v).
"""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from .. import driver
from ..driver import Generation
from ..model.backbone import Backbone, crop
from ..speculation import Plain, Sampler, generate
from ..speculation.decode import MOST_DRAFTS, draft_and_verify, one_token, read_prompt, verify
from ..speculation.drafters.base import Draft, Drafter
from ..speculation.reference import MlxLm
from .rounds import ratios, rounds

PLAIN_STEPS = 4  # timed together, because the loop starts each step before the previous one is read
TIE_ULP = 32  # logits that differ by less than this many units in the last place are tied


@dataclass
class Arm:
    """One decoding method, and its measurements."""

    name: str
    drafter: object  # None: mlx-lm's own generation
    drafts: int = 0
    training: dict = field(default_factory=dict)  # parameters, seconds and steps of its training
    tokens: int = 0
    times: np.ndarray | None = None  # (rounds, prompts, 2): total and prefill seconds
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    mismatches: int = 0
    ties: int = 0

    @property
    def equal(self) -> bool:
        """Whether all texts equal plain decoding's, except at ties."""
        return self.mismatches == self.ties

    @property
    def seconds(self) -> list[float]:
        """Per round, over all prompts."""
        return self.times[..., 0].sum(1).tolist()

    @property
    def prefill_seconds(self) -> list[float]:
        """Prefill time per round."""
        return self.times[..., 1].sum(1).tolist()

    def decode(self, backbone: Backbone, prompt: list[int], max_tokens: int) -> Generation:
        if self.drafter is None:
            return driver.generate(MlxLm(backbone), prompt, max_tokens)
        return generate(backbone, prompt, self.drafter, self.drafts, max_tokens)


# --- equality -----------------------------------------------------------------------------


def is_tie(backbone: Backbone, prompt: list[int], one: list[int], other: list[int]) -> bool:
    """Whether two texts first differ at a tie of the model's logits.

    The logits of the two tokens after the common prefix are computed in one pass; they tie if they differ by
    at most `TIE_ULP` units in the last place of the larger.
    """
    n = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if n is None:
        return False  # one text is a prefix of the other, which rounding cannot cause
    logits = backbone.logits(mx.array([prompt + one[:n]]))[0, -1]
    a, b = logits[one[n]].item(), logits[other[n]].item()
    unit = mx.finfo(logits.dtype).eps * 2.0 ** math.floor(math.log2(max(abs(a), abs(b), 1e-30)))
    return abs(a - b) <= TIE_ULP * unit


def run_arms(
    backbone: Backbone, arms: list[Arm], prompts: list[list[int]], max_tokens: int, repeats=0, report=None
) -> None:
    """Decode all prompts with all arms: one round to compare the texts with plain decoding's, then `repeats`
    timed rounds."""
    plain = Arm("plain", Plain())
    right = [plain.decode(backbone, prompt, max_tokens).tokens for prompt in prompts]

    def check(arm: Arm, number: int) -> None:
        out = arm.decode(backbone, prompts[number], max_tokens)
        arm.tokens += len(out.tokens)
        arm.accepted += out.accepted
        arm.drafted += out.drafted
        if out.tokens != right[number]:
            arm.mismatches += 1
            arm.ties += is_tie(backbone, prompts[number], right[number], out.tokens)

    def timed(arm: Arm, number: int) -> tuple[float, float]:
        out = arm.decode(backbone, prompts[number], max_tokens)
        return out.seconds, out.prefill_seconds

    for arm, times in zip(arms, rounds(arms, len(prompts), repeats, timed, check, report), strict=True):
        arm.times = times


# --- factors of a speed-up -----------------------------------------------------------


def prefill_steps(plain: Arm) -> float:
    """P: the prefill of all prompts, in plain steps; median over rounds."""
    each = zip(plain.prefill_seconds, plain.seconds, strict=True)
    return statistics.median(plain.tokens * first / (whole - first) for first, whole in each)


def acceptance(accepted: list[int], drafted: list[int]) -> list[float]:
    """a_1, a_2, ..: acceptance at each position, given that all earlier drafts were accepted."""
    a = []
    for position in range(1, max(drafted, default=0) + 1):
        offered = sum(d >= position and n >= position - 1 for n, d in zip(accepted, drafted, strict=True))
        right = sum(n >= position for n in accepted)
        if offered:
            a.append(right / offered)
    return a


@contextmanager
def not_stopping(drafter: Drafter):
    """Temporarily keep a drafter from stopping early, at the same cost per draft."""
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
    """(c, v) in plain steps: the cost of one of K drafts, and of verifying K + 1 positions.

    Medians of interleaved timings after the same prompt, as in the decoding loop: plain steps, a whole step
    of drafting and verification, and the verification alone; drafting is the difference. K + 1 positions are
    verified even if a lookup drafter finds fewer drafts. A prompt too near the end of the context is
    truncated.

    Args:
        accepted: drafts that the previous step accepted, K / 2 by default. A drafter with its own cache reads
            all of them with its first draft.
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
    if length > 1:  # first the previous step, so that the drafter's state is as in the middle of a text
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

    def seconds(part: Callable, _) -> float:
        nonlocal drafted
        if part in (check, full):
            drafted = drafter(prompt, K, greedy, cache)
            if isinstance(drafted, Draft):
                mx.eval(drafted.tokens, drafted.states)
        begun = time.perf_counter()
        part()
        took = time.perf_counter() - begun
        crop(cache, length)
        return took

    drafted = None
    times = rounds((plain, whole, check, full), 1, repeats + 1, seconds)
    unit, step, checked, v = (float(np.median(each[1:])) for each in times)  # the first rounds are warm-up
    unit /= PLAIN_STEPS
    made = max(1, drafted.depth)  # a lookup may find no drafts
    return (step - checked) / made / unit, v / unit


# --- comparison ----------------------------------------------------------------------------


def compare(
    backbone: Backbone,
    arms: list[Arm],
    prompts: list[list[int]],
    kinds: list[str],
    max_tokens: int = 128,
    repeats: int = 5,
    report: Callable | None = None,
) -> dict:
    """Figures of all arms, in the form of `data/results/speculation.jsonl`.

    An arm whose texts differ from plain decoding's gets no speed-up.
    """
    run_arms(backbone, arms, prompts, max_tokens, repeats, report)
    plain = next(a for a in arms if a.name == "plain")
    mlx_lm = next((a for a in arms if a.name == "mlx_lm" and a.equal), None)
    prefill = prefill_steps(plain)
    figures: dict = {"arms": {}, "per_kind": {}, "prefill": prefill}
    for arm in arms:
        steps = len(arm.drafted)
        tau = (len(arm.accepted) + sum(arm.accepted)) / steps
        c, v, predicted = 0.0, 1.0, 1.0
        if made := sum(arm.drafted) / steps:  # fewer than K if a drafter stops early
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
            for kind in dict.fromkeys(kinds):
                here = np.array(kinds) == kind
                one, other = (each.times[:, here, 0].sum(1) for each in (plain, arm))
                figures["per_kind"].setdefault(kind, {})[arm.name] = ratios(one, other)
    return figures
