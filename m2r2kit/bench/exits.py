"""Measure ways of leaving early against each other: quality and depth along given texts, then time.

Quality and depth need no clock: every method passes the model's own answers to the same prompts, each at many
thresholds, and a curve comes of it (`exits/forced.py`). Time is taken with some of these points, decoding the
same tokens one by one, interleaved with plain decoding (A B C A B C ..); a speed-up is the median over
rounds of the ratio of total times.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..exits import macs as work
from ..exits.decode import ExitDecoder
from ..exits.depth_decode import DepthDecoder
from ..exits.methods import Method
from ..exits.teacher_forced import ForcedPass, Texts, differing
from ..model.backbone import Backbone
from ..stream.distil import teacher_batch
from .merit import LOSSES, Curve, crossing, merits
from .rounds import ratios, rounds

TOGETHER = 48  # texts that pass at once
UNTIMED = ("m2r2-oracle", "m2r2-random")  # a bound and a control, of which nobody decodes
TIMED_LOSSES = (0.01, 0.05, 0.1)  # of agreement: the points of each curve that are timed


def measure(method: Method, texts: Texts, report: Callable | None = None) -> Curve:
    """A method's curve along texts; those of about one length pass together."""
    parts, back = parts_of(texts)
    measured = [list(method.curve(texts.part(rows), report)) for rows in parts]

    def sums(each: Callable) -> np.ndarray:
        """Of an array of each point, text by text in their own order, (m, n)."""
        columns = [
            np.stack([np.where(p.outcome.gated, each(p), 0).sum(1) for p in points]) for points in measured
        ]
        return np.concatenate(columns, axis=1)[:, back].astype(float)

    return Curve(
        [p.threshold for p in measured[0]],
        sums(lambda p: p.outcome.right),
        sums(lambda p: p.outcome.nats),
        sums(lambda p: p.blocks),
        sums(lambda p: p.macs),
        texts.gated.sum(1).astype(float),
        method.backbone.depth,
    )


def measure_free(method: Method, texts: Texts, report: Callable | None = None) -> np.ndarray:
    """`differing` at each of a method's thresholds, text by text, (m, n): how much of freely decoded answers
    differs from the whole model's."""
    forced = ForcedPass(method.backbone, *method.parts, use=method.use)
    parts, back = parts_of(texts)
    rows = []
    for threshold in method.thresholds:
        levels = method.levels(threshold)
        rows.append(np.concatenate([differing(forced, texts.part(part), levels) for part in parts])[back])
        if report:
            report()
    return np.stack(rows)


