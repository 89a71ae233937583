"""The table of all decoding methods, from a record of `m2r2kit bench speculation` (notebook 04).

ArmsTable(newest())            # at the end of a cell: a table
print(ArmsTable(newest()))     # the same in a terminal
"""

from ..common import UserError
from ..speculation.registry import METHODS
from . import claims, costs
from .tables import Table

HEADS = ("method", "speed-up", "from..to", "predicted", "tau", "c", "v", "parameters", "training")


def newest(subject: str = "speculation") -> dict:
    """The newest record among those with the most arms.

    Raises:
        UserError: there is no record yet.
    """
    found = claims.accepted(subject)
    if not found:
        raise UserError("There is no record yet; `m2r2kit bench speculation --record` makes one.")
    return max(enumerate(found), key=lambda pair: (len(pair[1]["figures"]["arms"]), pair[0]))[1]


def parts(record: dict, name: str) -> dict:
    """The factors of a drafting arm's speed-up, in terms of the cost model (`costs.py`).

    Returns:
        `tau`, `c`, `v` as measured; `g`, mean drafts per step; `a`, the acceptance that yields this tau if it
        is equal at all positions; `measured` and `predicted` speed-up, the latter with the prefill if the
        record has it (`speculation.py`).

    Raises:
        UserError: the record has no such arm, or the arm drafts nothing or has no speed because its text
            differs from plain decoding's.
    """
    arms = record["figures"]["arms"]
    if name not in arms:
        raise UserError(
            f"This record has no arm {name}, only {', '.join(arms)}; "
            f"`m2r2kit bench speculation --methods all --record` makes one with all arms."
        )
    arm = arms[name]
    predicted = arm.get("predicted_speedup")
    if not arm["drafts"] or not arm["speedup_vs_plain"] or not predicted:
        raise UserError(f"The arm {name} has no drafts or no speed; choose one that has both.")
    c, v, tau = (arm[k] for k in ("draft_cost", "verify_cost", "tau"))
    g = arm.get("drafted")
    if g is None:  # older records: solve S = tau / (g c + v) for g, unless c is 0
        g = (tau / predicted - v) / c if c > 1e-6 else arm["drafts"]
    g = max(g, tau - 1)
    if g <= 0:
        raise UserError(f"The arm {name} never drafted a token; choose one that did.")
    return {"a": costs.even_acceptance(tau, g), "c": c, "v": v, "g": g, "tau": tau,
            "measured": arm["speedup_vs_plain"]["median"], "predicted": predicted}  # fmt: skip


class ArmsTable(Table):
    """The arms of a record, fastest first; arms that changed the text come last, without a speed-up.

    Args:
        record: one of `records.read("speculation")`.
    """

    def __init__(self, record: dict):
        arms, settings = record["figures"]["arms"], record["settings"]
        self.names = sorted(arms, key=lambda name: -((arms[name]["speedup_vs_plain"] or {}).get("median", 0)))
        super().__init__(
            HEADS,
            [_row(name, arms[name]) for name in self.names],
            f"{settings.get('prompts', '?')} prompts, up to {settings.get('max_tokens', '?')} tokens each, "
            f"{settings.get('repeats', '?')} rounds; {record['machine']['chip']}, {record['date'][:10]}: "
            f"{record['command']}",
            [[str(METHODS[name])] if name in METHODS else [] for name in self.names],
            bold=[name for name in self.names if name.startswith("m2r2")],
        )


def _row(name: str, arm: dict) -> tuple[str, ...]:
    speed, predicted = arm["speedup_vs_plain"], arm.get("predicted_speedup")
    drafts = bool(arm["drafts"])
    return (
        name,
        f"{speed['median']:.2f}x" if speed else "other text",
        f"{speed['min']:.2f}..{speed['max']:.2f}" if speed else "-",
        f"{predicted:.2f}x" if predicted and drafts else "-",
        f"{arm['tau']:.2f}",
        f"{round(arm['draft_cost'], 2) + 0.0:.2f}" if drafts else "-",  # avoid -0.00
        f"{arm['verify_cost']:.2f}" if drafts else "-",
        _count(arm.get("parameters")),
        _training(arm.get("train_seconds"), arm.get("train_steps")),
    )


def _count(parameters: int | None) -> str:
    if parameters is None:
        return "-"
    return "0" if parameters == 0 else f"{parameters / 1000:,.0f} k"


def _training(seconds: float | None, steps: int | None) -> str:
    """Such as `12 min (2,000 steps)`; unknown parts are left out."""
    time = f"{seconds / 60:.0f} min" if seconds else ""
    taken = f"{steps:,} steps" if steps else ""
    return f"{time} ({taken})" if time and taken else time or taken or "-"
