"""The chapters' stored outputs are those of their sources, and the check that says so finds what it should."""

import os

import nbformat
import pytest

from tools import notebooks
from tools.notebooks import ROOT


@pytest.mark.parametrize("path", notebooks.chapters(ROOT, []), ids=lambda path: path.stem)
def test_chapter_is_fresh(path):
    assert notebooks.check_chapter(path, ROOT) == []


# ------------------------------------------------------ the check itself


def problems(root):
    return notebooks.check_chapter(root / "chapters" / "01_small.md", root)


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.fixture
def stored(small_book):
    """The stored notebook of the small book, and a function that writes it back."""
    path = small_book / "chapters" / "01_small.ipynb"
    notebook = nbformat.read(path, as_version=4)
    return notebook, lambda: nbformat.write(notebook, path)


def test_fresh(small_book, capsys):
    assert problems(small_book) == []
    assert notebooks.main(["--root", str(small_book), "check"]) == 0
    assert capsys.readouterr().out == "1 of 1 chapters are fresh\n"


def test_second_run_changes_no_byte(small_book):
    twin = small_book / "chapters" / "01_small.ipynb"
    before = twin.read_bytes()
    assert notebooks.main(["--root", str(small_book), "run", "--force", "01"]) == 0
    assert twin.read_bytes() == before


def test_a_run_leaves_the_environment_alone(small_book):
    before = dict(os.environ)
    assert notebooks.main(["--root", str(small_book), "run", "--force", "01"]) == 0
    assert dict(os.environ) == before


def test_stale_code(small_book, capsys):
    edit(small_book / "chapters" / "01_small.md", 'print("value"', 'print("number"')
    assert "changed since it was run: code" in problems(small_book)
    assert notebooks.main(["--root", str(small_book), "check"]) == 1
    assert "changed since it was run: code" in capsys.readouterr().err


def test_stale_prose_keeps_the_outputs(small_book):
    source, twin = (small_book / "chapters" / f"01_small.{kind}" for kind in ("md", "ipynb"))
    before = nbformat.read(twin, as_version=4)
    edit(source, "A small chapter", "A small, edited chapter")
    assert problems(small_book) == ["its text is not that of the source"]
    assert "new text" in notebooks.run_chapter(source, small_book)
    after = nbformat.read(twin, as_version=4)
    assert problems(small_book) == [] and after.cells[0].source == "# A small, edited chapter"
    assert after.cells[1:] == before.cells[1:]


@pytest.mark.parametrize("name", ["__init__", "near", "far"])
def test_changed_module(small_book, name):
    edit(small_book / "tokcx_lib" / f"{name}.py", "", "# changed\n")
    assert problems(small_book) == [f"changed since it was run: tokcx_lib/{name}.py"]


def test_module_that_is_not_imported(small_book):
    edit(small_book / "tokcx_lib" / "apart.py", "VALUE = 2", "VALUE = 3")
    assert problems(small_book) == []


def test_changed_pins(small_book):
    edit(small_book / "requirements.txt", "pandas==1.0", "pandas==2.0")
    assert problems(small_book) == []
    edit(small_book / "requirements.txt", "numpy==2.0.0", "numpy==2.1.0")
    assert problems(small_book) == ["changed since it was run: numpy"]


def test_changed_record(small_book):
    source = small_book / "chapters" / "01_small.md"
    record = small_book / "book" / "records" / "long_run.csv"
    record.write_text("n,error\n1,2\n", encoding="utf-8")
    edit(source, 'glue("answer"', 'records = type("", (), dict(load=str))\nrecords.load("long_run")\nglue("answer"')
    notebooks.run_chapter(source, small_book)
    assert problems(small_book) == []
    edit(record, "1,2", "1,3")
    assert problems(small_book) == ["changed since it was run: book/records/long_run.csv"]


def test_unexecuted_cell(small_book, stored):
    notebook, save = stored
    notebook.cells[2].update(execution_count=None, outputs=[])
    save()
    assert any("code cell 2" in problem and "was not executed" in problem for problem in problems(small_book))


def test_executed_out_of_order(small_book, stored):
    notebook, save = stored
    notebook.cells[2].execution_count = 7
    save()
    assert any("code cell 2" in problem and "out of order" in problem for problem in problems(small_book))


def test_stored_error(small_book, stored):
    notebook, save = stored
    notebook.cells[2].outputs.append(nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[]))
    save()
    assert any("stores an error: ValueError: no" in problem for problem in problems(small_book))


def test_stored_stderr(small_book, stored):
    notebook, save = stored
    notebook.cells[2].outputs.append(nbformat.v4.new_output("stream", name="stderr", text="careful"))
    save()
    assert any("stderr: careful" in problem for problem in problems(small_book))


@pytest.mark.parametrize(
    ("line", "what"), [("    alt: A dot.\n", "alt text"), ("    caption: One dot.\n", "a caption")]
)
def test_figure_without_words(small_book, line, what):
    source = small_book / "chapters" / "01_small.md"
    edit(source, line, line.replace(": ", ': "" # ', 1))
    notebooks.run_chapter(source, small_book)
    assert [problem for problem in problems(small_book) if f"without {what}" in problem]


def test_code_that_does_not_fit(small_book):
    edit(small_book / "chapters" / "01_small.md", "glue(", "\n" * 25 + "x = 1  # " + "wide " * 20 + "\nglue(")
    assert any("more than 25" in problem for problem in problems(small_book))
    assert any("more than 72" in problem for problem in problems(small_book))


def test_missing_twins(small_book):
    (small_book / "chapters" / "01_small.ipynb").rename(small_book / "chapters" / "02_alone.ipynb")
    found = [notebooks.check_chapter(path, small_book)[0] for path in notebooks.chapters(small_book, [])]
    assert found == ["was never run: 01_small.ipynb is missing", "has no source: 02_alone.md is missing"]


@pytest.mark.parametrize(("mistake", "error"), [("1 / 0", "ZeroDivisionError"), ("1 +", "SyntaxError")])
def test_failing_cell_leaves_the_stored_notebook(small_book, capsys, mistake, error):
    twin = small_book / "chapters" / "01_small.ipynb"
    before = twin.read_bytes()
    edit(small_book / "chapters" / "01_small.md", 'glue("answer", 42', f'glue("answer", {mistake}')
    assert notebooks.main(["--root", str(small_book), "run"]) == 1
    said = capsys.readouterr().err
    assert "chapters/01_small.md failed" in said and error in said and 'glue("answer"' in said
    assert twin.read_bytes() == before
    assert sorted(path.name for path in twin.parent.iterdir()) == ["01_small.ipynb", "01_small.md"]
