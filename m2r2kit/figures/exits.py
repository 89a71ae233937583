"""Figures of early exits, from a record of `m2r2kit bench exits` or from arrays (notebook 03).

Each function draws on the given axes and returns one sentence that describes the figure. A method has the
same colour, marker and dash in all figures.
"""

import html
from itertools import product

import numpy as np

from ..bench import claims
from ..common import UserError
from .style import COLORS, MARKERS, PALE

DASHES = ("-", "--", ":")
COLOR_NAMES = ("blue", "red", "green", "purple", "orange", "sky", "black")
LOOKS = {  # fixed looks of the usual methods; others get an unused combination
    "m2r2": (COLORS["blue"], "o", "-"),
    "m2r2-confidence": (COLORS["sky"], "*", "-"),
    "m2r2-equal": (COLORS["blue"], "d", "--"),
    "m2r2-oracle": (COLORS["black"], "P", ":"),
    "calm": (COLORS["red"], "s", "--"),
    "saturation": (COLORS["orange"], "^", "--"),
    "skipdecode": (COLORS["green"], "D", "-."),
    "mixture-of-depths": (COLORS["purple"], "v", "-."),
    "layerskip": (COLORS["orange"], "X", ":"),
    "static": (COLORS["green"], "h", ":"),
    "shallow": (COLORS["purple"], "p", ":"),
}
MAIN = ("m2r2", "m2r2-oracle", "calm", "saturation", "skipdecode", "mixture-of-depths", "layerskip", "static")
AXES = {  # value of a point, and the axis label
    "blocks": (lambda p, depth: p["blocks"] / depth, "share of the blocks that are run"),
    "macs": (lambda p, depth: p["macs"], "share of the multiply-adds, overhead included"),
    "time": (lambda p, depth: 1 / p["speedup"], "share of plain decoding's time"),
}


def newest() -> dict:
    """The newest record with all methods of `MAIN`, otherwise the newest record.

    Raises:
        UserError: there is no record yet.
    """
    found = claims.accepted("exits")
    if not found:
        raise UserError("There is no record yet; `m2r2kit bench exits --methods all --record` makes one.")
    whole = [r for r in found if r["figures"]["methods"].keys() >= set(MAIN)]
    return (whole or found)[-1]


def look(name: str) -> dict:
    """Line style of a method: colour, marker, dash, width and label."""
    if name not in LOOKS:
        used = set(LOOKS.values())
        colours = (COLORS[c] for c in COLOR_NAMES)
        free = [each for each in product(colours, MARKERS, DASHES) if each not in used]
        LOOKS[name] = free[0]
    color, marker, dash = LOOKS[name]
    width = 2.6 if name.startswith("m2r2") and name != "m2r2-oracle" else 1.3
    return {"color": color, "marker": marker, "linestyle": dash, "linewidth": width, "label": name}


def draw_curves(ax, record: dict, over: str = "blocks", names=MAIN, least: float = 0.7) -> str:
    """Agreement (axis from `least` to 1) by cost: `blocks`, `macs`, or `time` for methods that were timed."""
    ax.clear()
    measure, says = AXES[over]
    depth, methods = record["settings"]["depth"], record["figures"]["methods"]
    shown = []
    for name in names:
        if name not in methods:
            continue
        points = methods[name].get("timed" if over == "time" else "points") or []
        xy = sorted((measure(p, depth), p["agreement"]) for p in points)
        if xy:
            shown.append(name)
            ax.plot(*zip(*xy, strict=True), **look(name), markersize=5)
    ax.axhline(0.95, color=COLORS["black"], linewidth=0.8, linestyle="--")
    ax.plot(1, 1, marker="o", color="white", markeredgecolor="black", linestyle="", label="whole model")
    ax.set(xlabel=says, ylabel="agreement with the whole model", ylim=(least, 1.01))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    where = {"blocks": "blocks", "macs": "multiply-adds", "time": "time"}[over]
    return f"Agreement against {where} for {', '.join(shown)}; further left at equal height is better."


