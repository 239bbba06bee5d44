"""Tables of chapter 10, from its records."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tokcx_lib.sampling import fits
from tokcx_lib.theory import moment_bias, rates, stable_density, stable_limit


def with_errors(table: pd.DataFrame) -> pd.DataFrame:
    """The record `sharp_rate` with the errors of mean and variance, the remainder of the mean, and the second gap."""
    return table.assign(
        mean_error=table["mean"].abs(),
        variance_error=table["variance_gap"].abs(),
        remainder=(table["mean"] - table["linear"]).abs(),
        second_gap=table["variance_gap"] + table["mean"] ** 2,
    )


def prefactor(mean: pd.Series, beta: float, first: float = 1e8) -> float:
    """c of c n^-beta through mean errors, indexed by n, from n = `first` on."""
    n = mean.index.to_numpy(float)
    return float(np.exp(np.log(mean.to_numpy() * n**beta)[n >= first].mean()))


def local_exponent(psi: float, power: int, log_n: float) -> float:
    """Local exponent at log n of a mean of influences that grow like y^power e^{q y^2/2}: it has powers of log n."""
    alpha = 1 + 1 / psi
    return 1 - 1 / alpha - (power * alpha - 1) / (2 * alpha * log_n)


def slopes(table: pd.DataFrame, first: int = 10**8) -> pd.DataFrame:
    """Exponents of both errors from n = first on, with standard errors, the local exponent of theory, and the limit."""
    rows, late = [], table[table["n"] >= first]
    middle = np.log(late["n"].min() * float(late["n"].max())) / 2
    for horizon, part in late.groupby("horizon"):
        psi, row = horizon**2, {"H": horizon}
        for power, error in ((1, "mean"), (2, "variance")):
            fit = fits.fit_slope(part, error + "_error")
            row |= {error: fit.exponent, error + " ±": fit.stderr}
            row[error + " log"] = local_exponent(psi, power, middle) if psi > 1 else 0.5
        rows.append(row | {"limit": rates.exponent(psi, "gaussian")})
    return pd.DataFrame(rows).set_index("H")


def against_influences(table: pd.DataFrame) -> pd.DataFrame:
    """Mean of self-attention beside the mean of influences over the same tokens, by horizon above 1.

    Rank correlation at the smallest and largest n, exponent of the remainder from 10^8 on, and b.
    """
    rows = []
    for horizon, part in table[table["horizon"] > 1].groupby("horizon"):
        ends = [part[part["n"] == n][["mean", "linear"]].corr("spearman").iloc[0, 1] for n in sorted(set(part["n"]))]
        fit = fits.fit_slope(part[part["n"] >= 10**8], "remainder")
        limit = rates.exponent(horizon**2, "bias")
        rows.append((horizon, ends[0], ends[-1], fit.exponent, fit.stderr, limit))
    names = ["H", "rank at 10^4", "rank at 10^12", "remainder", "±", "b"]
    return pd.DataFrame(rows, columns=names).set_index("H")


def scales(table: pd.DataFrame, lengths=(10**4, 10**8, 10**12)) -> pd.DataFrame:
    """Median size of the mean, and of the mean of influences, over that of the stable law with unit a_n/n."""
    rows = []
    for horizon in (1.5, 2.0):
        alpha = 1 + 1 / horizon**2
        unit = stable_density.quartile(alpha) * stable_density.tail_constant(alpha) ** (-1 / alpha)
        for n in lengths:
            part = table[(table["horizon"] == horizon) & (table["n"] == n)]
            size = unit * stable_limit.typical_scale(float(n), horizon)
            rows.append((horizon, n, *(part[name].abs().median() / size for name in ("mean", "linear"))))
    return pd.DataFrame(rows, columns=["H", "n", "mean", "influences"])


def tail_ratios(levels, cases: dict) -> pd.DataFrame:
    """Pr(|W psi| > r) over that of its leading factor, two dimensions, and the constant it tends to.

    cases : name -> (horizons, values), diagonals of B and W.
    """
    rows = {}
    for name, (horizons, values) in cases.items():
        limit = stable_limit.stable_limit(np.diag(horizons), np.diag(values))
        ratios = np.exp(stable_limit.log_tail(levels, horizons, values) - limit.log_leading(levels))
        rows[name] = [*ratios, limit.factor]
    columns = [f"r=1e{np.log10(r):.0f}" for r in levels] + ["constant"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def measured_bias(table: pd.DataFrame, lengths=(10**4, 10**6, 10**8, 10**10)) -> pd.DataFrame:
    """Mean gap of the second moment in self-attention (record `sharp_rate`) beside the exact law of fresh queries."""
    rows = []
    for horizon in (1.5, 2.0, 3.0):
        for n in lengths:
            gaps = table[(table["horizon"] == horizon) & (table["n"] == n)]["second_gap"]
            exact = moment_bias.second_moment_bias(float(n), [[horizon]]).item()
            rows.append((horizon, n, gaps.mean(), gaps.sem(), exact, (gaps.mean() - exact) / gaps.sem()))
    return pd.DataFrame(rows, columns=["H", "n", "measured", "±", "exact law", "apart"])
