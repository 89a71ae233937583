"""Figures of all decoding methods, from a record of `m2r2kit bench speculation` (notebook 04).

Each function draws on the given axes and returns one sentence that describes the figure:

    figure, ax = new_figure(height=3.8)
    show(figure, draw_speeds(ax, arms.newest(), paper=2.8))

Each arm is a named bar or line; ours are hatched or thick. No information is in colour alone: a name, a
hatch or a marker repeats it.
"""

from itertools import cycle

from matplotlib.patches import Rectangle

from ..bench import claims
from ..bench.arms import ArmsTable
from ..common import UserError
from .steps import EDGE
from .style import COLORS, DASHES, MARKERS, ORDER, PALE

BAND = 0.1  # tolerated relative difference of measured and predicted speed-up
MORE_MARKERS = (*MARKERS, "<", ">", "*", "h", "p")  # enough for every arm to have its own


def draw_speeds(ax, record: dict, paper: float | None = None) -> str:
    """Speed-up over plain decoding, one bar per arm, with the range over rounds.

    Args:
        paper: the speed-up that the paper reports, drawn as a line.
    """
    ax.clear()
    arms = _arms(record)
    for y, (name, arm) in enumerate(arms.items()):
        speed = arm["speedup_vs_plain"]
        if not speed:
            ax.text(0, y, " changed the text: no speed", va="center", fontsize=9)
            continue
        look = {"color": PALE["blue"], "hatch": "///"} if _ours(name) else {"color": PALE["grey"]}
        ax.barh(y, speed["median"], 0.7, edgecolor=EDGE, **look)
        spread = [[speed["median"] - speed["min"]], [speed["max"] - speed["median"]]]
        ax.errorbar(speed["median"], y, xerr=spread, color=COLORS["black"], capsize=3, linewidth=1.2)
        ax.text(speed["max"], y, f"  {speed['median']:.2f}", va="center", fontsize=9)
    ax.axvline(1, color=COLORS["black"], linestyle="--", linewidth=1, label="plain decoding")
    if paper:
        ax.axvline(
            paper, color=COLORS["red"], linestyle="-.", linewidth=1.4, label=f"paper: up to {paper:g}x"
        )
    ax.set_yticks(range(len(arms)), list(arms))
    ax.invert_yaxis()
    fastest = max((a["speedup_vs_plain"]["max"] for a in arms.values() if a["speedup_vs_plain"]), default=1)
    ax.set(xlabel="speed-up over plain decoding", xlim=(0, 1.12 * max(fastest, paper or 1)))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    said = ", ".join(
        f"{name} {arm['speedup_vs_plain']['median']:.2f}"
        for name, arm in arms.items()
        if arm["speedup_vs_plain"]
    )
    lossy = [name for name, arm in arms.items() if not arm["speedup_vs_plain"]]
    changed = f" No speed, because the text changed: {', '.join(lossy)}." if lossy else ""
    return f"Speed-up over plain decoding, the fastest first: {said}.{changed}"


def draw_acceptance(ax, record: dict) -> str:
    """Acceptance by position in the draft, given that all earlier drafts were accepted; one line per arm."""
    ax.clear()
    arms = {name: arm for name, arm in _arms(record).items() if arm["acceptance"]}
    if not arms:
        raise UserError("No arm of this record drafts; `m2r2kit bench speculation --methods all` has some.")
    looks = zip(cycle(ORDER), MORE_MARKERS, cycle(DASHES[:4]))  # repeated colours get another dash
    for (name, arm), (color, marker, dash) in zip(arms.items(), looks):
        a = arm["acceptance"]
        width = 2.6 if _ours(name) else 1.2
        ax.plot(
            range(1, len(a) + 1), a, color=color, marker=marker, linestyle=dash, linewidth=width, label=name
        )
    longest = max(len(arm["acceptance"]) for arm in arms.values())
    ax.set(xlabel="position in the draft", ylabel="acceptance", ylim=(0, 1.05), xticks=range(1, longest + 1))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    first = sorted(arms, key=lambda name: -arms[name]["acceptance"][0])
    said = ", ".join(f"{name} {arms[name]['acceptance'][0]:.2f}" for name in first)
    return f"Acceptance of the first draft: {said}. Late positions have few drafts."


