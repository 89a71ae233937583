"""`explore` draws at once, follows its controls, and shows every error."""

import pytest

from m2r2kit.figures import style as figures
from m2r2kit.figures import widgets


class Handle:
    """Stands in for an output area of a page."""

    def __init__(self, data):
        self.data = [data]

    def update(self, data, **_):
        self.data.append(data)


@pytest.fixture
def page(monkeypatch):
    """What is displayed, in order; handles for what can be replaced in place."""
    shown = []

    def display(data, display_id=False, **_):
        shown.append(Handle(data) if display_id else data)
        return shown[-1]

    monkeypatch.setattr(widgets, "display", display)
    return shown


def exit_slider(value=1):
    return widgets.slider("exit", 1, 3, value, "After how many blocks p is read")


def test_a_picture_and_a_sentence_follow_the_control(page):
    figure, ax = figures.new_figure()
    dot = ax.plot([0], [0], "o")[0]

    def draw(exit):
        dot.set_xdata([exit])
        return figure, f"exit {exit}"

    controls = widgets.explore(draw, exit=exit_slider())
    _, picture, sentence = page
    assert picture.data[0]["image/png"].startswith(b"\x89PNG")
    assert sentence.data[0]["text/plain"] == "exit 1"
    controls["exit"].value = 3
    assert len(picture.data) == 2 and picture.data[1]["image/png"] != b""
    assert sentence.data[-1]["text/plain"] == "exit 3"


def test_an_error_in_a_callback_is_raised_and_said(page):
    figure, _ = figures.new_figure()

    def draw(exit):
        if exit == 2:
            raise RuntimeError("no such exit")
        return figure, "fine"

    controls = widgets.explore(draw, exit=exit_slider())
    with pytest.raises(RuntimeError, match="no such exit"):
        controls["exit"].value = 2
    assert "no such exit" in page[-1].data[-1]["text/plain"]


def test_the_ends_of_each_control_are_tried_first(page):
    figure, _ = figures.new_figure()
    with pytest.raises(ZeroDivisionError):
        widgets.explore(lambda exit, kind: (figure, 1 / (exit - 3)), exit=exit_slider(), kind=kinds())
    seen = []
    widgets.explore(lambda kind: (figure, seen.append(kind) or kind), kind=kinds())
    assert {"code", "shell"} <= set(seen)


def kinds():
    return widgets.choice("kind", ["code", "shell"], "code", "Which prompts")


def test_every_step_of_uneven_steps_is_tried(page):
    figure, _ = figures.new_figure()
    seen = []
    rates = widgets.steps("disk", [("slow", 1e6), ("fast", 1e9)], 1e6, "Bytes a second")
    widgets.explore(lambda rate: (figure, str(seen.append(rate))), rate=rates)
    assert {1e6, 1e9} <= set(seen)
    rates.value = 1e9
    assert seen[-1] == 1e9


def test_a_control_without_a_tooltip_is_refused(page):
    with pytest.raises(ValueError, match="tooltip"):
        widgets.explore(lambda exit: None, exit=widgets.slider("exit", 1, 3, 1, ""))


def test_lines_differ_without_their_colours():
    _, ax = figures.new_figure()
    drawn = figures.lines(ax, [0, 1], {name: [0, 1] for name in "abcdefg"})
    assert len({line.get_marker() for line in drawn.values()}) == len(drawn)


def test_a_picture_is_white_and_keeps_its_size():
    figure, ax = figures.new_figure(4, 2)
    first = figures.png(figure)
    ax.set_ylabel("a longer label\nthan before")
    assert first[16:24] == figures.png(figure)[16:24]  # width and height in a PNG's header
    assert figure.get_facecolor() == (1, 1, 1, 1)


def test_accepted_drafts_are_told_apart_without_colours():
    text = figures.MarkedText(["a", "<b>", ":\n", "c\n"], [False, True, True, False])
    assert repr(text) == "a[<b>:↵]\nc\n"
    assert "[&lt;b&gt;:↵]</span>\nc" in text._repr_html_()


def test_the_map_of_streams_goes_to_every_exit():
    streams = figures.StreamsMap(5)
    for exit in range(1, 5):
        _, sentence = streams.update(exit)
        assert f"After {exit} of 5" in sentence and streams._fast.get_ydata()[-1] == 5
