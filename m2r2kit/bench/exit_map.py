"""What speed-up each exit would give with each number of drafts: one run an exit, and the cost model.

A draft of 8 tokens shows what shorter ones would have brought, as drafts are right or wrong in order:
of its first k tokens the first min(right, k) would have been accepted. With the costs of a draft and
of a verification, measured at the same exit, that gives the predicted speed-up of every length.

The first pass over the prompt is left out, so the map is that of long texts (`bench.py` has the whole).
"""

from collections.abc import Callable

import numpy as np

from ..common import UserError
from ..model.backbone import Backbone
from ..speculation import Drafter
from .speculation import Arm, acceptance, run_arms
from .tune import smooth


def exit_map(
    backbone: Backbone,
    drafters: dict[int, Drafter],
    prompts: list[list[int]],
    most: int = 8,
    max_tokens: int = 64,
    report: Callable | None = None,
) -> dict:
    """Figures of the record `speculation-map`.

    Args:
        drafters: one for each exit; each drafts as many as it is asked for.
        most: the longest draft, at least 2 (the costs of verifying are a line through several lengths).

    Returns:
        `drafts`, the lengths 1..most, and `rows`, one an exit: `exit`, `acceptance` by position,
        `draft_cost` c, `verify_cost` v of each length, `predicted_speedup` of each length, `equal`.

    Raises:
        UserError: there is no exit, the longest draft is too short, or no text has room for it.
    """
    if not drafters or most < 2:
        raise UserError("A map needs at least one exit and drafts of at least 2 tokens.")
    arms = {exit: Arm(f"exit {exit}", drafter, most) for exit, drafter in drafters.items()}
    run_arms(backbone, list(arms.values()), prompts, max_tokens, report=report)
    lengths, rows = range(1, most + 1), []
    for exit, arm in arms.items():
        c, line = smooth(lengths, backbone, arm.drafter, prompts[0])
        v = [float(np.polyval(line, k)) for k in lengths]
        rows.append({
            "exit": exit,
            "acceptance": acceptance(arm.accepted, arm.drafted),
            "draft_cost": c,
            "verify_cost": v,
            "predicted_speedup": predicted(arm.accepted, arm.drafted, c, v) if arm.equal else None,
            "equal": arm.equal,
        })  # fmt: skip
    return {"drafts": list(lengths), "rows": rows}


def predicted(accepted: list[int], drafted: list[int], c: float, v: list[float]) -> list[float]:
    """S = tau / (k c + v) for drafts of k = 1, 2, .. tokens.

    Only steps that drafted as many as was asked count, for the last ones of a text are short.

    Args:
        accepted, drafted: of each step, with the longest drafts.
        c, v: cost of a draft, and of a verification of each length, in plain steps.
    """
    right = np.array([n for n, d in zip(accepted, drafted, strict=True) if d == len(v)])
    if not len(right):
        raise UserError(f"No step drafted {len(v)} tokens; ask for longer texts or shorter drafts.")
    taus = [1 + np.minimum(right, k).mean() for k in range(1, len(v) + 1)]
    return [float(tau / (k * c + cost)) for k, (tau, cost) in enumerate(zip(taus, v, strict=True), 1)]
