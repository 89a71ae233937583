"""Pictures drawn from records and arrays: one style, and a line of text that says what is shown.

    figure, ax = new_figure(height=3.2)              # white, plain, colours anyone can tell apart
    lines(ax, depths, {"p": ahead, "h": bare})       # each line has its own colour, marker and dash
    show(figure, "p agrees with the end of the model earlier than h does.")

Figures are not registered with pyplot: they need no `plt.show()` and no `plt.close()`.
"""

import html
import io
from itertools import cycle

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with any kind of colour vision
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

# set once for all: what a notebook draws by itself then looks the same
matplotlib.rcParams.update({
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
    "font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10, "legend.fontsize": 9,
    "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=ORDER), "lines.linewidth": 1.6, "lines.markersize": 5,
})  # fmt: skip


def new_figure(width: float = 9.0, height: float = 3.4, columns: int = 1, rows: int = 1, **kwargs):
    """An empty figure: (figure, axes), as `plt.subplots` gives them.

    Args:
        width, height: inches, at 100 pixels each.
        kwargs: as `Figure.subplots` takes them (`sharey=True`, `width_ratios=..`).
    """
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


def png(figure: Figure) -> bytes:
    """The figure as a PNG; quick rather than small, as a slider waits for it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, pil_kwargs={"compress_level": 3})
    # the layout holds from now on: numbers may move in the picture, the axes do not
    figure.set_layout_engine("none")
    return buffer.getvalue()


def show(figure: Figure, sentence: str) -> None:
    """Display a figure, and under it one line that says what it shows, for who cannot see it."""
    from IPython.display import display

    display(picture(figure, sentence), metadata=alt(sentence), raw=True)
    display(caption(sentence), raw=True)


def picture(figure: Figure, sentence: str) -> dict:
    """What a display shows as a picture."""
    return {"image/png": png(figure), "text/plain": f"<picture: {sentence}>"}


def alt(sentence: str) -> dict:
    """Metadata of a picture: the words that a screen reader says."""
    return {"image/png": {"alt": sentence}}


def caption(sentence: str) -> dict:
    """What a display shows as the line under a picture. Its height does not change with its length."""
    return {"text/html": f'<p style="min-height: 2.6em">{html.escape(sentence)}</p>', "text/plain": sentence}


def styles():
    """Endless settings for one line after another: colour, marker and dash all differ."""
    for color, marker, dash in cycle(zip(ORDER, MARKERS, DASHES)):
        yield {"color": color, "marker": marker, "linestyle": dash}


def lines(ax, x, series: dict, **kwargs) -> dict:
    """One line for each name, with a legend; returns the lines by name, for `set_ydata`."""
    drawn = {name: ax.plot(x, y, label=name, **(style | kwargs))[0]
             for (name, y), style in zip(series.items(), styles())}  # fmt: skip
    if len(drawn) > 1:
        ax.legend()
    return drawn
