"""Figures of what routers choose (notebook 05), from arrays of expert ids.

Each function draws on the given axes and returns one sentence that describes the figure. `chosen` (T, k)
holds the experts that one block's router selected for each of T tokens.
"""

import numpy as np

from .style import COLORS, HATCHES, ORDER, PALE, lines, styles, visible

EDGE = "#333333"
RIGHT = {"color": COLORS["blue"], "marker": "s"}
MISSED = {"color": COLORS["red"], "marker": "x"}
NEEDLESS = {"markeredgecolor": "#999999", "markerfacecolor": "none", "marker": "o", "color": "none"}


def draw_router(ax, shares: np.ndarray, top_k: int, token: str) -> str:
    """Router probabilities (E,) of one token, one bar per expert; the `top_k` that run are hatched."""
    ax.clear()
    runs = np.argsort(-shares, kind="stable")[:top_k]
    for e, share in enumerate(shares):
        look = {"color": PALE["orange"], "hatch": "///"} if e in runs else {"color": PALE["grey"]}
        ax.bar(e, share, 0.8, edgecolor=EDGE, linewidth=0.7, **look)
    for e in runs:
        ax.text(e, shares[e], f"{e}", ha="center", va="bottom", fontsize=8, fontweight="bold")
    ax.set(xlabel="expert", ylabel="probability", xlim=(-0.8, len(shares) - 0.2))
    ax.axhline(1 / len(shares), color="black", linestyle="--", linewidth=1, label="uniform")
    ax.set_ylim(0, 1.15 * shares.max())
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1))
    said = ", ".join(map(str, sorted(runs.tolist())))
    return f"After {token!r} experts {said} run (hatched); the router gave them {shares[runs].sum():.0%}."


def draw_roll(
    ax, chosen: np.ndarray, experts: int, tokens: list[str], predicted: np.ndarray | None = None
) -> str:
    """One mark per expert that a token uses; x is the token, y the expert.

    Args:
        predicted: (T, width) experts predicted for each token; marks then show hits, misses and false alarms.
    """
    ax.clear()
    T = len(chosen)
    right, missed, needless = ([], []), ([], []), ([], [])
    for t in range(T):
        said = set(predicted[t].tolist()) if predicted is not None else set(chosen[t].tolist())
        for e in range(experts):
            wanted = e in chosen[t]
            if wanted or e in said:
                into = right if wanted and e in said else missed if wanted else needless
                into[0].append(t)
                into[1].append(e)
    style = {"linestyle": "", "markersize": 6}
    ax.plot(*right, label="runs" if predicted is None else "runs, predicted", **style, **RIGHT)
    if predicted is not None:
        ax.plot(*missed, label="runs, not predicted", **style, **MISSED)
        ax.plot(*needless, label="predicted, does not run", **style, **NEEDLESS)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    ax.set_xticks(range(T), [visible(t, 7) for t in tokens], rotation=90, fontsize=7, family="monospace",
                  parse_math=False)  # fmt: skip
    ax.set(ylabel="expert", xlim=(-0.7, T - 0.3), ylim=(-0.8, experts - 0.2))
    ax.grid(axis="y", color="#eeeeee")
    ax.set_axisbelow(True)
    if predicted is None:
        again = np.mean([np.isin(chosen[t], chosen[t - 1]).mean() for t in range(1, T)])
        return f"{T} tokens; {again:.0%} of the experts that run also ran for the previous token."
    n = chosen.size
    return f"Of {n} experts that run, {len(right[0])} were predicted ({len(right[0]) / n:.0%})."


