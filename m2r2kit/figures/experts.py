"""Figures of experts that are read from disk: reads beside computing, and the gain (notebook 06).

Each function draws on the given axes and returns one sentence that describes the figure. No information is
in colour alone: waiting is crossed, a demand read is striped, a prefetch is plain. (Dotted hatches take four
times as long to draw, too long for a slider.)
"""

from itertools import pairwise

import numpy as np

from ..bench import claims
from ..experts.generation import Event
from .style import COLORS, HATCHES, ORDER, PALE

EDGE = "#333333"
LOOKS = {  # kind of event -> colour, hatch, label
    "compute": (PALE["blue"], "", "computes"),
    "wait": ("white", "x", "waits"),
    "demand": (COLORS["orange"], "/", "read on demand"),
    "ahead": (COLORS["green"], "", "read ahead"),
}
FOUND = {  # outcome of an access -> colour, hatch, label
    "resident": (PALE["blue"], "", "in memory"),
    "in_time": (COLORS["green"], "", "read ahead, in time"),
    "late": (COLORS["yellow"], "\\\\\\\\", "read ahead, late"),
    "missed": (COLORS["orange"], "////", "read on demand"),
}


# --- one token's time -------------------------------------------------------------------------


def by_token(events: list[Event]) -> list[list[Event]]:
    """Cut a run's timeline into tokens, each starting at 0.

    The time from a token's last event to the start of the next token counts as computing (the last experts
    and the head). The last token has no known end and is left out.
    """
    first = events[0].block
    starts = [i for i, e in enumerate(events) if e.kind == "compute" and e.block == first]
    tokens = []
    for i, j in pairwise(starts):
        begun, end = events[i].start, events[j].start
        own = [e._replace(start=e.start - begun, end=e.end - begun) for e in events[i:j]]
        rest = max(e.end for e in own if e.kind in ("compute", "wait"))
        last = max(e.block for e in own) + 1
        tokens.append([*own, Event("compute", last, rest, end - begun)])
    return tokens


def seconds_of(token: list[Event]) -> float:
    """Duration of a token."""
    begun = min(e.start for e in token if e.kind == "compute")
    return max(e.end for e in token if e.kind == "compute") - begun


def computing(tokens: list[list[Event]]) -> list[float]:
    """Seconds up to each router and after the last one, median over tokens, in the form of
    `experts.simulate.Clock`; from a run that has all experts in memory and stops at each router
    (`ExpertDecoder.cut`)."""
    rows = []
    for token in tokens:
        ends = [e.end for e in token if e.kind == "compute"]
        rows.append(np.diff([0.0, *ends]))
    return np.median(rows, axis=0).tolist()


def draw_timelines(
    ax, ways: dict[str, list[Event]], block: int | None = None, span: float | None = None
) -> str:
    """Timelines of one token with several methods, one below the other: computing and reads, in milliseconds.

    Args:
        ways: method -> events of the token.
        block: block to frame in black, with the reads of its experts.
        span: milliseconds on the axis; by default the duration of the slowest method.
    """
    ax.clear()
    ends, ticks = [], []
    for row, (name, events) in enumerate(ways.items()):
        zero = min(e.start for e in events if e.kind == "compute")
        y = -3.2 * row
        lanes = _lanes([e for e in events if e.kind in ("demand", "ahead")])
        high = 0.9 / max(1, len(lanes))
        bands = [(y, 0.9, [e for e in events if e.kind in ("compute", "wait")])]
        bands += [(y - 1.0 - i * high, high, lane) for i, lane in enumerate(lanes)]
        for top, height, boxes in bands:
            _band(ax, top, height, [e._replace(start=e.start - zero, end=e.end - zero) for e in boxes], block)
        ends.append(1e3 * seconds_of(events))
        ax.text(ends[-1], y - 0.45, f"  {ends[-1]:.1f} ms", va="center", fontsize=9, fontweight="bold")
        ticks += [(y - 0.45, name), (y - 1.45, "its reads")]
    ax.set_yticks(*zip(*ticks))
    ax.tick_params(axis="y", length=0)
    ax.set(
        xlabel="ms since the start of the token",
        xlim=(0, 1.12 * (span or max(ends))),
        ylim=(-3.2 * len(ways) + 0.9, 0.2),
    )
    ax.spines["left"].set_visible(False)
    for color, hatch, label in LOOKS.values():
        ax.bar(0, 0, color=color, hatch=hatch, edgecolor=EDGE, linewidth=0.5, label=label)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    said = ", ".join(f"{name} {end:.1f} ms" for name, end in zip(ways, ends))
    framed = "" if block is None else f" Framed: block {block}, and the reads of its experts."
    return f"One token: {said}.{framed}"


def _band(ax, top: float, height: float, boxes: list[Event], block: int | None) -> None:
    """Events as boxes in one lane; those of `block`, except waits, are framed."""
    for kind, (color, hatch, _) in LOOKS.items():
        for mine in (False, True):
            spans = [
                (1e3 * max(0.0, e.start), 1e3 * (e.end - max(0.0, e.start)))
                for e in boxes
                if e.kind == kind and (e.block == block and kind != "wait") == mine
            ]
            if spans:
                look = (
                    {"edgecolor": "black", "linewidth": 2.0}
                    if mine
                    else {"edgecolor": EDGE, "linewidth": 0.5}
                )
                place = top - height, height
                ax.broken_barh(spans, place, facecolor=color, hatch=hatch, zorder=3 if mine else 2, **look)


