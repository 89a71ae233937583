"""The rows of the paper-and-ours table: claims from `data/paper/`, our values from the accepted records.

All values come from records; a row without a record is "not tested", with a reason.
"""

import tomllib
from fnmatch import fnmatchcase

from ..common import UserError, missing_advice
from ..text import prompts
from . import records

PAPER = records.ROOT / "data" / "paper"
GROUPS = {
    "machine-free": "Independent of the machine",
    "predicted": "Predicted by the cost model",
    "wall-clock": "Wall clock",
}
VERDICTS = ("reproduced", "direction only", "differs", "not tested")


def load(name: str) -> dict:
    """Parse a file of `data/paper/`.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return tomllib.loads((PAPER / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what_to_do = missing_advice(PAPER / name, "restore it from git")
        raise UserError(f"data/paper/{name} cannot be read ({error}); {what_to_do}") from None


def choices() -> list[dict]:
    """The design choices that the sources leave open (`data/paper/choices.toml`)."""
    return load("choices.toml")["choice"]


# --- which records count ------------------------------------------------------------------


def accepted(subject: str) -> list[dict]:
    """The records of a subject that meet `[accepts]` of `claims.toml` (the kit's own models and prompts,
    minimum settings), oldest first."""
    file = load("claims.toml")
    return _accepted(subject, file["accepts"][subject], file["models"])


def _accepted(subject: str, asked: dict, models: dict[str, list[str]]) -> list[dict]:
    hashes = {sha256 for name in asked["models"] for sha256 in models[name]}
    shas = _own_prompts() if asked.get("own_prompts") else None

    def fits(record: dict) -> bool:
        settings = record["settings"]
        return (
            settings.get("model_sha256") in hashes
            and (shas is None or record.get("prompts_sha256") in shas)
            and all((_number(settings.get(name)) or 0) >= least for name, least in asked["least"].items())
        )

    return [record for record in records.read(subject) if fits(record)]


def _own_prompts() -> set[str]:
    """The hashes of the first 1, 2, .. prompts of each kind, up to all prompts."""
    own = prompts.read(prompts.ALL)
    return {prompts.sha256(prompts.first_of_each_kind(own, n)) for n in range(1, len(own) + 1)}


# --- from a claim and the records to a row ------------------------------------------------


def find(figures, steps):
    """Follow the path `steps` into a record's figures; None if it does not exist.

    A step is a name, a list index, or a dict of patterns that selects the first list element that matches
    them all: `["rows", {"form": "R=1*"}, "agreement"]`.
    """
    for step in steps:
        if isinstance(step, dict):
            elements = figures if isinstance(figures, list) else []
            hits = (e for e in elements if all(fnmatchcase(f"{e.get(k)}", f"{v}") for k, v in step.items()))
            figures = next(hits, None)
        else:
            try:
                figures = figures[step]
            except (KeyError, IndexError, TypeError):
                return None
    return figures


def _number(value) -> float | None:
    """The value if it is a number, otherwise None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def verdict(claim: dict, ours, baseline) -> str:
    """One of `VERDICTS`, by the rules in the header of `claims.toml`."""
    if ours is None:
        return "not tested"
    paper = claim.get("paper")
    if claim["unit"] == "yes":
        return "reproduced" if ours else "differs"
    if paper is not None and ours >= paper:
        return "reproduced"
    if baseline is None:
        return "not tested"
    better = baseline - ours if claim.get("better") == "lower" else ours - baseline
    return "direction only" if better >= claim.get("margin", 0) else "differs"


def _row(claim: dict, runs: list[dict]) -> dict:
    """The row of a claim from the accepted records of its subject."""
    wanted = {k: None if v == "none" else v for k, v in claim.get("settings", {}).items()}
    runs = [r for r in runs if all(r["settings"].get(k) == v for k, v in wanted.items())]

    def value(record: dict, name: str):
        steps = claim.get(name)
        found = find(record["figures"], steps) if isinstance(steps, list) else steps
        if name == "n":
            return len(found) if isinstance(found, list) else _number(found)
        if name == "value" and claim["unit"] == "yes":
            return found if isinstance(found, bool) else None
        return _number(found)

    def newest(*names: str) -> dict | None:
        """The newest record with all these values, so that a later run of other arms does not hide it."""
        names = [name for name in names if isinstance(claim.get(name), list)]
        return next((r for r in reversed(runs) if all(value(r, name) is not None for name in names)), None)

    record, reason = None, claim["reason"]
    if "subject" in claim:
        record = newest("value", "baseline") or newest("value")
        reason = reason if record else "no accepted record yet"
    shown = record or {"figures": {}}
    if record and "gate" in claim and find(record["figures"], claim["gate"]) is not True:
        reason, shown = (
            "the output is not equal to plain decoding's, so it has no speed-up",
            {"figures": {}},
        )
    ours, baseline = value(shown, "value") if "value" in claim else None, value(shown, "baseline")
    if ours is not None and claim["unit"] != "yes" and baseline is None:
        reason = "the record lacks the baseline"
    paper = claim.get("paper")
    numbers = ours is not None and paper is not None and claim["unit"] != "yes"
    return {
        "id": claim["id"],
        "group": claim["group"],
        "claim": claim["claim"],
        "source": claim["source"],
        "paper_setting": claim["paper_setting"],
        "ours_setting": claim["ours_setting"],
        "unit": claim["unit"],
        "better": claim.get("better", "higher"),
        "paper": paper,
        "ours": ours,
        "low": value(shown, "low"),
        "high": value(shown, "high"),
        "n": value(shown, "n"),
        "baseline": baseline if ours is not None else None,
        "ratio": round(ours / paper, 3) if numbers else None,
        "verdict": verdict(claim, ours, baseline),
        "reason": reason,
        "command": claim["command"],
        "machine": record["machine"] if record else None,
        "date": record["date"] if record else None,
        "commit": record.get("commit") if record else None,
    }


def table() -> list[dict]:
    """All rows, in the order of `GROUPS`."""
    file = load("claims.toml")
    runs = {subject: _accepted(subject, asked, file["models"]) for subject, asked in file["accepts"].items()}
    rows = [_row(claim, runs.get(claim.get("subject"), [])) for claim in file["claim"]]
    return sorted(rows, key=lambda row: list(GROUPS).index(row["group"]))
