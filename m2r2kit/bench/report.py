"""The paper-and-ours table: claims from `data/paper/`, our values from the records.

Nothing here is typed: a row without a record reads "not tested", and says why.
"""

import html
import json
import shutil
import textwrap
import tomllib
from fnmatch import fnmatchcase

from ..common import UserError
from . import records

PAPER = records.ROOT / "data" / "paper"
GROUPS = {
    "machine-free": "What does not depend on a machine",
    "predicted": "What the cost model predicts",
    "wall-clock": "Wall clock",
}
VERDICTS = ("reproduced", "direction only", "differs", "not tested")


def _load(name: str) -> dict:
    try:
        return tomllib.loads((PAPER / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"data/paper/{name} cannot be read ({error}); restore it from git") from None


def choices() -> list[dict]:
    """What the paper leaves open to us, as `data/paper/choices.toml` lists it."""
    return _load("choices.toml")["choice"]


# --- from a claim and the records to a row ------------------------------------------------


def find(figures, steps):
    """Follow `steps` into a record's figures; None where they lead nowhere.

    A step is a name, an index into a list, or a table of patterns that picks the first element of
    a list that matches them all: `["rows", {"form": "R=1*"}, "agreement"]`.
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


def verdict(claim: dict, ours, baseline) -> str:
    """One of `VERDICTS`, by the rule at the head of `claims.toml`."""
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


def _row(claim: dict) -> dict:
    record, reason = None, claim["reason"]
    if "subject" in claim:
        wanted = {k: None if v == "none" else v for k, v in claim.get("settings", {}).items()}
        runs = [
            r
            for r in records.read(claim["subject"])
            if all(r["settings"].get(k) == v for k, v in wanted.items())
        ]

        def newest(*names):
            """The newest record that holds all these values: a later run of other arms does not hide it."""
            paths = [claim[name] for name in names if isinstance(claim.get(name), list)]
            whole = [r for r in runs if all(find(r["figures"], path) is not None for path in paths)]
            return whole[-1] if whole else None

        record = newest("value", "baseline") or newest("value")
        if record is None:
            reason = "no record yet"
    figures = record["figures"] if record else {}
    if record and "gate" in claim and find(figures, claim["gate"]) is not True:
        reason, figures = "the output was not equal to plain decoding, so its speed means nothing", {}

    def number(name):
        steps = claim.get(name)
        return find(figures, steps) if isinstance(steps, list) else steps

    ours, baseline, n = number("value"), number("baseline"), number("n")
    if ours is not None and claim["unit"] != "yes" and baseline is None:
        reason = "the record has no baseline for it"
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
        "low": number("low"),
        "high": number("high"),
        "n": len(n) if isinstance(n, list) else n,
        "baseline": baseline if ours is not None else None,
        "ratio": round(ours / paper, 3) if numbers else None,
        "verdict": verdict(claim, ours, baseline),
        "reason": reason,
        "command": claim["command"],
        "machine": record["machine"] if record else None,
        "date": record["date"] if record else None,
        "commit": record["commit"] if record else None,
    }


def table() -> list[dict]:
    """The rows, first what no machine changes, then the prediction, then wall clock."""
    rows = [_row(claim) for claim in _load("claims.toml")["claim"]]
    return sorted(rows, key=lambda row: list(GROUPS).index(row["group"]))


# --- rows as text -------------------------------------------------------------------------


def amount(value, unit: str) -> str:
    """A value as a reader wants it: `2.80x`, `0.61`, `yes`."""
    if unit == "yes":
        return "yes" if value else "no"
    return f"{value:.2f}{'x' if unit == 'x' else ''}"


def cells(row: dict) -> dict:
    """What the table shows of a row: the paper's value, ours with its spread, ratio, machine."""
    unit, ours = row["unit"], "-"
    if row["ours"] is not None:
        about = []
        if row["low"] is not None and row["high"] is not None:
            about.append(f"{row['low']:.2f} to {row['high']:.2f}")
        if row["n"] is not None:
            about.append(f"n = {row['n']}")
        if row["baseline"] is not None:
            about.append(f"baseline {amount(row['baseline'], unit)}")
        ours = amount(row["ours"], unit) + (f" ({', '.join(about)})" if about else "")
    made = "-"
    if row["machine"]:
        cores = row["machine"]["cores"]
        made = f"{row['machine']['chip']}, {cores} core{'s' * (cores != 1)}, {row['date'][:10]}"
    return {
        "claim": row["claim"],
        "paper": "not verified" if row["paper"] is None else amount(row["paper"], unit),
        "ours": ours,
        "ratio": "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        "verdict": row["verdict"],
        "machine": made,
    }


def _grouped(rows):
    for group, title in GROUPS.items():
        if members := [row for row in rows if row["group"] == group]:
            yield title, members


def _details(row: dict) -> list[tuple[str, str]]:
    pairs = [
        ("where", row["source"]),
        ("paper's setting", row["paper_setting"]),
        ("our setting", row["ours_setting"]),
        ("why", row["reason"]),
        ("again", row["command"]),
        ("measured on", cells(row)["machine"]),
    ]
    return [(name, text) for name, text in pairs if text not in ("", "-")]


def as_text(width: int = 100, rows: list[dict] | None = None) -> str:
    """The table for a terminal `width` characters wide."""
    columns = {"paper": 12, "ours": 26, "ratio": 5, "verdict": 14}
    first = max(24, width - sum(columns.values()) - 2 * len(columns))
    widths = {"claim": first, **columns}

    def lines(texts):
        wrapped = [textwrap.wrap(texts[name], w) or [""] for name, w in widths.items()]
        for i in range(max(map(len, wrapped))):
            parts = ((w[i] if i < len(w) else "").ljust(n) for w, n in zip(wrapped, widths.values()))
            yield "  ".join(parts).rstrip()

    heads = {"claim": "claim", "paper": "paper", "ours": "ours", "ratio": "ratio", "verdict": "verdict"}
    out = []
    for title, members in _grouped(table() if rows is None else rows):
        out += [title, "=" * len(title), *lines(heads), *lines({name: "-" * w for name, w in widths.items()})]
        for row in members:
            out += lines(cells(row))
            for name, text in _details(row):
                text = textwrap.indent(textwrap.fill(f"{name}: {text}", width - 6), "      ")
                out.append("    " + text.lstrip())
            out.append("")
    return "\n".join(out).rstrip()


def as_markdown(rows: list[dict] | None = None) -> str:
    """The table in Markdown, one table a group."""
    out = []
    for title, members in _grouped(table() if rows is None else rows):
        heads = "| claim | paper | ours | ratio | verdict | why | again |"
        out += [f"**{title}**", "", heads, "|---" * 7 + "|"]
        for row in members:
            c = cells(row)
            again = f"`{row['command']}`" if row["command"] else "-"
            claim = f"{c['claim']} ({row['source']})"
            texts = [claim, c["paper"], c["ours"], c["ratio"], c["verdict"], row["reason"], again]
            out.append("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |")
        out.append("")
    return "\n".join(out).rstrip()


def as_html(rows: list[dict] | None = None) -> str:
    """The table for a notebook: what a row rests on unfolds below its claim."""
    heads = ("claim", "paper", "ours", "ratio", "verdict")
    out = ["<table><thead><tr>", *(f"<th>{head}</th>" for head in heads), "</tr></thead><tbody>"]
    for title, members in _grouped(table() if rows is None else rows):
        out.append(f'<tr><th colspan="{len(heads)}" style="text-align: left">{title}</th></tr>')
        for row in members:
            c = {name: html.escape(text) for name, text in cells(row).items()}
            notes = "<br>".join(f"<i>{n}:</i> {html.escape(t)}" for n, t in _details(row))
            c["claim"] = f"<details><summary>{c['claim']}</summary><small>{notes}</small></details>"
            out.append("<tr>" + "".join(f'<td style="text-align: left">{c[h]}</td>' for h in heads) + "</tr>")
    return "".join([*out, "</tbody></table>"])


def choices_as_markdown() -> str:
    """The choices, one row each."""
    heads = ("what", "open", "ours", "alternative", "switch", "why")
    rows = [[choice[name].replace("|", "\\|") or "-" for name in heads] for choice in choices()]
    names = ("choice", "what the sources say", "ours", "alternative", "switch", "why")
    return "\n".join("| " + " | ".join(row) + " |" for row in [names, ["---"] * len(heads), *rows])


def run(as_json: bool = False, markdown: bool = False) -> int:
    """`m2r2kit report`: print the table."""
    rows = table()
    if as_json:
        print(json.dumps(rows, indent=1))
    elif markdown:
        print(as_markdown(rows))
    else:
        print(as_text(min(140, shutil.get_terminal_size((100, 24)).columns), rows))
        counts = [f"{sum(row['verdict'] == v for row in rows)} {v}" for v in VERDICTS]
        print(f"\nreport: {', '.join(counts)}")
    return 0
