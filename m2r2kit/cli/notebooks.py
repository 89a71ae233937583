"""Run, check and build the notebooks of this project (`m2r2kit notebooks run|check|build`).

Papermill executes them, with three changes: an unknown parameter is an error, so is an exception in a widget
callback or a thread, and the kernel is always this Python (`notebook_client.py`).
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from tqdm import tqdm

from ..common import ROOT, UserError, missing_advice, whole
from .notebook_rules import outputs, parameters, structure

FOLDER = ROOT / "notebooks"
CELL_SECONDS = 60  # in CI
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def find(names=()) -> list[Path]:
    """Notebooks in reading order: all, or those given by number (`04`), name or file."""
    every = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
    if not every:
        raise UserError(
            f"There are no notebooks in {FOLDER}; {missing_advice(FOLDER, 'restore them from git')}"
        )
    if not names:
        return every
    chosen = []
    for name in names:
        stem = Path(name).stem
        hits = [path for path in every if path.stem == stem or path.stem.split("_")[0] == stem]
        if not hits:
            raise UserError(f"There is no notebook '{name}'; choose among {', '.join(p.stem for p in every)}")
        chosen += hits
    return sorted(set(chosen))


def load(path: Path) -> nbformat.NotebookNode:
    """Read a notebook file, as format 4."""
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises many types for a broken file
        raise UserError(f"{path.name} is not a notebook ({error}); restore it from the repository") from None


# --- execution ----------------------------------------------------------------------------


@contextmanager
def _home(folder: str) -> Iterator[None]:
    """Use `folder` as the home folder if the real one cannot be written: Jupyter keeps files there."""
    before = os.environ.get("HOME")
    home = os.path.expanduser("~")
    if os.path.isabs(home) and os.access(home, os.W_OK | os.X_OK):
        yield
        return
    os.environ["HOME"] = folder
    try:
        yield
    finally:
        os.environ.pop("HOME")
        if before is not None:
            os.environ["HOME"] = before


def execute(path: Path, values: dict | None = None, cell_seconds: int | None = None, bar=False):
    """Execute a copy of a notebook in its own folder, as JupyterLab does.

    Args:
        values: replace the notebook's parameters.
        cell_seconds: time limit of one cell.

    Returns:
        (executed notebook or None, problems, seconds).
    """
    values = values or {}
    unknown = set(values) - parameters(load(path))
    if unknown:
        names = ", ".join(sorted(unknown))
        return None, [f"unknown parameter {names}; the cell tagged 'parameters' does not set it"], 0.0

    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    from .notebook_client import NAME, Errors

    def number(count):
        """The number of a cell in the file: papermill inserts one with the values."""
        return max(1, count - bool(values))

    errors = Errors()
    begun = time.perf_counter()
    nb, failed = None, []
    with tempfile.TemporaryDirectory(prefix="m2r2kit-") as folder, _home(folder):
        try:
            nb = papermill.execute_notebook(
                str(path.resolve()),
                str(Path(folder) / path.name),
                parameters=values,
                engine_name=NAME,
                kernel_name="python3",
                language="python",
                progress_bar={"desc": path.stem, "leave": False} if bar else False,
                cwd=str(path.resolve().parent),
                execution_timeout=cell_seconds,
                errors=errors,
            )
        except PapermillExecutionError as error:
            failed = [f"cell {number(error.exec_count)}: {error.ename}: {error.evalue}"]
        except CellTimeoutError:
            failed = [f"cell {number(errors.cell)} took more than {cell_seconds} s"]
            errors = Errors()  # without the interrupt that ended the cell
        except DeadKernelError:
            failed = [f"cell {number(errors.cell)}: the kernel died: out of memory, or a crash in a library"]
        except RuntimeError as error:
            if errors.cell:
                raise
            failed = [f"the kernel did not start ({error}); see `m2r2kit doctor`"]
    # the error that failed a cell is among them; the others come from callbacks and threads
    quiet = [text for text in errors.all() if not any(text in line for line in failed)]
    failed += [f"an error outside of cells, such as in a widget's callback: {text}" for text in quiet]
    return nb, failed, time.perf_counter() - begun


# --- the three commands -------------------------------------------------------------------


def _each(paths, work) -> int:
    """Run `work(path) -> (problems, seconds)` for each notebook; prints one line each, and a summary."""
    failed, begun = 0, time.perf_counter()
    width = max(len(path.stem) for path in paths)
    for path in tqdm(paths, unit="notebook", disable=None, leave=False):
        problems, seconds = work(path)
        failed += bool(problems)
        tqdm.write(f"{path.stem:{width}}  {seconds:6.1f} s  {'failed' if problems else 'passed'}")
        for problem in problems:
            tqdm.write(f"    {problem}")
        sys.stdout.flush()  # ci/kit.py reads the lines as they come
    print(f"total {time.perf_counter() - begun:.1f} s")
    print(f"notebooks: {len(paths) - failed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


def run(names=()) -> int:
    """Execute copies of notebooks with their own parameters."""

    def work(path):
        _, problems, seconds = execute(path, bar=sys.stderr.isatty())
        return problems, seconds

    return _each(find(names), work)


def check(names=(), full: bool = False) -> int:
    """Check the budgets and committed outputs of notebooks, and execute copies with their CI parameters."""

    def work(path):
        nb = load(path)
        values = {} if full else nb.metadata.get("m2r2kit", {}).get("ci", {})
        _, problems, seconds = execute(path, values, CELL_SECONDS)
        return structure(nb, path.stat().st_size) + problems, seconds

    return _each(find(names), work)


def clean(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove from an executed notebook, in place, what is specific to one run or machine.

    Widgets need a kernel, so they are removed; the still picture beside each remains.
    """
    nb.metadata = nbformat.NotebookNode(
        {
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "m2r2kit": nb.metadata.get("m2r2kit", {"ci": {}}),
        }
    )
    for cell in nb.cells:
        kept = {key: value for key, value in cell.metadata.items() if key not in ("papermill", "execution")}
        if not kept.get("tags"):
            kept.pop("tags", None)
        cell.metadata = nbformat.NotebookNode(kept)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET_VIEW not in output.get("data", {})]
            pictures = json.dumps(cell.outputs).replace(f"{ROOT}/", "")
            cell.outputs = [nbformat.from_dict(output) for output in json.loads(pictures)]
    return nb


def build(names=()) -> int:
    """Execute notebooks with their own parameters and write them back executed and clean."""

    def work(path):
        nb, problems, seconds = execute(path, bar=sys.stderr.isatty())
        problems = problems or outputs(clean(nb))
        if not problems:
            with whole(path) as new:
                nbformat.write(nb, new)
        return problems, seconds

    return _each(find(names), work)