def _lanes(reads: list[Event]) -> list[list[Event]]:
    """Reads sorted into as few lanes as their overlaps allow."""
    lanes: list[list[Event]] = []
    for e in sorted(reads, key=lambda e: e.start):
        lane = next((lane for lane in lanes if lane[-1].end <= e.start + 1e-9), None)
        if lane is None:
            lanes.append(lane := [])
        lane.append(e)
    return lanes


# --- many tokens ----------------------------------------------------------------------------


def draw_found(ax, arms: dict[str, dict[str, float]]) -> str:
    """Outcome of the accesses, one bar per method.

    Args:
        arms: method -> shares `resident`, `in_time`, `late` and `missed`.
    """
    ax.clear()
    for y, found in enumerate(arms.values()):
        left = 0.0
        for key, (color, hatch, _) in FOUND.items():
            ax.barh(y, found[key], 0.7, left=left, color=color, hatch=hatch, edgecolor=EDGE, linewidth=0.6)
            if found[key] >= 0.06:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
                ax.text(
                    left + found[key] / 2,
                    y,
                    f"{found[key]:.0%}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    bbox=box,
                )
            left += found[key]
    for color, hatch, label in FOUND.values():
        ax.barh(0, 0, color=color, hatch=hatch, edgecolor=EDGE, linewidth=0.6, label=label)
    ax.set_yticks(range(len(arms)), list(arms))
    ax.invert_yaxis()
    ax.set(xlabel="share of all accesses", xlim=(0, 1))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    said = "; ".join(f"{name} {found['missed'] + found['late']:.0%}" for name, found in arms.items())
    return f"Accesses that had to wait for a read (late or on demand): {said}."


def draw_ways(ax, ways: dict[str, tuple[float, float]], bound: float | None = None) -> str:
    """Milliseconds per token, computing and waiting stacked; one bar per method.

    Args:
        ways: method -> (seconds of computing, seconds of waiting), per token.
        bound: lower bound with perfect overlap, in seconds.
    """
    ax.clear()
    longest = max(c + w for c, w in ways.values())
    for y, (c, w) in enumerate(ways.values()):
        for left, width, kind in ((0, c, "compute"), (c, w, "wait")):
            color, hatch, _ = LOOKS[kind]
            ax.barh(
                y, 1e3 * width, 0.7, left=1e3 * left, color=color, hatch=hatch, edgecolor=EDGE, linewidth=0.6
            )
        ax.text(1e3 * (c + w), y, f"  {1e3 * (c + w):.1f}", va="center", fontsize=9)
    for kind in ("compute", "wait"):
        color, hatch, label = LOOKS[kind]
        ax.barh(0, 0, color=color, hatch=hatch, edgecolor=EDGE, linewidth=0.6, label=label)
    if bound is not None:
        ax.axvline(1e3 * bound, color=COLORS["red"], linestyle="-.", linewidth=1.5, label="max(C, I) of LRU")
    ax.set_yticks(range(len(ways)), list(ways))
    ax.invert_yaxis()
    ax.set(xlabel="ms per token", xlim=(0, 1e3 * 1.15 * longest))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    said = ", ".join(f"{name} {1e3 * (c + w):.1f}" for name, (c, w) in ways.items())
    return f"Milliseconds per token: {said}."


def draw_bound(ax, points: dict[str, list[tuple[float, float]]]) -> str:
    """The bound of what overlap gains, (C + I) / max(C, I), by I / C, and observed gains.

    Args:
        points: name -> pairs (I/C, gain over an LRU cache of the same size).
    """
    ax.clear()
    points = {name: xy for name, xy in points.items() if xy}
    every = [x for xy in points.values() for x, _ in xy]
    low, high = min([0.05, *every]) / 1.3, max([20.0, *every]) * 1.3
    x = np.geomspace(low, high, 200)
    ax.plot(x, (1 + x) / np.maximum(1, x), color="black", linewidth=2, label="bound: (C + I) / max(C, I)")
    ax.axhline(1, color="black", linestyle=":", linewidth=1)
    for (name, xy), color, marker in zip(points.items(), ORDER, ("o", "s", "^", "D", "v", "P", "X")):
        dash = "none" if "live" in name or "record" in name else "--"
        size = 9 if dash == "none" else 5
        ax.plot(*zip(*sorted(xy)), color=color, marker=marker, linestyle=dash, markersize=size, label=name)
    ax.set(xscale="log", xlim=(low, high), ylim=(0, 2.15), ylabel="gain over LRU of the same size")
    ax.set_xlabel("I / C: reading time / computing time, log scale")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    best = {name: max(xy, key=lambda p: p[1]) for name, xy in points.items()}
    said = "; ".join(f"{name} {gain:.2f}x at I/C {at:.2f}" for name, (at, gain) in best.items())
    return f"The bound is 2 where reading takes as long as computing, and 1 at both ends. Best gains: {said}."


