"""The common style of all figures, and a sentence that describes each.

    figure, ax = new_figure(height=3.2)              # white, plain, colour-blind-safe
    lines(ax, depths, {"p": ahead, "h": bare})       # each line has its own colour, marker, dash
    show(figure, "p agrees with the end of the model earlier than h does.")

Figures are not registered with pyplot: they need no `plt.show()` and no `plt.close()`.
"""

import html
import io
from itertools import cycle, groupby

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ..stream.stream import tau

# Okabe and Ito's colour-blind-safe palette
COLORS = {
    "blue": "#0072b2", "orange": "#e69f00", "green": "#009e73", "red": "#d55e00",
    "purple": "#cc79a7", "sky": "#56b4e9", "yellow": "#f0e442", "black": "#000000",
}  # fmt: skip
ORDER = tuple(COLORS[name] for name in ("blue", "red", "green", "purple", "orange", "sky", "black"))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", "-", "--", "-.")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "+++", "ooo")
PALE = {"blue": "#cfe6f3", "orange": "#fbe7bd", "grey": "#eeeeee"}  # behind black text
DPI = 100

# global, so that figures drawn by a notebook's own code look the same
matplotlib.rcParams.update({
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
    "font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10, "legend.fontsize": 9,
    "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=ORDER), "lines.linewidth": 1.6, "lines.markersize": 5,
})  # fmt: skip


def new_figure(width: float = 9.0, height: float = 3.4, columns: int = 1, rows: int = 1, **kwargs):
    """An empty figure and its axes, as from `plt.subplots`.

    Args:
        width, height: inches, at 100 pixels per inch.
        kwargs: passed to `Figure.subplots` (`sharey=True`, `width_ratios=..`).
    """
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes; compressed for speed, not size, because sliders redraw it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # `savefig` would draw twice
    # freeze the layout: redrawing moves the data, not the axes
    figure.set_layout_engine("none")
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(buffer, "png", compress_level=3)
    return buffer.getvalue()


def show(figure: Figure, sentence: str) -> None:
    """Display a figure and below it a sentence that describes it, also as alternative text."""
    from IPython.display import display

    display(picture(figure, sentence), metadata=alt(sentence), raw=True)
    display(caption(sentence), raw=True)


def picture(figure: Figure, sentence: str) -> dict:
    """Display data of the picture."""
    return {"image/png": png(figure), "text/plain": f"<picture: {sentence}>"}


def alt(sentence: str) -> dict:
    """Metadata of a picture: its alternative text."""
    return {"image/png": {"alt": sentence}}


def caption(sentence: str) -> dict:
    """Display data of the sentence below a picture; its height is fixed for up to two lines."""
    return {"text/html": f'<p style="min-height: 2.6em">{html.escape(sentence)}</p>', "text/plain": sentence}


def styles():
    """Endless line styles; successive ones differ in colour, marker and dash."""
    for color, marker, dash in cycle(zip(ORDER, MARKERS, DASHES)):
        yield {"color": color, "marker": marker, "linestyle": dash}


def lines(ax, x, series: dict, **kwargs) -> dict:
    """Plot one line per name, with a legend; returns the lines by name, for `set_ydata`."""
    drawn = {name: ax.plot(x, y, label=name, **(style | kwargs))[0]
             for (name, y), style in zip(series.items(), styles())}  # fmt: skip
    if len(drawn) > 1:
        ax.legend()
    return drawn


# --- text with marks ------------------------------------------------------------------------


def visible(token: str, most: int = 9) -> str:
    """A token as a label: whitespace is visible, and text over `most` characters is cut."""
    text = token.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
    return text if len(text) <= most else text[: most - 1] + "…"


class MarkedText:
    """Text with accepted drafts in [brackets]; in HTML they are underlined and shaded.
    A drafted line end is shown as ↵.

    Args:
        pieces: the text of each token.
        marked: for each token, whether it was a draft.
    """

    def __init__(self, pieces: list[str], marked: list[bool]):
        runs = groupby(zip(pieces, marked), key=lambda pair: pair[1])
        self.runs = []  # (text, marked, line ends after it)
        for mark, run in runs:
            text = "".join(text for text, _ in run)
            if not mark:
                self.runs.append((text, False, ""))
                continue
            ends = text[len(text.rstrip("\n")) :]
            text = text.rstrip("\n").replace("\n", "↵\n") + "↵" * len(ends)
            self.runs.append((f"[{text}]", True, ends))

    def __repr__(self):
        return "".join(text + ends for text, _, ends in self.runs)

    def _repr_html_(self):
        style = f"background: {PALE['blue']}; color: black; text-decoration: underline"
        body = "".join(
            (f'<span style="{style}">{html.escape(text)}</span>' if mark else html.escape(text)) + ends
            for text, mark, ends in self.runs
        )
        return f'<pre style="white-space: pre-wrap">{body}</pre>'


# --- figures that update ---------------------------------------------------------------------


