"""The lectures as slides: `make slides` writes them into `dist/course/slides`, with every script beside them.

A lecture is a Markdown file in `book/teaching/slides`. A line `---` starts a slide, a line `Note:` what the speaker
says (key S in the browser). A line `!figure 05_gaussian_horizon fig-gaussian-horizon` shows that figure of a chapter,
and a glued value has the number of its chapter before its name: {glue:text}`03/slope-2`. Pictures, theorems and numbers
are thus those of the book.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter
from nbformat.v4 import new_code_cell, new_markdown_cell
from traitlets.config import Config

from tools import notebooks, plain
from tools.notebooks import ROOT

FIGURE = re.compile(r"^!figure (\S+) (\S+)$", re.M)


def lecture(text: str, root: Path, book: plain.Book) -> nbformat.NotebookNode:
    """The notebook of a lecture, its cells marked as slides and notes.

    Raises
    ------
    ValueError
        If a chapter has no such figure.
    """
    stored = {
        path.stem: nbformat.read(path.with_suffix(".ipynb"), as_version=4) for path in notebooks.chapters(root, [])
    }
    values = {f"{stem[:2]}/{name}": value for stem, nb in stored.items() for name, value in plain.glued(nb).items()}

    def written(words: str) -> list[nbformat.NotebookNode]:
        return [new_markdown_cell(plain.translate(words, book, values))] if words.strip() else []

    cells = [cell for slide in text.split("\n---\n") for cell in one_slide(slide, stored, written)]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number:03d}"
    return nbformat.v4.new_notebook(cells=cells)


def one_slide(text: str, stored: dict, written: Callable[[str], list]) -> list[nbformat.NotebookNode]:
    """The cells of a slide: its words as `written`, the figures between them, and its note."""
    shown, _, note = text.partition("\nNote:")
    words, *rest = FIGURE.split(shown)  # words, then chapter, figure, words for every figure
    made = written(words)
    for stem, name, after in zip(rest[::3], rest[1::3], rest[2::3]):
        made += [figure(stored, stem, name), *written(after)]
    if len(made) == 2 and len(words.strip().splitlines()) == 1:
        made[1].metadata.tags = [*made[1].metadata.get("tags", []), "tall"]  # a title and a figure
    notes = written(note)
    for place, cell in zip(chain(["slide"], repeat("-")), made):
        cell.metadata.slideshow = {"slide_type": place}
    for cell in notes:
        cell.metadata.slideshow = {"slide_type": "notes"}
    return made + notes


def figure(stored: dict, stem: str, name: str) -> nbformat.NotebookNode:
    """The figure of that name of a chapter, as a cell whose code is hidden."""
    if stem not in stored:
        raise ValueError(f"!figure: expected a chapter, one of {', '.join(stored)}, got {stem}")
    for cell in notebooks.code_cells(stored[stem]):
        if cell.metadata.get("mystnb", {}).get("figure", {}).get("name") == name:
            pictures = [o for o in cell.outputs if "image/png" in o.get("data", {})]
            return new_code_cell(cell.source, outputs=pictures, metadata={"tags": ["hide"]})
    raise ValueError(f"!figure: {stem} has no figure {name!r}")


def title(text: str) -> str:
    return next(line.lstrip("# ") for line in text.splitlines() if line.startswith("# "))


def write_slides(root: Path, out: Path) -> list[Path]:
    """Write every lecture as a page into `out`, which is replaced, with reveal.js and MathJax; the pages."""
    shutil.rmtree(out, ignore_errors=True)
    copy_scripts(out)
    exporter, resources = page_exporter(), {"macros": json.dumps(plain.tex_macros(root))}
    book, pages = plain.read_book(root), []
    for path in sorted((root / "book" / "teaching" / "slides").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        notebook = lecture(text, root, book)
        notebook.metadata.title = title(text)
        page, _ = exporter.from_notebook_node(notebook, resources=dict(resources))
        pages.append(out / f"{path.stem}.html")
        pages[-1].write_text(page, encoding="utf-8")
    return pages


def copy_scripts(out: Path) -> None:
    """What the pages load, from the packages that hold it: reveal.js and MathJax."""

    def site(name: str) -> Path:
        return Path(importlib.util.find_spec(name).origin).parent

    reveal = site("sphinx_revealjs") / "_static" / "revealjs"
    for part in ("dist", "plugin/notes"):
        shutil.copytree(reveal / part, out / "reveal" / part)
    shutil.copytree(site("sphinx-mathjax-offline") / "static" / "mathjax", out / "mathjax")


def page_exporter() -> SlidesExporter:
    """What makes a page of a notebook, by our template, without the code of figures."""
    config = Config()
    config.TemplateExporter.extra_template_basedirs = [str(Path(__file__).parent)]
    config.TagRemovePreprocessor.update({"enabled": True, "remove_input_tags": {"hide"}})
    return SlidesExporter(
        config=config, template_name="slides_template", reveal_url_prefix="reveal", reveal_theme="white"
    )


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
