"""The copies for a course: students get no solution, a stub for each exercise and the figures to compare with."""

import importlib
import os
import re
import zipfile

import nbformat
import pytest
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.myst_blocks import myst_block_plugin
from mdit_py_plugins.myst_role import myst_role_plugin
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tools import course, notebooks, plain
from tools.notebooks import ROOT

CHAPTERS = notebooks.chapters(ROOT, [])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    course.write_copies(ROOT, folder)
    return folder


def read(out, kind, path):
    return nbformat.read(out / kind / f"{path.stem}.ipynb", as_version=4)


def said(notebook):
    """Everything a copy says: cells, outputs as text, names and data of attachments."""
    return "\n".join(str(dict(cell)) + "\n" + cell.source for cell in notebook.cells)


def solutions(path):
    """Cells of the solutions of a chapter, and those of the rest."""
    inside, hidden, shown = False, [], []
    for what, piece in course.pieces(nbformat.read(path.with_suffix(".ipynb"), as_version=4)):
        if what.startswith("solution"):
            inside = what == "solution-start"
        elif what == "cell":
            (hidden if inside else shown).append(piece)
    return hidden, shown


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_no_solution_leaks_into_a_student_copy(out, path):
    hidden, shown = solutions(path)
    assert len([cell for cell in hidden if cell.cell_type == "code"]) >= 5
    student, open_text = said(read(out, "student", path)), "\n".join(cell.source for cell in shown)
    for cell in hidden:
        lines = [line.strip() for line in cell.source.splitlines()]
        # Lines that also stand outside of solutions, and short ones such as `plt.show()`, tell nothing.
        telling = [line for line in lines if len(line) > 25 and line not in open_text]
        assert not [line for line in telling if line in student]
        for output in cell.get("outputs", []):
            text = output.get("text", "")
            assert not text.strip() or text in open_text or text not in student


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_stub_for_every_exercise_and_the_figures_of_its_solution(out, path):
    student, instructor = (read(out, kind, path) for kind in course.KINDS)
    labels = re.findall(r"^```\{exercise-start\} [^\n]+\n:label: (\S+)$", path.read_text(encoding="utf-8"), flags=re.M)
    numbers = [f"{int(path.stem[:2])}.{i}" for i in range(1, len(labels) + 1)]
    stubs = [cell.source for cell in student.cells if cell.source.startswith("raise NotImplementedError(")]
    assert [re.search(r"exercise (\d+\.\d+): ", stub)[1] for stub in stubs] == numbers
    assert [re.search(r"check\.exercise\('(\S+)', answer\)$", stub)[1] for stub in stubs] == labels
    assert set(labels) == set(importlib.import_module(f"tokcx_lib.check.chapter_{path.stem[:2]}").CHECKS)
    assert not any(cell.source.startswith("raise NotImplementedError") for cell in instructor.cells)
    hidden, _ = solutions(path)
    assert sum(len(cell.get("attachments", {})) for cell in student.cells) == sum(
        len(course.drawn(cell)) for cell in hidden
    )


def exercise(title, label):
    """An exercise with its solution, as cells."""
    asked = f"```{{exercise-start}} {title}\n:label: {label}\n```\nDo.\n```{{exercise-end}}\n```"
    cells = [asked, f"```{{solution-start}} {label}\n```\nDone.\n\n```{{solution-end}}\n```"]
    return [nbformat.v4.new_markdown_cell(cell) for cell in cells]


def test_an_exercise_put_in_the_middle_moves_numbers_and_no_check(tmp_path):
    cells = exercise("First", "ex-one") + exercise("New", "ex-new") + exercise("Second", "ex-two")
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "P"}})
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, tmp_path / "03_some.ipynb")
    made = course.make_copy(tmp_path / "03_some.ipynb", "student", BOOK, "")
    said = "\n".join(cell.source for cell in made.cells)
    assert re.findall(r"### Exercise (3\.\d: \w+)", said) == ["3.1: First", "3.2: New", "3.3: Second"]
    assert re.findall(r"exercise (3\.\d): \w+'\)\nanswer = ...\ncheck\.exercise\('(\S+)', answer\)", said) == [
        ("3.1", "ex-one"),
        ("3.2", "ex-new"),
        ("3.3", "ex-two"),
    ]


@pytest.mark.parametrize("kind", course.KINDS)
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_copies_are_plain_markdown(out, kind, path):
    for cell in read(out, kind, path).cells:
        if cell.cell_type == "markdown":
            assert not re.search(r"```\{|\{[\w:]+\}`|^\([\w-]+\)=|:::", cell.source, flags=re.M), cell.source[:200]


def test_instructors_get_every_cell_of_the_chapter(out):
    for path in CHAPTERS:
        mine = [cell.source for cell in notebooks.code_cells(notebooks.source_notebook(path))]
        assert [cell.source for cell in notebooks.code_cells(read(out, "instructor", path))] == mine


