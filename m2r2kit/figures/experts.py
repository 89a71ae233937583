"""Pictures of experts that come from disk: reads beside computing, and what that gains (notebook 06).

Each function draws on axes that it is given, and returns one sentence that says what it shows. What a
colour tells, a place or a hatch tells as well: waiting is crossed, a read on demand is striped, one asked for
ahead is plain. (Dots would make a slider wait: they take four times as long to draw.)
"""

from itertools import pairwise

import numpy as np

from ..bench import claims
from ..experts.generation import Event
from .style import COLORS, HATCHES, ORDER, PALE

EDGE = "#333333"
LOOKS = {  # of an event: colour, hatch, what it is called
    "compute": (PALE["blue"], "", "computes"),
    "wait": ("white", "x", "waits"),
    "demand": (COLORS["orange"], "/", "read on demand"),
    "ahead": (COLORS["green"], "", "read ahead"),
}
FOUND = {  # of an access
    "resident": (PALE["blue"], "", "in memory"),
    "in_time": (COLORS["green"], "", "read ahead, in time"),
    "late": (COLORS["yellow"], "\\\\\\\\", "read ahead, late"),
    "missed": (COLORS["orange"], "////", "read on demand"),
}


# --- one token's time -------------------------------------------------------------------------


def by_token(events: list[Event]) -> list[list[Event]]:
    """A run's timeline cut into tokens, each from 0.

    What follows a token's last wait, to the beginning of the next token, is computing as well (the last
    experts and the head). The last token has no end, and is left out.
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
    """From a token's beginning to its end."""
    begun = min(e.start for e in token if e.kind == "compute")
    return max(e.end for e in token if e.kind == "compute") - begun


def computing(tokens: list[list[Event]]) -> list[float]:
    """Seconds up to each router and behind the last one, the middle of all tokens, as `experts.clock` takes
    them; of a run that has all experts and stops at each router (`ExpertDecoder.cut`)."""
    rows = []
    for token in tokens:
        ends = [e.end for e in token if e.kind == "compute"]
        rows.append(np.diff([0.0, *ends]))
    return np.median(rows, axis=0).tolist()


def draw_timelines(
    ax, ways: dict[str, list[Event]], block: int | None = None, span: float | None = None
) -> str:
    """One token in several ways, one below the other: what computes, and what reads, in milliseconds.

    Args:
        ways: name -> events of the token.
        block: framed in black, with the reads of its experts.
        span: milliseconds that the axis shows; by default those of the slowest way.
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
        xlabel="ms since the token began",
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
    """Boxes side by side; those of a block, but its wait, are framed."""
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
    """Reads in as few lanes as overlap."""
    lanes: list[list[Event]] = []
    for e in sorted(reads, key=lambda e: e.start):
        lane = next((lane for lane in lanes if lane[-1].end <= e.start + 1e-9), None)
        if lane is None:
            lanes.append(lane := [])
        lane.append(e)
    return lanes


# --- many tokens ----------------------------------------------------------------------------


def draw_found(ax, arms: dict[str, dict[str, float]]) -> str:
    """What each access found, a bar a way; shares `resident`, `in_time`, `late`, `missed`."""
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
    """Milliseconds a token: computing, and on it waiting; a bar a way.

    Args:
        ways: name -> (seconds of computing, seconds of waiting), a token.
        bound: seconds that no overlap can go below.
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
    ax.set(xlabel="ms a token", xlim=(0, 1e3 * 1.15 * longest))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    said = ", ".join(f"{name} {1e3 * (c + w):.1f}" for name, (c, w) in ways.items())
    return f"Milliseconds a token: {said}."


def draw_bound(ax, points: dict[str, list[tuple[float, float]]]) -> str:
    """The most that overlap can gain, (C + I) / max(C, I) over I / C, and gains that were seen.

    Args:
        points: name -> (I/C, gain over a cache of the same size).
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
    ax.set_xlabel("I / C: reading over computing, log scale")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    best = {name: max(xy, key=lambda p: p[1]) for name, xy in points.items()}
    said = "; ".join(f"{name} {gain:.2f}x at I/C {at:.2f}" for name, (at, gain) in best.items())
    return f"The bound is 2 where reading takes as long as computing, and 1 at both ends. Best gains: {said}."


def record_points(record: dict, arm: str) -> list[tuple[float, float]]:
    """(I/C, gain over LRU) of an arm at each budget of a record of `m2r2kit bench experts`."""
    return [
        (budget["io_over_compute"], budget["arms"][arm]["speedup_vs_lru"]["median"])
        for budget in record["figures"]["budgets"]
        if budget["arms"].get(arm, {}).get("speedup_vs_lru")
    ]


def newest(record_bytes: int | None = None) -> dict | None:
    """The record of `m2r2kit bench experts` on a real disk with the most arms, of several the newest; of a
    simulated link where there is none other; None where nothing was measured.

    Args:
        record_bytes: of one expert; None is any.
    """

    def rank(pair):
        number, figures = pair[0], pair[1]["figures"]
        return not figures["simulated"], max(len(b["arms"]) for b in figures["budgets"]), number

    found = [r for r in claims.accepted("experts") if record_bytes in (None, r["settings"]["record_bytes"])]
    return max(enumerate(found), key=rank, default=(0, None))[1]


def sizes() -> list[dict]:
    """The newest record on a real disk of each size of expert, from the smallest on."""
    real = [r for r in claims.accepted("experts") if not r["figures"]["simulated"]]
    return [newest(nbytes) for nbytes in sorted({r["settings"]["record_bytes"] for r in real})]


def draw_sizes(ax, runs: list[dict], share: float, arms=("lru", "next-router", "m2r2", "oracle")) -> str:
    """Speed over reading on demand, by the size of an expert: a line an arm, at one budget of all records.

    Args:
        runs: of `sizes`; those without this budget are left out.
        share: of all experts, that is in memory.
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
    ax.set(xlabel="KiB of one expert", ylabel="speed over on demand", ylim=(0, None))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    order = ", ".join(f"{kib:.0f}" for kib, _ in at)
    return f"{share:.1%} in memory, experts of {order} KiB: {'; '.join(said)}."


def draw_budgets(axes, record: dict) -> str:
    """Speed of each arm at each budget of a record, over reading on demand; axes for as many budgets."""
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
        ax.set(xlabel="speed over on demand")
        ax.set_title(f"{budget['share']:.1%} in memory, I/C {budget['io_over_compute']:.2f}", fontsize=10)
        ax.set_xlim(0, 1.2 * max(speed["max"] for speed in arms.values()))
        best = max(arms, key=lambda name: arms[name]["median"])
        said.append(f"{budget['share']:.1%} of the experts in memory: {best} {arms[best]['median']:.2f}x")
    kind = " (simulated link)" if record["figures"]["simulated"] else ""
    return f"Fastest over on demand without a cache{kind}: {'; '.join(said)}."
