"""Make and check the executed twins of the chapters.

    python tools/notebooks.py run [--force] [CHAPTER ...]
    python tools/notebooks.py check [CHAPTER ...]

`chapters/NN_name.md` (MyST) is what one edits; `chapters/NN_name.ipynb` is the same notebook with its outputs, and
what the book is built from. `run` brings the twins up to date: it executes a chapter whose outputs are stale, and only
rewrites the text of one whose prose alone has changed. A second run changes no byte. `check` lists everything that is
stale, and where a chapter breaks the book's style or its parts do not fit together; it exits with 1 if it found
something.

Outputs are stale when a code cell has changed, or anything that they were computed from: a module of `tokcx_lib` that
the chapter imports, directly or not, a record that it or such a module loads, or the version of a numerical package.
The twin carries a stamp (`metadata.tokcx`) with a hash of each, so that `check` can name the one that moved, without
importing or executing anything. It also carries a hash of what was written, so that work done in Jupyter, which the
source does not have, is not overwritten.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import os
import re
import sys
import time
from functools import cache
from pathlib import Path

import jupytext
import nbformat
import yaml
from jupytext.myst import MystMetadataParsingError
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "tokcx_lib"
NUMERICAL = ("numpy", "scipy", "torch", "transformers", "sympy", "matplotlib")
TIMEOUT = 600  # seconds for one cell
LINE, CELL = 72, 25  # longest line of code that a page shows without scrolling; longest cell, in lines
OUTPUT = ("output_type", "name", "text", "data", "ename", "evalue")  # of an output, what does not count its run
IMAGES = ("image/png", "image/jpeg", "image/svg+xml")

# What stored outputs are made with, and tested against.
ENVIRONMENT = {
    "TOKCX_PROFILE": "quick",
    "TOKCX_DEVICE": "cpu",
    "TQDM_DISABLE": "1",  # progress bars write to stderr
    "HF_HUB_OFFLINE": "1",  # live cells need no network
    "PYTHONHASHSEED": "0",
}


# ---------------------------------------------------------------- reading


class Refused(Exception):
    """A chapter that cannot be run as it stands; the message is one line that says what to do."""


def source_notebook(path: Path) -> nbformat.NotebookNode:
    """The notebook that the MyST file `path` describes: no outputs, and cell ids that depend on positions only.

    Raises
    ------
    Refused
        If there is no front matter of jupytext, or it or the options of a cell are not YAML.
    """
    front = re.match(r"---\n(.*?)^---$", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    try:
        header = yaml.safe_load(front[1]) if front else None
        if not isinstance(header, dict) or not {"jupytext", "kernelspec"} <= header.keys():
            raise Refused("its front matter has no `jupytext:` and `kernelspec:`; copy that of another chapter")
        notebook = jupytext.read(path, fmt="md:myst")
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 2})" if error.problem_mark else ""
        raise Refused(f"its front matter is not YAML{line}: {error.problem}") from error
    except MystMetadataParsingError as error:
        raise Refused(" ".join(str(error).split())) from error
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for position, cell in enumerate(notebook.cells):
        cell.id = f"cell-{position:03d}"
    # Fixed, where the kernel would write the version of Python into it.
    notebook.metadata.language_info = {"name": "python", "file_extension": ".py", "pygments_lexer": "ipython3"}
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The code cells that have code: the others are not executed and have no outputs."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def code_of(notebook: nbformat.NotebookNode) -> str:
    """All the code of a notebook, without lines that belong to IPython (`%magic`, `!shell`, `help?`)."""
    lines = "\n".join(cell.source for cell in code_cells(notebook)).splitlines()
    return "\n".join(line for line in lines if not (line.lstrip().startswith(("%", "!")) or line.endswith("?")))


# ----------------------------------------------------------------- stamps


@cache  # chapters share their modules
def imported_names(code: str, package: str = "") -> frozenset[str]:
    """Dotted names that `code` imports, in functions too; `package` is the one it lives in, for relative imports.

    `from a import b` gives both `a` and `a.b`: whether `b` is a module is for the caller to find out. Code with a
    mistake in its syntax imports nothing, and says so itself when it is run.
    """
    names = set()
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return frozenset()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return frozenset(names)


def module_file(name: str, root: Path) -> Path | None:
    """The file of a module of the library, or None if `name` is something else."""
    path = root.joinpath(*name.split("."))
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            return file
    return None


def library_files(code: str, root: Path) -> list[Path]:
    """Files of the library that `code` imports, transitively, found without importing them."""
    found: set[Path] = set()
    waiting = set(imported_names(code))
    while waiting:
        name = waiting.pop()
        if name.split(".")[0] != PACKAGE:
            continue
        waiting.add(name.rpartition(".")[0])  # Python imports the packages around a module first
        file = module_file(name, root)
        if file is None or file in found:
            continue
        found.add(file)
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        waiting |= imported_names(file.read_text(encoding="utf-8"), package)
    return sorted(found)


def record_files(code: str, root: Path) -> dict[str, list[Path]]:
    """Files of the records that `code` loads, by name; of `f"real_heads_{name}"`, all records whose name fits."""
    found = {}
    for made, name in re.findall(r"records\.load\(\s*(f?)[\"']([^\"']+)[\"']", code):
        name = re.sub(r"\{[^}]*\}", "*", name) if made else name
        found[name] = sorted((root / "book" / "records").glob(f"{name}.*"))
    return found


def stamp(notebook: nbformat.NotebookNode, root: Path) -> dict[str, str]:
    """Hashes of everything that the outputs of a chapter depend on, by what it is."""
    code = code_of(notebook)
    hashes = {"code": digest("\0".join(cell.source for cell in code_cells(notebook)).encode())}
    files = library_files(code, root)
    for text in [code, *(file.read_text(encoding="utf-8") for file in files)]:
        for record, stored in record_files(text, root).items():
            files += stored
            if not stored:
                hashes[f"book/records/{record}"] = "missing"
    for file in files:
        hashes[file.relative_to(root).as_posix()] = digest(file.read_bytes().replace(b"\r\n", b"\n"))
    pins = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for pin in pins:
        if re.split(r"[=<>~! ]", pin)[0] in NUMERICAL:
            hashes[re.split(r"[=<>~! ]", pin)[0]] = pin.split("#")[0].strip()
    return hashes


def written(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Hashes of the cells and of the outputs of a notebook, by which one that was changed since is known."""
    cells = [[cell.cell_type, cell.source] for cell in notebook.cells]
    outputs = [[output.get(key) for key in OUTPUT] for cell in code_cells(notebook) for output in cell.outputs]
    parts = {"cells": cells, "outputs": outputs}
    return {name: digest(json.dumps(part, sort_keys=True).encode()) for name, part in parts.items()}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# ----------------------------------------------------------------- checks


