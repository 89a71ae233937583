"""The same pictures with controls. The only file of the kit that imports ipywidgets.

def draw(exit, kind):
    line.set_ydata(table[kind][exit])            # move what is there: a new figure costs 150 ms
    return figure, f"With exit {exit} ..."       # the picture, and what it shows, in words

explore(
    draw,
    exit=slider("exit", 1, 8, 3, "After how many blocks p is read"),
    kind=choice("kind of text", ["code", "shell"], "code", "Which prompts"),
)
"""

import ipywidgets
from IPython.display import display

from . import style as figures


def slider(description: str, low, high, value, tooltip: str, step=None):
    """A number from `low` to `high`: whole numbers if all three are, else steps of `step` or a hundredth.
    The arrow keys move it by a step, Home and End to its ends."""
    whole = all(isinstance(number, int) for number in (low, high, value))
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    step = step or (1 if whole else (high - low) / 100)
    return kind(min=low, max=high, step=step, value=value, **_look(description, tooltip))


def choice(description: str, options, value, tooltip: str):
    """One of several: a list of names, or of (name, value). The arrow keys and first letters choose."""
    return ipywidgets.Dropdown(options=list(options), value=value, **_look(description, tooltip))


def steps(description: str, values, value, tooltip: str):
    """One of several in a row, as numbers that grow by factors: a list of them, or of (name, value)."""
    return ipywidgets.SelectionSlider(options=list(values), value=value, **_look(description, tooltip))


def switch(description: str, value: bool, tooltip: str):
    """On or off, with the space bar."""
    return ipywidgets.Checkbox(value=value, indent=False, **_look(description, tooltip))


def _look(description: str, tooltip: str) -> dict:
    return {
        "description": description,
        "tooltip": tooltip,
        "style": {"description_width": "140px"},
        "layout": ipywidgets.Layout(width="520px"),
    }


class Controls(dict):
    """The controls of an `explore` by name, so that a cell may set `controls["exit"].value`."""

    def _ipython_display_(self):
        """Nothing: they are on the page already, and a cell may end with `explore(..)`."""


def explore(draw, **controls) -> Controls:
    """Controls above a picture that follows them.

    The picture is an output of the cell itself, a PNG that each change replaces in place, and not
    a part of the widget. So one picture is there with a kernel and without: where no kernel runs,
    as on a web page, the controls are missing and the picture stands. Under it is one line that says
    what it shows.

    Before the first picture, `draw` is called with each control at its ends (or each of its options),
    so that an error shows when the cell runs and not under a reader's hand.

    Args:
        draw: called with the controls' values, as `draw(exit=3, kind="code")`; returns
            (figure, sentence). It should take less than 100 ms: read a table, move what is drawn,
            and return the same figure each time.
        controls: made by `slider`, `steps`, `choice` and `switch`; names as `draw` takes them. Any ipywidget
            with a description and a tooltip will do.

    Raises:
        ValueError: a control lacks its description or tooltip.
        Whatever `draw` raises, also later, from a callback.
    """
    for name, control in controls.items():
        if not (control.description and control.tooltip):
            raise ValueError(f"the control '{name}' needs a description and a tooltip")

    def values(**changed):
        return {name: control.value for name, control in controls.items()} | changed

    for name, control in controls.items():
        for value in _ends(control):
            draw(**values(**{name: value}))

    display(ipywidgets.VBox(list(controls.values())))
    figure, sentence = draw(**values())
    shown = display(
        figures.picture(figure, sentence), metadata=figures.alt(sentence), raw=True, display_id=True
    )
    said = display(figures.caption(sentence), raw=True, display_id=True)

    def follow(_):
        try:
            figure, sentence = draw(**values())
        except Exception as error:  # the picture would stand still without a word
            said.update(figures.caption(f"This setting failed: {error}"), raw=True)
            raise
        shown.update(figures.picture(figure, sentence), metadata=figures.alt(sentence), raw=True)
        said.update(figures.caption(sentence), raw=True)

    for control in controls.values():
        control.observe(follow, names="value")
    return Controls(controls)


def _ends(control) -> list:
    """Values at which a picture is most likely to break."""
    if hasattr(control, "min"):
        return [control.min, control.max]
    if hasattr(control, "options"):
        return [value for _, value in control._options_full]
    return [False, True]
