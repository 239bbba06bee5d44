"""Student and instructor copies of the chapters, for a course: `make course` writes them into `dist/course`.

Both are made from the executed chapters, with MyST turned into plain Markdown, so that any notebook program shows them.
In a student copy every solution is replaced by a stub that raises NotImplementedError, and the figures that the
solution drew are kept to compare with. The copies are never edited by hand.
"""

from __future__ import annotations

import argparse
import base64
import copy
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell

from tools import notebooks, plain
from tools.notebooks import ROOT

MARKER = re.compile(r"^```\{(exercise|solution)-(start|end)\} *([^\n]*)\n(?::[^\n]*\n)*```$", re.M)
KINDS = ("student", "instructor")

OPENING = """\
*{kind} copy of chapter {chapter} of **Token Sample Complexity of Attention**. It is generated from the book; a new copy
replaces this one, so keep your work under another name.*

Run it with the book's environment: `README.md`, beside this file, says how. (`glue` keeps numbers for the text of the
book's pages; here its calls do nothing.) {rest}"""
REST = {
    "student": "The outputs shown are those you should get. Each exercise ends in a cell that raises "
    "`NotImplementedError`: put your work in its place, set `answer`, and let `check.exercise` tell you whether it "
    "is right.",
    "instructor": "Every exercise is followed by its solution.",
}
README = """\
# Token Sample Complexity of Attention: {kind} copies

Notebooks for a course, generated from the book. To run them:

1. Get the book: the folder that has `tokcx_lib`, `chapters` and a `Makefile`.
2. There, `make .venv/.full` installs everything into `.venv`, once; it takes some minutes.
3. Unpack this folder anywhere, and from the book's folder run `.venv/bin/jupyter lab PATH_OF_THIS_FOLDER`.

A chapter runs in about a minute on two CPU cores. No network is needed.
"""


def pieces(notebook: nbformat.NotebookNode) -> Iterator[tuple[str, str | nbformat.NotebookNode]]:
    """The cells in order, ("cell", cell), cut where an exercise or solution starts or ends: ("solution-start", …)."""
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            yield "cell", cell
            continue
        at = 0
        for mark in MARKER.finditer(cell.source):
            if cell.source[at : mark.start()].strip():
                yield "cell", new_markdown_cell(cell.source[at : mark.start()].strip())
            yield f"{mark[1]}-{mark[2]}", mark[3] if mark[2] == "start" else ""
            at = mark.end()
        if cell.source[at:].strip():
            yield "cell", new_markdown_cell(cell.source[at:].strip())


def make_copy(path: Path, kind: str, book: plain.Book, macros: str) -> nbformat.NotebookNode:
    """The student's or the instructor's copy of the chapter whose executed twin is `path`."""
    chapter, stored = int(path.stem[:2]), nbformat.read(path, as_version=4)
    values, cells = plain.glued(stored), []
    opening = OPENING.format(kind=kind.capitalize(), chapter=chapter, rest=REST[kind])
    cells.append(new_markdown_cell(opening + "\n\n" + macros))
    exercise, title, label, heading, inside, pictures = 0, "", "", "", False, []
    for what, piece in pieces(stored):
        if what == "exercise-start":
            exercise, title = exercise + 1, piece
            heading = f"### Exercise {chapter}.{exercise}: {title}\n\n"
        elif what == "solution-start":
            inside, pictures, label = True, [], piece
            if kind == "instructor":
                cells.append(new_markdown_cell(f"#### Solution of exercise {chapter}.{exercise}"))
        elif what == "solution-end":
            inside = False
            if kind == "student":
                cells += expected(pictures) + [stub(f"{chapter}.{exercise}", title, label)]
        elif what == "cell" and inside and kind == "student":
            pictures += drawn(piece)
        elif what == "cell":
            translated = plain_cell(piece, book, values)
            translated[0].source, heading = heading + translated[0].source, ""
            cells += translated
    made = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": stored.metadata.kernelspec})
    made.metadata.language_info = stored.metadata.language_info
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number:03d}"  # the same in every run
    nbformat.validate(made)
    return made


def plain_cell(cell: nbformat.NotebookNode, book: plain.Book, values: dict[str, str]) -> list[nbformat.NotebookNode]:
    """A cell of the book as one of any notebook; a figure's caption follows it."""
    if cell.cell_type == "markdown":
        return [new_markdown_cell(plain.translate(cell.source, book, values))]
    figure = cell.metadata.get("mystnb", {}).get("figure")
    kept = new_code_cell(cell.source, execution_count=cell.execution_count)
    # Glued values have said what they had to say.
    kept.outputs = [copy.deepcopy(o) for o in cell.outputs if "scrapbook" not in o.get("metadata", {})]
    if not figure:
        return [kept]
    caption = plain.translate(figure["caption"].strip(), book, values)
    return [kept, new_markdown_cell(f"**{book.targets[figure['name']]}.** {caption}")]


def drawn(cell: nbformat.NotebookNode) -> list[str]:
    """The figures of a cell, PNG in base64."""
    return [o.data["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]


def expected(pictures: list[str]) -> list[nbformat.NotebookNode]:
    """A cell with the figures that a solution draws, if there are any."""
    if not pictures:
        return []
    shown = "\n\n".join(f"![expected figure](attachment:expected-{i}.png)" for i in range(1, len(pictures) + 1))
    cell = new_markdown_cell("What your figure should look like:\n\n" + shown)
    cell.attachments = {f"expected-{i}.png": {"image/png": data.strip()} for i, data in enumerate(pictures, start=1)}
    assert all(base64.b64decode(data) for data in pictures)
    return [cell]


def stub(number: str, title: str, label: str) -> nbformat.NotebookNode:
    """The cell that stands where the solution stood; it is checked by label, for numbers move with the exercises."""
    raised = f"raise NotImplementedError({f'exercise {number}: {title}'!r})"
    return new_code_cell(f"{raised}\nanswer = ...\ncheck.exercise({label!r}, answer)")


def write_copies(root: Path, out: Path) -> list[Path]:
    """Write all copies and a zip of each kind into `out`, which is replaced; the folders and the archives."""
    book, macros, made = plain.read_book(root), plain.macros(root), []
    for kind in KINDS:
        folder = out / kind
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(README.format(kind=kind), encoding="utf-8")
        for path in notebooks.chapters(root, []):
            notebook = make_copy(path.with_suffix(".ipynb"), kind, book, macros)
            notebooks.write(folder / f"{path.stem}.ipynb", notebook)
        archive = out / f"{kind}.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for file in sorted(folder.iterdir()):
                # A fixed date: the same copies make the same archive.
                entry = zipfile.ZipInfo(f"tokcx-{kind}/{file.name}", (2026, 1, 1, 0, 0, 0))
                entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                packed.writestr(entry, file.read_bytes())
        made += [folder, archive]
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make student and instructor copies of the chapters.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder (default: that of this file)")
    parser.add_argument("--out", type=Path, help="where to (default: dist/course in the project's folder)")
    options = parser.parse_args(arguments)
    root = options.root.resolve()
    stale = {
        path.name: problems
        for path in notebooks.chapters(root, [])
        if (problems := notebooks.check_chapter(path, root))
    }
    if stale:
        print("\n".join(f"{name}: {problem}" for name, found in stale.items() for problem in found), file=sys.stderr)
        print("copies are made from fresh chapters: `make run` first", file=sys.stderr)
        return 1
    for path in write_copies(root, options.out or root / "dist" / "course"):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
