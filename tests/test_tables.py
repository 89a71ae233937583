"""One table, three forms: the same cells, aligned, wrapped or escaped."""

import pytest

from m2r2kit.bench.tables import Table

TABLE = Table(
    ("name", "speed", "why"),
    [("a|b", "1.5x", "<because>"), ("long name", "10x")],
    "Two rows & a caption",
    [["it is so"], []],
    left=("why",),
    bold=("long name",),
)


def test_text_is_aligned_numbers_to_the_right():
    assert str(TABLE).splitlines() == [
        "Two rows & a caption",
        "",
        "name       speed  why",
        "a|b         1.5x  <because>",
        "    it is so",
        "long name    10x",
    ]


@pytest.mark.parametrize("width", [1, 6, 40, 60])
def test_long_cells_are_wrapped_and_nothing_is_lost(width):
    cell = "many words that do not fit into one line of a narrow terminal"
    table = Table(("what", "n"), [(cell, "7")], details=[[f"why: {cell}"]])
    lines = table.as_text(width).splitlines()
    assert max(map(len, lines)) <= max(40, width)
    assert " ".join(" ".join(lines).replace("7", "").split()) == f"what n {cell} why: {cell}"


def test_markdown_and_html_escape_what_they_hold():
    assert TABLE.as_markdown().splitlines() == [
        "| name | speed | why |",
        "| --- | ---: | --- |",
        "| a\\|b: it is so | 1.5x | <because> |",
        "| long name | 10x |  |",
    ]
    markup = TABLE._repr_html_()
    assert "&lt;because&gt;" in markup and "Two rows &amp; a caption" in markup
    assert "<b>long name</b>" in markup and "<small>it is so</small>" in markup
