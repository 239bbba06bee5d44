"""Symmetric stable laws: density, quantiles and scale, by one Fourier integral, and far out by a series.

The law with characteristic function e^{-|t|^alpha}, 1 < alpha < 2. Pr(|X| > x) ~ tail_constant(alpha) x^-alpha.
Classical (Zolotarev; Samorodnitsky and Taqqu); chapter 10 sets the mean of self-attention against it.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq

from tokcx_lib.validation import as_array, as_number

_EDGE = 30.0  # from here on by the series
_STEP = 0.004  # of the Fourier integral; the sum over it repeats with the period 2 pi / step
_TERMS = 6


def _as_index(alpha: float) -> float:
    alpha = as_number("alpha", alpha, 1, 2)
    if not 1.05 <= alpha <= 1.95:
        raise ValueError(f"alpha: expected a number from 1.05 to 1.95, got {alpha}")
    return alpha


def tail_constant(alpha: float) -> float:
    """C with Pr(|X| > x) ~ C x^-alpha: (2/pi) Gamma(alpha) sin(pi alpha/2), for 1.05 <= alpha <= 1.95."""
    alpha = _as_index(alpha)
    return 2 / math.pi * math.gamma(alpha) * math.sin(math.pi * alpha / 2)


def log_density(x, alpha: float) -> np.ndarray:
    """log of the density at x, numbers of any shape, to about 1e-5 (relative to the density).

    Raises ValueError if alpha is not from 1.05 to 1.95.
    """
    x = np.abs(as_array("x", x))
    inner = _spline(_as_index(alpha))(np.arcsinh(np.minimum(x, _EDGE)))
    return np.where(x <= _EDGE, inner, np.log(_series(np.maximum(x, _EDGE), alpha)))


def _series(x: np.ndarray, alpha: float) -> np.ndarray:
    k = np.arange(1, _TERMS + 1)
    factors = [(-1) ** (i + 1) * math.gamma(alpha * i + 1) / math.factorial(i) for i in k]
    powers = np.asarray(x)[..., None] ** (-alpha * k - 1)
    return powers @ (np.array(factors) * np.sin(np.pi * alpha * k / 2)) / math.pi


@lru_cache(maxsize=64)
def _spline(alpha: float) -> CubicSpline:
    grid = np.linspace(0, math.asinh(_EDGE), 160)
    x = np.sinh(grid)
    t = _STEP * np.arange(1, math.ceil(40 ** (1 / alpha) / _STEP))
    value = _STEP / math.pi * (0.5 + np.cos(x[:, None] * t) @ np.exp(-(t**alpha)))
    period = 2 * math.pi / _STEP
    for k in range(1, 200):  # the sum is that of the density over all periods
        value -= _series(k * period - x, alpha) + _series(k * period + x, alpha)
    return CubicSpline(grid, np.log(value))


def quartile(alpha: float) -> float:
    """The x > 0 with Pr(|X| > x) = 1/2: the median size."""
    spline = _spline(_as_index(alpha))
    mass = CubicSpline(spline.x, np.exp(spline(spline.x)) * np.cosh(spline.x)).antiderivative()
    return math.sinh(brentq(lambda u: 2 * (mass(u) - mass(0)) - 0.5, 0, spline.x[-1]))
