"""How many tokens a drafter should draft: chosen on the tuning prompts, never on those of a figure."""

import numpy as np
from tqdm import tqdm

from . import prompts
from .backbone import Backbone
from .bench import Arm, step_costs
from .speculation import Drafter, generate


def tune(backbone: Backbone, drafter: Drafter, max_tokens: int = 48, most: int = 8) -> tuple[int, float]:
    """The number of drafts with the best predicted speed-up on the tuning prompts, and that speed-up.

    The prompts are decoded once, with the most drafts; the beginnings of those drafts say what
    shorter ones would have given, also where a drafter stops by itself.
    """
    accepted, drafted = [], []
    asked = prompts.read(prompts.TUNING)
    for p in tqdm(asked, desc="tuning", leave=False):
        out = generate(backbone, backbone.encode(p.prompt), drafter, most, max_tokens)
        accepted += out.accepted
        drafted += out.drafted
    full = np.array(drafted) > 0  # the last token of a text is never drafted for
    accepted, drafted = np.array(accepted)[full], np.array(drafted)[full]
    best = (1, 0.0)
    if not len(drafted):
        return best
    ids = backbone.encode(asked[0].prompt)
    for k in range(1, most + 1):
        c, v = step_costs(backbone, Arm("tuning", drafter, k), ids, repeats=9)
        tau, made = 1 + np.minimum(accepted, k).mean(), np.minimum(drafted, k).mean()
        if (s := float(tau / (made * c + v))) > best[1]:
            best = (k, s)
    return best