def test_the_archives_open_and_are_the_same_each_time(out, tmp_path):
    course.write_copies(ROOT, tmp_path)
    for kind in course.KINDS:
        with zipfile.ZipFile(out / f"{kind}.zip") as packed:
            assert packed.testzip() is None
            assert len(packed.namelist()) == len(CHAPTERS) + 1
        assert (out / f"{kind}.zip").read_bytes() == (tmp_path / f"{kind}.zip").read_bytes()


def run(notebook, tmp_path):
    """Execute a copy in a folder of its own, as a student would, with the book's library."""
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, **notebooks.ENVIRONMENT, "PYTHONPATH": str(ROOT)})


def up_to_the_first_stub(out, path, tmp_path):
    notebook = read(out, "student", path)
    with pytest.raises(CellExecutionError, match=rf"NotImplementedError.*exercise {int(path.stem[:2])}\.1: "):
        run(notebook, tmp_path)


def test_a_student_copy_runs_up_to_the_first_stub(out, tmp_path):
    up_to_the_first_stub(out, CHAPTERS[0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", CHAPTERS[1:], ids=lambda path: path.stem)
def test_every_student_copy_runs_up_to_the_first_stub(out, path, tmp_path):
    up_to_the_first_stub(out, path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_instructor_copies_run_through(out, path, tmp_path):
    run(read(out, "instructor", path), tmp_path)


# ------------------------------------------------------------ plain Markdown

BOOK = plain.Book(
    {"thm-a": "Theorem 3.1", "eq-b": "(3.2)", "sec-c": "A section", "ex-d": "Exercise 3.4"},
    {"doe2020": ("Doe and Roe", "2020")},
)


@pytest.mark.parametrize(
    ("myst", "markdown"),
    [
        (
            "{prf:ref}`thm-a` and {eq}`eq-b`, {ref}`sec-c`, {ref}`there <sec-c>`",
            "Theorem 3.1 and (3.2), “A section”, there",
        ),
        ("{ref}`An exercise <ex-d>` asks", "Exercise 3.4 asks"),
        (
            "{cite:t}`doe2020` say so {cite:p}`doe2020,doe2020`",
            "Doe and Roe (2020) say so (Doe and Roe, 2020; Doe and Roe, 2020)",
        ),
        ("it is {glue:text}`value`", "it is 0.5"),
        ("(sec-c)=\n## A section\n\nText", "## A section\n\nText"),
        ("$$\nx\n$$ (eq-b)", "$$\nx\n\\tag{3.2}\n$$"),
        ("```{math}\n:label: eq-b\nx\n```", "$$\nx\n\\tag{3.2}\n$$"),
        ("```{admonition} Note\n:class: tip\n- a\n- b\n```", "> **Note.**\n>\n> - a\n> - b"),
        (
            "```{prf:theorem} Of Doe\n:label: thm-a\nIt {eq}`eq-b` holds.\n```",
            "> **Theorem 3.1 (Of Doe).**\n>\n> It (3.2) holds.",
        ),
    ],
)
def test_myst_to_plain_markdown(myst, markdown):
    assert plain.translate(myst, BOOK, {"value": "0.5"}) == markdown


def test_the_places_found_in_chapters_are_those_of_a_parser():
    """Directives, labels and roles by our patterns, and by markdown-it with the rules of MyST."""
    parser = MarkdownIt("commonmark").use(myst_block_plugin).use(myst_role_plugin).use(dollarmath_plugin)
    cells = [cell.source for path in CHAPTERS for cell in notebooks.source_notebook(path).cells]
    texts = [text for text in cells if "prf:" in text or "{ref}" in text or ")=" in text]
    assert len(texts) > 50
    for text in texts:
        tokens = parser.parse(text)
        fences = [token for token in tokens if token.type == "fence" and token.info.startswith("{")]
        ours = list(plain.DIRECTIVE.finditer(text))
        assert [at["name"] for at in ours] == [re.match(r"{([^}]*)}", fence.info)[1] for fence in fences]
        targets = [token.content for token in tokens if token.type == "myst_target"]
        assert [at["label"] for at in plain.ANCHOR.finditer(text)] == targets
        roles = [part for token in tokens for part in token.children or [] if part.type == "myst_role"]
        outside = plain.ROLE.finditer(plain.DIRECTIVE.sub("", text))
        assert [at["name"] for at in outside] == [part.meta["name"] for part in roles]


@pytest.mark.parametrize("text", ["{prf:ref}`thm-z`", "{glue:text}`none`", "{cite:t}`none`", "{unknown}`x`"])
def test_what_is_not_there_is_an_error(text):
    with pytest.raises(KeyError):
        plain.translate(text, BOOK, {})
