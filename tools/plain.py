"""The book's MyST as the plain Markdown that any notebook program shows, with the numbers that the pages have.

Theorems and boxes become quotations, references become words and numbers, glued values become text. A chapter counts
theorems, propositions, equations, figures and exercises each on its own, as `book/_ext/chapter_numbers.py` has it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import nbformat
import yaml
from pybtex.database import parse_file
from pybtex.richtext import Text

from tools import notebooks

# Patterns, not markdown-it: it has no places of roles in a paragraph, and writes no Markdown. A test compares both.
DIRECTIVE = re.compile(
    r"^```\{(?P<name>[\w:-]+)\} *(?P<title>[^\n]*)\n(?P<options>(?::[\w-]+:[^\n]*\n)*)(?P<body>.*?)^```$", re.M | re.S
)
EQUATION = re.compile(r"^\$\$\n(?P<body>.*?)^\$\$ *(?:\((?P<label>[\w-]+)\))?$", re.M | re.S)
ROLE = re.compile(r"\{(?P<name>[\w:]+)\}`(?P<text>[^`]*)`")
ANCHOR = re.compile(r"^\((?P<label>[\w-]+)\)=\n(?P<heading>#+ [^\n]*\n)?", re.M)


class Book(NamedTuple):
    """What references need: the words that stand for each label, and for each source that is cited."""

    targets: dict[str, str]
    sources: dict[str, tuple[str, str]]


def read_book(root: Path) -> Book:
    """Labels of all chapters and of the other pages; authors and year of each source."""
    targets = {}
    for path in notebooks.chapters(root, []):
        targets |= labels(notebooks.source_notebook(path), int(path.stem[:2]))
    for path in sorted((root / "book").rglob("*.md")):
        targets |= headings(path.read_text(encoding="utf-8"))
    sources = {}
    for key, entry in parse_file(root / "book" / "references.bib").entries.items():
        people = [" ".join([*person.prelast_names, *person.last_names]) for person in entry.persons["author"]]
        names = [str(Text.from_latex(name)) for name in people]
        authors = names[0] + (" et al." if len(names) > 2 else f" and {names[1]}" if len(names) == 2 else "")
        sources[key] = (authors, entry.fields["year"])
    return Book(targets, sources)


def headings(text: str) -> dict[str, str]:
    return {at["label"]: at["heading"].lstrip("# ").strip() for at in ANCHOR.finditer(text) if at["heading"]}


def labels(notebook: nbformat.NotebookNode, chapter: int) -> dict[str, str]:
    """Words for every label of a chapter, such as "Theorem 3.2", in the order of the page."""
    counts, found = {}, {}

    def number(kind: str, label: str | None, words: str) -> None:
        counts[kind] = counts.get(kind, 0) + 1
        if label:
            found[label] = words.format(f"{chapter}.{counts[kind]}")

    for cell in notebook.cells:
        if cell.cell_type == "code":
            figure = cell.metadata.get("mystnb", {}).get("figure")
            if figure:
                number("figure", figure["name"], "Figure {}")
            continue
        found |= headings(cell.source)
        for at in sorted(
            [*DIRECTIVE.finditer(cell.source), *EQUATION.finditer(cell.source)], key=lambda at: at.start()
        ):
            if at.re is EQUATION:
                label = at["label"]
                if label:
                    number("equation", label, "({})")
                continue
            label = options(at).get("label")
            if at["name"].startswith("prf:"):
                kind = at["name"].removeprefix("prf:")
                number(kind, label, kind.capitalize() + " {}")
            elif at["name"] == "exercise-start":
                number("exercise", label, "Exercise {}")
            elif at["name"] == "math" and label:
                number("equation", label, "({})")
    return found


def options(directive: re.Match) -> dict[str, str]:
    return dict(re.findall(r"^:([\w-]+): *([^\n]*)$", directive["options"], flags=re.M))


def glued(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Values that the cells of an executed notebook have glued, as text."""
    values = {}
    for cell in notebooks.code_cells(notebook):
        for output in cell.outputs:
            name = output.get("metadata", {}).get("scrapbook", {}).get("name")
            if name:
                shown = output["data"]["application/papermill.record/text/plain"]
                values[name] = str(ast.literal_eval(shown)) if shown[:1] in "'\"" else shown
    return values


def translate(text: str, book: Book, values: dict[str, str]) -> str:
    """One Markdown cell without directives, roles and anchors.

    Raises
    ------
    KeyError
        If a label, a source or a glued value is not there.
    """

    def equation(label: str | None, body: str) -> str:
        tag = f"\\tag{{{book.targets[label].strip('()')}}}\n" if label else ""
        return f"$$\n{body}{tag}$$"

    def box(at: re.Match) -> str:
        name, label = at["name"], options(at).get("label")
        if name == "math":
            return equation(label, at["body"])
        title = at["title"].strip()
        if name.startswith("prf:"):
            title = f"{book.targets[label]} ({title})" if title else book.targets[label]
        quoted = (line if line.startswith(">") else f"> {line}".rstrip() for line in at["body"].strip().splitlines())
        return "\n".join([f"> **{title}.**", ">", *quoted])

    text = EQUATION.sub(lambda at: equation(at["label"], at["body"]), text)
    text = DIRECTIVE.sub(box, text)
    text = ROLE.sub(lambda at: role(at["name"], at["text"], book, values), text)
    return ANCHOR.sub(lambda at: at["heading"] or "", text).strip()


def role(name: str, text: str, book: Book, values: dict[str, str]) -> str:
    if name == "glue:text":
        return values[text]
    if name in ("cite:p", "cite:t"):
        shown = [book.sources[key.strip()] for key in text.split(",")]
        if name == "cite:t":
            return " and ".join(f"{authors} ({year})" for authors, year in shown)
        return "(" + "; ".join(f"{authors}, {year}" for authors, year in shown) + ")"
    if name in ("ref", "numref", "eq", "prf:ref"):
        said, _, label = text.rstrip(">").rpartition("<")
        target = book.targets[label]
        if said and not target.startswith("Exercise "):  # "an exercise" would be a link to nowhere
            return said.strip()
        return f"“{target}”" if label.startswith("sec-") else target
    raise KeyError(f"no plain form for the role {name!r}")


def tex_macros(root: Path) -> dict[str, str | list]:
    """The TeX macros of the book, as MathJax takes them."""
    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    return config["sphinx"]["config"]["mathjax3_config"]["tex"]["macros"]


def macros(root: Path) -> str:
    """The TeX macros of the book, as a formula that defines them for the cells after it."""
    defined = []
    for name, meaning in tex_macros(root).items():
        body, arguments = (meaning, 0) if isinstance(meaning, str) else meaning
        defined.append(f"\\newcommand{{\\{name}}}" + (f"[{arguments}]" if arguments else "") + f"{{{body}}}")
    return "$$\n" + "\n".join(defined) + "\n$$"
