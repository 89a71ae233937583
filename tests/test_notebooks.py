"""The notebook runner finds what papermill misses. Each test has a notebook that must fail."""

import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from m2r2kit.cli import notebook_rules, notebooks
from m2r2kit.common import UserError

PARAMETERS = "steps: int = 3  # how many steps"
WIDGET = """\
import ipywidgets as widgets
out = widgets.Output()
slider = widgets.IntSlider(value=1)

@out.capture(clear_output=True)
def moved(change):
    if change["new"] == 5:
        raise ValueError("five is too many")

slider.observe(moved, "value")
slider.value = {value}
slider.value = 6  # wipes what the Output widget showed
display(slider, out)"""


def notebook(*sources, ci=None, executed=True):
    """A notebook within the budgets: prose, the parameters, then cells with these sources."""
    cells = [new_markdown_cell("# Test a runner\n" + "word " * 1300)]
    parameters = new_code_cell(PARAMETERS)
    parameters.metadata["tags"] = ["parameters"]
    cells += [parameters, *(new_code_cell(source) for source in sources)]
    nb = new_notebook(cells=cells, metadata={"m2r2kit": {"ci": {} if ci is None else ci}})
    if executed:
        for i, cell in enumerate(cells[1:], 1):
            cell.execution_count = i
    return nb


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    return tmp_path


def write(folder, nb, name="07_test.ipynb"):
    nbformat.write(nb, folder / name)
    return folder / name


def check(folder, nb, capsys):
    write(folder, nb)
    code = notebooks.check()
    return code, capsys.readouterr().out


# --- with a kernel ------------------------------------------------------------------------


def test_a_good_notebook_passes_with_its_ci_parameters(folder, capsys):
    nb = notebook(
        "import sys, os, m2r2kit\nassert steps == 1",
        f"assert sys.executable == {notebooks.sys.executable!r}",
        "assert os.path.exists('07_test.ipynb')  # as in JupyterLab: the notebook's own folder",
        ci={"steps": 1},
    )
    code, text = check(folder, nb, capsys)
    assert code == 0, text
    assert text.splitlines()[-1] == "notebooks: 1 passed, 0 failed"


def test_an_unknown_parameter_is_refused(folder, capsys):
    code, text = check(folder, notebook(ci={"stepz": 1}), capsys)
    assert code == 1 and "unknown parameter stepz" in text
    assert text.splitlines()[-1] == "notebooks: 0 passed, 1 failed"


def test_a_failing_cell_is_found(folder, capsys):
    code, text = check(folder, notebook("1 / (steps - 2)", ci={"steps": 2}), capsys)
    assert code == 1 and "cell 2: ZeroDivisionError" in text  # as the file counts, without papermill's cell
    assert text.count("ZeroDivisionError") == 1  # told once


@pytest.mark.parametrize(("value", "expected"), [(5, 1), (4, 0)])
def test_an_error_in_a_widget_callback_is_found(value, expected, folder, capsys):
    code, text = check(folder, notebook(WIDGET.format(value=value)), capsys)
    assert code == expected, text
    assert ("five is too many" in text) == bool(expected)


def test_a_traceback_in_the_log_is_found(folder):
    source = "import sys\nprint('Traceback (most recent call last):\\nKeyError: 3', file=sys.stderr)"
    _, problems, _ = notebooks.execute(write(folder, notebook(source)))
    assert len(problems) == 1 and "KeyError: 3" in problems[0]


LATE = """\
import threading, time
def fail():
    time.sleep({seconds})
    raise ValueError("too late")
threading.Thread(target=fail).start()"""
SPLIT = """\
import sys
sys.stderr.write("Traceback (most recent")
sys.stderr.flush()
sys.stderr.write(" call last):\\n  File 'x', line 1\\nKeyError: 'split'\\n")"""
REPORTED = """\
import logging
try:
    {}["logged"]
except KeyError:
    logging.exception("in a callback")"""


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([LATE.format(seconds=1)], "ValueError: too late"),  # after the last cell
        ([LATE.format(seconds=0.5), "time.sleep(2)"], "ValueError: too late"),  # in another cell
        ([SPLIT], "KeyError: 'split'"),
        ([REPORTED], "KeyError: 'logged'"),
        (["class A:\n    def __del__(self):\n        raise OSError('at the end')\na = A()\na.a = a\ndel a"],
         "OSError: at the end"),
    ],
)  # fmt: skip
def test_an_error_outside_the_cells_is_found(sources, expected, folder):
    _, problems, _ = notebooks.execute(write(folder, notebook(*sources)))
    assert len(problems) == 1 and problems[0].endswith(expected), problems


