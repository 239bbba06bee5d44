"""The tables of the reference pages: what is shown of a record, and which records are refused."""

import shutil
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
