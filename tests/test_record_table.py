"""The tables of the reference pages: what is shown of a record, and which records are refused."""

import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tokcx_lib import records

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "book" / "_ext"))
import record_table  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    table = pd.DataFrame({"part": ["a", "a", "b"], "size": [10, 1000, 10], "value": [1 / 3, 2e-7, 12345.0]})
    records.save("trial", table, {}, tmp_path)
    return tmp_path


def test_rows_are_those_asked_for(folder):
    rows, meta = record_table.load(folder, "trial")
    assert meta["name"] == "trial" and len(rows) == 3
    assert [row["value"] for row in record_table.matching(rows, "part=a; size=10")] == ["0.333333"]
    assert record_table.matching(rows, "part=a|b") == record_table.matching(rows, "") == rows
    with pytest.raises(ValueError, match="no row has part = c"):
        record_table.matching(rows, "part=a|c")
    with pytest.raises(KeyError, match="colour"):
        record_table.matching(rows, "colour=red")


@pytest.mark.parametrize(
    "text, digits, shown",
    [("0.333333", 3, "0.333"), ("2e-07", 2, "2.0 · 10⁻⁷"), ("12345", 3, "12,345"), ("12345.6", 3, "12,300")]
    + [("ours", 3, "ours"), ("", 3, "")]
    + [("1.5", 3, "1.50"), ("99.96", 3, "100"), ("0", 3, "0"), ("0.00123", 2, "0.0012"), ("-0.0456", 2, "-0.046")],
)
def test_numbers_are_shown_with_so_many_digits(text, digits, shown):
    assert record_table.shown(text, digits) == shown


def test_an_edited_record_is_refused(folder):
    path = folder / "trial.csv"
    path.write_text(path.read_text().replace("0.333333", "0.3"))
    with pytest.raises(ValueError, match="trial.csv is not the table that trial.json describes"):
        record_table.load(folder, "trial")
    shutil.rmtree(folder)
    with pytest.raises(OSError):
        record_table.load(folder, "trial")


# ---- records made on a GPU ----

PAGE = """\
Title
=====

.. record-source:: trial

.. record-table:: trial
   :where: part=a
   :rows: size
   :caption: What was measured.
   :name: tab-trial

.. code-block:: python

   record = records.load("trial")

After it.
"""


def plant(folder: Path, name: str, **meta) -> None:
    table = pd.DataFrame({"part": ["a", "a"], "size": [7, 77], "value": [0.125, 4242.0]})
    records.save(name, table, {"device": "NVIDIA H200", **meta}, folder)


def built(root: Path) -> str:
    """The words of the page, which Sphinx has built."""
    (root / "index.rst").write_text(PAGE)
    (root / "conf.py").write_text('extensions = ["record_table"]\nhtml_theme = "basic"\n')
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-E", "-b", "html", str(root), str(root / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(record_table.__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (root / "out" / "index.html").read_text(encoding="utf-8").partition("<h1>")[2]
    return " ".join(html.unescape(re.sub("<[^>]+>", "", page)).split())


@pytest.fixture
def page(tmp_path):
    folder = tmp_path / "book" / "records"
    table = pd.DataFrame({"part": ["a", "b"], "size": [10, 10], "value": [0.5, 1.0]})
    records.save("trial", table, {}, folder)
    return tmp_path


def test_without_a_record_from_a_gpu_a_page_says_nothing_of_one(page):
    text = built(page)
    assert "What was measured." in text and "0.500" in text and "After it." in text
    assert "GPU" not in text and "H200" not in text and "_cuda" not in text


def test_a_record_from_a_gpu_stands_beside_that_of_the_cpu(page):
    plant(page / "book" / "records", "trial_cuda", replicates=200, wall_seconds=90)
    plant(page / "book" / "records", "trial_long_cuda", replicates=5)
    plant(page / "book" / "records", "trials_cuda")
    text = built(page)
    assert (
        text.index("0.500") < text.index("0.125") and "4,242" in text and "What was measured. On NVIDIA H200." in text
    )
    assert "Record trial_cuda" in text and "device: NVIDIA H200" in text
    assert "The same on NVIDIA H200: record trial_cuda, 2 rows, 200 replicates, 1.5 min" in text
    assert "More on NVIDIA H200: record trial_long_cuda, 2 rows, 5 replicates" in text and "trials_cuda" not in text
    assert text.index('records.load("trial")') < text.index("The same on") < text.index("More on")
    assert text.index("More on") < text.index("After it.")


def test_a_note_says_how_the_exponents_compare(page):
    folder = page / "book" / "records"
    beside = {"record": "trial", "exponents": 24, "within": 23, "largest": 0.00123}
    plant(folder, "trial_cuda", beside=beside)
    (note,) = record_table.gpu_notes(folder, "trial")
    assert "Of 24 exponents 23 lie within the intervals of the record here; the largest gap is 0.0012." in note
    table = folder / "trial_cuda.csv"
    table.write_text(table.read_text().replace("4242", "4243"))
    with pytest.raises(ValueError, match="trial_cuda.csv is not the table"):
        record_table.gpu_notes(folder, "trial")


def test_another_record_of_the_book_keeps_the_notes_of_its_own(page):
    folder = page / "book" / "records"
    plant(folder, "trial_long")
    plant(folder, "trial_long_cuda")
    assert record_table.gpu_notes(folder, "trial") == [] and len(record_table.gpu_notes(folder, "trial_long")) == 1
