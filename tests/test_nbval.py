"""nbval, with the options of `make test`, compares what a reader sees."""

import os
import subprocess
import sys

import nbformat
import pytest

from tools.notebooks import ROOT

OPTIONS = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with", str(ROOT / "tests" / "nbval_sanitize.cfg")]


def nbval(book):
    """The answer of nbval on the small book."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *OPTIONS, "chapters"]
    environment = os.environ | {"PYTHONPATH": str(book)}
    return subprocess.run(command, cwd=book, env=environment, capture_output=True, text=True, timeout=120)


def test_executed_notebook_passes(small_book):
    answer = nbval(small_book)
    assert answer.returncode == 0 and "3 passed" in answer.stdout, answer.stdout


def test_another_device_passes(small_book):
    path = small_book / "chapters" / "01_small.ipynb"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("device: cpu, profile: quick", "device: Tesla T4, profile: full"), encoding="utf-8")
    assert nbval(small_book).returncode == 0


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("text", "value 1", "value 2"),
        ("text/latex", "x^2", "x^3"),
        ("application/papermill.record/text/plain", "42", "43"),
    ],
)
def test_altered_output_fails(small_book, kind, old, new):
    path = small_book / "chapters" / "01_small.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        place = output if kind == "text" else output.get("data", {})
        if old in place.get(kind, ""):
            place[kind] = place[kind].replace(old, new)
            break
    else:
        pytest.fail(f"the small book has no {kind} output with {old!r}")
    nbformat.write(notebook, path)
    answer = nbval(small_book)
    assert answer.returncode == 1 and "1 failed, 2 passed" in answer.stdout, answer.stdout
