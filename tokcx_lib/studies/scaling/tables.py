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
    """Exponents a of the effective number of tokens n^a = 1 / rest between two numbers of keys: one row a head, one
    column a scheme, and the exponent that the exact law gives for the same loads, 1 / law, in columns law_SCHEME."""
    heads = as_kind("heads", heads, pd.DataFrame).set_index(["layer", "head"])
    found = {}
    for scheme, rows in heads.groupby("scheme"):
        low, high = (rows[rows["n"] == n] for n in (start, end))
        for name, column in ((scheme, "rest"), (f"law_{scheme}", "law")):
            found[name] = np.log(low[column] / high[column]) / np.log(end / start)
    return pd.DataFrame(found)


def quoted(heads: pd.DataFrame, anchor: int) -> dict[str, str]:
    """Numbers that the chapter quotes of the heads of one model, as it writes them.

    load-start, load-end and effective-least, -most, -anchor, -end: medians over heads without a scaling. ratio, low,
    high: median and 10% and 90% quantiles of measured effective numbers over those of the law. parted-SCHEME: their
    median at the most keys. frozen-SCHEME: share of the heads there with a reduced load above 1. a-SCHEME and
    a-law_SCHEME: medians of `growth` from the anchor on.
    """
    heads = as_kind("heads", heads, pd.DataFrame)
    last = heads["n"].max()
    ratio = heads["law"] / heads["rest"]
    load, number = (medians(heads, column)["none"] for column in ("load", "effective"))
    found = {"load-start": f"{load.iloc[0]:.1f}", "load-end": f"{load.iloc[-1]:.1f}"}
    sizes = {"least": number.min(), "most": number.max(), "anchor": number[anchor], "end": number.iloc[-1]}
    found |= {f"effective-{key}": f"{x:.1f}" if x < 10 else f"{x:,.0f}" for key, x in sizes.items()}
    quantiles = {"low": ratio.quantile(0.1), "ratio": ratio.median(), "high": ratio.quantile(0.9)}
    found |= {key: f"{x:.1f}" if x > 3 else f"{x:.2f}" for key, x in quantiles.items()}
    parted = ratio[heads["n"] == last].groupby(heads["scheme"]).median()
    found |= {f"parted-{scheme}": f"{x:.1f}" for scheme, x in parted.items()}
    found |= {f"frozen-{scheme}": f"{x:.0%}" for scheme, x in states(heads).loc[last]["frozen"].items()}
    return found | {f"a-{key}": f"{x:.2f}" for key, x in growth(heads, anchor, last).median().items()}
