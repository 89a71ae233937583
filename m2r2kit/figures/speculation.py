"""Figures of accelerated streams and of verified drafts (notebooks 02 and 04).

Each function draws on the given axes and returns one sentence that describes the figure:

    figure, ax = new_figure()
    show(figure, draw_rates(ax, depth, exit, stands_for))

No information is in colour alone: a sign, a word or a hatch repeats it.
"""

from .steps import EDGE
from .style import COLORS, PALE

# --- the streams (notebook 02) ------------------------------------------------------------


def draw_streams(ax, depth: int, exit: int) -> str:
    """The slow stream through all N blocks, and below it the fast one, which reads its keys and values."""
    ax.clear()
    ax.set_axis_off()
    shown = list(range(min(exit, 4)))
    columns = [f"block {l}" for l in shown] + ["..", f"block {depth - 1}"]
    for x, name in enumerate(columns):
        _box(ax, 2 * x + 1, 1, name, "white")
        _arrow(ax, (2 * x - 0.3, 1), (2 * x + 0.3, 1))
        ax.text(2 * x, 1.24, f"$h_{{{x}}}$" if x <= len(shown) else "", ha="center")
    end = 2 * len(columns)
    _arrow(ax, (end - 0.3, 1), (end + 0.3, 1))
    ax.text(end + 0.4, 1, f"$h_{{{depth}}}$, then the head", va="center")
    for x in range(len(shown)):
        _box(ax, 2 * x + 1, 0, f"fast {x}", PALE["orange"])
        _arrow(ax, (2 * x - 0.3, 0), (2 * x + 0.3, 0))
        ax.text(2 * x, -0.36, f"$p_{{{x}}}$", ha="center")
        _arrow(ax, (2 * x + 1, 0.75), (2 * x + 1, 0.25), "--")
        ax.text(2 * x + 1.08, 0.5, "K, V", va="center", fontsize=9)
    _arrow(ax, (-0.5, 0.75), (-0.5, 0.25))
    ax.text(-0.6, 0.5, "copy", ha="right", va="center", fontsize=9)
    last = 2 * len(shown)
    _arrow(ax, (last - 0.3, 0), (last + 0.3, 0))
    more = "" if len(shown) == exit else ".. "
    guess = f"{more}$p_{{{exit}}}$, then the same head: a draft of the same token"
    ax.text(last + 0.4, 0, guess, va="center")
    ax.set(xlim=(-1.4, end + 3.4), ylim=(-0.5, 1.5))
    return (
        f"Above, the slow stream h passes {depth} blocks. Below, the fast stream p starts as h, passes "
        f"{exit}, and in each it reads the keys and values that h wrote there."
    )


def draw_rates(ax, depth: int, exit: int, stands_for: list[int]) -> str:
    """Depth that each stream approximates, block by block; `stands_for` is tau(0), .., tau(exit)."""
    ax.clear()
    depths, blocks = range(depth + 1), range(exit + 1)
    ax.plot(depths, depths, "o-", color=COLORS["blue"], markersize=3, linewidth=1, label="slow stream h")
    ax.plot(blocks, stands_for, "s--", color=COLORS["red"], label="fast stream p")
    ax.axvline(exit, linestyle=":", color=COLORS["black"], linewidth=1)
    ahead = stands_for[-1]
    at = {"xytext": (8, -12 if ahead == depth else 4), "textcoords": "offset points"}
    ax.annotate(f"$p_{{{exit}}}$ stands for $h_{{{ahead}}}$", (exit, ahead), **at)
    ax.set(xlim=(-0.3, depth + 0.3), ylim=(-0.5, depth + 0.8))
    ax.set(xlabel="blocks run", ylabel="depth that the state stands for")
    ax.legend(loc="lower right")
    return f"After {exit} of {depth} blocks p stands for depth {ahead}, " + (
        f"{ahead - exit} blocks ahead of h." if ahead > exit else "no further than h (the control)."
    )


