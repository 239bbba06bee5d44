"""Errors of schemes against each other, on the same sequences: paired ratios, and what a key is worth (chapter 11)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats


def compare(rows: pd.DataFrame, one: str, other: str, by: Sequence[str] = ("load", "budget")) -> pd.DataFrame:
    """Ratio of the mean errors of two schemes, with a 95% interval over replicates, which see the same tokens.

    Parameters
    ----------
    rows : columns `by`, replicate, scheme and error.

    Returns
    -------
    DataFrame, index `by`, columns ratio, low and high: Student's interval of the mean of error - ratio * other error.

    Raises
    ------
    ValueError
        If a scheme is not in the table.
    """
    for scheme in (one, other):
        if scheme not in set(rows["scheme"]):
            raise ValueError(f"rows: expected errors of {scheme!r}, got those of {sorted(set(rows['scheme']))}")
    table = rows.pivot_table(index=[*by, "replicate"], columns="scheme", values="error")
    found = {}
    for key, part in table[[one, other]].dropna().groupby(level=list(by)):
        a, b = part[one], part[other]
        ratio = a.mean() / b.mean()
        half = stats.t.ppf(0.975, len(a) - 1) * (a - ratio * b).sem() / b.mean()
        found[key] = (ratio, ratio - half, ratio + half)
    return pd.DataFrame(found, index=["ratio", "low", "high"]).T


def as_text(found: pd.DataFrame, key) -> str:
    """A row of `compare` in words."""
    return "{:.2f} (95%: {:.2f} to {:.2f})".format(*found.loc[key])


def ratios(rows: pd.DataFrame, schemes: Sequence[str], keys: dict, other: str = "random", by=("load", "budget")):
    """Table of ratios to `other` with half-widths of their 95% intervals, as text: a row a scheme, a column a case.

    `keys` : column -> its key in `compare`.
    """
    table = {}
    for name in schemes:
        found = compare(rows, name, other, by)
        here = {column: found.loc[key] for column, key in keys.items()}
        table[name] = {column: f"{row.ratio:.2f}±{row.high - row.ratio:.2f}" for column, row in here.items()}
    return pd.DataFrame(table).T


def worth(curve: pd.Series, error: float) -> float:
    """How many keys of a scheme, with mean errors `curve` over budgets that fall, err by `error`: between its ends."""
    return float(np.exp(np.interp(-np.log(error), -np.log(curve.to_numpy()), np.log(curve.index))))


def with_loads(table: pd.DataFrame, meta: dict) -> pd.DataFrame:
    """Record `sparse_heads` with the number `case`, the `name` and the median `load` of the head of each row."""
    parts = []
    for case, ((layer, head, factor), at) in enumerate(zip(meta["config"]["cases"], meta["cases"])):
        here = (table["layer"] == layer) & (table["head"] == head) & (table["factor"] == factor)
        name = f"layer {layer}, head {head}" + (", halved" if factor != 1 else "")
        parts.append(table[here].assign(case=case, name=name, load=at["load_median"]))
    return pd.concat(parts)
