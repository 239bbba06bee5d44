"""A test that tells a stable law from a normal one by a few dozen values, whatever their scale, and its error rates."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pandas as pd
import torch

from tokcx_lib import runtime
from tokcx_lib.theory.stable_density import log_density
from tokcx_lib.validation import as_array, as_count, as_kind, as_list, as_number

INDICES = tuple(round(1.1 + 0.1 * i, 1) for i in range(9))  # 1.1 to 1.9
_LEVELS = np.geomspace(0.2, 3.0, 28)  # scales tried, in units of the median size
_PLACES = np.linspace(0, math.asinh(1e6), 801)  # arsinh of a value in units of the median size


@lru_cache(maxsize=1)
def _tables() -> np.ndarray:
    """Log-likelihood of a value at each place (places, laws), for each index and scale."""
    sizes = np.sinh(_PLACES)
    laws = [log_density(sizes / level, alpha) - math.log(level) for alpha in INDICES for level in _LEVELS]
    return np.stack(laws, 1)


def evidence(values) -> np.ndarray:
    """Log-likelihood ratio of the best symmetric stable law, alpha in `INDICES`, over the best centred normal law.

    Each law is given its best scale, so that the answer does not depend on the unit of the values.

    Parameters
    ----------
    values : (..., k) samples of k >= 5 values, not all of a sample zero.

    Returns
    -------
    Array of shape (...); large where a few values dwarf the others

    Raises
    ------
    ValueError
        If there are fewer than 5 values, one is not finite, or half of a sample is zero.

    Source: chapter 10.
    """
    values = as_array("values", values)
    if values.ndim < 1 or values.shape[-1] < 5:
        raise ValueError(f"values: expected samples of at least 5 values, got shape {values.shape}")
    unit = np.median(np.abs(values), -1, keepdims=True)
    if not (unit > 0).all():
        raise ValueError("values: expected samples with a median size that is not zero, got one of zeros")
    scaled, count = np.abs(values) / unit, values.shape[-1]
    normal = -0.5 * count * (1 + np.log(2 * math.pi * (scaled**2).mean(-1)))
    # Each value is shared between the two places next to it, as a linear interpolation would have it.
    place = np.minimum(np.arcsinh(scaled) / _PLACES[1], len(_PLACES) - 1.001)
    index = place.astype(int)
    flat, share = index.reshape(-1, count), (place - index).reshape(-1, count)
    start = len(_PLACES) * np.arange(len(flat))[:, None]
    length = len(_PLACES) * len(flat)
    heap = np.bincount((start + flat).ravel(), (1 - share).ravel(), length)
    heap += np.bincount((start + flat + 1).ravel(), share.ravel(), length)
    best = (heap.reshape(len(flat), -1) @ _tables()).max(1)
    return best.reshape(normal.shape) - normal


def threshold(count: int, error: float = 0.01, draws: int = 4000, seed: int = 0) -> float:
    """What `evidence` of `count` normal values exceeds with probability `error`, by simulation from a fixed seed."""
    count, draws = as_count("count", count, least=5, most=10_000), as_count("draws", draws, least=100, most=10**5)
    error = as_number("error", error, 0, 1)
    sample = torch.randn(draws, count, generator=runtime.stream(seed, count), dtype=torch.float64)
    return float(np.quantile(evidence(sample.numpy()), 1 - error))


def error_rates(table: pd.DataFrame, counts=(20, 50, 100, 200), error: float = 0.01) -> pd.DataFrame:
    """How often batches of replicates are called stable, by horizon and by how many replicates a batch has.

    Parameters
    ----------
    table : columns horizon and mean (the record `sharp_verdicts`); batches are of consecutive rows.
    counts : replicates in a batch; error : share of exactly normal batches that are called stable.

    Returns
    -------
    DataFrame
        horizon, replicates, batches, stable (share called stable), stderr, and wrong, the share with the wrong answer:
        `stable` below horizon 1, the rest above.
    """
    as_kind("table", table, pd.DataFrame)
    for name in ("horizon", "mean"):
        if name not in table:
            raise ValueError(f"table: expected columns horizon and mean, got {', '.join(map(str, table)) or 'none'}")
    rows = []
    for count in as_list("counts", counts, "integers"):
        count = as_count("counts", count, least=5, most=10_000)
        line = threshold(count, error)
        for horizon, part in table.groupby("horizon"):
            means = part["mean"].to_numpy()
            batches = means[: len(means) // count * count].reshape(-1, count)
            stable = float((evidence(batches) > line).mean())
            stderr = math.sqrt(stable * (1 - stable) / len(batches))
            rows.append((horizon, count, len(batches), stable, stderr, 1 - stable if horizon > 1 else stable))
    return pd.DataFrame(rows, columns=["horizon", "replicates", "batches", "stable", "stderr", "wrong"])


def ideal_rates(
    horizons=(1.2, 1.5, 2.0), counts=(20, 50, 100, 200), error: float = 0.01, draws: int = 2000
) -> pd.DataFrame:
    """How often batches of *exactly* stable values, alpha = 1 + 1/horizon^2, are called normal, from a fixed seed.

    Columns horizon, replicates, wrong. Values by the formula of Chambers, Mallows and Stuck (1976).
    """
    horizons, rows = as_array("horizons", horizons).ravel(), []
    if not ((horizons > 1.03) & (horizons < 4)).all():
        raise ValueError(f"horizons: expected numbers between 1.03 and 4, got {horizons[:8]}")
    draws = as_count("draws", draws, least=100, most=10**5)
    for count in as_list("counts", counts, "integers"):
        count = as_count("counts", count, least=5, most=10_000)
        line = threshold(count, error)
        for i, horizon in enumerate(horizons.tolist()):
            stream = runtime.stream(1, count, i)
            angle = math.pi * (torch.rand(draws, count, generator=stream, dtype=torch.float64) - 0.5)
            wait = -torch.log(torch.rand(draws, count, generator=stream, dtype=torch.float64))
            alpha = 1 + 1 / horizon**2
            values = torch.sin(alpha * angle) / torch.cos(angle) ** (1 / alpha)
            values = values * (torch.cos((1 - alpha) * angle) / wait) ** ((1 - alpha) / alpha)
            rows.append((horizon, count, float((evidence(values.numpy()) <= line).mean())))
    return pd.DataFrame(rows, columns=["horizon", "replicates", "wrong"])
