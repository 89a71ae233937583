"""Calibrate a threshold with a guarantee: learn then test.

The promise: after the same words, the mean fraction of tokens that differ from the whole model's is at most
the given risk. It fails only if the calibration texts are a sample that occurs with a probability of at most
1 - confidence. Thresholds are tested from the safest down, each with a p-value that is valid for any loss
between 0 and 1; the last one before a test fails is taken (Angelopoulos et al. 2021, arXiv 2110.01052; CALM,
arXiv 2207.07061, section 3).

The loss is measured token by token along the model's own texts, so the promise does not cover a generated
answer: there, one token that differs changes the words after it, and most later tokens may differ too. The
fraction that differs in freely decoded answers is measured separately (`Promise.free`).
"""

import math
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from ..common import UserError

RISK, CONFIDENCE = 0.05, 0.95  # defaults


def p_value(mean: float, n: int, risk: float) -> float:
    """Hoeffding-Bentkus p-value: the probability of a mean loss this low over n texts if the true mean is
    above `risk`. Each loss lies between 0 and 1.
    """
    if mean >= risk:
        return 1.0
    distance = mean * math.log(mean / risk) if mean > 0 else 0.0
    distance += (1 - mean) * math.log((1 - mean) / (1 - risk))
    return min(1.0, math.exp(-n * distance), math.e * binomial_below(math.ceil(n * mean), n, risk))


def binomial_below(k: int, n: int, p: float) -> float:
    """P(X <= k) for a binomial X with n trials of probability p."""
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
    """Number of texts that a gate without errors needs to pass the test for this risk."""
    return math.ceil(min(math.log1p(-confidence) / math.log1p(-risk), 1e15))  # stays finite for a tiny risk


def check(risk: float, confidence: float, texts: int) -> None:
    """Raise UserError for a risk, a confidence or a number of texts that allows no promise."""
    for name, value in (("risk", risk), ("confidence", confidence)):
        if not 0 < value < 1:
            raise UserError(f"The {name} must lie between 0 and 1, both excluded; got {value}.")
    if texts < (least := texts_needed(risk, confidence)):
        raise UserError(
            f"{texts} texts are too few to promise a risk of {risk} with a confidence of {confidence}; "
            f"calibrate with at least {least}."
        )


@dataclass(frozen=True)
class Promise:
    """A threshold and what calibration promises for it.

    Attributes:
        threshold: the score at which a token exits; None if no threshold keeps the risk.
        risk: upper bound of the mean fraction of tokens that differ after the same words; None if nothing is
            promised.
        confidence: of the promise.
        free: fraction of tokens that differ in freely decoded answers of `tokens` tokens; None if not
            measured.
    """

    threshold: float | None
    risk: float | None = None
    confidence: float | None = None
    free: float | None = None
    tokens: int | None = None

    def __str__(self) -> str:
        if self.threshold is None:
            return "no threshold keeps the risk: every token passes all blocks"
        if self.risk is None:
            said = f"threshold {self.threshold:g}, nothing promised"
        else:
            said = (
                f"after the same words at most {percent(self.risk)} of the tokens differ from the whole "
                f"model's, with a confidence of {percent(self.confidence)}"
            )
        if self.free is not None:
            said += (
                f"; in freely decoded answers of {self.tokens} tokens {self.free:.0%} of the tokens differed"
            )
        return said


def percent(share: float) -> str:
    """A fraction as a percentage with all its digits: rounded, 0.995 would become 100 %."""
    exact = f"{Decimal(repr(share)) * 100:f}"
    return (exact.rstrip("0").rstrip(".") if "." in exact else exact) + "%"


def promised(known: dict | None, risk: float, confidence: float) -> Promise:
    """The lowest threshold that keeps a risk, from the results of `m2r2kit calibrate`.

    Args:
        known: `thresholds`, the `means` of the loss at each over `texts` texts, and, if measured, `free`:
            the fraction of tokens that differ in freely decoded answers of `free_tokens` tokens.

    Raises:
        UserError: the exits are not calibrated, or no such promise is possible.
    """
    if known is None:
        raise UserError("These exits are not calibrated; run `m2r2kit calibrate`, or give a --threshold.")
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
        means: mean loss over the texts at each threshold, (m,).
        texts: number of texts.

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
    """Check how often the promise holds on fresh texts: `times` times, calibrate on a random half of the
    texts and evaluate on the other half.

    Args:
        losses: of each threshold on each text, (m, n).

    Returns:
        (fraction of the trials in which the mean loss of the fresh half is at most `risk`, mean loss of the
        fresh halves). Without a threshold all tokens pass all blocks, and the loss is 0.
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
