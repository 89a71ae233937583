"""Figures of a disk: its speed, an expert's record on it, and the decoding speed it permits (notebook 07).

Each function draws on the given axes and returns one sentence that describes the figure.
"""

from .experts import EDGE, LOOKS
from .style import COLORS, DASHES, HATCHES, MARKERS, ORDER, PALE


def draw_speeds(ax, speeds: dict[str, tuple[float, float | None]]) -> str:
    """Bytes/s that the program received, one bar per way of reading, and inside it what came from the disk.

    Args:
        speeds: name -> (bytes/s received, bytes/s that the system read from disks, or None if unknown).
    """
    ax.clear()
    for y, (seen, system) in enumerate(speeds.values()):
        ax.barh(y, seen / 1e6, 0.7, color=PALE["blue"], edgecolor=EDGE, linewidth=0.7)
        ax.text(seen / 1e6, y, f"  {seen / 1e6:,.0f} MB/s", va="center", fontsize=9)
        if system is not None:
            ax.barh(y, system / 1e6, 0.3, color=COLORS["orange"], hatch="////", edgecolor=EDGE, linewidth=0.7)
    ax.bar(0, 0, color=PALE["blue"], edgecolor=EDGE, label="received by the program")
    if any(system is not None for _, system in speeds.values()):
        ax.bar(0, 0, color=COLORS["orange"], hatch="////", edgecolor=EDGE, label="read from the disk")
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
    """Bytes/s by size of a read, one line per number of threads.

    Args:
        sizes: bytes of a read.
        speeds: number of threads -> bytes/s at each size.
    """
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
    ax.set(xlabel="size of a read", ylabel="MB/s", ylim=(0, None))
    ax.legend()
    small, large = (max(values[i] for values in speeds.values()) for i in (0, -1))
    best = max((v, threads, size) for threads, values in speeds.items() for v, size in zip(values, sizes))
    return (
        f"Reads of {sizes[-1] / 1024:g} KiB bring {large / small:.0f} times the bytes per second of reads of "
        f"{sizes[0] / 1024:g} KiB; fastest: {best[0] / 1e6:,.0f} MB/s with {best[1]} thread"
        f"{'s' * (best[1] > 1)} and {best[2] / 1024:g} KiB."
    )


def draw_record(ax, manifest) -> str:
    """One expert's record of the first block on disk, in pages: its tensors and its padding."""
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
        f"{record // page} pages, with {padding} bytes of padding; one read loads all of it."
    )


def draw_plan(ax, plans: list, at: int, fits: float) -> str:
    """Upper bound of tokens/s by share of experts in memory, on demand and ahead of time; one is marked.

    Args:
        plans: `bench.plan.Plan`s, by rising share.
        at: index of the marked plan.
        fits: share of the experts that fits in memory.
    """
    ax.clear()
    shares = [p.share for p in plans]
    ahead, on_demand = [p.ahead for p in plans], [p.on_demand for p in plans]
    green, orange = (LOOKS[kind][0] for kind in ("ahead", "demand"))
    ax.plot(shares, ahead, color=green, linewidth=2.2, label="ahead of time, perfect prediction")
    ax.plot(shares, on_demand, color=orange, linestyle="--", linewidth=2.2, label="on demand")
    ax.fill_between(shares, on_demand, ahead, color=PALE["grey"])
    if fits < 1:
        look = {"facecolor": "white", "edgecolor": "#bbbbbb", "hatch": "\\\\", "linewidth": 0, "zorder": 0}
        ax.axvspan(max(0, fits), 1, label="does not fit", **look)
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
    """Computed figures relative to published ones (`bench.plan.check`), one row each."""
    ax.clear()
    for y, row in enumerate(checks):
        ratio = row.computed / row.published
        ax.plot([1, ratio], [y, y], color="#999999", linewidth=1.5)
        ax.plot(ratio, y, "o", color=COLORS["blue"], markersize=8)
        ax.text(max(1, ratio), y, f"   {ratio:.2f}", va="center", fontsize=9)
    ax.axvline(1, color="black", linestyle="--", linewidth=1, label="published")
    ax.set_yticks(range(len(checks)), [row.what for row in checks])
    ax.invert_yaxis()
    ax.set(
        xlabel="computed here / published",
        xlim=(0, 1.25 * max(r.computed / r.published for r in checks)),
    )
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1))
    near = sum(abs(row.computed / row.published - 1) < 0.02 for row in checks)
    return (
        f"{near} of {len(checks)} published figures come out within 2%; the others show what "
        "is lost or was not measured."
    )