def draw_load(ax, shares: np.ndarray) -> str:
    """Load of each block's experts, busiest first.

    Args:
        shares: (L, E), share of a block's accesses that each of its experts serves.
    """
    ax.clear()
    E = shares.shape[1]
    order = -np.sort(-shares, axis=1) * E  # 1: an even share
    ax.plot(range(1, E + 1), order.T, color=COLORS["sky"], linewidth=0.8)
    mean = order.mean(0)
    ax.plot(
        range(1, E + 1), mean, color=COLORS["blue"], marker="o", markersize=4, linewidth=2.2, label="mean"
    )
    ax.axhline(1, color="black", linestyle="--", linewidth=1, label="even")
    ax.plot([], [], color=COLORS["sky"], linewidth=0.8, label="one block")
    ax.set(
        xlabel="experts of a block, busiest first",
        ylabel="multiple of an even share",
        xlim=(0.5, E + 0.5),
    )
    ax.set_ylim(bottom=0)
    ax.legend()
    quarter = order[:, : E // 4].sum(1).mean() / E
    return (
        f"The busiest expert of a block serves {order[:, 0].mean():.1f} times an even share, the idlest "
        f"{order[:, -1].mean():.2f}; the busiest quarter serves {quarter:.0%}."
    )


def draw_return(ax, again: dict[str, list[float]], chance: float) -> str:
    """Share of a token's experts that also ran 1, 2, .. tokens earlier; one line per name.

    Args:
        again: name -> share at each lag.
        chance: the share with random routing.
    """
    ax.clear()
    lags = range(1, 1 + len(next(iter(again.values()))))
    lines(ax, lags, again)
    ax.axhline(chance, color="black", linestyle="--", linewidth=1, label="random routing")
    ax.set(xlabel="tokens ago", ylabel="share that ran then", xticks=lags, ylim=(0, None))
    ax.legend()
    said = ", ".join(f"{name} {values[0]:.0%}" for name, values in again.items())
    return f"Also ran for the previous token: {said}; with random routing {chance:.0%}."


def draw_distances(ax, distances: list[int], experts: int) -> str:
    """Histogram of the reuse distance: how many other experts of the block run between two uses of one."""
    ax.clear()
    edges = np.arange(0, experts + 1)
    counts, _ = np.histogram(distances, edges)
    ax.bar(
        edges[:-1], counts / max(1, len(distances)), 0.9, color=PALE["blue"], edgecolor=EDGE, linewidth=0.7
    )
    middle = float(np.median(distances))
    ax.axvline(middle, color="black", linestyle=":", label=f"median {middle:g}")
    ax.set(xlabel="other experts of the block that run in between", ylabel="share of uses")
    ax.legend()
    return f"Between two uses of an expert, {middle:g} others of its block run (median)."


class HitCurves:
    """Hit rates of caches by size, and a movable mark.

    Args:
        slots: cache sizes, in slots per block.
        hits: name -> hit rate at each size.
        experts: E; the dashed line is slots / E, the hit rate with random routing.
    """

    def __init__(self, ax, slots: list[int], hits: dict[str, list[float]], experts: int):
        self.slots, self.hits, self.experts = list(slots), hits, experts
        lines(ax, self.slots, hits)
        ax.plot([0, experts], [0, 1], color="black", linestyle="--", linewidth=1, label="random routing")
        self.mark = ax.axvline(self.slots[0], color="black", linewidth=6, alpha=0.15)
        ax.set(
            xlabel="slots per block",
            ylabel="hit rate",
            ylim=(0, 1.02),
            xlim=(0, experts + 0.5),
        )
        ax.legend(loc="lower right")

    def move(self, slots: int) -> str:
        """Move the mark to the nearest size and return the sentence."""
        at = min(range(len(self.slots)), key=lambda i: abs(self.slots[i] - slots))
        slots = self.slots[at]
        self.mark.set_xdata([slots, slots])
        said = ", ".join(f"{name} {values[at]:.0%}" for name, values in self.hits.items())
        chance = slots / self.experts
        return f"With {slots} of {self.experts} slots, hit rates: {said}; with random routing {chance:.0%}."


def draw_bars(ax, values: dict[str, float], xlabel: str, chance: float | None = None) -> str:
    """One labelled bar per name."""
    ax.clear()
    for y, (value, color, hatch) in enumerate(zip(values.values(), ORDER * 2, HATCHES * 2)):
        ax.barh(y, value, 0.7, color=color, alpha=0.55, edgecolor=EDGE, linewidth=0.8, hatch=hatch)
        ax.text(value, y, f"  {value:.2f}", va="center", fontsize=9)
    if chance is not None:
        ax.axvline(chance, color="black", linestyle="--", linewidth=1, label=f"chance {chance:.2f}")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1))
    ax.set_yticks(range(len(values)), list(values))
    ax.invert_yaxis()
    ax.set(xlabel=xlabel, xlim=(0, 1.15 * max(*values.values(), chance or 0)))
    return "; ".join(f"{name} {value:.2f}" for name, value in values.items()) + "."


def draw_recall(ax, recalls: dict[str, dict[int, float]], chance: float) -> str:
    """Recall by number of blocks ahead, one line per predictor.

    Args:
        recalls: predictor -> blocks ahead -> recall.
        chance: recall of random predictions.
    """
    ax.clear()
    for (name, by_distance), look in zip(recalls.items(), styles()):
        wide = 2.6 if name == "M2R2" else 1.5
        ax.plot(by_distance.keys(), by_distance.values(), label=name, linewidth=wide, markersize=7, **look)
    ax.axhline(chance, color="black", linestyle="--", linewidth=1, label="at random")
    farthest = max(max(by) for by in recalls.values())
    ax.set(xlabel="blocks ahead", ylabel="recall", ylim=(0, 1.03), xticks=range(farthest + 1))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    said = "; ".join(
        f"{name} " + ", ".join(f"{r:.2f} at {d}" for d, r in by.items() if 1 <= d <= 3)
        for name, by in recalls.items()
    )
    return f"Recall at 1, 2, 3 blocks ahead, where available: {said}; at random {chance:.2f}."