def parts_of(texts: Texts) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows of texts that pass together, those of about one length; and how to put them back in order."""
    order = np.argsort(texts.first, kind="stable")
    return [order[i : i + TOGETHER] for i in range(0, len(order), TOGETHER)], np.argsort(order)


def best_exits(method: Method, texts: Texts) -> list[int] | None:
    """Of some sets of exits the one that saves most blocks at the largest of `LOSSES`; None where a method
    says by itself which it uses."""
    if method.gate.monotone:
        return None
    J = len(method.reader.exits)
    sets = dict.fromkeys(((J - 1,), (max(0, J - 2), J - 1), (0, J - 1), (0,), tuple(range(J))))
    # every second threshold, without the ends: on a line over the steep part the wrong exits would win
    some = replace(
        method, thresholds=method.thresholds[2:-1:2] if len(method.thresholds) > 4 else method.thresholds
    )
    saved = {}
    for use in (tuple(sorted(set(each))) for each in sets):
        some.use = use
        curve = measure(some, texts)
        saved[use] = curve.saved_at(LOSSES[-1], np.arange(len(curve.tokens)))
    return list(max(saved, key=saved.get))


def at_exits(reader, backbone: Backbone, texts: Texts) -> list[dict]:
    """How well the head reads the answer at each exit if nobody leaves: agreement and cross-entropy."""
    depths, blocks = reader.needs()
    batch = teacher_batch(backbone, texts.tokens[:, :-1], depths, blocks)
    gated, answer = texts.gated, mx.array(texts.tokens[:, 1:])
    out = []
    for j, exit in enumerate(reader.exits):
        logits = backbone.head(reader.over(j, batch))
        chosen = mx.take_along_axis(logits, answer[..., None], -1)[..., 0]
        nats = np.array(mx.logsumexp(logits, axis=-1) - chosen)[gated]
        right = np.array(mx.argmax(logits, axis=-1) == answer)[gated]
        out.append({"exit": exit, "agreement": float(right.mean()), "nats": float(nats.mean())})
    return out


def nats_of(backbone: Backbone, texts: Texts) -> float:
    """Mean cross-entropy that the whole model gives its own answers."""
    total = 0.0
    for row, gated in zip(texts.tokens, texts.gated, strict=True):
        logits = backbone.logits(mx.array(row[None, :-1]))[0]
        chosen = mx.take_along_axis(logits, mx.array(row[1:, None]), -1)[:, 0]
        total += float(np.array(mx.logsumexp(logits, axis=-1) - chosen)[gated].sum())
    return total / texts.gated.sum()


# --- time ---------------------------------------------------------------------------------


@dataclass
class Timed:
    """A method at one threshold, and what was seen of it while it decoded."""

    name: str
    threshold: float
    decoder: object
    levels: object  # the thresholds of the exits
    seconds: np.ndarray | None = None  # of each round, all prompts
    right: int = 0
    tokens: int = 0
    depth: int = 0

    def decode(self, prompt: list[int], answer: list[int]) -> float:
        """Seconds of decoding an answer; only its own choices count as right."""
        out = self.decoder.generate(prompt, self.levels, max_tokens=len(answer), given=answer)
        self.right += sum(a == b for a, b in zip(out.tokens, answer, strict=True))
        self.tokens += len(answer)
        self.depth += sum(out.depth)
        return out.seconds

    def figures(self, plain: np.ndarray) -> dict:
        speed = ratios(plain, self.seconds)
        return {
            "threshold": self.threshold,
            "agreement": self.right / self.tokens,
            "depth": self.depth / self.tokens,
            "speedup": speed["median"],
            "from": speed["min"],
            "to": speed["max"],
        }


def timed(method: Method, threshold: float) -> Timed:
    """A point to be timed."""
    if method.reader is None:
        return Timed(method.name, threshold, DepthDecoder(method.backbone, method.module), threshold)
    decoder = ExitDecoder(method.backbone, *method.parts, method.used(threshold))
    return Timed(method.name, threshold, decoder, method.levels(threshold))


def points_to_time(curve: Curve) -> list[float]:
    """Thresholds whose agreement is nearest to those that are asked for, each once."""
    agreement = curve.means("right")
    near = {int(np.argmin(abs(agreement - (1 - loss)))) for loss in TIMED_LOSSES}
    return [curve.thresholds[i] for i in sorted(near)]


def time_points(
    arms: list[Timed], plain: Callable, pairs: list, repeats: int, report: Callable | None = None
) -> np.ndarray:
    """Rounds of plain decoding and all arms; the arms keep their seconds.

    Args:
        plain: (prompt, number of tokens) -> seconds of plain decoding.
        pairs: prompts and the whole model's answers to them, token ids.

    Returns:
        seconds of each round of plain decoding.
    """

    def seconds(arm: Timed | None, number: int) -> float:
        prompt, answer = pairs[number]
        return arm.decode(prompt, answer) if arm else plain(prompt, len(answer))

    plainly, *others = (
        each.sum(1) for each in rounds([None, *arms], len(pairs), repeats, seconds, None, report)
    )
    for arm, each in zip(arms, others, strict=True):
        arm.seconds = each
    return plainly


def fastest(points: list[dict], loss: float) -> dict | None:
    """Of timed points the fastest that loses at most so much agreement."""
    good = [p for p in points if p["agreement"] >= 1 - loss]
    return max(good, key=lambda p: p["speedup"], default=None)


def speedup_at(points: list[dict], loss: float) -> float:
    """Speed-up at a loss of agreement, on the line between the two timed points beside it; plain decoding is
    a point of every curve."""
    saved = np.array([0.0, *(1 - 1 / p["speedup"] for p in points)])
    agreement = np.array([1.0, *(p["agreement"] for p in points)])
    return 1 / (1 - crossing(saved, agreement, 1 - loss))


def taken_back(point: dict, depth: int) -> float:
    """Of the time that a timed point's skipped blocks would have taken in a model of `depth` blocks, the
    share that readers, gates, heads and the company of tokens that wait took back."""
    run = point["depth"] / depth
    return (1 / point["speedup"] - run) / (1 - run)


# --- answers --------------------------------------------------------------------------------


def last_number(text: str) -> str | None:
    """The answer to an arithmetic prompt: the last number of the text."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return found[-1].replace(",", "") if found else None


def answers_kept(backbone: Backbone, arm: Timed, pairs: list, max_tokens: int) -> dict:
    """How many of the whole model's answers are also the method's when it decodes freely.

    Returns:
        `same`, of `asked` prompts to which the whole model's text has a number.
    """
    same = asked = 0
    for prompt, answer in pairs:
        wanted = last_number(backbone.decode(answer))
        if wanted is None:
            continue
        asked += 1
        out = arm.decoder.generate(prompt, arm.levels, max_tokens=max_tokens)
        same += last_number(backbone.decode(out.tokens)) == wanted
    return {"same": same, "asked": asked}


# --- the whole --------------------------------------------------------------------------------


def figures(curves: dict[str, Curve], methods: dict[str, Method], full_nats: float) -> dict:
    """Points and figures of merit of all methods, in the form of `data/results/exits.jsonl`."""
    found = merits(curves)
    whole = work.whole(next(iter(methods.values())).backbone).total
    out = {}
    for name, curve in curves.items():
        names = ("right", "nats", "blocks", "macs")
        means = {n: curve.means(n) for n in names}
        out[name] = {
            "points": [
                {
                    "threshold": float(t),
                    "agreement": float(r),
                    "nats_lost": float(n) - full_nats,
                    "blocks": float(b),
                    "macs": float(m) / whole,
                }
                for t, r, n, b, m in zip(curve.thresholds, *(means[n] for n in names), strict=True)
            ],
            "merit": found[name],
        }
    return out