def draw_merits(ax, record: dict, loss: float = 0.05) -> str:
    """Blocks saved at a loss of agreement, one bar per method, with the 95 % bootstrap interval."""
    ax.clear()
    merits = {name: m["merit"][str(loss)] for name, m in record["figures"]["methods"].items()}
    order = sorted(merits, key=lambda name: -merits[name]["saved"])
    for y, name in enumerate(order):
        m = merits[name]
        ours = name.startswith("m2r2")
        style = {"color": PALE["blue"], "hatch": "///"} if ours else {"color": PALE["grey"]}
        ax.barh(y, m["saved"], 0.7, edgecolor="black", linewidth=0.8, **style)
        spread = [[max(0, m["saved"] - m["from"])], [max(0, m["to"] - m["saved"])]]
        ax.errorbar(m["saved"], y, xerr=spread, color=COLORS["black"], capsize=3, linewidth=1.2)
        ax.text(max(m["to"], m["saved"]), y, f"  {m['saved']:.1%}", va="center", fontsize=9)
    ax.set_yticks(range(len(order)), order)
    ax.invert_yaxis()
    ax.set(xlabel=f"share of the blocks saved at {loss:.0%} loss of agreement")
    ax.set_xlim(0, 1.15 * max(0.01, *(m["to"] for m in merits.values())))
    said = ", ".join(f"{name} {merits[name]['saved']:.1%}" for name in order)
    return f"Blocks saved at {loss:.0%} loss of agreement: {said}."


def draw_at_exits(axes, found: dict, depth: int) -> str:
    """Agreement and cross-entropy at each exit, one line per readout.

    Args:
        axes: two.
        found: readout -> rows of `bench.exits.at_exits`.
        depth: blocks of the whole model.
    """
    names = {
        "m2r2": "stream p",
        "m2r2-equal": "stream p, trained like the layers",
        "lens": "h and a trained layer",
        "bare": "bare h",
    }
    methods = {"m2r2": "m2r2", "m2r2-equal": "m2r2-equal", "lens": "calm", "bare": "layerskip"}
    looks = {kind: look(name) for kind, name in methods.items()}
    for ax, key, says in zip(axes, ("agreement", "nats"), ("agreement", "cross-entropy (nats)"), strict=True):
        ax.clear()
        for kind, rows in found.items():
            style = looks[kind] | {"label": names[kind]}
            ax.plot([r["exit"] for r in rows], [r[key] for r in rows], **style)
        ax.set(xlabel=f"exit: blocks run, of {depth}", ylabel=says, xticks=[r["exit"] for r in rows])
    axes[0].set_ylim(0, 1.02)
    axes[0].legend(loc="lower right")
    said = "; ".join(
        f"{names[kind]} " + ", ".join(f"{r['agreement']:.2f}" for r in rows) for kind, rows in found.items()
    )
    return f"Agreement with the whole model's token, exit by exit: {said}."


def draw_latents(ax, latents: np.ndarray, right: np.ndarray, names: list[str]) -> str:
    """The latents that a gate reads, projected on their first two principal components.

    Args:
        latents: (n, L), of n tokens at one exit.
        right: (n,), whether the head would be right at this exit.
        names: tokens as text; a few label their points.
    """
    ax.clear()
    centred = latents - latents.mean(0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    x, y = (centred @ directions[:2].T).T
    for said, marker, color in ((True, "o", COLORS["blue"]), (False, "x", COLORS["red"])):
        label = "the head is right here" if said else "it is wrong"
        ax.plot(x[right == said], y[right == said], marker, color=color, markersize=5, alpha=0.7, label=label)
    for i in range(0, len(x), max(1, len(x) // 12)):
        ax.annotate(names[i], (x[i], y[i]), fontsize=9, family="monospace", parse_math=False)
    ax.set(xlabel="first component", ylabel="second component")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    share = (sizes[:2] ** 2).sum() / (sizes**2).sum()
    return (
        f"{len(x)} tokens as the gate sees them, in the two components with {share:.0%} of the variance; "
        f"the head is right for {right.mean():.0%}."
    )


class DepthText:
    """Text in which each token that left early is in [brackets with its depth]; in HTML it is also shaded,
    darker for an earlier exit.

    Args:
        pieces: the text of each token.
        depths: number of blocks that each token ran.
        depth: blocks of the whole model.
    """

    def __init__(self, pieces: list[str], depths: list[int], depth: int):
        self.pieces, self.depths, self.depth = pieces, depths, depth

    def __repr__(self):
        return "".join(
            piece if d >= self.depth else f"[{piece}|{d}]"
            for piece, d in zip(self.pieces, self.depths, strict=True)
        )

    def _repr_html_(self):
        out = []
        for piece, d in zip(self.pieces, self.depths, strict=True):
            text = html.escape(piece.replace("\n", "↵\n"))
            if d >= self.depth:
                out.append(html.escape(piece))
                continue
            early = 1 - d / self.depth
            style = f"background: rgba(0, 114, 178, {0.12 + 0.4 * early:.2f}); color: black"
            out.append(f'<span style="{style}">{text}<sub>{d}</sub></span>')
        return f'<pre style="white-space: pre-wrap; line-height: 1.9">{"".join(out)}</pre>'
