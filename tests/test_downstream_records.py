"""The records of chapter 8 hold the queries, lengths and draws that it speaks of, and what the theorem promises."""

import numpy as np

from tokcx_lib import records

KEYS = ["width", "article", "query"]


def test_five_hundred_articles_a_thousand_queries_and_eight_lengths():
    table, meta = records.load("downstream_retrieval")
    long = table[table["width"] == 128]
    assert long["article"].nunique() >= 500 and len(long[KEYS].drop_duplicates()) >= 1000
    assert (long.groupby(KEYS)["n"].nunique() >= 8).all() and meta["replicates"] >= 5
    assert not table.duplicated([*KEYS, "n"]).any() and (table["n"] < table["width"]).all()
    assert ((table[["agree", "right", "safe"]] >= 0) & (table[["agree", "right", "safe"]] <= 1)).all(axis=None)


def test_no_safe_draw_changes_its_nearest_article():
    table = records.load("downstream_retrieval").table
    assert (table["safe"] <= table["agree"] + 1e-6).all() and table["safe"].max() > 0
    # A mean product of two errors, and one component of an error, are at most the whole.
    assert (table["common"] <= table["error"] ** 2 * (1 + 1e-5)).all() and (
        table["along"] <= table["error"] * (1 + 1e-5)
    ).all()


def test_the_queries_are_those_of_the_retrieval():
    table, asked = (records.load(name).table for name in ("downstream_retrieval", "downstream_queries"))
    assert len(asked.merge(table[KEYS].drop_duplicates(), on=KEYS)) == len(asked) == len(table[KEYS].drop_duplicates())
    critical = asked.filter(like="critical_").to_numpy()
    assert (np.diff(critical, axis=1) >= -1e-6).all() and (critical > 0).all()
    assert np.allclose(asked["load"], asked.filter(regex=r"load_\d").mean(axis=1), rtol=1e-4)
