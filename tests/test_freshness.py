"""The chapters' stored outputs are those of their sources, and the check that says so finds what it should."""

import json
import os
import shutil
import subprocess
import sys

import nbformat
import pytest

from tools import notebooks
from tools.notebooks import ROOT


@pytest.mark.parametrize("path", notebooks.chapters(ROOT, []), ids=lambda path: path.stem)
def test_chapter_is_fresh(path):
    assert notebooks.check_chapter(path, ROOT) == []


# ------------------------------------------- what a chapter is made of

CHAPTERS = notebooks.chapters(ROOT, [])

# Imports what the code of a chapter imports, then what functions of the modules loaded import, until nothing is new;
# says which files of the library Python has loaded after each.
IMPORTS = """
import ast, json, pathlib, sys

def library():
    return {name: module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "tokcx_lib"}

def imports(code):
    return [node for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.Import, ast.ImportFrom))]

def load(node, names):
    exec(compile(ast.Module([node], []), "imports", "exec"), names)

said = {}
for chapter, code in json.load(sys.stdin).items():
    for name in library():
        del sys.modules[name]
    for node in imports(code):
        load(node, {})
    at_once, seen = sorted(library().values()), set()
    while set(library()) - seen:
        for name in set(library()) - seen:
            seen.add(name)
            for node in imports(pathlib.Path(library()[name]).read_text(encoding="utf-8")):
                load(node, {"__package__": sys.modules[name].__package__, "__name__": name})
    said[chapter] = [at_once, sorted(library().values())]
print(json.dumps(said))
"""


def modules(path, root=ROOT):
    """Files of the library in the stamp of a chapter."""
    stamp = notebooks.stamp(notebooks.source_notebook(path), root)
    return {name for name in stamp if name.startswith("tokcx_lib/")}


@pytest.fixture(scope="module")
def imported():
    """By chapter: the files of the library that Python loads for its imports, and those that it can reach."""
    code = {path.stem: notebooks.code_of(notebooks.source_notebook(path)) for path in CHAPTERS}
    run = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(run, input=json.dumps(code), capture_output=True, text=True, cwd=ROOT, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    return {name: [{os.path.relpath(file, ROOT) for file in part} for part in parts] for name, parts in said.items()}


# What `tokcx_lib.probe.probe` imports when it is called, and a chapter that imports another part of the probe does not.
BEHIND_THE_DOOR = {f"tokcx_lib/probe/{name}.py" for name in ("question", "context", "policies", "queries")}
BEHIND_THE_DOOR |= {f"tokcx_lib/probe/{name}.py" for name in ("pooled", "layers", "plan", "resuming")}
BEHIND_THE_DOOR |= {f"tokcx_lib/models/{name}.py" for name in ("capture", "heads")} | {"tokcx_lib/theory/drawn_keys.py"}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_stamp_holds_the_modules_that_python_loads(imported, path):
    at_once, reachable = imported[path.stem]
    assert modules(path) == reachable  # what is not loaded at once, a function imports when it is called
    later = {file for file in reachable - at_once if file not in BEHIND_THE_DOOR}
    assert at_once <= reachable and len(later) <= 2


@pytest.fixture
def bare_book(tmp_path):
    """Sources of the real book, to spoil: chapters, library, pins."""
    for name in ("tokcx_lib", "chapters"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    return tmp_path


def test_a_changed_check_makes_its_own_chapter_stale_and_no_other(bare_book):
    sources = {path.stem: notebooks.source_notebook(path) for path in CHAPTERS}

    def stamps():
        return {stem: notebooks.stamp(source, bare_book) for stem, source in sources.items()}

    before = stamps()
    for path in CHAPTERS:
        file = bare_book / "tokcx_lib" / "check" / f"chapter_{path.stem[:2]}.py"
        kept = file.read_text(encoding="utf-8")
        edit(file, "CHECKS = {\n", "CHECKS = {  # changed\n")
        after = stamps()
        assert [stem for stem in sources if after[stem] != before[stem]] == [path.stem]
        file.write_text(kept, encoding="utf-8")
    edit(bare_book / "tokcx_lib" / "check" / "kinds.py", "import numpy", "# changed\nimport numpy")
    assert all(stamp != before[stem] for stem, stamp in stamps().items())


def test_a_stamp_holds_the_records_that_a_chapter_loads():
    def loaded(stem):
        (path,) = (path for path in CHAPTERS if path.stem == stem)
        return notebooks.stamp(notebooks.source_notebook(path), ROOT)

    assert "book/records/real_heads_german.csv" in loaded("07_real_heads")  # by a name put together in a loop
    assert "book/records/gaussian_moments.csv" not in loaded("07_real_heads")


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


def test_changed_record_of_a_module(small_book):
    record = small_book / "book" / "records" / "long_run.csv"
    record.write_text("n,error\n1,2\n", encoding="utf-8")
    edit(small_book / "tokcx_lib" / "far.py", "", 'def table(records):\n    return records.load("long_run")\n\n\n')
    notebooks.run_chapter(small_book / "chapters" / "01_small.md", small_book)
    assert problems(small_book) == []
    edit(record, "1,2", "1,3")
    assert problems(small_book) == ["changed since it was run: book/records/long_run.csv"]


def test_module_that_a_function_imports(small_book):
    edit(
        small_book / "tokcx_lib" / "far.py", "", "def later():\n    from tokcx_lib import apart\n    return apart\n\n\n"
    )
    notebooks.run_chapter(small_book / "chapters" / "01_small.md", small_book)
    edit(small_book / "tokcx_lib" / "apart.py", "VALUE = 2", "VALUE = 3")
    assert problems(small_book) == ["changed since it was run: tokcx_lib/apart.py"]


def test_module_of_a_room_whose_package_was_changed(small_book):
    deep = small_book / "tokcx_lib" / "room" / "inner"
    deep.mkdir(parents=True)
    for file in (deep / "leaf.py", deep / "__init__.py", deep.parent / "__init__.py"):
        file.write_text("", encoding="utf-8")
    edit(small_book / "tokcx_lib" / "far.py", "", "from tokcx_lib.room.inner import leaf as leaf\n")
    notebooks.run_chapter(small_book / "chapters" / "01_small.md", small_book)
    edit(deep.parent / "__init__.py", "", "# changed\n")
    assert problems(small_book) == ["changed since it was run: tokcx_lib/room/__init__.py"]


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


# ---------------------------------------------- parts that do not fit together


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("  formats: ipynb,md:myst", "  formats: [ipynb", "its front matter is not YAML (line 4): expected"),
        ("jupytext:", "jupytext: a: b", "its front matter is not YAML (line 2): mapping values are not allowed here"),
        (
            "jupytext:",
            "jupyter:",
            "its front matter has no `jupytext:` and `kernelspec:`; copy",
        ),
        ("---\njupytext:", "jupytext:", "its front matter has no `jupytext:`"),
        ("name: python3\n---", "name: python3", "its front matter is not YAML (line 11)"),
        ("    caption: One dot.", "    caption: [One dot.", "Code cell 3 at line 27 could not be read: Invalid YAML"),
    ],
)
def test_a_source_that_cannot_be_read_is_named_in_one_line(small_book, capsys, old, new, problem):
    source = small_book / "chapters" / "01_small.md"
    twin = source.with_suffix(".ipynb").read_bytes()
    edit(source, old, new)
    for command in (["check"], ["run"], ["run", "--force"]):
        assert notebooks.main(["--root", str(small_book), *command]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"chapters/01_small.md: {problem}")
    assert source.with_suffix(".ipynb").read_bytes() == twin


