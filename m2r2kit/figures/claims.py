"""The paper-and-ours table as a bar chart (notebook 14)."""

from ..bench.report import VERDICTS, amount
from .style import COLORS, PALE

EDGE = "#333333"
UNITS = {"x": "speed-ups", "share": "shares"}


def draw_rows(ax, rows: list[dict], unit: str) -> str:
    """Our value as a solid bar, shared by all rows with the same value; below it, hatched, the value that
    each of
    these rows compares it with: the paper's, otherwise the baseline of the same run.

    Args:
        rows: from `report.table()`.
        unit: draw the rows with this unit, `x` or `share`.
    """
    ax.clear()
    rows = [row for row in rows if row["unit"] == unit]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["ours"], row["low"], row["high"]), []).append(row)
    ticks: list[str] = []
    for (ours, low, high), members in groups.items():
        _ours(ax, len(ticks), ours, low, high, unit)
        ticks.append("ours")
        for row in members:
            _against(ax, len(ticks), row)
            ticks.append(row["id"])
    ax.set_yticks(range(len(ticks)), ticks)
    ax.set_ylim(len(ticks) - 0.4, -0.6)
    ends = [row[name] or 0 for row in rows for name in ("paper", "ours", "high", "baseline")]
    ax.set_xlim(0, 1.4 * max(ends, default=1))
    verdicts = [row["verdict"] for row in rows]
    counted = ", ".join(f"{verdicts.count(v)} {v}" for v in VERDICTS if v in verdicts)
    return f"Verdicts on {len(rows)} {UNITS[unit]}: {counted}."


def _ours(ax, y: int, ours, low, high, unit: str) -> None:
    if ours is None:
        ax.text(0, y, " not tested", va="center", style="italic")
        return
    ax.barh(y, ours, 0.8, color=COLORS["blue"], edgecolor=EDGE)
    if low is not None:
        ax.plot([low, high], [y, y], "k|-", linewidth=1)
    ax.text(
        max(ours, high or 0), y, f" ours {amount(ours, unit)}", va="center", fontweight="bold", fontsize=9
    )


def _against(ax, y: int, row: dict) -> None:
    against = row["paper"] or row["baseline"]
    if against is None:
        return
    name = "paper" if row["paper"] else "at most" if row["better"] == "lower" else "baseline"
    ax.barh(y, against, 0.8, color=PALE["grey"], edgecolor=EDGE, hatch="///")
    ax.text(against, y, f" {name} {amount(against, row['unit'])}", va="center", fontsize=9)
