"""Tune the number of drafts of a drafter, and the shape of its tree.

Tuning uses the tuning prompts, never those of a benchmark. The result depends on the machine: longer drafts
pay if drafts or verified positions are cheap.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from ..common import UserError
from ..model.backbone import Backbone
from ..speculation import M2R2, Drafter, generate
from ..speculation import trained as baselines
from ..speculation.drafters.m2r2_tree import M2R2Tree
from ..stream.stream import AcceleratedStream
from ..text import prompts
from .speculation import step_costs

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.45)
BASELINE_THRESHOLDS = (0.2, 0.4, 0.6, 0.8)  # confidence in one token, for kinds that have a threshold
LEAVES = (0, 1, 2, 4)


@dataclass
class Tuned:
    """The best settings: maximum drafts per step, the confidence threshold below which drafting stops
    (`Drafter.threshold`), the predicted speed-up, and the number of leaves of a tree."""

    drafts: int = 1
    threshold: float = 0.0
    estimate: float = 0.0
    leaves: int = 0

    def __str__(self) -> str:
        stop = f", while all are right with probability {self.threshold:g}" if self.threshold else ""
        more = f" and {self.leaves} leaves" if self.leaves else ""
        return (
            f"Best on the tuning prompts: {self.drafts} drafts{more}{stop} (predicted {self.estimate:.2f}x)."
        )


def tune(
    backbone: Backbone,
    drafter: Drafter,
    thresholds: Sequence[float] = (),
    max_tokens: int = 48,
    most: int = 8,
) -> Tuned:
    """The best number of drafts and threshold; by default only the drafter's own threshold.

    The prompts are decoded once per threshold, with the most drafts; the prefixes of these drafts give the
    results of shorter ones.

    Args:
        most: the largest number of drafts.
    """
    best, costs, lengths = Tuned(threshold=drafter.threshold), {}, range(1, most + 1)
    asked = [backbone.encode(p.prompt) for p in prompts.read(prompts.TUNING)]
    for threshold in tqdm(thresholds or (drafter.threshold,), desc="tuning", leave=False):
        drafter.threshold = threshold
        if (stops := threshold > 0) not in costs:  # the value of the threshold does not change the costs
            costs[stops] = smooth(lengths, backbone, drafter, asked[0])
        made, right = drafted(backbone, drafter, asked, most, max_tokens)
        for k in lengths if len(made) else ():
            mean = np.minimum(made, k).mean()
            paid = np.minimum(made + stops, k).mean()  # a drafter that stops has computed one more draft
            c, (slope, first) = costs[stops]
            estimate = float((1 + np.minimum(right, k).mean()) / (paid * c + first + slope * mean))
            if estimate > best.estimate:
                best = Tuned(k, threshold, estimate)
    drafter.threshold = best.threshold
    return best


def tune_tree(backbone: Backbone, tree: M2R2Tree, **options) -> Tuned:
    """The best number of leaves, each with its best number of drafts, at the drafter's own threshold.

    `options` are those of `tune`. Short drafts are evaluated as prefixes of long ones, whose leaves may come
    later, so trees with few drafts are slightly underestimated.
    """
    found = []
    for tree.leaves in LEAVES:
        found.append(replace(tune(backbone, tree, **options), leaves=tree.leaves))
    best = max(found, key=lambda each: each.estimate)
    tree.leaves = best.leaves
    return best


def tune_stream(backbone: Backbone, stream: AcceleratedStream) -> tuple[dict, float]:
    """Tune the chain of a stream, then its tree with the chain's threshold, and print both.

    Returns:
        the settings for the stream's JSON (those of the tree under `tree`), and the chain's predicted
        speed-up.
    """
    chain = tune(backbone, M2R2(backbone, stream), THRESHOLDS)
    print(chain)
    facts = {"drafts": chain.drafts, "threshold": chain.threshold}
    try:
        tree = tune_tree(backbone, M2R2Tree(backbone, stream, threshold=chain.threshold))
    except UserError as error:  # a model that supports only chains
        print(f"No tree: {error}")
        return facts, chain.estimate
    print(f"As a tree: {tree}")
    shape = {"drafts": tree.drafts, "threshold": tree.threshold, "leaves": tree.leaves}
    return facts | {"tree": shape}, chain.estimate


def tune_baseline(backbone: Backbone, kind: str, module) -> Tuned:
    """The best number of drafts of a trained baseline; sets the best threshold in its config, if it has
    one."""
    found = []
    for threshold in BASELINE_THRESHOLDS if hasattr(module.config, "threshold") else [None]:
        if threshold is not None:
            module.config = replace(module.config, threshold=threshold)
        found.append((tune(backbone, baselines.drafter(backbone, kind, module)), module.config))
    tuned, module.config = max(found, key=lambda each: each[0].estimate)
    return tuned


def smooth(lengths: range, backbone: Backbone, drafter: Drafter, prompt: list[int]):
    """The median cost of a draft, and a linear fit of the verification cost over the drafts (slope,
    intercept). Single timings on a busy machine vary more than neighbouring lengths."""
    c, v = zip(*(step_costs(backbone, drafter, k, prompt, repeats=9) for k in lengths), strict=True)
    return float(np.median(c)), np.polyfit(lengths, v, 1)


def drafted(backbone: Backbone, drafter: Drafter, asked: list[list[int]], most: int, max_tokens: int):
    """Numbers of drafted and of accepted tokens per step, over all prompts; steps without drafts are left
    out."""
    pairs = []
    for ids in asked:
        out = generate(backbone, ids, drafter, most, max_tokens)
        pairs += zip(out.drafted, out.accepted, strict=True)
    made, right = np.array(pairs).T
    return made[made > 0], right[made > 0]
