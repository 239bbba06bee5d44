"""Exponents from error curves, with intervals that know that the prefixes of one replicate share tokens.

An exponent is a linear function of the logarithms of the mean errors, so its standard error follows from the covariance
of the errors between lengths, which the replicates show (the delta method). The interval is exponent +- q stderr, where
q is the level's quantile of |exponent* - exponent| / stderr* over resamples of whole replicates: the symmetric
studentised bootstrap (P. Hall, On symmetric bootstrap confidence intervals, J. R. Stat. Soc. B 50, 1988). When
replicates are few, the plain percentiles of the resampled exponents make too short an interval. The record
``interval_coverage`` counts how often ours holds the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from tokcx_lib.validation import as_count, as_flag, as_kind, as_list, as_number, rows_that_fit, shown


class Slope(NamedTuple):
    """Exponent beta of error = const n^-beta with its interval, and how far the curve is from such a law.

    `stderr` is the standard error of the exponent. `curvature` is the rise of the local exponent for each factor of ten
    in n, from a parabola on logarithmic axes, with its own interval (NaN with two lengths, which show no bend).
    """

    exponent: float
    low: float
    high: float
    stderr: float
    curvature: float
    curvature_low: float
    curvature_high: float

    @property
    def straight(self) -> bool:
        """Whether the data allow a straight line. If not, the exponent depends on the lengths: quote local slopes."""
        return not (self.curvature_low > 0 or self.curvature_high < 0)


def fit_slope(
    table: pd.DataFrame,
    error: str,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    weighted: bool = False,
) -> Slope:
    """Least-squares exponent of the mean error on logarithmic axes, with an interval from resampled replicates.

    A replicate's errors at different n are prefixes of the same draw, hence dependent: replicates are resampled
    whole, which keeps that dependence, where the usual standard error of a regression would ignore it.

    Parameters
    ----------
    table : one row per replicate and n, with columns replicate, n and `error` (positive).
    weighted : weigh each length by the inverse of its squared relative error. That spread is itself an estimate, so it
        is smoothed by a power of n, and the weights are made anew in every resample. It pays where the errors scatter
        more at some n than at others; where they scatter alike, as in the sweeps of this book, it changes nothing, and
        where the curve bends, the weights decide which stretch of it counts.

    Raises
    ------
    ValueError
        If there are fewer than two lengths or two replicates, a replicate lacks a length, a mean error is not positive
        and finite, or the level is not between 0 and 1.

    Notes
    -----
    With two or three replicates the interval is the whole line, unless they agree to rounding.
    """
    sample, weighted = _resample(table, error, resamples, seed), as_flag("weighted", weighted)
    lines = [_coefficients(sample, 1, weighted)]
    if len(sample.log_n) > 2:
        # error = exp(.. + c log(n)^2) has the local exponent .. - 2 c log(n).
        lines.append(2 * math.log(10) * _coefficients(sample, 2, weighted))
    value, stderr, margin = _studentised(sample, np.stack(lines, axis=-2), level)
    ends = np.stack([value, value - margin, value + margin]).T.tolist() + [[math.nan] * 3]
    return Slope(*ends[0], stderr[0].item(), *ends[1])


def fit_slopes(table: pd.DataFrame, error: str, by: str | Sequence[str], **options) -> pd.DataFrame:
    """`fit_slope` for each group of rows: one row a group, with the columns `by`, those of `Slope`, and `straight`.

    Parameters
    ----------
    by : column, or columns, that name the groups.
    options : as for `fit_slope`.
    """
    by = [by] if isinstance(by, str) else as_list("by", by, "names of columns")
    as_kind("table", table, pd.DataFrame)
    for name in by:
        _require_column("by", table, name)
    rows = []
    for key, part in table.groupby(by):
        slope = fit_slope(part, error, **options)
        rows.append({**dict(zip(by, key)), **slope._asdict(), "straight": slope.straight})
    return pd.DataFrame(rows)


def local_slopes(
    table: pd.DataFrame, error: str, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Exponent of the mean error between each n and the next, with bootstrap intervals: one slope mixes regimes.

    Parameters and errors as for `fit_slope`. Each interval is one of its own: of many, some miss.

    Returns
    -------
    DataFrame
        n_low and n_high (the two lengths), n (their geometric mean), exponent, low and high (its interval), stderr.
    """
    sample = _resample(table, error, resamples, seed)
    steps = -np.diff(np.eye(len(sample.log_n)), axis=0) / np.diff(sample.log_n)[:, None]
    value, stderr, margin = _studentised(sample, steps, level)
    lengths = np.sort(table["n"].unique())
    return pd.DataFrame(
        {
            "n_low": lengths[:-1],
            "n_high": lengths[1:],
            "n": np.sqrt(lengths[:-1] * lengths[1:].astype(float)),
            "exponent": value,
            "low": value - margin,
            "high": value + margin,
            "stderr": stderr,
        }
    )


