"""mlx-lm is imported in one place, and the process keeps its limits of open files."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "m2r2kit"
IMPORT = """
import json, resource, sys
soft, hard = json.loads(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
set_limit = resource.setrlimit
import m2r2kit.model.backbone
print(json.dumps([*resource.getrlimit(resource.RLIMIT_NOFILE), resource.setrlimit is set_limit]))
"""


@pytest.mark.parametrize("before, after", [((256, 1024), 1024), ((1024, 4000), 2048), ((3000, 4000), 3000)])
def test_the_hard_limit_stays_and_the_soft_one_only_rises(before, after):
    command = [sys.executable, "-c", IMPORT, json.dumps(before)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [after, before[1], True]


def test_no_other_file_imports_it():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {path.name for name in names if name.split(".")[0] == "mlx_lm"}
    assert found == {"mlxlm.py"}