def draw_readouts(ax, rows: list[dict]) -> str:
    """Agreement with the final token, one labelled bar per readout; ours is hatched.

    Args:
        rows: rows of the record `alignment`, each with `form`, `agreement` and `parameters`.
    """
    ax.clear()
    best = max(rows, key=lambda row: row["agreement"])
    for y, row in enumerate(rows):
        ours = row["form"] == "block"
        style = {"hatch": "///", "color": PALE["blue"]} if ours else {"color": PALE["grey"]}
        ax.barh(y, row["agreement"], 0.7, edgecolor=EDGE, **style)
        size = f"{row['parameters'] / 1000:,.0f} k parameters" if row["parameters"] else "nothing trained"
        ax.text(row["agreement"], y, f" {row['agreement']:.2f}, {size}", va="center", fontsize=9)
    ax.set_yticks(range(len(rows)), [row["form"] for row in rows])
    ax.set(xlabel="share of tokens that agree with the whole model")
    ax.set_xlim(0, 1.25 * best["agreement"] + 0.05)
    ax.invert_yaxis()
    said = ", ".join(f"{row['form']} {row['agreement']:.2f}" for row in rows)
    return f"Agreement with the final token: {said}. Highest: {best['form']}."


# --- rules and speed (notebook 04) --------------------------------------------------------


def draw_accept_rule(ax, p, q, names: list[str]) -> str:
    """The rule min(1, p/q) as areas: accepted, rejected (of q), resampled (of p)."""
    ax.clear()
    parts = {
        "accepted: min(p, q)": {"color": PALE["blue"]},
        "rejected: max(q - p, 0)": {"color": "white", "hatch": "xxx"},
        "resampled: max(p - q, 0)": {"color": PALE["orange"], "hatch": "///"},
    }
    accepted, rejected, resampled = parts.values()
    both = [min(a, b) for a, b in zip(p, q)]
    for x, (a, b, shared) in enumerate(zip(p, q, both)):
        for at, whole, rest in ((x - 0.2, b, rejected), (x + 0.2, a, resampled)):
            ax.bar(at, shared, 0.38, edgecolor=EDGE, **accepted)
            ax.bar(at, whole - shared, 0.38, bottom=shared, edgecolor=EDGE, **rest)
        ax.text(x - 0.2, b + 0.01, f"q {b:.2f}", ha="center", fontsize=9)
        ax.text(x + 0.2, a + 0.01, f"p {a:.2f}", ha="center", fontsize=9)
    ax.legend([ax.bar(0, 0, edgecolor=EDGE, **look) for look in parts.values()], parts, loc="upper right")
    ax.set_xticks(range(len(names)), names)
    ax.set(ylabel="probability", ylim=(0, 1.05))
    alpha = sum(both)
    return (
        f"Left bars are the draft's q, right bars the model's p. A draft is accepted with probability "
        f"{alpha:.2f}, the shared area; the total variation distance between them is {1 - alpha:.2f}."
    )


def draw_speedup(
    ax, lengths, curve, chosen: int, measured: tuple[float, float] | None, paper: float | None = None
) -> str:
    """Predicted speed-up by draft length, with the chosen length and a measured point marked.

    Args:
        lengths: draft lengths. curve: predicted speed-up at each.
        measured: (mean drafts per step, speed-up).
        paper: the speed-up that the paper reports, drawn as a line (its draft length is not known).
    """
    ax.clear()
    ax.plot(lengths, curve, "o-", color=COLORS["blue"], label="predicted")
    ax.axhline(1, color=COLORS["black"], linestyle="--", linewidth=1, label="plain decoding")
    here = curve[list(lengths).index(chosen)]
    ax.plot(chosen, here, "s", color=COLORS["red"], markersize=11, fillstyle="none", label="your setting")
    if measured:
        ax.plot(*measured, "k*", markersize=13, label="measured here")
    if paper:
        ax.axhline(
            paper, color=COLORS["black"], linestyle="-.", linewidth=1, label=f"paper: up to {paper:g}x"
        )
    ax.set(xlabel="drafts per step", ylabel="speed-up over plain")
    ax.set_ylim(0, max(3.5, 1.1 * max(curve)))
    ax.legend(loc="lower right", ncols=3)  # the corner that curves above 1 leave free
    best = max(zip(curve, lengths), key=lambda pair: (pair[0], -pair[1]))
    said = f"With {chosen} drafts the prediction is {here:.2f}x. "
    said += "Not drafting is best." if best[1] == 0 else f"The best length is {best[1]}: {best[0]:.2f}x."
    star = f" The star: {measured[1]:.2f}x, measured with {measured[0]:.3g} drafts." if measured else ""
    return said + star


# --- pieces -------------------------------------------------------------------------------


def _box(ax, x, y, name, color):
    frame = {"boxstyle": "round,pad=0.4", "facecolor": color, "edgecolor": EDGE}
    ax.text(x, y, name, ha="center", va="center", bbox=frame)


def _arrow(ax, start, end, line="-"):
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": EDGE, "linestyle": line})
