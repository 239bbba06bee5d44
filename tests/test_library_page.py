"""The library page names what is there, and no module imports one that stands below it in its table."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROWS = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]*)\|$", (ROOT / "book/reference/library.md").read_text(), flags=re.M)
ORDER = [name for name, _ in ROWS]


def test_every_module_has_a_row():
    library = ROOT / "tokcx_lib"
    modules = {path.stem for path in library.glob("*.py")} - {"__init__", "__main__"}
    modules |= {path.parent.name for path in library.glob("*/__init__.py")}
    assert sorted(ORDER) == sorted(modules)


@pytest.mark.parametrize("module, names", ROWS)
def test_the_names_exist_and_say_what_they_do(module, names):
    loaded = importlib.import_module(f"tokcx_lib.{module}")
    assert loaded.__doc__
    for name in re.findall(r"`(\w+)`", names):
        assert hasattr(loaded, name), f"{module}.{name}"
        assert not callable(getattr(loaded, name)) or getattr(loaded, name).__doc__, f"{module}.{name} has no docstring"


@pytest.mark.parametrize("module", ORDER)
def test_data_flows_one_way(module):
    folder = ROOT / "tokcx_lib" / module
    files = sorted(folder.glob("*.py")) or [folder.with_suffix(".py")]
    imported = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tokcx_lib":
            names = [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
            imported.update(names)
    imported -= {module}  # a package's own parts
    assert all(ORDER.index(name) < ORDER.index(module) for name in imported & set(ORDER)), imported