def stale_outputs(source: nbformat.NotebookNode, stored: nbformat.NotebookNode, root: Path) -> list[str]:
    """Why the stored outputs are not those of the source: empty if they are."""
    problems = []
    expected, found = stamp(source, root), stored.metadata.get("tokcx", {}).get("stamp", {})
    if not found:
        problems.append("has no stamp: it was not made by this tool")
    elif expected != found:
        moved = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
        problems.append("changed since it was run: " + ", ".join(moved))
    elif [cell.source for cell in code_cells(source)] != [cell.source for cell in code_cells(stored)]:
        problems.append("its code cells are not those of the source")
    if stored.metadata.get("tokcx", {}).get("outputs", written(stored)["outputs"]) != written(stored)["outputs"]:
        problems.append("its outputs were changed after it was run")
    for count, cell in enumerate(code_cells(stored), start=1):
        if cell.execution_count is None:
            problems.append(f"{label(stored, cell)} was not executed")
        elif cell.execution_count != count:
            problems.append(
                f"{label(stored, cell)} was executed out of order: number {cell.execution_count}, not {count}"
            )
    return problems


def bad_outputs(stored: nbformat.NotebookNode) -> list[str]:
    """Outputs that have no place in the book."""
    problems = []
    for cell in code_cells(stored):
        for output in cell.outputs:
            kinds = output.get("data", {}).keys()
            if output.output_type == "error":
                problems.append(f"{label(stored, cell)} stores an error: {output.ename}: {output.evalue}")
            elif output.output_type == "stream" and output.name == "stderr":
                problems.append(f"{label(stored, cell)} stores a message on stderr: {output.text.strip()[:200]}")
            elif any("widget" in kind for kind in kinds):
                problems.append(f"{label(stored, cell)} stores a widget, which a page can only show with scripts")
            elif any(kind in IMAGES for kind in kinds):
                page = cell.metadata.get("mystnb", {})
                if not page.get("image", {}).get("alt"):
                    problems.append(f"{label(stored, cell)} has a figure without alt text (mystnb: image: alt)")
                if not page.get("figure", {}).get("caption"):
                    problems.append(f"{label(stored, cell)} has a figure without a caption (mystnb: figure: caption)")
    return problems


