"""How many tokens a drafter should draft, and how its tree should branch.

Chosen on the tuning prompts, never on those of a figure. The answer depends on the machine:
where a draft is cheap or rows are, longer drafts pay.
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
BASELINE_THRESHOLDS = (0.2, 0.4, 0.6, 0.8)  # of confidence in one token, where a kind has one
LEAVES = (0, 1, 2, 4)


@dataclass
class Tuned:
    """The best that was found: the most drafts in a step, the threshold below which it drafts no
    further (`Drafter.threshold`), the speed-up that is predicted with both, and the leaves of a tree."""

    drafts: int = 1
    threshold: float = 0.0
    estimate: float = 0.0
    leaves: int = 0

    def __str__(self) -> str:
        stop = f", on while all are right with a chance of {self.threshold:g}" if self.threshold else ""
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
    """The best number of drafts, and of some thresholds the best; by default the drafter's own.

    The prompts are decoded once for each threshold, with the most drafts; the beginnings of those
    drafts say what shorter ones would have given.
    """
    best, costs, lengths = Tuned(threshold=drafter.threshold), {}, range(1, most + 1)
    asked = [backbone.encode(p.prompt) for p in prompts.read(prompts.TUNING)]
    for threshold in tqdm(thresholds or (drafter.threshold,), desc="tuning", leave=False):
        drafter.threshold = threshold
        if (stops := threshold > 0) not in costs:  # how unsure a drafter may be does not change what it costs
            costs[stops] = smooth(lengths, backbone, drafter, asked[0])
        made, right = drafted(backbone, drafter, asked, most, max_tokens)
        for k in lengths if len(made) else ():
            mean = np.minimum(made, k).mean()
            paid = np.minimum(made + stops, k).mean()  # a draft that stops has one more under way
            c, (slope, first) = costs[stops]
            estimate = float((1 + np.minimum(right, k).mean()) / (paid * c + first + slope * mean))
            if estimate > best.estimate:
                best = Tuned(k, threshold, estimate)
    drafter.threshold = best.threshold
    return best


def tune_tree(backbone: Backbone, tree: M2R2Tree, **options) -> Tuned:
    """The best number of leaves, each with its best number of drafts, at the drafter's own threshold.

    `options` are `tune`'s. Short drafts are judged by the beginnings of long ones, whose leaves may
    lie further on: what a tree of few drafts would have given is so estimated a little too low.
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
        what the stream's JSON keeps of them (the tree's under `tree`), and the chain's predicted speed-up.
    """
    chain = tune(backbone, M2R2(backbone, stream), THRESHOLDS)
    print(chain)
    facts = {"drafts": chain.drafts, "threshold": chain.threshold}
    try:
        tree = tune_tree(backbone, M2R2Tree(backbone, stream, threshold=chain.threshold))
    except UserError as error:  # a model that has chains only
        print(f"No tree: {error}")
        return facts, chain.estimate
    print(f"As a tree: {tree}")
    shape = {"drafts": tree.drafts, "threshold": tree.threshold, "leaves": tree.leaves}
    return facts | {"tree": shape}, chain.estimate


def tune_baseline(backbone: Backbone, kind: str, module) -> Tuned:
    """The best number of drafts of a trained baseline; if it has a threshold, its module keeps the best."""
    found = []
    for threshold in BASELINE_THRESHOLDS if hasattr(module.config, "threshold") else [None]:
        if threshold is not None:
            module.config = replace(module.config, threshold=threshold)
        found.append((tune(backbone, baselines.drafter(backbone, kind, module)), module.config))
    tuned, module.config = max(found, key=lambda each: each[0].estimate)
    return tuned


def smooth(lengths: range, backbone: Backbone, drafter: Drafter, prompt: list[int]):
    """The cost of a draft, and that of a verification as a line over the drafts (slope, value at 0).
    A single timing on a busy machine may be off by more than two lengths differ."""
    c, v = zip(*(step_costs(backbone, drafter, k, prompt, repeats=9) for k in lengths), strict=True)
    return float(np.median(c)), np.polyfit(lengths, v, 1)


def drafted(backbone: Backbone, drafter: Drafter, asked: list[list[int]], most: int, max_tokens: int):
    """In each step over all prompts: how many tokens were drafted, and how many of them were right."""
    pairs = []
    for ids in asked:
        out = generate(backbone, ids, drafter, most, max_tokens)
        pairs += zip(out.drafted, out.accepted, strict=True)
    made, right = np.array(pairs).T
    return made[made > 0], right[made > 0]  # none is made for a text's last token
