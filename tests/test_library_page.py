"""The library's rooms: who may import whom, what its page says of them, and that no page names what is not there."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book" / "_ext"))
import library_tree  # noqa: E402

LIBRARY = ROOT / "tokcx_lib"
FILES = sorted(LIBRARY.rglob("*.py"))
PAGES = [*ROOT.glob("chapters/*.md"), *ROOT.glob("book/**/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", *FILES]


def linted(root: Path) -> subprocess.CompletedProcess:
    """What import-linter says of the tree at `root`."""
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    return subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)


def test_who_may_import_whom():
    found = linted(ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(
    "module, line",
    [
        ("theory/laws.py", "from tokcx_lib.sampling import fits"),
        ("sampling/fits.py", "from tokcx_lib.models import corpora"),
        ("studies/sharp/experiments.py", "from tokcx_lib.studies import coverage"),
        ("records.py", "from tokcx_lib import plots"),
    ],
)
def test_a_wrong_import_breaks_the_contract(module, line, tmp_path):
    shutil.copytree(LIBRARY, tmp_path / "tokcx_lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "tokcx_lib" / module
    file.write_text(file.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    found = linted(tmp_path)
    assert found.returncode == 1 and "BROKEN" in found.stdout, found.stdout + found.stderr


def test_a_room_without_a_place_in_the_contract_breaks_it(tmp_path):
    shutil.copytree(LIBRARY, tmp_path / "tokcx_lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tokcx_lib" / "studies" / "new.py").write_text('"""A study."""\n', encoding="utf-8")
    assert linted(tmp_path).returncode == 1


@pytest.mark.parametrize("file", [file for file in FILES if file.name == "__init__.py"], ids=lambda f: f.parent.name)
def test_a_package_imports_nothing_of_the_library(file):
    """Else every chapter that uses one module of a room would depend on all of them."""
    if file.parent.name in ("check", "probe"):  # doors, which open when they are asked
        return
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    assert not [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]


def test_the_page_has_every_module_with_its_first_line():
    page = "\n".join(library_tree.page(ROOT))
    shown = {Path(room, file.name) for room in library_tree.rooms(ROOT) for file in library_tree.modules(ROOT, room)}
    there = {file.relative_to(LIBRARY) for file in FILES if not file.name.startswith("__")}
    assert shown == there
    for file in there:
        module = importlib.import_module(".".join(["tokcx_lib", *file.with_suffix("").parts]))
        first = module.__doc__.splitlines()[0].replace("``", "`").rstrip(".").replace("|", r"\|")
        assert re.match(r"chapter_\d+$", file.stem) or f"| `{file.stem}` | {first} |" in page, file


def test_what_a_room_holds_comes_in_the_order_of_imports():
    for room in library_tree.rooms(ROOT):
        order = [file.stem for file in library_tree.modules(ROOT, room)]
        assert "laws" not in order or order.index("laws") < order.index("rates") < order.index("moment_bias")
        assert "validation" not in order or order.index("validation") < order.index("runtime") < order.index("cli")


def test_public_functions_have_one_home_and_a_docstring():
    for file in FILES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokcx_lib"):
                assert not any(alias.asname == alias.name for alias in node.names), f"{file}: a second door"
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{file}: {node.name} has no docstring"


def modules() -> dict[str, list]:
    """The library's modules by their last name, which some share."""
    found: dict[str, list] = {}
    for file in FILES:
        if not file.name.startswith("__"):
            name = ".".join(["tokcx_lib", *file.relative_to(LIBRARY).with_suffix("").parts])
            found.setdefault(file.stem, []).append(importlib.import_module(name))
    return found


# What the library had in other places, and words of other things that look like a module and a name.
GONE = {"finite_n", "experiments", "sparse", "sparse_law", "depth", "convergence", "downstream", "peer"}
OTHERS = {"heads.csv", "report.html", "report.json", "probe.json", "plan.json", "theory.md", "page.html"}


@pytest.mark.parametrize("file", PAGES, ids=lambda f: f.name)
def test_names_in_prose_are_there(file):
    known, missing = modules(), []
    for module, name in re.findall(r"`(\w+)\.(\w+)[`(]", file.read_text(encoding="utf-8")):
        if f"{module}.{name}" in OTHERS or module not in known.keys() | GONE:
            continue
        if not any(hasattr(each, name) for each in known.get(module, [])):
            missing.append(f"{module}.{name}")
    assert not missing
