"""Which packages may import which, read from the source; each public name is defined once."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "m2r2kit"
USES = ("exits", "speculation", "experts")
MAY = {  # a subpackage or module, and those that it may import
    "common": (),
    "model": ("common",),
    "text": ("common", "model"),
    "driver": ("common", "model", "text"),
    "stream": ("common", "model", "text"),
    "pocket": ("common", "model", "text"),
    "exits": ("common", "model", "stream", "driver", "text"),
    "speculation": ("common", "model", "stream", "driver"),
    "experts": ("common", "model", "stream", "driver"),
    "bench": ("common", "model", "text", "stream", "driver", *USES),
    "figures": ("common", "stream", "experts", "bench"),
}
OUTSIDE = ("__init__", "__main__", "api", "cli")  # the entry points may import all
TWICE = {  # names for the same thing in two subpackages
    *("load", "save", "read", "write", "new", "train", "measure", "compare", "newest", "table", "run"),
    *("loss", "mean_loss", "hf_config", "new_parameters", "hidden_states", "attend", "predictor_of"),
    *("teacher_batch",),
    *("check", "find", "parts", "questions", "stream", "drafter", "predictor", "tau", "default_exits"),
    *("Static", "Oracle", "Check", "swiglu", "draft_and_verify", "draw_sizes", "draw_speeds", "whole"),
    *("generate", "prepare", "load_stream", "train_stream", "pack"),
}


def imports():
    """(file, its subpackage, the imported one) of every import inside the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = list(parts[: len(parts) - node.level])
            full = base + (node.module.split(".") if node.module else [])
            for package in [full[0]] if full else [alias.name for alias in node.names]:
                if package not in (parts[0], "__version__"):
                    yield str(path.relative_to(PACKAGE)), parts[0], package


def test_every_subpackage_imports_only_what_stands_below_it():
    wrong = [
        f"{file} imports {package}"
        for file, own, package in imports()
        if own not in OUTSIDE and package not in MAY.get(own, ())
    ]
    assert not wrong


def test_the_order_of_subpackages_has_no_circle():
    done = set()
    while rest := MAY.keys() - done:
        floor = {package for package in rest if set(MAY[package]) <= done}
        assert floor, f"a circle among {sorted(rest)}"
        done |= floor


def test_there_are_few_subpackages_and_few_imports_between_them():
    packages = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")} - {"__init__.py"}
    pairs = {(own, package) for _, own, package in imports() if own != "__init__"}
    assert len(packages) <= 17 and len(pairs) <= 70
    known = {*MAY, *OUTSIDE}
    assert {package.removesuffix(".py") for package in packages} <= known


def test_a_public_name_is_defined_once():
    where = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        if "cli" in path.parts:  # each of its files is a program of its own
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].append(str(path.relative_to(PACKAGE)))
    twice = {name: files for name, files in where.items() if len(files) > 1 and name not in TWICE}
    assert not twice


@pytest.mark.parametrize("module", ["m2r2kit.__main__", *(f"m2r2kit.{use}.registry" for use in USES)])
def test_names_and_help_are_read_without_the_libraries(module):
    """`--help` answers at once, because nothing that it reads imports MLX."""
    code = "import sys, m2r2kit; before = set(sys.modules); "
    code += f"import {module} as m; getattr(m, 'parser', dict)(); print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert module in run.stdout
    assert not {"mlx.core", "mlx_lm", "numpy", "transformers"} & set(run.stdout.split())


SUBPACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


@pytest.mark.parametrize("name", SUBPACKAGES)
def test_a_subpackage_opens_its_files_and_names_on_demand(name):
    """Importing it is light; a name that it gives is the file's own, and hides none of its files."""
    code = f"import sys; from m2r2kit import {name} as m; assert not {{'mlx', 'numpy'}} & set(sys.modules); "
    code += "print(*(n for n in dir(m) if n[0] != '_' and n != 'on_demand'))"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    module = importlib.import_module(f"m2r2kit.{name}")
    files = {path.stem for path in (PACKAGE / name).glob("[!_]*.py")}
    files |= {path.parent.name for path in (PACKAGE / name).glob("*/__init__.py")}
    assert files <= set(names.stdout.split())
    for each in names.stdout.split():
        found = getattr(module, each)
        assert (each in files) == inspect.ismodule(found), each
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018
