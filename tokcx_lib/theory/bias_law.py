"""How fast the bias of the second moment of attention falls: floors, ceilings and exact integrals in one dimension.

With P(n, s) the expected participation E sum_j w_j^2 of a query of load s over n standard normal tokens, the bias of
the second moment along the query lies between -(7 s^2 - 1) P and -(s^2 - 1) P. Averaged over queries it is n^{-b} up to
powers of log n, b = min(1, (sqrt(1 + 4/Psi) - 1)/2) (`rates.exponent(psi, "bias")`). Derivations: chapter 10.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.special import log_ndtr, logsumexp

from tokcx_lib.theory.softmax_law import MOST_TILT, MOST_TOKENS, map_error, self_moments, softmax_moments
from tokcx_lib.validation import as_array, as_broadcast, as_number, as_positive

_KNOTS = 72  # loads at which the exact law is computed
_NODES = 6000  # of the trapezoidal rule over loads
_FURTHEST = 1.6  # in units of sqrt(2 log n): no query further out counts,
_RARE = 9.0  # nor one so many standard deviations out


class BiasExponents(NamedTuple):
    """Local exponents, from n to 10 n, of what one-dimensional fresh queries of load s = horizon |x| see on average.

    `bias`, of |E Gamma_n^2 - s^2|; `below` and `above`, of its bounds (s^2 - 1) P and (7 s^2 - 1) P; `value`, the mean
    bias itself at n, and `inside`, whether it lies between minus the two bounds.
    """

    bias: float
    below: float
    above: float
    value: float
    inside: bool


def log_participation_floor(n, s) -> np.ndarray:
    """log of a lower bound (n/18) Pr(N(0, 1) > log(n)/s + s/2) on the expected participation P(n, s), for every n.

    A token so far out weighs as much as all others are expected to: with probability 1/2 it holds a third of the
    weight or more.

    Parameters
    ----------
    n : numbers of tokens >= 2; s : loads > 0. They broadcast.

    Source: chapter 10.
    """
    n, s = as_broadcast("n, s", as_array("n", n, 2), as_array("s", s, 0))
    if not (s > 0).all():
        raise ValueError(f"s: expected positive numbers, got {s.ravel()[:8]}")
    return np.log(n / 18) + log_ndtr(-(np.log(n) / s + s / 2))


def log_participation_ceiling(n, s, p) -> np.ndarray:
    """log of an upper bound 6^p n^{1-p} e^{p(p-1)s^2/2} on the expected participation P(n, s), for every 1 <= p <= 2.

    They broadcast. Source: chapter 10.
    """
    n, s, p = as_broadcast("n, s, p", as_array("n", n, 1), as_array("s", s, 0), as_array("p", p, 1, 2))
    return p * math.log(6) + (1 - p) * np.log(n) + p * (p - 1) * s**2 / 2


def bias_exponents(n: float, horizon: float) -> BiasExponents:
    """How fast the mean bias of the second moment falls from n to 10 n tokens, by exact integrals, in one dimension.

    Parameters
    ----------
    n : number of tokens, real, from 100 to 1e249; horizon : positive. Loads beyond 300 are left out.

    Returns
    -------
    BiasExponents, right to about 1e-4

    Raises
    ------
    ValueError
        If n or the horizon is out of range.

    Source: chapter 10; the exact law of one query: chapter 9.
    """
    n, horizon = as_number("n", n, 100, MOST_TOKENS / 10), as_positive("horizon", horizon)
    top = min(max(_FURTHEST * math.sqrt(2 * math.log(10 * n)), _RARE * horizon), MOST_TILT)
    knots, s = (np.linspace(top / 500, top, count) for count in (_KNOTS, _NODES))
    density = 0.5 * math.log(2 / math.pi) - math.log(horizon) - (s / horizon) ** 2 / 2 + math.log(s[1] - s[0])
    found = []
    for size in (n, 10 * n):
        spread = softmax_moments(size, knots).participation
        shape = (map_error(size, knots) - 2 * knots**2 * spread) / spread  # (E Gamma^2 - s^2) / P: smooth in s
        base = CubicSpline(knots, np.log(spread))(s) + density
        shapes = (CubicSpline(knots, shape)(s), s**2 - 1, 7 * s**2 - 1)
        found.append([logsumexp(base, b=b, return_sign=True) for b in shapes])
    logs, signs = np.array(found)[..., 0], np.array(found)[..., 1]
    slopes = (logs[0] - logs[1]) / math.log(10)
    bias, below, above = signs[0] * np.exp(logs[0])
    return BiasExponents(*slopes.tolist(), float(bias), bool(-above <= bias <= -below))


def own_weight(n: float, horizon: float) -> float:
    """Mean weight E w_0 that a query of self-attention gives its own token among n, in one dimension, exactly.

    But for queries beyond sqrt(2 log n), of probability 1/n or less, whose weight is put at 1: to that extent an upper
    bound.

    Parameters
    ----------
    n : number of tokens, real, from 100 to 1e100; horizon : positive.

    Raises
    ------
    ValueError
        If n or the horizon is out of range.

    Source: chapter 10.
    """
    n, horizon = as_number("n", n, 100, 1e100), as_positive("horizon", horizon)
    far = min(math.sqrt(2 * math.log(n)), 0.999 * MOST_TILT / horizon)
    knots, x = (np.linspace(far / 500, far, count) for count in (40, _NODES))
    own = np.array([self_moments(n, horizon * k, k).own.item() for k in knots])
    logs = CubicSpline(knots, np.log(own))(x) - x**2 / 2 + 0.5 * math.log(2 / math.pi) + math.log(x[1] - x[0])
    return float(np.exp(np.logaddexp(logsumexp(logs), math.log(2) + log_ndtr(-far))))