def edited(path: Path, source: nbformat.NotebookNode, stored: nbformat.NotebookNode) -> list[str]:
    """Whether someone worked in the twin of `path`, and the source has not got it: what to do, or nothing."""
    noted = stored.metadata.get("tokcx", {}).get("cells")  # not in twins of old
    if noted in (None, written(stored)["cells"]) or written(source)["cells"] == written(stored)["cells"]:
        return []
    twin = path.with_suffix(".ipynb").name
    return [
        f"{twin} was edited after it was run: copy small edits into {path.name}, or make it anew with "
        f"`jupytext --to md:myst {twin}`; `tools/notebooks.py run --force {path.stem}` forgets the edits"
    ]


def bad_style(source: nbformat.NotebookNode) -> list[str]:
    """Code that does not fit on a page."""
    problems = []
    for cell in code_cells(source):
        lines = cell.source.splitlines()
        if len(lines) > CELL:
            problems.append(f"{label(source, cell)} has {len(lines)} lines, more than {CELL}")
        for line in lines:
            if len(line) > LINE:
                problems.append(f"{label(source, cell)} has a line of {len(line)} characters, more than {LINE}: {line}")
    return problems


def bad_place(path: Path, root: Path) -> list[str]:
    """What the rest of the book does not know of a chapter, and the chapter not of it: its page, exercises, checks."""
    toc, checks = root / "_toc.yml", root / PACKAGE / "check" / f"chapter_{path.stem[:2]}.py"
    page, text = f"chapters/{path.stem}.ipynb", path.read_text(encoding="utf-8")
    problems = []
    listed = toc.read_text(encoding="utf-8") if toc.is_file() else ""
    if not re.search(rf"^ *- file: {re.escape(page)} *$", listed, flags=re.M):
        problems.append(f"is not in _toc.yml: `- file: {page}` is missing there")
    exercises = re.findall(r"^```\{exercise-start\}[^\n]*\n:label: (\S+)$", text, flags=re.M)
    solutions = re.findall(r"^```\{solution-start\} (\S+)$", text, flags=re.M)
    name = checks.relative_to(root).as_posix()
    try:
        checked = check_labels(checks)
    except SyntaxError as error:
        return [*problems, f"{name} is not Python (line {error.lineno}): {error.msg}"]
    problems += [f"exercise {one} has no check in {name}" for one in exercises if one not in checked]
    problems += [f"{name} has a check {one}, which is no exercise here" for one in checked if one not in exercises]
    problems += [f"exercise {one} has no solution" for one in exercises if one not in solutions]
    problems += [f"has a solution of {one}, which is no exercise here" for one in solutions if one not in exercises]
    for one, cells in re.findall(r"^```\{solution-start\} (\S+)$(.*?)^```\{solution-end\}$", text, flags=re.M | re.S):
        asked = set(re.findall(r"check\.exercise\(\s*[\"']([^\"']+)", cells)) - {one}
        problems += [f"the solution of {one} checks {other}" for other in sorted(asked)]
    return problems + [f"label {one} is there twice" for one in sorted(set(exercises)) if exercises.count(one) > 1]


