"""Errors of schemes against each other, on the same sequences: paired ratios, and what a key is worth (chapter 11)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from tokcx_lib.sampling import fits

PEER = {"mean": "mean_error", "covariance": "cov_error", "outputs": "rms"}


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


def _exponents(rows: pd.DataFrame, x: str) -> dict[str, str]:
    """Exponents of the three errors of `PEER` against a column, with their intervals."""
    rows = rows.assign(n=rows[x])
    found = {name: fits.fit_slope(rows, error) for name, error in PEER.items()}
    return {name: f"{fit.exponent:.2f} [{fit.low:.2f}, {fit.high:.2f}]" for name, fit in found.items()}


def window_exponents(table: pd.DataFrame, loads: dict) -> pd.DataFrame:
    """Exponents of record `sparse_window`: against the keys read at the longest n, and against n at the middle width.

    Parameters
    ----------
    table : with a column rms, the root of mse; loads : (layer, head) -> load as text, for the first level of the index.
    """
    longest, found = table["n"].max(), {}
    widths = sorted(table.loc[table["n"] == longest, "half_width"].unique())
    middle = widths[len(widths) // 2]
    for (layer, head), rows in table.groupby(["layer", "head"]):
        load, window = loads[layer, head], rows[rows["scheme"] == "window + random"]
        found[load, "window, keys"] = _exponents(window[window["n"] == longest], "keys")
        same = rows[rows["half_width"] * longest == middle * rows["n"]]
        for name, scheme in (("window, n", "window + random"), ("random, n", "random")):
            found[load, name] = _exponents(same[same["scheme"] == scheme], "n")
    return pd.DataFrame(found).T.sort_index(level=0, sort_remaining=False)


def window_errors(table: pd.DataFrame, loads: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Errors of record `sparse_window` at the longest n and the middle width: as text, and two ratios for each load.

    The ratios: shared, of the error of the mean with shared random keys over that with each query's own; window, of the
    outputs' error with window + random over that with random keys.
    """
    longest = table[table["n"] == table["n"].max()]
    widths = sorted(longest["half_width"].unique())
    same = longest[longest["half_width"] == widths[len(widths) // 2]]
    lines, ratios_of = {}, {}
    for (layer, head), rows in same.groupby(["layer", "head"]):
        load, groups = loads[layer, head], rows.groupby("scheme")[list(PEER.values())]
        mean, sem = groups.mean(), groups.sem()
        for scheme in ("window + random", "window + weighted", "random", "shared"):
            lines[load, scheme] = {k: f"{mean.loc[scheme, e]:.4f} ± {sem.loc[scheme, e]:.4f}" for k, e in PEER.items()}
        shared = mean.loc["shared", "mean_error"] / mean.loc["random", "mean_error"]
        ratios_of[load] = {"shared": shared, "window": mean.loc["window + random", "rms"] / mean.loc["random", "rms"]}
    return pd.DataFrame(lines).T.sort_index(level=0, sort_remaining=False), pd.DataFrame(ratios_of).T