class StreamsMap:
    """The two streams of a model of `depth` blocks: the blocks they run, and the depth each stands for."""

    def __init__(self, depth: int):
        self.depth = depth
        self.figure, (self._blocks, self._depths) = new_figure(9.6, 3.6, 2, width_ratios=(1.7, 1))
        self._draw_blocks()
        self._draw_depths()

    def _draw_blocks(self):
        N, ax = self.depth, self._blocks
        self._boxes = ax.bar(
            range(N), 1, width=0.7, bottom=-0.5, align="edge", edgecolor="black", linewidth=0.8
        )
        arrow = {"arrowstyle": "-|>", "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
        ax.plot([-0.04 * N, 1.09 * N], [-1, -1], color=COLORS["blue"], linewidth=3)
        ax.text(-0.05 * N, -1, "$h$", ha="right", va="center", color=COLORS["blue"], fontsize=13)
        ax.text(N / 2, -1.12, "slow stream: the model itself, through every block", ha="center", va="top")
        ax.annotate("", (1.09 * N, -0.55), (1.09 * N, -1), arrowprops=arrow | {"color": COLORS["blue"]})
        self._ahead = ax.plot([], [], color=COLORS["red"], linewidth=3, marker="s", markevery=[1])[0]
        self._leap = ax.plot([], [], color=COLORS["red"], linewidth=1.8, linestyle=":")[0]
        ax.text(-0.05 * N, 1, "$p$", ha="right", va="center", color=COLORS["red"], fontsize=13)
        ax.annotate("", (1.09 * N, 0.55), (1.09 * N, 1), arrowprops=arrow | {"color": COLORS["red"]})
        self._said = ax.text(0, 1.12, "", va="bottom")
        ax.text(1.09 * N, 0, "head:\nnext\ntoken", ha="center", va="center")
        ax.set(xlim=(-0.1 * N, 1.2 * N), ylim=(-1.7, 1.8))
        ax.axis("off")

    def _draw_depths(self):
        N, ax = self.depth, self._depths
        style = dict(zip(("slow", "fast"), styles()))
        ax.plot(range(N + 1), range(N + 1), label="$h$, slow", markevery=max(1, N // 8), **style["slow"])
        self._fast = ax.plot([], [], label="$p$, accelerated", **style["fast"])[0]
        ax.set(xlabel="blocks run", ylabel="depth it stands for", xlim=(-0.5, N + 0.5), ylim=(-0.5, N + 0.5))
        ax.legend(loc="lower right")

    def update(self, exit: int) -> tuple[Figure, str]:
        """The streams with an exit after `exit` blocks; (figure, sentence)."""
        N = self.depth
        for l, box in enumerate(self._boxes):
            box.set(facecolor=PALE["orange"] if l < exit else "white", hatch="//" if l < exit else "")
        self._ahead.set_data([-0.04 * N, exit], [1, 1])
        self._leap.set_data([exit, 1.09 * N], [1, 1])
        self._said.set_text(f"accelerated stream: {exit} {'block' if exit == 1 else 'blocks'}, then the head")
        self._fast.set_data(range(exit + 1), [tau(l, 0, exit, N, None) for l in range(exit + 1)])
        return self.figure, (
            f"After {exit} of {N} blocks the slow stream is at depth {exit}, and the accelerated one stands "
            f"for depth {N}: each of its blocks covers {N / exit:.3g}."
        )


class LensTable:
    """A logit-lens table: x is the position, y the depth, each cell the predicted token; it is bold on blue
    where it equals the model's own. Create once, then call `fill` for each text."""

    def __init__(self, depths: list[int], columns: int):
        self.depths, self.columns = depths, columns
        self.figure, ax = new_figure(9.6, 1.0 + 0.3 * len(depths))
        shape = (len(depths), columns)
        blue = matplotlib.colors.ListedColormap(["white", PALE["blue"]])
        self._shade = ax.imshow(np.zeros(shape), cmap=blue, vmin=0, vmax=1, origin="lower", aspect="auto")
        style = {"ha": "center", "va": "center", "fontsize": 9, "family": "monospace", "parse_math": False}
        self._words = [[ax.text(x, y, "", **style) for x in range(shape[1])] for y in range(shape[0])]
        self._axis = ax
        ax.set_yticks(range(len(depths)), [str(l) for l in depths])
        ax.set(ylabel="depth $l$", xlabel="previous token  (the model's input)")
        ax.tick_params(length=0)

    def fill(self, before: list[str], words: list[list[str]], right: list[list[bool]]) -> Figure:
        """Set the column labels `before`, and `words` and `right`, one row per depth."""
        self._shade.set_data(right)
        for artists, texts, marks in zip(self._words, words, right):
            for artist, text, mark in zip(artists, texts, marks):
                artist.set(text=visible(text), fontweight="bold" if mark else "normal")
        labels = [visible(token) for token in before]
        self._axis.set_xticks(range(self.columns), labels, family="monospace", fontsize=9, parse_math=False)
        return self.figure


def histograms(values: dict, edges, xlabel: str) -> Figure:
    """One histogram of integers per name, on a common scale, with the mean marked."""
    figure, axes = new_figure(9.6, 2.8, len(values), sharey=True, squeeze=False)
    for ax, (name, numbers), color, hatch in zip(axes[0], values.items(), ORDER, HATCHES):
        counts = [sum(n == e for n in numbers) / len(numbers) for e in edges]
        ax.bar(edges, counts, color=color, alpha=0.75, edgecolor="black", linewidth=0.6, hatch=hatch)
        mean = sum(numbers) / len(numbers)
        ax.axvline(mean, color="black", linestyle=":")
        ax.set(title=f"{name} (mean {mean:.1f})", xlabel=xlabel)
    axes[0][0].set_ylabel("share of tokens")
    return figure


def step_bars(ax, generation) -> None:
    """One bar per pass of the model: its own token, and on top the accepted drafts."""
    ax.clear()
    steps = range(1, generation.steps + 1)
    ax.bar(steps, 1, color=COLORS["blue"], edgecolor="white", label="the model's own token")
    ax.bar(steps, generation.accepted, bottom=1, color=COLORS["orange"], edgecolor="black", linewidth=0.6,
           hatch="///", label="drafts accepted")  # fmt: skip
    ax.set(xlabel="pass through the whole model", ylabel="tokens")
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.legend(loc="upper right", ncols=2)
