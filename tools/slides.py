"""The lectures as slides: `make slides` writes them into `dist/course/slides`, with every script beside them.

A lecture is a Markdown file in `book/teaching/slides`. A line `---` starts a slide, a line `Note:` what the speaker says
(key S in the browser). A line `!figure 05_gaussian_horizon fig-horizon-slopes` shows a figure of a chapter, `!code 03_moment_rate gauss =`
the cell whose code has these words, with its output, and a glued value has the number of its chapter before its name:
{glue:text}`03/slope-2`. Theorems and numbers are thus those of the book.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import nbformat
import yaml
from nbconvert import SlidesExporter
from nbformat.v4 import new_code_cell, new_markdown_cell
from traitlets.config import Config

from tools import notebooks, plain
from tools.notebooks import ROOT


def lecture(text: str, root: Path, book: plain.Book) -> nbformat.NotebookNode:
    """The notebook of a lecture, its cells marked as slides and notes.

    Raises
    ------
    ValueError
        If a chapter has no such figure or cell.
    """
    stored = {path.stem: nbformat.read(path.with_suffix(".ipynb"), as_version=4) for path in notebooks.chapters(root, [])}
    values = {f"{stem[:2]}/{name}": value for stem, nb in stored.items() for name, value in plain.glued(nb).items()}
    cells = []
    for slide in text.split("\n---\n"):
        shown, _, note = slide.partition("\nNote:")
        place, words = "slide", []
        alone = len([line for line in shown.splitlines() if line.strip()]) == 2  # a title and a figure

        def flush() -> None:
            nonlocal place, words
            if "\n".join(words).strip():
                source = plain.translate("\n".join(words), book, values)
                cells.append(new_markdown_cell(source, metadata={"slideshow": {"slide_type": place}}))
                place = "-"
            words = []

        for line in shown.strip().splitlines():
            if not line.startswith("!figure ") and not line.startswith("!code "):
                words.append(line)
                continue
            flush()
            kind, stem, wanted = line[1:].split(" ", 2)
            cells.append(taken(stored, kind, stem, wanted, place))
            cells[-1].metadata.tags += ["tall"] * alone
            place = "-"
        flush()
        if note.strip():
            source = plain.translate(note.strip(), book, values)
            cells.append(new_markdown_cell(source, metadata={"slideshow": {"slide_type": "notes"}}))
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number:03d}"
    return nbformat.v4.new_notebook(cells=cells)


def taken(stored: dict, kind: str, stem: str, wanted: str, place: str) -> nbformat.NotebookNode:
    """A cell of a chapter for a slide: its figure alone, or its code and what it prints."""
    if stem not in stored:
        raise ValueError(f"!{kind}: expected a chapter, one of {', '.join(stored)}, got {stem}")
    for cell in notebooks.code_cells(stored[stem]):
        name = cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
        if wanted == name if kind == "figure" else wanted in cell.source:
            outputs = [o for o in cell.outputs if "scrapbook" not in o.get("metadata", {})]
            if kind == "figure":
                outputs = [o for o in outputs if "image/png" in o.get("data", {})]
            made = new_code_cell(cell.source, outputs=outputs, metadata={"slideshow": {"slide_type": place}})
            made.metadata.tags = ["hide"] if kind == "figure" else []
            return made
    raise ValueError(f"!{kind}: {stem} has no cell with {wanted!r}")


def title(text: str) -> str:
    return next(line.lstrip("# ") for line in text.splitlines() if line.startswith("# "))


def write_slides(root: Path, out: Path) -> list[Path]:
    """Write every lecture as a page into `out`, which is replaced, with reveal.js and MathJax; the pages."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    site = lambda name: Path(importlib.util.find_spec(name).origin).parent
    reveal = site("sphinx_revealjs") / "_static" / "revealjs"
    for part in ("dist", "plugin/notes"):
        shutil.copytree(reveal / part, out / "reveal" / part)
    shutil.copytree(site("sphinx-mathjax-offline") / "static" / "mathjax", out / "mathjax")
    tex = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["sphinx"]["config"]["mathjax3_config"]["tex"]
    config = Config()
    config.TemplateExporter.extra_template_basedirs = [str(Path(__file__).parent)]
    config.TagRemovePreprocessor.update({"enabled": True, "remove_input_tags": {"hide"}})
    exporter = SlidesExporter(config=config, template_name="slides_template", reveal_url_prefix="reveal", reveal_theme="white")
    book, pages = plain.read_book(root), []
    for path in sorted((root / "book" / "teaching" / "slides").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        notebook = lecture(text, root, book)
        notebook.metadata.title = title(text)
        page, _ = exporter.from_notebook_node(notebook, resources={"macros": json.dumps(tex["macros"])})
        pages.append(out / f"{path.stem}.html")
        pages[-1].write_text(page, encoding="utf-8")
    return pages


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the slides of the lectures.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder (default: that of this file)")
    parser.add_argument("--out", type=Path, help="where to (default: dist/course/slides in the project's folder)")
    options = parser.parse_args(arguments)
    root = options.root.resolve()
    for page in write_slides(root, options.out or root / "dist" / "course" / "slides"):
        print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
