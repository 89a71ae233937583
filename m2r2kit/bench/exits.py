"""Compare early-exit methods: quality and depth on given texts, then time.

Quality and depth need no timing: each method runs on the model's own answers to the same prompts at many
thresholds, which gives a curve (`exits/teacher_forced.py`). Some of these points are timed, decoding the same
tokens one by one, interleaved with plain decoding (`rounds.py`).
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

TOGETHER = 48  # texts per batch
UNTIMED = ("m2r2-oracle", "m2r2-random")  # a bound and a control, not decoding methods
TIMED_LOSSES = (0.01, 0.05, 0.1)  # loss of agreement of the points that are timed


def measure(method: Method, texts: Texts, report: Callable | None = None) -> Curve:
    """A method's curve on texts, in batches of similar length."""
    parts, back = parts_of(texts)
    measured = [list(method.curve(texts.part(rows), report)) for rows in parts]

    def sums(each: Callable) -> np.ndarray:
        """Sums over the gated positions of each text, at each point, in the original order: (m, n)."""
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
    """`differing` for each of a method's thresholds and each text, (m, n): how much freely decoded answers
    differ from the whole model's."""
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
    """Batches of texts of similar length, and the permutation that restores their order."""
    order = np.argsort(texts.first, kind="stable")
    return [order[i : i + TOGETHER] for i in range(0, len(order), TOGETHER)], np.argsort(order)


def best_exits(method: Method, texts: Texts) -> list[int] | None:
    """The set of exits, among a few candidates, that saves most blocks at the largest of `LOSSES`; None if
    the method determines its exits itself."""
    if method.gate.monotone:
        return None
    J = len(method.reader.exits)
    sets = dict.fromkeys(((J - 1,), (max(0, J - 2), J - 1), (0, J - 1), (0,), tuple(range(J))))
    # every second threshold without the ends, where interpolation over a steep part favours wrong exits
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
    """Agreement and cross-entropy of the head at each exit when no token leaves."""
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
    """Mean cross-entropy of the whole model on its own answers, in nats."""
    total = 0.0
    for row, gated in zip(texts.tokens, texts.gated, strict=True):
        logits = backbone.logits(mx.array(row[None, :-1]))[0]
        chosen = mx.take_along_axis(logits, mx.array(row[1:, None]), -1)[:, 0]
        total += float(np.array(mx.logsumexp(logits, axis=-1) - chosen)[gated].sum())
    return total / texts.gated.sum()


# --- time ---------------------------------------------------------------------------------


@dataclass
class Timed:
    """A method at one threshold, and measurements of its decoding."""

    name: str
    threshold: float
    decoder: object
    levels: object  # the thresholds of the exits
    seconds: np.ndarray | None = None  # per round, over all prompts
    right: int = 0
    tokens: int = 0
    depth: int = 0

    def decode(self, prompt: list[int], answer: list[int]) -> float:
        """Decode with the given answer and return the seconds; counts agreement and depth."""
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
    """A point to time."""
    if method.reader is None:
        return Timed(method.name, threshold, DepthDecoder(method.backbone, method.module), threshold)
    decoder = ExitDecoder(method.backbone, *method.parts, method.used(threshold))
    return Timed(method.name, threshold, decoder, method.levels(threshold))


def points_to_time(curve: Curve) -> list[float]:
    """Distinct thresholds whose agreement is nearest to 1 - `TIMED_LOSSES`."""
    agreement = curve.means("right")
    near = {int(np.argmin(abs(agreement - (1 - loss)))) for loss in TIMED_LOSSES}
    return [curve.thresholds[i] for i in sorted(near)]


def time_points(
    arms: list[Timed], plain: Callable, pairs: list, repeats: int, report: Callable | None = None
) -> np.ndarray:
    """Time plain decoding and all arms in rounds; the arms store their seconds.

    Args:
        plain: (prompt, number of tokens) -> seconds of plain decoding.
        pairs: prompts and the whole model's answers to them, token ids.

    Returns:
        seconds of plain decoding, per round.
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
    """The fastest timed point with at most this loss of agreement."""
    good = [p for p in points if p["agreement"] >= 1 - loss]
    return max(good, key=lambda p: p["speedup"], default=None)


def speedup_at(points: list[dict], loss: float) -> float:
    """Speed-up at a loss of agreement, interpolated between timed points; plain decoding is a point of every
    curve."""
    saved = np.array([0.0, *(1 - 1 / p["speedup"] for p in points)])
    agreement = np.array([1.0, *(p["agreement"] for p in points)])
    return 1 / (1 - crossing(saved, agreement, 1 - loss))


def taken_back(point: dict, depth: int) -> float:
    """Fraction of the saved block time of a timed point spent on readouts, gates, heads and deferred tokens,
    in a model of `depth` blocks."""
    run = point["depth"] / depth
    return (1 / point["speedup"] - run) / (1 - run)


# --- answers --------------------------------------------------------------------------------


def last_number(text: str) -> str | None:
    """The answer to an arithmetic prompt: the last number of the text."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return found[-1].replace(",", "") if found else None


def answers_kept(backbone: Backbone, arm: Timed, pairs: list, max_tokens: int) -> dict:
    """How many final numbers of the whole model's answers the method keeps in free decoding.

    Returns:
        `same`, out of `asked` prompts for which the whole model's answer has a number.
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


# --- the record --------------------------------------------------------------------------------


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