@pytest.mark.parametrize(
    "source",
    [
        "print('Traceback (most recent call last):')",
        "import sys\nprint('Python prints Traceback (most recent call last): first', file=sys.stderr)",
        "import traceback\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    print(traceback.format_exc())",
    ],
)
def test_a_notebook_may_write_of_tracebacks(source, folder):
    nb, problems, _ = notebooks.execute(write(folder, notebook(source)))
    assert problems == [] and len(nb.cells) == 3  # what runs after the last cell is not kept


@pytest.mark.parametrize("source", ["import os\nos.kill(os.getpid(), 9)", "import os\nos._exit(0)"])
def test_a_kernel_that_dies_is_told_in_a_sentence(source, folder, capsys):
    write(folder, notebook("a = 1", source))
    assert notebooks.run() == 1
    shown = capsys.readouterr()
    assert "07_test" in shown.out and "cell 3: the kernel died" in shown.out
    assert "Traceback" not in shown.out + shown.err


@pytest.mark.parametrize("home", ["/nowhere/at/all", "/dev/null"])
def test_a_notebook_runs_without_a_home_that_can_be_written(home, folder, monkeypatch):
    monkeypatch.setenv("HOME", home)
    source = "from pathlib import Path\n(Path.home() / 'file').write_text('')"
    _, problems, _ = notebooks.execute(write(folder, notebook(source)))
    assert problems == [] and notebooks.os.environ["HOME"] == home


def test_a_slow_cell_is_ended(folder):
    _, problems, seconds = notebooks.execute(write(folder, notebook("import time\ntime.sleep(60)")), None, 2)
    assert problems == ["cell 2 took more than 2 s"] and seconds < 50


def test_build_writes_a_clean_notebook_and_run_leaves_it_alone(folder, capsys):
    nb = notebook(WIDGET.format(value=4), "print(__import__('m2r2kit').__file__)", executed=False)
    path = write(folder, nb)
    assert notebook_rules.structure(notebooks.load(path), 0) != []
    assert notebooks.build() == 0
    built = notebooks.load(path)
    assert notebook_rules.structure(built, 0) == []
    assert built.cells[-1].outputs[0].text == "m2r2kit/__init__.py\n"
    assert notebooks.WIDGET_VIEW not in path.read_text() and "papermill" not in path.read_text()
    assert [p.name for p in folder.iterdir()] == [path.name]

    before = path.read_bytes()
    assert notebooks.run(["07"]) == 0
    assert path.read_bytes() == before
    assert capsys.readouterr().out.splitlines()[-1] == "notebooks: 1 passed, 0 failed"


def test_build_writes_nothing_that_failed_or_names_the_machine(folder, capsys):
    for source, problem in (("1 / 0", "ZeroDivisionError"), ("print('/home/someone/x')", "/home/someone/x")):
        path = write(folder, notebook(source))
        before = path.read_bytes()
        assert notebooks.build() == 1
        assert problem in capsys.readouterr().out
        assert path.read_bytes() == before


# --- without a kernel ---------------------------------------------------------------------


def printed(text):
    nb = notebook("print(1)")
    nb.cells[-1].outputs = [new_output("stream", text=text)]
    return nb


def tag_nothing(nb):
    nb.cells[1].metadata["tags"] = []


def skip_a_count(nb):
    nb.cells[-1].execution_count = 7


def fail(nb):
    nb.cells[-1].outputs = [new_output("error", ename="E", evalue="e", traceback=[])]


def keep_widgets(nb):
    nb.metadata["widgets"] = {}


def forget_ci(nb):
    del nb.metadata["m2r2kit"]


def untyped(nb):
    nb.cells[1].source = "steps = 3  # how many"


def computed(nb):
    nb.cells[1].source = "steps: int = 3 * len('ab')  # how many"


def uncommented(nb):
    nb.cells[1].source = "steps: int = 3"


def long_cell(nb):
    nb.cells[-1].source = "a = 1\n" * 41


def long_cells(nb):
    for cell in nb.cells[1:]:
        cell.source = PARAMETERS if cell is nb.cells[1] else "a = 1\n" * 20


def many_cells(nb):
    nb.cells += [new_markdown_cell("") for _ in range(60)]