class _Sample(NamedTuple):
    """Of all replicates, then of resampled ones: mean errors and the covariance of those means."""

    log_n: np.ndarray  # (lengths,)
    means: np.ndarray  # (1 + resamples, lengths)
    covs: np.ndarray  # (1 + resamples, lengths, lengths), relative: divided by both means


def _resample(table: pd.DataFrame, error: str, resamples: int, seed: int) -> _Sample:
    as_kind("table", table, pd.DataFrame)
    _require_column("table", table, "replicate"), _require_column("table", table, "n")
    _require_column("error", table, error)
    groups = table.groupby(["replicate", "n"], dropna=False).ngroups
    if groups < len(table):
        # A setting comes back for every replicate and n; what was measured does not.
        others = [name for name in table if name not in ("replicate", "n", error)]
        settings = [name for name in others if 1 < table[name].nunique() <= len(table) / groups]
        apart = ", ".join(map(repr, settings or others)) or "no column"
        raise ValueError(
            f"table: expected one row for each replicate and n, got {len(table)} for {groups}, which {apart} tells "
            f"apart; take the rows of one setting, or means over settings, or `fit_slopes` with `by`"
        )
    grid = table.pivot(index="replicate", columns="n", values=error)
    if grid.shape[0] < 2 or grid.shape[1] < 2 or grid.isna().any(axis=None):
        raise ValueError(f"table: expected two or more replicates of two or more n, all present, got {grid.shape}")
    try:
        errors, n = grid.to_numpy(dtype=float), grid.columns.to_numpy(dtype=float)
    except (TypeError, ValueError) as problem:
        raise ValueError(f"table: expected numbers in n and {error!r}, got others ({problem})") from problem
    if not (n > 0).all():
        raise ValueError(f"table: expected positive n, got {n.min():g}")
    log_n = np.log(n)
    centre = errors.mean(0)
    if not (np.isfinite(centre) & (centre > 0)).all():
        raise ValueError(f"table: expected finite errors with positive means in {error!r}, got means {centre}")
    count = len(errors)
    resamples = as_count("resamples", resamples, most=rows_that_fit(count + 4 * len(log_n) ** 2))
    rng = np.random.default_rng(as_count("seed", seed, least=0, most=2**128))
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    shares = np.concatenate([np.ones((1, count)), drawn]) / count
    apart = errors / centre - 1
    shift = shares @ apart
    shift[0] = 0.0
    squares = (shares @ (apart[:, :, None] * apart[:, None, :]).reshape(count, -1)).reshape(-1, *2 * (len(log_n),))
    covs = (squares - shift[:, :, None] * shift[:, None, :]) / (count - 1)
    scale = 1 + shift
    if (scale <= 0).any():
        raise ValueError(f"table: expected positive errors in {error!r}, got means that vanish in resamples")
    return _Sample(log_n, centre * scale, covs / (scale[:, :, None] * scale[:, None, :]))


def _require_column(name: str, table: pd.DataFrame, column) -> None:
    if not isinstance(column, str) or list(table).count(column) != 1:
        raise ValueError(f"{name}: expected a column {shown(column)} in the table, which has {list(table)}")


def _coefficients(sample: _Sample, degree: int, weighted: bool) -> np.ndarray:
    """Minus the coefficients of log means in the leading term of a fitted polynomial in log n, (..., lengths)."""
    x = sample.log_n - sample.log_n.mean()
    powers = x ** np.arange(degree + 1)[:, None]
    if not weighted:
        return -np.linalg.pinv(powers.T)[degree]
    spread = np.diagonal(sample.covs, axis1=1, axis2=2)
    largest = spread.max(axis=1, keepdims=True)
    # Replicates that agree at some lengths only must not get all the weight, those that agree everywhere equal weights.
    log_spread = np.log(np.where(largest > 0, np.maximum(spread, 1e-6 * largest), 1.0))
    tilt = log_spread @ x / (x @ x)
    weights = np.exp(-tilt[:, None] * x)
    normal = (powers * weights[:, None, :]) @ powers.T
    return -np.linalg.solve(normal, powers * weights[:, None, :])[:, degree]


def _studentised(sample: _Sample, lines: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, standard error and margin of linear functions (..., functions, lengths) of the log means."""
    if not 0 < as_number("level", level) < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    values = (lines @ np.log(sample.means)[:, :, None])[..., 0]
    lines = np.broadcast_to(lines, (*values.shape, lines.shape[-1]))
    variances = np.einsum("rki,rij,rkj->rk", lines, sample.covs, lines, optimize=True)
    stderrs = np.sqrt(np.maximum(variances, 0))
    gaps = np.abs(values[1:] - values[0])
    rounding = 1e-12 * np.abs(lines[0]).max(axis=-1)
    # A resample that holds one replicate only has no spread: its ratio is infinite, unless there is nothing to see.
    ratios = np.where(gaps > rounding, np.inf, 0.0)
    np.divide(gaps, stderrs[1:], out=ratios, where=stderrs[1:] > rounding)
    quantile = np.quantile(ratios, level, axis=0, method="higher")
    return values[0], stderrs[0], np.maximum(quantile * stderrs[0], rounding)
