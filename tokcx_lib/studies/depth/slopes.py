"""Exponents of errors in a stack in one dimension: measured, to first order on the same tokens, and in the limit.

The measured slopes of the record `depth_scalar` lie below the exponents that theory gives for n without end. Is the
theory wrong, or is 10^10 not large? The first-order errors of the very same tokens (`influence.first_order`) answer:
they have no free parameter and no limit in them. Chapter 12.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from tokcx_lib.sampling import fits
from tokcx_lib.studies.depth import influence, stacks
from tokcx_lib.validation import as_kind

FAR = 1000, 3000  # decimal digits of n at which the exponent of the largest pull is that of the limit, to 10^-3
ERRORS = {"query": ("probe_0", "first_query"), "mean": ("mean", "first_mean")}


def typical(values) -> float:
    """Size of errors that need not have a variance: the square of the mean of the roots, (E sqrt|e|)^2."""
    return float(np.mean(np.sqrt(np.abs(np.asarray(values, dtype=float)))) ** 2)


def with_first_order(table: pd.DataFrame, config: dict) -> pd.DataFrame:
    """A table of the experiment `depth_scalar`, and beside it the errors of its tokens by `influence.first_order`.

    Parameters
    ----------
    table : of the record, or of a run with the same columns; config : that of the record or run.
    """
    first = influence.first_order(config)
    keys = ["n", "stack", "layer", "replicate"]
    return as_kind("table", table, pd.DataFrame).merge(first, on=keys, validate="one_to_one")


def exponents(table: pd.DataFrame, horizons: dict[str, list[float]]) -> pd.DataFrame:
    """Exponents of the error after each layer of each stack, of a query at 0 and of the mean of the tokens.

    Parameters
    ----------
    table : of `with_first_order`; horizons : those of the layers of each stack.

    Returns
    -------
    DataFrame, one row a stack, layer and error:
        measured, stderr : slope of the typical error over the lengths; first_order : the same to first order.
        rank : the least rank correlation, over the lengths, of measured and first-order errors of the replicates.
        low, high : the range, over the lengths, of the measured typical error in units of the first-order one.
        theory : min(1/2, 1/(1 + Psi_J)) for the strongest path; summed : what it would be if couplings added up,
        min(1/2, 1/(1 + Psi_1 + ... + Psi_l)).
        near, far : exponent of the pull of the largest token over the lengths, and far beyond; NaN where the influence
        has a variance, and the pulls of all tokens count.
    """
    rows = []
    for (name, layer), part in as_kind("table", table, pd.DataFrame).groupby(["stack", "layer"]):
        chain = influence.influences(horizons[name])[:layer]
        for what, (seen, first) in ERRORS.items():
            below = horizons[name][: layer - 1 if what == "query" else layer]
            psi = chain[-1] if what == "query" else chain[-1].over_queries()
            roots = part.assign(**{c: part[c].abs() ** 0.5 for c in (seen, first)})
            slope, predicted = (fits.fit_slope(roots, c, resamples=200) for c in (seen, first))
            by_n = part.groupby("n")
            size = by_n[seen].apply(typical) / by_n[first].apply(typical)
            coupling = stacks.effective_couplings(stacks.scalar_stack(below))[-1] if below else 0.0
            digits = np.log10([part["n"].min(), part["n"].max()])
            heavy = coupling > 1
            rows.append(
                {
                    "stack": name,
                    "layer": layer,
                    "error": what,
                    "measured": 2 * slope.exponent,
                    "stderr": 2 * slope.stderr,
                    "first_order": 2 * predicted.exponent,
                    "rank": min(g[seen].corr(g[first], "spearman") for _, g in by_n),
                    "low": size.min(),
                    "high": size.max(),
                    "near": psi.exponent(*digits) if heavy else np.nan,
                    "far": psi.exponent(*FAR) if heavy else np.nan,
                    "theory": min(0.5, 1 / (1 + coupling)),
                    "summed": min(0.5, 1 / (1 + sum(h**2 for h in below))),
                }
            )
    return pd.DataFrame(rows)


def disagreements(found: pd.DataFrame, theory: str = "theory") -> list[str]:
    """What `exponents` shows against first order and against a formula for the limit, in words; empty if nothing.

    First order must give every measured slope to 0.02, rank the replicates by 0.98 and give their size to a quarter;
    the formula must give the exponent of the largest pull far out to 0.002. The measured slopes themselves cannot judge
    the formula: at 10^10 tokens they are further from it than two formulas are from each other.

    Parameters
    ----------
    found : of `exponents`; theory : the column with the formula.
    """
    found, wrong = as_kind("found", found, pd.DataFrame), []
    for row in found.itertuples():
        where = f"{row.stack}, layer {row.layer}, {row.error}: "
        if not abs(row.measured - row.first_order) < 0.02:
            wrong.append(f"{where}slope {row.measured:.3f}, to first order {row.first_order:.3f}")
        if not row.rank > 0.98:
            wrong.append(f"{where}rank correlation with first order {row.rank:.3f}")
        if not (0.75 < row.low and row.high < 1.25):
            wrong.append(f"{where}{row.low:.2f} to {row.high:.2f} times first order")
        limit = getattr(row, theory)
        if not (np.isnan(row.far) or abs(row.far - limit) < 0.002):
            wrong.append(f"{where}exponent {row.far:.4f} far out, expected {limit:.4f}")
    return wrong
