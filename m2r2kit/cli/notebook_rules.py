"""Checks of a notebook that do not run it: budgets, parameters, committed outputs, sliders."""

import ast
import io
import re
import statistics
import tokenize

import nbformat

MOST_CELLS, MOST_LINES, MEDIAN_LINES = 60, 40, 8
MOST_NAMES = 8  # of this package that a notebook imports: subpackages, and what is used again and again
WORDS = (1200, 2500)
MOST_BYTES = 1_000_000
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|home|root|tmp|Users)\b[^\s\"'<>)]*")


def structure(nb: nbformat.NotebookNode, size: int) -> list[str]:
    """All problems of a notebook; `size` in bytes."""
    problems = []
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    lines = [len(cell.source.strip().splitlines()) for cell in code]
    words = sum(count_words(cell.source) for cell in nb.cells if cell.cell_type == "markdown")
    if len(nb.cells) > MOST_CELLS:
        problems.append(f"{len(nb.cells)} cells; at most {MOST_CELLS}")
    if lines and max(lines) > MOST_LINES:
        problems.append(f"a code cell of {max(lines)} lines; at most {MOST_LINES}")
    if lines and statistics.median(lines) > MEDIAN_LINES:
        median = statistics.median(lines)
        problems.append(f"code cells of {median:g} lines at the median; at most {MEDIAN_LINES}")
    if not WORDS[0] <= words <= WORDS[1]:
        problems.append(f"{words} words; {WORDS[0]} to {WORDS[1]}")
    if size >= MOST_BYTES:
        problems.append(f"{size / 1e6:.2f} MB; under {MOST_BYTES / 1e6:g} MB")
    names = imported(nb)
    if len(names) > MOST_NAMES:
        problems.append(
            f"{len(names)} names are imported from m2r2kit ({', '.join(names)}); at most {MOST_NAMES}, "
            "so import a subpackage and write experts.Clock"
        )
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        problems.append(f"{len(tagged)} cells are tagged 'parameters'; exactly one must be")
    else:
        problems += [f"parameters: {problem}" for problem in parameter_problems(tagged[0].source)]
    if "ci" not in nb.metadata.get("m2r2kit", {}):
        problems.append('the metadata holds no "m2r2kit": {"ci": {..}}, the parameters for CI')
    return problems + rebound(nb) + reused(nb) + outputs(nb)


def count_words(markdown: str) -> int:
    """Words of prose, without code blocks, equations, tags and addresses."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$\n]+\$|<[^>]+>|\]\([^)]*\)", " ", markdown, flags=re.S)
    return len(re.findall(r"[^\W_]+(?:['’.-][^\W_]+)*", text))


def imported(nb: nbformat.NotebookNode) -> list[str]:
    """Names that its code imports from this package, in order."""
    trees = [ast.parse(cell.source) for cell in nb.cells if cell.cell_type == "code"]
    names = []
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            names += [each.name for each in node.names if each.name.split(".")[0] == "m2r2kit"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "m2r2kit":
            names += [each.name for each in node.names]
    return names


def parameters(nb: nbformat.NotebookNode) -> set[str]:
    """Names set by the cell tagged `parameters`."""
    tagged = [cell.source for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]
    nodes = [node for source in tagged for node in ast.parse(source).body]
    return {node.target.id for node in nodes if isinstance(node, ast.AnnAssign)}


def parameter_problems(source: str) -> list[str]:
    """Problems of a parameter cell: each line is `name: type = literal`, with a comment there or above."""
    problems = []
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.AnnAssign):
            problems.append(f"'{ast.unparse(node)}' is not of the form name: type = value")
            continue
        try:
            ast.literal_eval(node.value)
        except (ValueError, TypeError):
            problems.append(f"'{ast.unparse(node)}' is computed; derived values belong in the next cell")
        if not comments.intersection((node.lineno - 1, node.end_lineno)):
            problems.append(f"'{node.target.id}' has no comment")
    return problems


def outputs(nb: nbformat.NotebookNode) -> list[str]:
    """Problems of committed outputs: errors, gaps, widget state, paths of a machine."""
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    problems = []
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        problems.append("not executed from top to bottom in one go")
    if any(output.output_type == "error" for cell in code for output in cell.outputs):
        problems.append("an output is an error")
    if "widgets" in nb.metadata:
        problems.append("widget state is saved in it")
    if "papermill" in nb.metadata:
        problems.append("papermill's timing is saved in it")
    for cell in code:
        for text in _texts(cell.outputs):
            if hit := MACHINE_PATH.search(text):
                problems.append(f"a path of a machine in the output of cell {cell.execution_count}: {hit[0]}")
                break
    if problems:
        problems.append("to repair its outputs: m2r2kit notebooks build")
    return problems


def _texts(value):
    """Every string in the outputs, except encoded pictures."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("image/png", "image/jpeg"):
                yield from _texts(item)


# --- names that change their meaning --------------------------------------------------------


def rebound(nb: nbformat.NotebookNode) -> list[str]:
    """Names that a slider's function reads and a later cell rebinds.

    After all cells have run, such a slider would draw with the wrong values.
    """
    trees = [ast.parse(cell.source) for cell in nb.cells if cell.cell_type == "code"]
    problems, functions = [], {}
    for i, tree in enumerate(trees):
        functions |= {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for call in (c for c in calls if ast.unparse(c.func).endswith("explore") and c.args):
            drawn = functions.get(ast.unparse(call.args[0]))
            read = _reads(drawn, functions) if drawn else set()
            for j, later in enumerate(trees[i + 1 :], i + 1):
                for name in sorted(read & _binds(later)):
                    problems.append(f"the slider of cell {i + 1} reads '{name}', which cell {j + 1} changes")
    return problems


def reused(nb: nbformat.NotebookNode) -> list[str]:
    """Names that a cell reads from an earlier cell and that more than one cell binds.

    Without them, any cell can be run again after all have run.
    """
    trees = [ast.parse(cell.source) for cell in nb.cells if cell.cell_type == "code"]
    bound = [_binds(tree) for tree in trees]
    problems, functions = [], {}
    for i, tree in enumerate(trees):
        functions |= {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        read = (_reads(tree, functions) - bound[i]) & set().union(*bound[:i])
        for name in sorted(read):
            cells = [str(j + 1) for j, names in enumerate(bound) if name in names]
            if len(cells) > 1:
                problems.append(
                    f"cell {i + 1} reads '{name}', which cells {' and '.join(cells)} set; rename one"
                )
    return problems


def _reads(code: ast.FunctionDef | ast.Module, functions: dict) -> set[str]:
    """Global names that a function or a cell reads, directly or through functions of the notebook."""
    names = [node for node in ast.walk(code) if isinstance(node, ast.Name)]
    own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    own |= {node.arg for node in ast.walk(code) if isinstance(node, ast.arg)}
    found = {n.id for n in names} - own
    for name in found & functions.keys() - {getattr(code, "name", None)}:
        rest = {k: v for k, v in functions.items() if k != name}
        found |= _reads(functions[name], rest)
    return found


def _binds(node: ast.AST) -> set[str]:
    """Global names that a cell binds: not those inside functions and comprehensions."""
    found = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            found.add(child.name)
        elif isinstance(child, ast.alias):
            found.add((child.asname or child.name).split(".")[0])
        elif isinstance(child, ast.ExceptHandler) and child.name:
            found |= {child.name} | _binds(child)
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            found.add(child.id)
        elif not isinstance(child, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            found |= _binds(child)
    return found