def record_points(record: dict, arm: str) -> list[tuple[float, float]]:
    """(I/C, gain over LRU) of an arm at each budget of a record of `m2r2kit bench experts`; budgets where the
    arm has no speed are left out."""
    return [
        (budget["io_over_compute"], budget["arms"][arm]["speedup_vs_lru"]["median"])
        for budget in record["figures"]["budgets"]
        if budget["arms"].get(arm, {}).get("speedup_vs_lru")
    ]


def newest(record_bytes: int | None = None) -> dict | None:
    """The newest record of `m2r2kit bench experts` among those with the most arms; real disks come before
    simulated links. None if there is no record.

    Args:
        record_bytes: bytes of one expert; None accepts any.
    """

    def rank(pair):
        number, figures = pair[0], pair[1]["figures"]
        return not figures["simulated"], max(len(b["arms"]) for b in figures["budgets"]), number

    found = [r for r in claims.accepted("experts") if record_bytes in (None, r["settings"]["record_bytes"])]
    return max(enumerate(found), key=rank, default=(0, None))[1]


def sizes() -> list[dict]:
    """The record that `newest` picks for each expert size measured on a real disk, smallest first."""
    real = [r for r in claims.accepted("experts") if not r["figures"]["simulated"]]
    return [newest(nbytes) for nbytes in sorted({r["settings"]["record_bytes"] for r in real})]


def draw_sizes(ax, runs: list[dict], share: float, arms=("lru", "next-router", "m2r2", "oracle")) -> str:
    """Speed-up over reading on demand by expert size, one line per arm, at one budget.

    Args:
        runs: records from `sizes`; those without this budget are left out.
        share: the budget, as a share of all experts.
    """
    ax.clear()
    at = [(r["settings"]["record_bytes"] / 1024, b) for r in runs for b in r["figures"]["budgets"]]
    at, said = [(kib, budget) for kib, budget in at if budget["share"] == share], []
    for name, color, marker in zip(arms, ORDER, ("o", "s", "^", "D")):
        seen = [(kib, b["arms"][name]["speedup_vs_on_demand"]) for kib, b in at if name in b["arms"]]
        seen = [(kib, speed) for kib, speed in seen if speed]
        x, y = [kib for kib, _ in seen], [speed["median"] for _, speed in seen]
        spread = [[speed["median"] - speed["min"] for _, speed in seen],
                  [speed["max"] - speed["median"] for _, speed in seen]]  # fmt: skip
        ax.errorbar(x, y, yerr=spread, color=color, marker=marker, capsize=3, linewidth=1.5, label=name)
        said.append(f"{name} " + ", ".join(f"{speed:.2f}x" for speed in y))
    ax.axhline(1, color="black", linestyle="--", linewidth=1)
    ax.set_xscale("log", base=2)
    ax.set_xticks([kib for kib, _ in at], [f"{kib:.0f}" for kib, _ in at])
    ax.minorticks_off()
    ax.set(xlabel="KiB of one expert", ylabel="speed-up over on demand", ylim=(0, None))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    order = ", ".join(f"{kib:.0f}" for kib, _ in at)
    return f"{share:.1%} in memory, experts of {order} KiB: {'; '.join(said)}."


def draw_budgets(axes, record: dict) -> str:
    """Speed-up of each arm over reading on demand, one of `axes` per budget of the record."""
    said = []
    for ax, budget in zip(axes, record["figures"]["budgets"]):
        ax.clear()
        arms = {n: a["speedup_vs_on_demand"] for n, a in budget["arms"].items() if a["speedup_vs_on_demand"]}
        for y, ((name, speed), hatch) in enumerate(zip(arms.items(), HATCHES * 2)):
            color = PALE["blue"] if name.startswith("m2r2") else PALE["grey"]
            ax.barh(y, speed["median"], 0.7, color=color, hatch=hatch, edgecolor=EDGE, linewidth=0.7)
            spread = [[speed["median"] - speed["min"]], [speed["max"] - speed["median"]]]
            ax.errorbar(speed["median"], y, xerr=spread, color="black", capsize=3, linewidth=1.1)
            ax.text(speed["max"], y, f"  {speed['median']:.2f}", va="center", fontsize=9)
        ax.axvline(1, color="black", linestyle="--", linewidth=1)
        ax.set_yticks(range(len(arms)), list(arms))
        ax.invert_yaxis()
        ax.set(xlabel="speed-up over on demand")
        ax.set_title(f"{budget['share']:.1%} in memory, I/C {budget['io_over_compute']:.2f}", fontsize=10)
        ax.set_xlim(0, 1.2 * max(speed["max"] for speed in arms.values()))
        best = max(arms, key=lambda name: arms[name]["median"])
        said.append(f"{budget['share']:.1%} of the experts in memory: {best} {arms[best]['median']:.2f}x")
    kind = " (simulated link)" if record["figures"]["simulated"] else ""
    return f"Fastest over on demand without a cache{kind}: {'; '.join(said)}."
