"""What chapter 15 reads off its record of real heads: effective tokens, shares, states and costs, scheme by scheme."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tokcx_lib.theory import scaling
from tokcx_lib.validation import as_choice, as_kind

MODELS = ("minilm", "smollm2")
MEANS = ["factor", "load", "participation", "rest", "law", "first"]


def heads_of(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """One row per n, scheme, layer and head of a model, from the table of `scaling_heads`.

    Over pieces of text: means of factor, load, participation, rest, law and first; geometric means of effective; root
    mean squares of moved and error. Besides: share, effective / n; reduced, the reduced load of the scaled logits; and
    law_effective, 1 / law.

    Raises
    ------
    ValueError
        If the model is not one of the two, or the table is none.
    """
    table = as_kind("table", table, pd.DataFrame)
    rows = table[table["model"] == MODELS.index(as_choice("model", model, MODELS))]
    groups = rows.groupby(["n", "scheme", "layer", "head"], sort=False)
    found = groups[MEANS].mean()
    found["effective"] = np.exp(groups["effective"].agg(lambda x: np.log(x).mean()))
    for name in ("moved", "error"):
        found[name] = np.sqrt(groups[name].agg(lambda x: np.square(x).mean()))
    found = found.reset_index()
    found["share"] = found["effective"] / found["n"]
    found["reduced"] = scaling.reduced_load((found["factor"] * found["load"]).to_numpy(), found["n"].to_numpy())
    found["law_effective"] = 1 / found["law"]
    return found


def medians(heads: pd.DataFrame, column: str) -> pd.DataFrame:
    """Medians over heads of a column of `heads_of`: one row per n, one column per scheme."""
    return as_kind("heads", heads, pd.DataFrame).pivot_table(
        index="n", columns="scheme", values=column, aggfunc="median"
    )


def states(heads: pd.DataFrame) -> pd.DataFrame:
    """Shares of the heads in each phase of the typical error, by n and scheme: averaging, extremal and frozen."""
    heads = as_kind("heads", heads, pd.DataFrame)
    phase = np.where(heads["reduced"] < 0.5, "averaging", np.where(heads["reduced"] < 1, "extremal", "frozen"))
    counted = heads.assign(phase=phase).groupby(["n", "scheme"])["phase"].value_counts(normalize=True)
    return counted.unstack("phase", fill_value=0.0).reindex(columns=["averaging", "extremal", "frozen"], fill_value=0.0)


def growth(heads: pd.DataFrame, start: int, end: int) -> pd.DataFrame:
    """Exponents a of the effective number of tokens n^a between two numbers of keys: one row a head, one column a
    scheme, and the exponent that the exact law gives for the same loads, in columns law_SCHEME."""
    heads = as_kind("heads", heads, pd.DataFrame).set_index(["layer", "head"])
    found = {}
    for scheme, rows in heads.groupby("scheme"):
        low, high = (rows[rows["n"] == n] for n in (start, end))
        for name, column, sign in ((scheme, "effective", 1), (f"law_{scheme}", "law", -1)):
            found[name] = sign * np.log(high[column] / low[column]) / np.log(end / start)
    return pd.DataFrame(found)
