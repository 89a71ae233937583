"""Run, check and build the notebooks of this project (`m2r2kit notebooks run|check|build`).

Execution goes through papermill, with three things that papermill leaves out: an unknown
parameter is an error, an error in a widget callback or a thread is an error, and the kernel is always the
Python that runs this (`notebook_client.py`).
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

from ..common import ROOT, UserError, missing_advice
from .notebook_rules import outputs, parameters, structure

FOLDER = ROOT / "notebooks"
CELL_SECONDS = 60  # in CI
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def find(names=()) -> list[Path]:
    """Notebooks in reading order: all, or those named by number (`04`), name or file."""
    every = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
    if not every:
        raise UserError(f"no notebooks are in {FOLDER}; {missing_advice(FOLDER, 'restore them from git')}")
    if not names:
        return every
    chosen = []
    for name in names:
        stem = Path(name).stem
        hits = [path for path in every if path.stem == stem or path.stem.split("_")[0] == stem]
        if not hits:
            raise UserError(f"there is no notebook '{name}'; there are {', '.join(p.stem for p in every)}")
        chosen += hits
    return sorted(set(chosen))


def load(path: Path) -> nbformat.NotebookNode:
    """A notebook file, as format 4."""
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises many kinds for a broken file
        raise UserError(f"{path.name} is not a notebook ({error}); restore it from the repository") from None


# --- execution ----------------------------------------------------------------------------


@contextmanager
def _home(folder: str) -> Iterator[None]:
    """Jupyter keeps files in the home folder: where none can be written, `folder` stands in for it."""
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
    """Execute a copy of a notebook; returns (executed notebook or None, problems, seconds).

    `values` replace its parameters. The kernel starts in the notebook's own folder, as it does in
    JupyterLab. `cell_seconds` ends the run when one cell takes longer.
    """
    values = values or {}
    unknown = set(values) - parameters(load(path))
    if unknown:
        names = ", ".join(sorted(unknown))
        return None, [f"unknown parameter {names}; the cell tagged 'parameters' does not set it"], 0.0

    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    from .notebook_client import NAME, Heard

    def number(count):
        """Of a cell in the file: papermill runs one more, with the values, after the parameters."""
        return max(1, count - bool(values))

    heard = Heard()
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
                heard=heard,
            )
        except PapermillExecutionError as error:
            failed = [f"cell {number(error.exec_count)}: {error.ename}: {error.evalue}"]
        except CellTimeoutError:
            failed = [f"cell {number(heard.cell)} took more than {cell_seconds} s"]
            heard = Heard()  # the interrupt that ended it
        except DeadKernelError:
            failed = [
                f"cell {number(heard.cell)}: the kernel died, as where memory ends or a library crashes"
            ]
        except RuntimeError as error:
            if heard.cell:
                raise
            failed = [f"the kernel did not start ({error}); see `m2r2kit doctor`"]
    # what failed a cell was heard as well; only the rest comes from callbacks
    quiet = [text for text in heard.all() if not any(text in line for line in failed)]
    failed += [f"an error that its cell did not raise, as in a widget's callback: {text}" for text in quiet]
    return nb, failed, time.perf_counter() - begun


# --- the three commands -------------------------------------------------------------------


def _each(paths, work) -> int:
    """Do `work(path) -> (problems, seconds)` for each, one line each; the last line is the sum."""
    failed, begun = 0, time.perf_counter()
    width = max(len(path.stem) for path in paths)
    for path in tqdm(paths, unit="notebook", disable=None, leave=False):
        problems, seconds = work(path)
        failed += bool(problems)
        tqdm.write(f"{path.stem:{width}}  {seconds:6.1f} s  {'failed' if problems else 'passed'}")
        for problem in problems:
            tqdm.write(f"    {problem}")
        sys.stdout.flush()  # ci/kit.py reads along
    print(f"total {time.perf_counter() - begun:.1f} s")
    print(f"notebooks: {len(paths) - failed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


def run(names=()) -> int:
    """Execute notebooks with their own parameters; the files stay as they are."""

    def work(path):
        _, problems, seconds = execute(path, bar=sys.stderr.isatty())
        return problems, seconds

    return _each(find(names), work)


def check(names=(), full: bool = False) -> int:
    """CI: the budgets and committed outputs of notebooks, and a run with their CI parameters."""

    def work(path):
        nb = load(path)
        values = {} if full else nb.metadata.get("m2r2kit", {}).get("ci", {})
        _, problems, seconds = execute(path, values, CELL_SECONDS)
        return structure(nb, path.stat().st_size) + problems, seconds

    return _each(find(names), work)


def clean(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An executed notebook without what belongs to one run or one machine; changes `nb`.

    A widget cannot live on a page without a kernel, and its text form helps nobody: it goes, and
    the still picture displayed beside it stays.
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
            temporary = path.with_name(f".{path.name}.tmp")
            nbformat.write(nb, temporary)
            temporary.replace(path)
        return problems, seconds

    return _each(find(names), work)