def draw_predicted(ax, record: dict) -> str:
    """Speed-up that the cost model predicts for each arm, with a band of `BAND`, and the measured one."""
    ax.clear()
    arms = {
        name: arm
        for name, arm in _arms(record).items()
        if arm["drafts"] and arm["speedup_vs_plain"] and arm.get("predicted_speedup")
    }
    if not arms:
        raise UserError("No arm of this record has a prediction; `m2r2kit bench speculation` makes one.")
    outside = []
    for y, (name, arm) in enumerate(arms.items()):
        predicted, speed = arm["predicted_speedup"], arm["speedup_vs_plain"]
        measured = speed["median"]
        band = {"color": PALE["orange"], "edgecolor": EDGE, "linewidth": 0.8}
        ax.barh(y, 2 * BAND * predicted, 0.6, left=(1 - BAND) * predicted, **band)
        ax.plot(predicted, y, "|", color=EDGE, markersize=13, markeredgewidth=2)
        spread = [[measured - speed["min"]], [speed["max"] - measured]]
        ax.errorbar(measured, y, xerr=spread, fmt="o", color=COLORS["blue"], capsize=3)
        if abs(measured / predicted - 1) > BAND:
            outside.append(f"{name} ({measured:.2f}, predicted {predicted:.2f})")
            at = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
            ax.annotate("outside", (measured, y), fontsize=9, **at)
    ax.set_yticks(range(len(arms)), list(arms))
    ax.set_ylim(len(arms) - 0.3, -0.9)  # the first on top, with space for its label
    ax.use_sticky_edges = False  # otherwise the lowest band touches the frame
    ax.set(xlabel="speed-up over plain decoding")
    names = (f"predicted, +/- {BAND:.0%}", "measured")
    ax.legend([ax.patches[0], ax.lines[1]], names, loc="lower right")
    within = len(arms) - len(outside)
    said = f"Measured within {BAND:.0%} of the prediction: {within} of {len(arms)} arms."
    return said + (f" Outside: {', '.join(outside)}." if outside else "")


def draw_map(ax, record: dict | None = None) -> str:
    """Predicted speed-up by exit and number of drafts, one labelled cell each; the best is framed.

    Args:
        record: of `m2r2kit bench map`; by default the newest.

    Raises:
        UserError: there is no record yet.
    """
    record = record or next(reversed(claims.accepted("speculation-map")), None)
    if record is None:
        raise UserError("There is no map yet; `m2r2kit bench map --record` makes one.")
    ax.clear()
    lengths = record["figures"]["drafts"]
    rows = [row for row in record["figures"]["rows"] if row["predicted_speedup"]]
    if not rows:
        raise UserError("Every exit of this record changed the text, so it has no speed-up to draw.")
    speeds = [row["predicted_speedup"] for row in rows]
    ax.imshow(speeds, cmap="cividis", aspect="auto")
    lowest, highest = min(map(min, speeds)), max(map(max, speeds))
    for y, row in enumerate(speeds):
        for x, speed in enumerate(row):
            dark = speed < (lowest + highest) / 2
            ax.text(x, y, f"{speed:.2f}", ha="center", va="center", color="white" if dark else "black")
    best = max((speed, -y, -x) for y, row in enumerate(speeds) for x, speed in enumerate(row))
    y, x = -best[1], -best[2]
    ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=COLORS["red"], linewidth=3))
    ax.set_xticks(range(len(lengths)), lengths)
    ax.set_yticks(range(len(rows)), [row["exit"] for row in rows])
    ax.set(xlabel="drafts per step", ylabel="exit: blocks run for a draft")
    return (
        f"Predicted speed-up of {record['settings']['method']}, from acceptance and costs measured at each "
        f"exit: at best {best[0]:.2f}x, with exit {rows[y]['exit']} and "
        f"{lengths[x]} draft{'s' * (lengths[x] > 1)}."
    )


# --- pieces -------------------------------------------------------------------------------


def _arms(record: dict) -> dict:
    """The arms in the order of `ArmsTable`: fastest first, arms that changed the text last."""
    return {name: record["figures"]["arms"][name] for name in ArmsTable(record).names}


def _ours(name: str) -> bool:
    return name.startswith("m2r2")