def check_labels(path: Path) -> list[str]:
    """Keys of the dictionary CHECKS of a module, read without importing it; none if there is no such file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CHECKS":
            return [key.value for key in getattr(node.value, "keys", ()) if isinstance(key, ast.Constant)]
    return []


def label(notebook: nbformat.NotebookNode, cell: nbformat.NotebookNode) -> str:
    """How a message names a cell: its number among the code cells and its first line."""
    number = next(i for i, other in enumerate(code_cells(notebook), start=1) if other is cell)
    return f"code cell {number} ({cell.source.strip().splitlines()[0]!r})"


def check_chapter(path: Path, root: Path) -> list[str]:
    """Everything that is wrong with the chapter whose source is `path`: empty if nothing is."""
    twin = path.with_suffix(".ipynb")
    if not path.is_file():
        return ["has no source: " + path.name + " is missing"]
    try:
        source = source_notebook(path)
    except Refused as error:
        return [str(error)]
    itself = bad_style(source) + bad_place(path, root)
    if not twin.is_file():
        return ["was never run: " + twin.name + " is missing"] + itself
    stored = nbformat.read(twin, as_version=4)
    problems = edited(path, source, stored) or stale_outputs(source, stored, root)
    if not problems and not same_cells(source, stored):
        problems.append("its text is not that of the source")
    return problems + bad_outputs(stored) + itself


def same_cells(source: nbformat.NotebookNode, stored: nbformat.NotebookNode) -> bool:
    keys = ("id", "cell_type", "source", "metadata")
    return [[cell[k] for k in keys] for cell in source.cells] == [[cell.get(k) for k in keys] for cell in stored.cells]


# ------------------------------------------------------------------- runs


def execute(notebook: nbformat.NotebookNode, root: Path) -> None:
    """Run the cells in place, in a new kernel of this Python, in the folder of the chapters."""
    # The library of this tree, whichever is installed, for this kernel alone: the next may be of another tree.
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(root / "chapters")}},
        # Times, widgets, and how a stream was cut into messages differ from run to run.
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
    )
    language = copy.deepcopy(notebook.metadata.language_info)
    client.execute(env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path})
    notebook.metadata.language_info = language


def run_chapter(path: Path, root: Path, force: bool = False) -> str:
    """Bring the twin of one chapter up to date, and say what that took.

    Raises
    ------
    Refused
        If the source cannot be read, or the twin was edited and `force` does not say to overwrite it.
    """
    twin = path.with_suffix(".ipynb")
    if not path.is_file():
        raise Refused(f"{path.name} is missing")
    notebook = source_notebook(path)
    stored = nbformat.read(twin, as_version=4) if twin.is_file() else None
    if stored is not None and not force:
        for problem in edited(path, notebook, stored):
            raise Refused(problem)
    start = time.perf_counter()
    if not force and stored is not None and not stale_outputs(notebook, stored, root) and not bad_outputs(stored):
        noted = stored.metadata.tokcx.get("cells", written(stored)["cells"])
        if same_cells(notebook, stored) and noted == written(stored)["cells"]:
            return "is up to date"
        # Only prose has changed: the outputs stay.
        for cell, old in zip(code_cells(notebook), code_cells(stored), strict=True):
            cell.execution_count, cell.outputs = old.execution_count, old.outputs
        done = "has new text, its outputs are up to date"
    else:
        execute(notebook, root)
        done = f"was run in {time.perf_counter() - start:.0f} s"
    notebook.metadata.tokcx = {"stamp": stamp(notebook, root), **written(notebook)}
    write(twin, notebook)
    return done


def write(path: Path, notebook: nbformat.NotebookNode) -> None:
    """Write a notebook whole or not at all."""
    nbformat.validate(notebook)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n")
    os.replace(draft, path)


# ------------------------------------------------------------------- main


def chapters(root: Path, wanted: list[str]) -> list[Path]:
    """Sources of the chapters named (`7`, `07`, `07_real_heads`, or a path), or of all, twins without one included."""
    files = (file for file in (root / "chapters").iterdir() if file.suffix in (".md", ".ipynb"))
    every = sorted({file.with_suffix(".md") for file in files})
    if not wanted:
        return every
    picked = []
    for name in wanted:
        stem = re.sub(r"\.(md|ipynb)$", "", Path(name).name)
        if re.fullmatch("[0-9]+", stem):
            stem = f"{int(stem):02d}"
        match = [path for path in every if path.stem == stem or path.stem.startswith(stem + "_")]
        if not match:
            sys.exit(f"no chapter {name!r}; there are: {', '.join(path.stem for path in every)}")
        picked += match
    return picked


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make and check the executed twins of the chapters.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder (default: that of this file)")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the chapters whose outputs are stale")
    run.add_argument("--force", action="store_true", help="execute the others too, and overwrite edits made in Jupyter")
    check = commands.add_parser("check", help="list what is stale or breaks the style")
    for command in (run, check):
        command.add_argument("chapter", nargs="*", help="such as 7 or 07_real_heads (default: all)")
    options = parser.parse_args(arguments)

    root, failed, paths = options.root.resolve(), 0, chapters(options.root.resolve(), options.chapter)
    for path in paths:
        name = path.relative_to(root)
        if options.command == "run":
            print(f"{name} …", flush=True)
            try:
                print(f"{name} {run_chapter(path, root, options.force)}", flush=True)
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                said = str(error) if sys.stderr.isatty() else re.sub(r"\x1b\[[0-9;]*m", "", str(error))
                print(f"{name} failed; the stored notebook is as it was.\n{said}", file=sys.stderr)
                failed += 1
                continue
            except Refused as error:
                print(f"{name}: {error}", file=sys.stderr)
                failed += 1
                continue
        problems = check_chapter(path, root)
        for problem in problems:
            print(f"{name}: {problem}", file=sys.stderr)
        failed += bool(problems)
    if options.command == "check":
        print(f"{len(paths) - failed} of {len(paths)} chapters are fresh")
    if not paths:
        print("no chapter found in " + str(root / "chapters"), file=sys.stderr)
    return 1 if failed or not paths else 0


if __name__ == "__main__":
    sys.exit(main())
