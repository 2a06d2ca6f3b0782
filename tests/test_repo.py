"""The repository keeps its own promises: notebooks, map of the house, private names in one file."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_notebook_runs(path, tmp_path):
    cells = json.loads(path.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert outputs  # kept, so that they read well where they are only looked at
    assert not any(output.get("name") == "stderr" for output in outputs)
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    (tmp_path / "notebook.py").write_text(code)
    subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, check=True, timeout=120)


def test_the_maps_name_every_module():
    """The package's docstring names what lies in its folder, that of each larger part its modules."""
    parts = [path.parent for path in (ROOT / "assign").rglob("__init__.py")]
    for part in [part for part in parts if "==\n" in (part / "__init__.py").read_text()]:
        inside = [path.stem for path in part.glob("*.py")] + [path.parent.name for path in part.glob("*/__init__.py")]
        named = ast.get_docstring(ast.parse((part / "__init__.py").read_text())) or ""
        assert not [name for name in inside if name[:2] != "__" and f"``{name}``" not in named], part
    mapped = {part.name for part in parts if "==\n" in (part / "__init__.py").read_text()}
    assert mapped >= {
        "assign",
        "tracing",
        "formats",
        "plan",
        "memory",
        "numerics",
        "noise",
        "executor",
        "optim",
        "training",
    }


def test_private_torch_names_live_in_one_file():
    private = re.compile(
        r"(?<!_)torch(\.\w+)*\._(?!C\b|to_copy\b)[a-z]|from torch(\.\w+)* import _|from torch(\.\w+)*\._|\._cdata"
    )
    for path in (ROOT / "assign").rglob("*.py"):
        if path.name != "_torch.py":
            assert not private.search(path.read_text()), path


def test_no_module_keeps_live_objects():
    """What belongs to a model, a parameter or a training is kept there, or passed on, not in a module's own table."""
    for path in (ROOT / "assign").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            value = getattr(node, "value", None)
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(value, ast.Call):
                kind = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
                assert not re.fullmatch(r"Weak\w+", kind), f"{path.name}:{node.lineno}: {kind}"


def test_every_public_name_has_a_docstring():
    for path in (ROOT / "assign").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in [tree, *ast.walk(tree)]:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node in tree.body and node.name[0] != "_":
                assert ast.get_docstring(node), f"{path.name}: {node.name}"
        assert ast.get_docstring(tree), path


def test_pre_commit_has_the_linters_of_the_gate():
    hooks = re.findall(r"entry: ([^,]+),", (ROOT / ".pre-commit-config.yaml").read_text())
    gate = (ROOT / ".ci" / "run").read_text().splitlines()
    first = gate.index(hooks[0])
    assert hooks == gate[first : gate.index("lint-imports") + 1]
