"""Predicted speed-up of each exit with each number of drafts, from one run per exit and the cost model.

A draft of 8 tokens also gives the acceptance of shorter ones: of its first k tokens, the first min(right, k)
are accepted. With the costs of a draft and a verification, measured at the same exit, this predicts the
speed-up of each length.

The prefill is left out, so the map holds for long texts (`speculation.py` includes it).
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
        drafters: exit -> drafter; a drafter must not stop early.
        most: the longest draft, at least 2 (verification costs are fitted over several lengths).

    Returns:
        `drafts`, the lengths 1..most, and `rows`, one per exit: `exit`, `acceptance` by position,
        `draft_cost` c, `verify_cost` v of each length, `predicted_speedup` of each length, `equal`.

    Raises:
        UserError: there is no exit, the longest draft is too short, or no step drafts that many tokens.
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

    Only steps with the full draft length count; the last steps of a text are shorter.

    Args:
        accepted, drafted: per step, with the longest drafts.
        c, v: cost of a draft, and of a verification of each length, in plain steps.

    Raises:
        UserError: no step has the full draft length.
    """
    right = np.array([n for n, d in zip(accepted, drafted, strict=True) if d == len(v)])
    if not len(right):
        raise UserError(f"No step drafted {len(v)} tokens; use longer texts or shorter drafts.")
    taus = [1 + np.minimum(right, k).mean() for k in range(1, len(v) + 1)]
    return [float(tau / (k * c + cost)) for k, (tau, cost) in enumerate(zip(taus, v, strict=True), 1)]
