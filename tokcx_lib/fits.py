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
    grid = table.pivot(index="replicate", columns="n", values=error)
    if grid.shape[0] < 2 or grid.shape[1] < 2 or grid.isna().any(axis=None):
        raise ValueError(f"table: expected two or more replicates of two or more n, all present, got {grid.shape}")
    errors, log_n = grid.to_numpy(), np.log(grid.columns.to_numpy(dtype=float))
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(errors), size=(as_count("resamples", resamples), len(errors)))
    means = np.concatenate([errors.mean(0)[None], errors[drawn].mean(1)])
    exponents = -np.polyfit(log_n, np.log(means).T, 1)[0]
    low, high = np.quantile(exponents[1:], [(1 - level) / 2, (1 + level) / 2])
    return Slope(exponents[0].item(), low.item(), high.item())
