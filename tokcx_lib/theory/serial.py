"""Tokens that depend on their neighbours: the long-run variance of the mean of self-attention, in one dimension.

The tokens are a stationary Gaussian sequence with correlation r^k at distance k (`laws.SerialGaussian`), whitened; the
logit of query x and key y is H x y. Derivations: chapter 13.
"""

from __future__ import annotations

import math

import numpy as np

from tokcx_lib.validation import as_array, as_flag, as_number

_TERM = 1e-17  # relative size of a term that may be left out


def _horizon(value) -> float:
    H = as_number("horizon", value)
    if not -1 < H < 1:
        raise ValueError(f"horizon: expected a number between -1 and 1, beyond which pulls have no variance, got {H}")
    return H


def pull_covariance(horizon: float, correlation) -> np.ndarray:
    """Covariance of the pulls g(x), g(y) of two keys with this correlation: r (1 - Psi^2 r^2)^{-3/2}, Psi = H^2 < 1.

    Parameters
    ----------
    horizon : H, strictly between -1 and 1; correlation : from -1 to 1, any shape.

    Raises ValueError if a number is out of its range.

    Source: chapter 13, from Mehler's formula.
    """
    psi = _horizon(horizon) ** 2
    r = as_array("correlation", correlation, -1, 1)
    return r * (1 - (psi * r) ** 2) ** -1.5


def long_run_variance(horizon: float, correlation: float, causal: bool = False) -> float:
    """Limit of n Var(m_n), m_n the mean of self-attention over a serial sequence with V = 1.

    sum_k Cov(psi(z_0), psi(z_k)) = (Psi + 2H) (1 + r)/(1 - r) + sum_m (3/2)_m/m! Psi^{2m} (1 + r^{2m+1})/(1 -
    r^{2m+1}); under the causal mask the sum, which is the pull of the keys, counts twice.

    Parameters
    ----------
    horizon : H, strictly between -1 and 1, the sign of A kept; correlation : r of neighbours, likewise.

    Raises ValueError if a number is out of its range.

    Source: chapter 13.
    """
    H, r = _horizon(horizon), as_number("correlation", correlation)
    if not -1 < r < 1:
        raise ValueError(f"correlation: expected a number strictly between -1 and 1, got {r}")
    times = 2 if as_flag("causal", causal) else 1
    found, factor, m = (H**2 + 2 * H) * (1 + r) / (1 - r), 1.0, 0
    total = 0.0
    while factor > _TERM * (1 - H**4):
        power = r ** (2 * m + 1)
        total += factor * (1 + power) / (1 - power)
        m += 1
        factor *= (m + 0.5) / m * H**4
    return found + times * total if math.isfinite(total) else math.inf
