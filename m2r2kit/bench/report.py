"""The paper-and-ours table (`claims.py`) for the terminal, a notebook and Markdown."""

import html

from .claims import GROUPS, VERDICTS, choices, table
from .tables import Table

__all__ = ["GROUPS", "VERDICTS", "amount", "as_html", "as_markdown", "as_text", "cells", "choices", "table"]
HEADS = ("claim", "paper", "ours", "ratio", "verdict")


def amount(value, unit: str) -> str:
    """A value as text: `2.80x`, `0.61`, `yes`."""
    if unit == "yes":
        return "yes" if value else "no"
    return f"{value:.2f}{'x' if unit == 'x' else ''}"


def cells(row: dict) -> dict:
    """The cells of a row: claim, the paper's value, ours with its range, ratio, verdict, machine."""
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


def _tables(rows: list[dict] | None, fold: bool = False) -> list[tuple[str, Table]]:
    """A title and a table for each group; each row has its details below."""
    found = []
    for group, title in GROUPS.items():
        members = [row for row in (table() if rows is None else rows) if row["group"] == group]
        lines = [[cells(row)[head] for head in HEADS] for row in members]
        details = [[f"{name}: {text}" for name, text in _details(row)] for row in members]
        if members:
            found.append((title, Table(HEADS, lines, details=details, left=HEADS, fold=fold)))
    return found


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
    found = [f"{title}\n{'=' * len(title)}\n{part.as_text(width)}" for title, part in _tables(rows)]
    return "\n\n".join(found)


def as_markdown(rows: list[dict] | None = None) -> str:
    """The tables in Markdown, one per group."""
    rows, heads = table() if rows is None else rows, (*HEADS, "why", "again")
    out = []
    for group, title in GROUPS.items():
        lines = []
        for row in (row for row in rows if row["group"] == group):
            again = f"`{row['command']}`" if row["command"] else "-"
            shown = cells(row) | {"claim": f"{row['claim']} ({row['source']})"}
            lines.append([*(shown[head] for head in HEADS), row["reason"], again])
        if lines:
            out.append(f"**{title}**\n\n{Table(heads, lines, left=heads).as_markdown()}")
    return "\n\n".join(out)


def as_html(rows: list[dict] | None = None) -> str:
    """The tables for a notebook; the details of a row unfold below its claim."""
    return "".join(f"<p><b>{html.escape(t)}</b></p>{p._repr_html_()}" for t, p in _tables(rows, fold=True))


def choices_as_markdown() -> str:
    """The choices, one row each."""
    heads = ("choice", "what the sources say", "ours", "alternative", "switch", "why")
    names = ("what", "open", "ours", "alternative", "switch", "why")
    rows = [[choice[name] or "-" for name in names] for choice in choices()]
    return Table(heads, rows, left=heads).as_markdown()