@pytest.mark.parametrize(
    "toc", ["chapters:\n  - file: chapters/02_other.ipynb\n", "# - file: chapters/01_small.ipynb", None]
)
def test_a_chapter_that_is_not_in_the_table_of_contents(small_book, toc):
    (small_book / "_toc.yml").unlink()
    if toc:
        (small_book / "_toc.yml").write_text(toc, encoding="utf-8")
    assert problems(small_book) == ["is not in _toc.yml: `- file: chapters/01_small.ipynb` is missing there"]


EXERCISE = """
```{exercise-start} A title
:label: ex-one
```
Do it.
```{exercise-end}
```

```{solution-start} ex-one
```
Done.

```{solution-end}
```
"""


@pytest.mark.parametrize(
    ("keys", "old", "new", "found"),
    [
        (["ex-one"], "", "", []),
        ([], "", "", ["exercise ex-one has no check in tokcx_lib/check/chapter_01.py"]),
        (None, "", "", ["exercise ex-one has no check in tokcx_lib/check/chapter_01.py"]),
        (["ex-one", "ex-two"], "", "", ["tokcx_lib/check/chapter_01.py has a check ex-two, which is no exercise here"]),
        (
            ["ex-one"],
            "solution-start} ex-one",
            "solution-start} ex-oen",
            ["exercise ex-one has no solution", "has a solution of ex-oen, which is no exercise here"],
        ),
        (["ex-one"], "Done.", 'check.exercise(\n    "ex-two", 1)', ["the solution of ex-one checks ex-two"]),
        (["ex-one"], "Done.", 'check.exercise("ex-one", 1)', []),
        (
            ["ex-one"],
            EXERCISE,
            EXERCISE + EXERCISE,
            ["label ex-one is there twice"],
        ),
    ],
)
def test_exercises_solutions_and_checks_belong_together(small_book, keys, old, new, found):
    source, checks = small_book / "chapters" / "01_small.md", small_book / "tokcx_lib" / "check" / "chapter_01.py"
    source.write_text(source.read_text(encoding="utf-8") + EXERCISE.replace(old, new, 1), encoding="utf-8")
    if keys is not None:
        checks.parent.mkdir()
        checks.write_text("CHECKS = " + repr(dict.fromkeys(keys, 1)), encoding="utf-8")
    notebooks.run_chapter(source, small_book)
    assert problems(small_book) == found


