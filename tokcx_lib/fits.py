"""Exponents from error curves, with intervals that know that the prefixes of one replicate share tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from tokcx_lib.validation import as_count


class Slope(NamedTuple):
    """Exponent beta of error = const n^-beta, with the ends of its interval."""

    exponent: float
    low: float
    high: float


def fit_slope(table: pd.DataFrame, error: str, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> Slope:
    """Least-squares exponent of the mean error on logarithmic axes, with a bootstrap interval over replicates.

    A replicate's errors at different n are prefixes of the same draw, hence dependent: replicates are resampled
    whole, which keeps that dependence, where the usual standard error of a regression would ignore it.

    Parameters
    ----------
    table : one row per replicate and n, with columns replicate, n and `error` (positive).

    Raises
    ------
    ValueError
        If there are fewer than two lengths or two replicates, or a replicate lacks a length.
    """
    log_n, means = _resampled_means(table, error, resamples, seed)
    exponents = -np.polyfit(log_n, np.log(means).T, 1)[0]
    low, high = np.quantile(exponents[1:], [(1 - level) / 2, (1 + level) / 2])
    return Slope(exponents[0].item(), low.item(), high.item())


def local_slopes(
    table: pd.DataFrame, error: str, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Exponent of the mean error between each n and the next, with bootstrap intervals: one slope mixes regimes.

    Parameters and errors as for `fit_slope`.

    Returns
    -------
    DataFrame
        n_low and n_high (the two lengths), n (their geometric mean), exponent, low and high (its interval).
    """
    log_n, means = _resampled_means(table, error, resamples, seed)
    exponents = -np.diff(np.log(means), axis=1) / np.diff(log_n)
    low, high = np.quantile(exponents[1:], [(1 - level) / 2, (1 + level) / 2], axis=0)
    lengths = np.sort(table["n"].unique())
    return pd.DataFrame(
        {
            "n_low": lengths[:-1],
            "n_high": lengths[1:],
            "n": np.sqrt(lengths[:-1] * lengths[1:].astype(float)),
            "exponent": exponents[0],
            "low": low,
            "high": high,
        }
    )


def _resampled_means(table: pd.DataFrame, error: str, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """log n (lengths,), and mean errors (1 + resamples, lengths): of all replicates, then of resampled ones."""
    grid = table.pivot(index="replicate", columns="n", values=error)
    if grid.shape[0] < 2 or grid.shape[1] < 2 or grid.isna().any(axis=None):
        raise ValueError(f"table: expected two or more replicates of two or more n, all present, got {grid.shape}")
    errors, log_n = grid.to_numpy(), np.log(grid.columns.to_numpy(dtype=float))
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(errors), size=(as_count("resamples", resamples), len(errors)))
    return log_n, np.concatenate([errors.mean(0)[None], errors[drawn].mean(1)])
