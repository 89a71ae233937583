"""A threshold with a promise: learn then test.

What is promised: after the same words, the share of tokens that differ from the whole model's is at most the
asked risk, on average over texts, unless the calibration texts were a sample that comes up once in
1 / (1 - confidence) times. Thresholds are tested from the safest down, each with a p-value that holds for any
loss between 0 and 1, and the last one before a test fails is taken (Angelopoulos et al. 2021, arXiv
2110.01052; CALM, arXiv 2207.07061, section 3).

The loss is measured token by token along the model's own texts, so the promise says nothing about a printed
answer as a whole: there one token that differs changes the words after it, and most of the rest may differ
too. How much of freely decoded answers differs is measured as well (`Promise.free`).
"""

import math
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from ..common import UserError

RISK, CONFIDENCE = 0.05, 0.95  # if nothing else is asked for


def p_value(mean: float, n: int, risk: float) -> float:
    """How likely so low a mean loss of n texts would be if the true one lay above `risk` (Hoeffding-Bentkus);
    each loss lies between 0 and 1."""
    if mean >= risk:
        return 1.0
    distance = mean * math.log(mean / risk) if mean > 0 else 0.0
    distance += (1 - mean) * math.log((1 - mean) / (1 - risk))
    return min(1.0, math.exp(-n * distance), math.e * binomial_below(math.ceil(n * mean), n, risk))


def binomial_below(k: int, n: int, p: float) -> float:
    """P(X <= k) for X of n trials with chance p each."""
    logs = [
        math.lgamma(n + 1)
        - math.lgamma(i + 1)
        - math.lgamma(n - i + 1)
        + i * math.log(p)
        + (n - i) * math.log1p(-p)
        for i in range(k + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def texts_needed(risk: float, confidence: float) -> int:
    """Texts without which not even a gate that never errs could be promised to keep the risk."""
    texts = math.log1p(-confidence) / math.log1p(-risk)
    return math.ceil(min(texts, 1e15))  # beyond it there are never enough


def check(risk: float, confidence: float, texts: int) -> None:
    """Refuse a promise that cannot be given, in one sentence."""
    for name, value in (("risk", risk), ("confidence", confidence)):
        if not 0 < value < 1:
            raise UserError(f"The {name} must lie between 0 and 1, ends excluded; got {value}.")
    if texts < (least := texts_needed(risk, confidence)):
        raise UserError(
            f"{texts} texts are too few to promise a risk of {risk} with a confidence of {confidence}; "
            f"calibrate with at least {least}."
        )


@dataclass(frozen=True)
class Promise:
    """What is known of a threshold.

    Attributes:
        threshold: the score from which a token leaves; None if no threshold keeps the risk.
        risk: share of tokens that differ after the same words, at most; None: nothing is promised.
        confidence: of the promise.
        free: share of the tokens that differed in freely decoded answers of `tokens` tokens; None if it was
            not measured.
    """

    threshold: float | None
    risk: float | None = None
    confidence: float | None = None
    free: float | None = None
    tokens: int | None = None

    def __str__(self) -> str:
        if self.threshold is None:
            return "no threshold keeps the risk: all blocks for every token"
        if self.risk is None:
            said = f"threshold {self.threshold:g}, nothing promised"
        else:
            said = (
                f"after the same words at most {percent(self.risk)} of the tokens differ from the whole "
                f"model's, with a confidence of {percent(self.confidence)}"
            )
        if self.free is not None:
            said += f"; of answers of {self.tokens} tokens {self.free:.0%} of the tokens differed"
        return said


def percent(share: float) -> str:
    """A share as a percentage with all its digits: rounded, 0.995 would become a certainty."""
    exact = f"{Decimal(repr(share)) * 100:f}"
    return (exact.rstrip("0").rstrip(".") if "." in exact else exact) + "%"


def promised(known: dict | None, risk: float, confidence: float) -> Promise:
    """The lowest threshold that keeps a risk, by what `m2r2kit calibrate` noted: `thresholds`, the `means` of
    the loss at each over so many `texts`, and if measured `free`, the share that differs in answers of
    `free_tokens` tokens.

    Raises:
        UserError: nothing was noted, or such a promise cannot be given.
    """
    if known is None:
        raise UserError("These exits were never calibrated; run `m2r2kit calibrate`, or give a --threshold.")
    thresholds, means = known["thresholds"], known["means"]
    found = calibrate(thresholds, means, known["texts"], risk, confidence)
    if found is None:
        return Promise(None, risk, confidence)
    free = known["free"][thresholds.index(found)] if "free" in known else None
    return Promise(found, risk, confidence, free, known.get("free_tokens"))


def calibrate(thresholds, means, texts: int, risk: float, confidence: float) -> float | None:
    """The lowest threshold that keeps the promise; None if not even the highest does.

    Args:
        thresholds: (m,); the highest is the safest.
        means: of the loss over the texts at each threshold, (m,).
        texts: how many there are.

    Raises:
        UserError: a risk or a confidence outside (0, 1), or too few texts for them.
    """
    check(risk, confidence, texts)
    found = None
    for threshold, mean in sorted(zip(thresholds, means, strict=True), reverse=True):
        if p_value(float(mean), texts, risk) > 1 - confidence:
            break
        found = float(threshold)
    return found


def holds(thresholds, losses: np.ndarray, risk: float, confidence: float, times: int = 100, seed: int = 0):
    """How often the promise holds on fresh texts: calibrated on one half of the texts drawn at random, and
    looked at on the other, `times` times.

    Args:
        losses: of each threshold on each text, (m, n).

    Returns:
        (share of the times that the mean loss of the fresh half was at most `risk`; where no threshold was
        found all tokens pass all blocks, and it holds, mean loss of the fresh halves).
    """
    rng, kept, seen = np.random.default_rng(seed), 0, []
    for _ in range(times):
        order = rng.permutation(losses.shape[1])
        half, fresh = np.array_split(order, 2)
        chosen = calibrate(thresholds, losses[:, half].mean(1), len(half), risk, confidence)
        loss = 0.0 if chosen is None else float(losses[list(thresholds).index(chosen), fresh].mean())
        kept += loss <= risk
        seen.append(loss)
    return kept / times, float(np.mean(seen))