def few_words(nb):
    nb.cells[0].source = "# Short\n\n```\n" + "code " * 2000 + "\n```"


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (tag_nothing, "0 cells are tagged 'parameters'"),
        (skip_a_count, "not executed from top to bottom"),
        (fail, "an output is an error"),
        (keep_widgets, "widget state"),
        (forget_ci, "the parameters for CI"),
        (untyped, "not of the form"),
        (computed, "is computed"),
        (uncommented, "'steps' has no comment"),
        (long_cell, "a code cell of 41 lines"),
        (long_cells, "at the median"),
        (many_cells, "at most 60"),
        (few_words, "1 words; 1200 to 2500"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_structure_finds(spoil, problem):
    nb = notebook("a = 1", "b = 2")
    assert notebook_rules.structure(nb, 1000) == []
    spoil(nb)
    assert any(problem in found for found in notebook_rules.structure(nb, 1000))


@pytest.mark.parametrize(
    "more", ["from m2r2kit.text import prompts, rows", "import m2r2kit.text, m2r2kit as m2"]
)
def test_structure_counts_the_names_that_are_imported_from_the_package(more):
    few = "import numpy\nfrom m2r2kit import a, b, c, d\nfrom m2r2kit.experts import Clock as C, Trace"
    nb = notebook(few, more)
    assert notebook_rules.structure(nb, 1000) == [] and len(notebook_rules.imported(nb)) == 8
    nb = notebook(few, f"def f():\n    from m2r2kit import one\n{more}")
    assert any("9 names are imported" in problem for problem in notebook_rules.structure(nb, 1000))


def test_structure_finds_a_large_file():
    assert any("MB" in problem for problem in notebook_rules.structure(notebook(), 1_000_000))


@pytest.mark.parametrize(
    "path", ["/work/main/x.py", "/home/a", "see '/root/.cache'", "(/tmp/x)", "/Users/a/b"]
)
def test_a_path_of_a_machine_is_found(path):
    assert any("a path of a machine" in problem for problem in notebook_rules.outputs(printed(path)))


@pytest.mark.parametrize("text", ["data/pocket-dense", "https://a.org/home/x", "tokens/work", "3/tmp"])
def test_other_text_is_no_path_of_a_machine(text):
    assert notebook_rules.outputs(printed(text)) == []


def test_pictures_are_not_searched_for_paths():
    nb = notebook("draw()")
    nb.cells[-1].outputs = [new_output("display_data", data={"image/png": "iVBOR+/tmp/aaaa"})]
    assert notebook_rules.outputs(nb) == []


def test_a_comment_above_a_parameter_counts():
    assert notebook_rules.parameter_problems("# how many\nsteps: int = 3\nx: float = 1.0  # why") == []


def test_notebooks_are_found_by_number_name_and_file(folder):
    for name in ("00_a.ipynb", "04_b.ipynb", "draft.ipynb"):
        write(folder, notebook(), name)
    assert [p.name for p in notebooks.find()] == ["00_a.ipynb", "04_b.ipynb"]
    for name in ("04", "04_b", "notebooks/04_b.ipynb"):
        assert [p.name for p in notebooks.find([name])] == ["04_b.ipynb"]
    with pytest.raises(UserError, match="There is no notebook '05'"):
        notebooks.find(["05"])


def test_a_broken_file_is_named(folder):
    (folder / "07_test.ipynb").write_text(json.dumps({"cells": 3}))
    with pytest.raises(UserError, match="07_test"):
        notebooks.load(folder / "07_test.ipynb")


# --- sliders --------------------------------------------------------------------------------

SLIDER = """
figure, ax = new_figure()
def draw(x):
    height = scale * x
    return figure, helper(height)
widgets.explore(draw, x=widgets.slider("x"))
"""


@pytest.mark.parametrize("later, name", [
    ("figure = 3", "figure"), ("for scale in range(3): pass", "scale"), ("import figure", "figure"),
    ("def helper(y):\n    return y", "helper"), ("unit = 2", "unit"), ("with open(p) as unit: pass", "unit"),
])  # fmt: skip
def test_a_name_that_a_slider_reads_must_keep_its_meaning(later, name):
    nb = notebook("def helper(y):\n    return unit * y", SLIDER, later)
    assert any(f"reads '{name}'" in problem for problem in notebook_rules.rebound(nb))


@pytest.mark.parametrize("later", [
    "draw = 3", "height, x, y = 1, 2, 3", "[figure for figure in range(3)]", "def f(figure):\n    scale = 1",
    "figure.size = 2",
])  # fmt: skip
def test_other_names_are_free(later):
    nb = notebook("def helper(y):\n    return unit * y", SLIDER, later)
    assert notebook_rules.rebound(nb) == []


@pytest.mark.parametrize("reading", [
    "print(found)", "def f(x):\n    return x + found", "[x for x in found]", "print(helper(1))",
    "found.append(1)",
])  # fmt: skip
def test_a_name_that_one_cell_sets_and_another_reads_has_one_meaning(reading):
    """Or not every cell could be run again after all have run."""
    first, again = "found = [1]\ndef helper(x):\n    return found", "for found in range(2): pass"
    for cells in ([first, reading, again], [again, first, reading]):
        assert any("'found'" in problem for problem in notebook_rules.reused(notebook(*cells)))
    assert notebook_rules.reused(notebook(first, reading, "other = 2")) == []


@pytest.mark.parametrize(
    "cell", ["found = 3\nprint(found)", "[found for found in x]", "def f(found):\n    found()"]
)
def test_a_cell_may_bind_a_name_again_for_itself(cell):
    assert notebook_rules.reused(notebook("x, found = 1, 2", cell, "found = 2")) == []
