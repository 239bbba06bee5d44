"""The library's tree on its page: `{library-tree}` lists rooms and modules with the first lines of their docstrings.

The order is that of the contract in pyproject.toml, from the ground up; in a room a module comes after those that it
imports. Nothing is imported to find out: the book builds without the packages that the library needs.
"""

import ast
import re
import tomllib
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

DOOR = "The ground, which all others use; `plots`; and `cli`, which knows them all"


def contract(root: Path) -> list[str]:
    """Rooms and modules at the library's door, from the ground up, as the contract has them."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    return [name for layer in reversed(layers) for name in reversed(re.split(r" *[|:] *", layer))]


def rooms(root: Path) -> list[str]:
    """Folders of the library, "" for its own modules, from the ground up."""
    found = ["", *(name for name in contract(root) if (root / "tokcx_lib" / name / "__init__.py").is_file())]
    for room in found.copy():
        inner = sorted((root / "tokcx_lib" / room).glob("*/__init__.py")) if room else []
        at = found.index(room) + 1
        found[at:at] = [f"{room}/{file.parent.name}" for file in inner]
    return found


def modules(root: Path, room: str) -> list[Path]:
    """The modules of a room, each after those of it that it imports."""
    if not room:
        known = (root / "tokcx_lib" / f"{name}.py" for name in contract(root))
        return [file for file in known if file.is_file() and file.stem[:2] != "__"]
    files = {file.stem: file for file in sorted((root / "tokcx_lib" / room).glob("*.py")) if file.stem[:2] != "__"}
    package = ".".join(["tokcx_lib", *room.split("/")])
    needs = {name: _imported(file, package) & files.keys() - {name} for name, file in files.items()}
    ordered: list[str] = []
    while len(ordered) < len(files):
        ready = [name for name in files if name not in ordered and needs[name] <= {*ordered}]
        ordered += ready or sorted(files.keys() - {*ordered})  # a circle: as they come
    return [files[name] for name in ordered]


def _imported(file: Path, package: str) -> set[str]:
    """Names that a module imports from a package: modules of it, and others."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package + "."):
            found.add(node.module.removeprefix(package + ".").split(".")[0])
    return found


def summary(file: Path) -> str:
    """The first line of a module's docstring. ValueError if it has none."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{file.name}: expected a docstring, got none")
    return text.splitlines()[0].replace("``", "`")


def names(file: Path) -> list[str]:
    """The public functions and classes of a module, in its order."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return [node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def page(root: Path) -> list[str]:
    """The lines of Markdown that the directive stands for."""
    lines = ["", "| room | what it holds |", "|---|---|"]
    for room in rooms(root):
        head = _cell(summary(root / "tokcx_lib" / room / "__init__.py")) if room else DOOR
        lines.append(f"| {_path(room)} | {head} |")
    for room in rooms(root):
        lines += ["", f"**{_path(room)}**", "", "| module | what it holds |", "|---|---|"]
        files = modules(root, room)
        numbered = [file for file in files if re.fullmatch(r"chapter_\d+", file.stem)]
        for file in (file for file in files if file not in numbered):
            lines.append(f"| `{file.stem}` | {_cell(summary(file))} |")
        if numbered:
            ends = " … ".join(f"`{file.stem}`" for file in (numbered[0], numbered[-1]))
            lines.append(f"| {ends} | the checks of a chapter each |")
        listed = [f"- `{file.stem}`: {', '.join(f'`{name}`' for name in names(file))}" for file in files if names(file)]
        if listed:
            lines += ["", ":::{dropdown} Functions and classes", *listed, ":::"]
    return lines


def _path(room: str) -> str:
    return f"`{room or 'tokcx_lib'}/`"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").rstrip(".")


class LibraryTree(SphinxDirective):
    def run(self):
        root = Path(self.env.srcdir)
        for file in [root / "pyproject.toml", *(root / "tokcx_lib").rglob("*.py")]:
            self.env.note_dependency(str(file))
        try:
            lines = page(root)
        except ValueError as error:
            raise self.error(str(error)) from error
        holder = nodes.container()
        self.state.nested_parse(StringList(lines, source=self.env.docname), self.content_offset, holder)
        return holder.children


def setup(app):
    app.add_directive("library-tree", LibraryTree)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
