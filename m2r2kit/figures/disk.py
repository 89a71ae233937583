"""Pictures of a disk, of what lies on it, and of what it lets a model do (notebook 07).

Each function draws on axes that it is given, and returns one sentence that says what it shows.
"""

from .experts import EDGE, LOOKS
from .style import COLORS, DASHES, HATCHES, MARKERS, ORDER, PALE


def draw_speeds(ax, speeds: dict[str, tuple[float, float | None]]) -> str:
    """Bytes/s that a program saw, a bar a way of reading, and in it what the system read from the disk."""
    ax.clear()
    for y, (seen, system) in enumerate(speeds.values()):
        ax.barh(y, seen / 1e6, 0.7, color=PALE["blue"], edgecolor=EDGE, linewidth=0.7)
        ax.text(seen / 1e6, y, f"  {seen / 1e6:,.0f} MB/s", va="center", fontsize=9)
        if system is not None:
            ax.barh(y, system / 1e6, 0.3, color=COLORS["orange"], hatch="////", edgecolor=EDGE, linewidth=0.7)
    ax.bar(0, 0, color=PALE["blue"], edgecolor=EDGE, label="what the program got")
    if any(system is not None for _, system in speeds.values()):
        ax.bar(0, 0, color=COLORS["orange"], hatch="////", edgecolor=EDGE, label="what came from the disk")
    ax.set_yticks(range(len(speeds)), list(speeds))
    ax.invert_yaxis()
    ax.set(xlabel="MB/s", xlim=(0, 1.2e-6 * max(seen for seen, _ in speeds.values())))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    said = "; ".join(
        f"{name} {seen / 1e6:,.0f} MB/s"
        + ("" if system is None else f", of them {min(1, system / seen):.0%} disk")
        for name, (seen, system) in speeds.items()
    )
    return f"{said}."


def draw_sizes(ax, sizes: list[int], speeds: dict[int, list[float]]) -> str:
    """Bytes/s over the size of a read, a line a number of threads."""
    ax.clear()
    for (threads, values), color, marker, dash in zip(speeds.items(), ORDER, MARKERS, DASHES):
        label = f"{threads} thread{'s' * (threads > 1)}"
        ax.plot(
            range(len(sizes)),
            [v / 1e6 for v in values],
            color=color,
            marker=marker,
            linestyle=dash,
            label=label,
        )
    ax.set_xticks(range(len(sizes)), [f"{size / 1024:g} KiB" for size in sizes])
    ax.set(xlabel="bytes of a read", ylabel="MB/s", ylim=(0, None))
    ax.legend()
    small, large = (max(values[i] for values in speeds.values()) for i in (0, -1))
    best = max((v, threads, size) for threads, values in speeds.items() for v, size in zip(values, sizes))
    return (
        f"Reads of {sizes[-1] / 1024:g} KiB bring {large / small:.0f} times the bytes per second of reads of "
        f"{sizes[0] / 1024:g} KiB; fastest: {best[0] / 1e6:,.0f} MB/s with {best[1]} thread"
        f"{'s' * (best[1] > 1)} and {best[2] / 1024:g} KiB."
    )


def draw_record(ax, manifest) -> str:
    """A record of the first block on disk: its pieces, and its padding, in pages."""
    ax.clear()
    page, left, record = 4096, 0, manifest.record_size(manifest.blocks[0])
    for piece, color, hatch in zip(
        manifest.pieces[0], (PALE["blue"], PALE["orange"], PALE["grey"]) * 4, HATCHES * 2
    ):
        width = piece.nbytes / page
        ax.barh(0, width, 1, left=left, color=color, hatch=hatch, edgecolor=EDGE)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        ax.text(left + width / 2, 0, piece.name.split(".")[0], ha="center", va="center", fontsize=9, bbox=box)
        left += width
    ax.set(yticks=[], xlabel="pages of 4 KiB", xlim=(0, record / page), ylim=(-0.55, 0.55))
    ax.spines["left"].set_visible(False)
    padding = record - sum(piece.nbytes for piece in manifest.pieces[0])
    return (
        f"One expert is one record of {record / 1024:.0f} KiB, "
        f"{record // page} pages, of which {padding} bytes are padding; one read brings all."
    )


def draw_plan(ax, plans: list, at: int, room: float) -> str:
    """Tokens/s at most over the share of experts in memory, on demand and ahead of time, and a place on it.

    Args:
        plans: `planner.Plan`s, by rising share.
        at: which of them is marked.
        room: share for which there is memory.
    """
    ax.clear()
    shares = [p.share for p in plans]
    ahead, on_demand = [p.ahead for p in plans], [p.on_demand for p in plans]
    green, orange = (LOOKS[kind][0] for kind in ("ahead", "demand"))
    ax.plot(shares, ahead, color=green, linewidth=2.2, label="ahead of time, all right")
    ax.plot(shares, on_demand, color=orange, linestyle="--", linewidth=2.2, label="on demand")
    ax.fill_between(shares, on_demand, ahead, color=PALE["grey"])
    if room < 1:
        look = {"facecolor": "white", "edgecolor": "#bbbbbb", "hatch": "\\\\", "linewidth": 0, "zorder": 0}
        ax.axvspan(max(0, room), 1, label="does not fit", **look)
    p = plans[at]
    ax.plot([p.share] * 2, [p.on_demand, p.ahead], color="black", marker="o", linestyle="-", label="here")
    ax.set(
        xlabel="share of the experts in memory", ylabel="tokens/s at most", yscale="log", xlim=(-0.01, 1.01)
    )
    low, high = ax.get_ylim()
    ax.set_yticks([t for t in (m * 10**e for e in range(-3, 5) for m in (1, 2, 5)) if low <= t <= high])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return (
        f"With {p.share:.0%} of the experts in memory: C {1e3 * p.compute:.1f} ms, I {1e3 * p.read:.1f} ms, "
        f"I/C {p.ratio:.2f}; {p.on_demand:.1f} tokens/s on demand, {p.ahead:.1f} ahead of time "
        f"({p.bound:.2f} times)."
    )


def draw_checks(ax, checks: list) -> str:
    """Published figures beside computed ones: computed over published, a row each."""
    ax.clear()
    for y, row in enumerate(checks):
        ratio = row.computed / row.published
        ax.plot([1, ratio], [y, y], color="#999999", linewidth=1.5)
        ax.plot(ratio, y, "o", color=COLORS["blue"], markersize=8)
        ax.text(max(1, ratio), y, f"   {ratio:.2f}", va="center", fontsize=9)
    ax.axvline(1, color="black", linestyle="--", linewidth=1, label="what they published")
    ax.set_yticks(range(len(checks)), [row.what for row in checks])
    ax.invert_yaxis()
    ax.set(
        xlabel="computed here, as a multiple of it",
        xlim=(0, 1.25 * max(r.computed / r.published for r in checks)),
    )
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1))
    near = sum(abs(row.computed / row.published - 1) < 0.02 for row in checks)
    return (
        f"{near} of {len(checks)} published figures come out within 2%; the others say what is lost, or was "
        "not measured."
    )
