"""Every number on the page about long contexts is one that the records, or the library, give."""

import re
from pathlib import Path

import numpy as np
import pytest

from tokcx_lib import records
from tokcx_lib.studies.depth import tables as depth_tables
from tokcx_lib.studies.sparse import tables as sparse_tables
from tokcx_lib.theory import rotary

PAGE = Path(__file__).resolve().parents[1] / "book/reference/long_contexts.md"


def loads():
    heads = records.load("real_heads_english").table
    low, median, high = heads["effective_200000"].quantile([0, 0.5, 1])
    phases = heads["phase"].value_counts()
    needed = heads["tokens_10_percent"]
    quarter = needed.quantile(0.75)
    return [
        f"from {heads['load_median'].min():.2f} to {heads['load_median'].max():.1f}.",
        "Given 200,000 tokens",
        f"over {low:.0f} of them, the median head over {round(median, -3):,.0f}, and the widest over "
        f"{round(high, -3):,.0f}.",
        f"Of the {len(heads)} heads, {phases['averaging']} average, {phases['extremal']} depend",
        f"and {phases['frozen']} is frozen",
        f"need {needed.median():,.0f} keys in the median head, more than {quarter // 100 * 100:,.0f} in a quarter",
        f"$10^{{{np.floor(np.log10(needed.max())):.0f}}}$",
    ]


def kept_keys():
    record = records.load("sparse_heads")
    rows = sparse_tables.with_loads(record.table, record.meta)
    errors = rows[rows["budget"] == 128].groupby(["case", "scheme"])["error"].mean().unstack()
    held = rows[(rows["budget"] == 128) & (rows["scheme"] == "window")].groupby("case")["mass"].mean()
    cases = 0, 2, 3
    names = ["random", "window", "top-k"]
    loads = {case: record.meta["cases"][case]["load_median"] for case in cases}
    lines = [f"| {loads[c]:.2f} | " + " | ".join(f"{e:.3f}" for e in errors.loc[c, names]) + " |" for c in cases]
    assert errors.loc[0, names].idxmax() == "top-k"
    assert errors.loc[3, names].idxmin() == "top-k"
    total = rows["budget"].max()
    return [
        *lines,
        f"With 128 keys of about {round(total, -2):,},",
        f"at most {100 * held.loc[list(cases)].max():.1f}% of",
    ]


def planes():
    kept = [rotary.slow_planes(1e5, 64, n) for n in (2048, 8192)]
    assert f"{rotary.half_length(1.0):.2f}" == "3.79"
    return [
        "at $3.79/\\theta$ of them. With base 100,000 and heads of 64 dimensions, as in SmolLM2,",
        f"{kept[0]} of 32 planes keep at least half over 2,048 tokens, and {kept[1]} over 8,192.",
    ]


def layers():
    table = records.load("depth_model").table
    passed = depth_tables.model_layers(table).loc[32, "passed"].dropna()
    last = table[(table["n"] == 32) & (table["layer"] == 6)]
    off = ((last["error"] ** 2).mean() / (last["spread"] ** 2).mean()) ** 0.5
    *most, end = (f"{factor:.2f}" for factor in passed)
    return [
        "reads 32 keys of its context",
        f"layers 2 to {passed.index.max()} pass on {', '.join(most)} and {end} times the error",
        f"off by {off:.2f} of their spread. A budget",
    ]


def readers():
    table = records.load("downstream_retrieval").table
    means = table[table["width"] == 128].groupby("n")[["error", "agree"]].mean()
    some, more = means.loc[32], means.loc[96]
    return [
        f"read 32 keys of 128 are off by {some['error']:.2f} of their spread",
        f"the same for {100 * some['agree']:.0f}% of the queries; with 96 keys, {more['error']:.2f} and "
        f"{100 * more['agree']:.0f}%.",
    ]


STATEMENTS = {"1": loads, "3": kept_keys, "4": planes, "5": layers, "6": readers}
LIMITS = ("encoder of 6 layers", "between 2 and 5", "like $1/\\sqrt n$", "contexts of 256 tokens")


def left_over(page, fragments):
    """What is left of a page without some of its words, which must be there, its own numbering and its links."""
    page = re.sub(r"\{ref\}`[^`]*`|\{cite:\w\}`[^`]*`|`[\w.]+`|^## \d\. ", " ", page, flags=re.MULTILINE)
    page = " ".join(re.sub(r"^\|-.*$", "", page, flags=re.MULTILINE).split())
    for fragment in fragments:
        assert page.count(fragment) == 1, fragment
        page = page.replace(fragment, " ")
    return page


def numbers(page):
    return re.findall(r"\d[\d.,]*", page.replace("SmolLM2", "").replace("MiniLM", ""))


def test_every_number_is_computed_again():
    page = PAGE.read_text(encoding="utf-8")
    fragments = [fragment for statement in STATEMENTS.values() for fragment in statement()]
    assert numbers(left_over(page, [*fragments, *LIMITS])) == []


@pytest.mark.parametrize("right, wrong", [("0.461", "0.561"), ("33,000", "35,000"), ("14 of 32", "15 of 32")])
def test_a_number_that_is_not_the_records_is_seen(right, wrong):
    page = PAGE.read_text(encoding="utf-8")
    fragments = [fragment for statement in STATEMENTS.values() for fragment in statement()]
    assert right in page
    with pytest.raises(AssertionError):
        left_over(page.replace(right, wrong), fragments)


def test_it_has_six_statements_each_with_its_limits():
    page = PAGE.read_text(encoding="utf-8")
    parts = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    assert [part[0] for part in parts] == list("123456")
    assert all(part.count("*Limits.*") == 1 for part in parts)