def test_a_module_of_checks_that_is_not_python(small_book):
    checks = small_book / "tokcx_lib" / "check" / "chapter_01.py"
    checks.parent.mkdir()
    checks.write_text("CHECKS = {\n", encoding="utf-8")
    (found,) = problems(small_book)
    assert found.startswith("tokcx_lib/check/chapter_01.py is not Python (line 1): ")


# --------------------------------------------------------- work done in Jupyter


def work(notebook):
    """What someone does in Jupyter."""
    notebook.cells.append(nbformat.v4.new_code_cell("3 + 4", execution_count=4))


def test_an_edited_twin_is_not_overwritten(small_book, stored, capsys):
    notebook, save = stored
    source, twin = (small_book / "chapters" / f"01_small.{kind}" for kind in ("md", "ipynb"))
    work(notebook)
    save()
    before = twin.read_bytes()
    for command in ("run", "check"):
        assert notebooks.main(["--root", str(small_book), command]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(
            "chapters/01_small.md: 01_small.ipynb was edited after it was run: copy small edits into "
        )
        assert "run --force 01_small" in line
    edit(source, "A small chapter", "A small, edited chapter")  # both were edited
    assert notebooks.main(["--root", str(small_book), "run"]) == 1
    assert twin.read_bytes() == before
    assert notebooks.main(["--root", str(small_book), "run", "--force"]) == 0
    assert "3 + 4" not in twin.read_text(encoding="utf-8") and problems(small_book) == []


@pytest.mark.parametrize("position", [0, 1])
def test_an_edit_of_any_cell_counts(small_book, stored, position):
    notebook, save = stored
    notebook.cells[position].source += "\n# more"
    save()
    with pytest.raises(notebooks.Refused, match="was edited"):
        notebooks.run_chapter(small_book / "chapters" / "01_small.md", small_book)


def test_edits_that_the_source_has_are_no_loss(small_book, stored):
    """As where Jupyter writes both: the twin is run again, and says what it holds."""
    notebook, save = stored
    notebook.cells[0].source += ", edited"
    save()
    edit(small_book / "chapters" / "01_small.md", "# A small chapter", "# A small chapter, edited")
    assert "new text" in notebooks.run_chapter(small_book / "chapters" / "01_small.md", small_book)
    assert problems(small_book) == []


def test_jupytext_brings_edits_into_the_source(small_book, stored):
    notebook, save = stored
    source = small_book / "chapters" / "01_small.md"
    work(notebook)
    save()
    before = source.read_text(encoding="utf-8")
    command = [sys.executable, "-m", "jupytext", "--to", "md:myst", "01_small.ipynb"]
    subprocess.run(command, cwd=source.parent, check=True, capture_output=True)
    assert "3 + 4" in source.read_text(encoding="utf-8") and "stamp" not in source.read_text(encoding="utf-8")
    assert "was run" in notebooks.run_chapter(source, small_book)
    assert problems(small_book) == [] and before != source.read_text(encoding="utf-8")


def test_outputs_of_another_run_are_made_again(small_book, stored):
    notebook, save = stored
    source = small_book / "chapters" / "01_small.md"
    notebook.cells[1].outputs[0].text = notebook.cells[1].outputs[0].text.replace("value 1", "value 9")
    save()
    assert problems(small_book) == ["its outputs were changed after it was run"]
    assert "was run" in notebooks.run_chapter(source, small_book) and problems(small_book) == []


def test_a_twin_of_before_these_hashes_is_taken_as_it_is(small_book, stored):
    notebook, save = stored
    del notebook.metadata.tokcx["cells"], notebook.metadata.tokcx["outputs"]
    save()
    source = small_book / "chapters" / "01_small.md"
    assert problems(small_book) == [] and notebooks.run_chapter(source, small_book) == "is up to date"
    edit(source, "A small chapter", "A small, edited chapter")
    assert "new text" in notebooks.run_chapter(source, small_book)


# ------------------------------------------------------------ naming a chapter


@pytest.mark.parametrize(
    ("name", "stems"),
    [
        ("3", ["03_c"]),
        ("03", ["03_c"]),
        ("1", ["01_a"]),
        ("12", ["12_f"]),
        ("03_c", ["03_c"]),
        ("chapters/03_c.md", ["03_c"]),
        ("03_c.ipynb", ["03_c"]),
    ],
)
def test_names_of_chapters(tmp_path, name, stems):
    (tmp_path / "chapters").mkdir()
    for stem in ("01_a", "03_c", "10_d", "11_e", "12_f"):
        (tmp_path / "chapters" / f"{stem}.md").touch()
    assert [path.stem for path in notebooks.chapters(tmp_path, [name])] == stems


@pytest.mark.parametrize("name", ["2", "0", "ch3", "3.5", "c", "13", "-1", "³"])
def test_no_such_chapter(tmp_path, name):
    (tmp_path / "chapters").mkdir()
    (tmp_path / "chapters" / "03_c.md").touch()
    with pytest.raises(SystemExit, match="no chapter .*; there are: 03_c"):
        notebooks.chapters(tmp_path, [name])
