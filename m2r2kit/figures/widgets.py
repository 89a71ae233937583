"""Figures with controls. The only file of the kit that imports ipywidgets.

def draw(exit, kind):
    line.set_ydata(table[kind][exit])            # update in place: a new figure costs 150 ms
    return figure, f"With exit {exit} ..."       # the figure and its description

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
    """A slider from `low` to `high`: of integers if all three values are integers; otherwise `step` defaults
    to a hundredth of the range. Arrow keys move by one step, Home and End to the ends."""
    whole = all(isinstance(number, int) for number in (low, high, value))
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    step = step or (1 if whole else (high - low) / 100)
    return kind(min=low, max=high, step=step, value=value, **_look(description, tooltip))


def choice(description: str, options, value, tooltip: str):
    """A drop-down of names or (name, value) pairs. Arrow keys and first letters select."""
    return ipywidgets.Dropdown(options=list(options), value=value, **_look(description, tooltip))


def steps(description: str, values, value, tooltip: str):
    """A slider over a list of values or (name, value) pairs, such as numbers that grow by factors."""
    return ipywidgets.SelectionSlider(options=list(values), value=value, **_look(description, tooltip))


def switch(description: str, value: bool, tooltip: str):
    """A checkbox; the space bar toggles it."""
    return ipywidgets.Checkbox(value=value, indent=False, **_look(description, tooltip))


def _look(description: str, tooltip: str) -> dict:
    return {
        "description": description,
        "tooltip": tooltip,
        "style": {"description_width": "140px"},
        "layout": ipywidgets.Layout(width="520px"),
    }


class Controls(dict):
    """The controls of an `explore` by name; a cell can set `controls["exit"].value`."""

    def _ipython_display_(self):
        """Show nothing: `explore` has displayed the controls already."""


def explore(draw, **controls) -> Controls:
    """Display controls and a figure that follows them, with a sentence that describes it.

    The figure is a PNG output of the cell, not part of the widget, and each change replaces it in place.
    Where no kernel runs, as on a web page, the controls are missing and the figure remains.

    `draw` is first called with each control at its ends (or each of its options), so that errors show when
    the cell runs and not later.

    Args:
        draw: called with the controls' values, as `draw(exit=3, kind="code")`; returns
            (figure, sentence). It should take less than 100 ms: read a table, update the artists,
            and return the same figure each time.
        controls: made by `slider`, `steps`, `choice` and `switch`, named like the arguments of `draw`. Any
            ipywidget with a description and a tooltip works.

    Raises:
        ValueError: a control lacks a description or tooltip.
        Exception: any error of `draw`, also later from a callback.
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
        except Exception as error:  # otherwise the old picture stays without an explanation
            said.update(figures.caption(f"This setting failed: {error}"), raw=True)
            raise
        shown.update(figures.picture(figure, sentence), metadata=figures.alt(sentence), raw=True)
        said.update(figures.caption(sentence), raw=True)

    for control in controls.values():
        control.observe(follow, names="value")
    return Controls(controls)


def _ends(control) -> list:
    """Extreme values of a control, where `draw` is most likely to fail."""
    if hasattr(control, "min"):
        return [control.min, control.max]
    if hasattr(control, "options"):
        return [value for _, value in control._options_full]
    return [False, True]
