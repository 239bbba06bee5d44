"""The mean of hardmax attention over n Gaussian tokens, exactly, at any n.

With scalar tokens and a horizon that grows without bound, a query picks the largest token if it is positive and the
smallest if it is negative (`attention.hardmax_map`). The mean of what n tokens N(0, sigma^2) report is then

* for **fresh queries**, half of the law on each side: the midrange M = (max + min) / 2;
* for **self-attention**, where the queries are the tokens, n_+ of them positive: (n_+ max + n_- min) / n.

Both tend to zero like sigma ln 4 / (2 sqrt(2 ln n)) (`rates.hardmax_mean`). Here are their laws at any n, and, for
fresh queries, the mean square in any dimension. F, f and Q = 1 - F are the distribution function, density and tail of
N(0, 1). Derivations: chapter 4.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.integrate import quad
from scipy.special import gammaln, log_ndtr, ndtr, ndtri_exp

from tokcx_lib.validation import MOST_DIM, as_array, as_count, as_number, as_positive

# Distribution functions of extremes rise over about 1/sqrt(2 ln n): panels that follow this to n = 10^300.
_PANEL = 0.025
_SUM_ALL = 2_000  # up to this n, self-attention sums over every number of positive tokens


def _level(log_p: float) -> float:
    """The z with Q(z) = e^log_p, whatever the size of log_p < 0."""
    return float(-ndtri_exp(min(log_p, -1e-300)))


def _grid(low: float, n: float) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights in panels, from `low` to where n Q = 10^-18."""
    high = _level(math.log(1e-18) - math.log(n))
    nodes, weights = np.polynomial.legendre.leggauss(8)
    start = np.arange(round(low / _PANEL), math.ceil(high / _PANEL)) * _PANEL  # zero is an edge
    return (start[:, None] + _PANEL / 2 * (nodes + 1)).reshape(-1), np.tile(_PANEL / 2 * weights, len(start))


def expected_abs_midrange(n: float, sigma: float = 1.0) -> float:
    """E|M| for the midrange M = (max + min) / 2 of n tokens N(0, sigma^2): hardmax with fresh queries, d = 1.

    E|M| = E max|y| - E max y = int_{-oo}^0 F^n dr + int_0^oo [F^n - (F - Q)^n] dr, by quadrature, to about 1e-9 (1e-12
    for integers).

    Parameters
    ----------
    n : number of tokens, any real n >= 1 (n = 1 gives E|y|; n = 10^300 works).
    sigma : standard deviation of the tokens, > 0; the result has its units.

    Raises
    ------
    ValueError
        If n is not a finite number >= 1 or sigma is not positive and finite.

    Source: the identity |max + min| / 2 = max|y| - (max - min) / 2, chapter 4.
    """
    n, sigma = as_number("n", n, least=1), as_positive("sigma", sigma)

    r, dr = _grid(-40.0 if n < 1e4 else 0.0, n)
    # (F - Q)^n = F^n (1 - Q/F)^n for r > 0, so that the difference loses no digits where both are close to 1.
    ratio = np.minimum(np.exp(log_ndtr(-np.abs(r)) - log_ndtr(np.abs(r))), 1 - 1e-16)
    rest = np.where(r > 0, -np.expm1(n * np.log1p(-ratio)), 1.0)
    return sigma * float((np.exp(n * log_ndtr(r)) * rest) @ dr)


def midrange_cdf(n: float, m, sigma: float = 1.0) -> np.ndarray:
    """P(M <= m) for the midrange of n tokens N(0, sigma^2): n int_{-oo}^m [F(2m - x) - F(x)]^(n-1) f(x) dx.

    Parameters
    ----------
    n : number of tokens, any real n >= 1; m : numbers of any shape, in the units of sigma.

    Returns
    -------
    Array of the shape of m, to about 1e-9

    Raises
    ------
    ValueError
        If n is not a finite number >= 1, sigma is not positive and finite, or m holds NaN.

    Source: classical; the minimum is at x, and all other tokens lie between x and 2m - x.
    """
    n, sigma = as_number("n", n, least=1), as_positive("sigma", sigma)
    m = as_array("m", m, finite=False) / sigma
    lower = np.array([_midrange_tail(n, value) for value in np.abs(m).reshape(-1)]).reshape(m.shape)
    return np.where(m > 0, 1 - lower, lower)


def _midrange_tail(n: float, m: float) -> float:
    """P(M <= -m) for m >= 0, in the variable t = log(n F(x)): n f(x) dx = e^t dt."""
    if n == 1:
        return float(ndtr(-m))

    def integrand(t):
        x = float(ndtri_exp(min(t - math.log(n), -1e-300)))
        outside = ndtr(2 * m + x) + math.exp(t - math.log(n))  # above -2m - x, or below x
        return math.exp(t + (n - 1) * math.log1p(-outside)) if outside < 1 else 0.0

    top = math.log(n) + float(log_ndtr(-m))
    cuts = [min(top, 0.0) - 45, *(t for t in (-8.0, -2.0, 0.0, 1.0, 2.0, 3.0, 4.0) if t < top), min(top, 8.0)]
    return math.fsum(quad(integrand, a, b, epsabs=1e-15, epsrel=1e-11, limit=200)[0] for a, b in zip(cuts, cuts[1:]))


def expected_abs_hardmax(n: int, sigma: float = 1.0) -> float:
    """E|(n_+ max + n_- min) / n| for n tokens N(0, sigma^2): the mean of self-attention under hardmax, d = 1.

    Given k positive tokens, n_+ max and -n_- min are independent: k and n - k times the largest of as many |y|. The
    mean absolute difference of independent variables is an integral over their distribution functions, and k is
    binomial. Beyond n = 2,000 the sum over k is a Gaussian quadrature; the result is good to about 1e-7.

    Parameters and errors as for `expected_abs_midrange`, with n an integer.

    Source: chapter 4.
    """
    n, sigma = float(as_count("n", n, most=10**300)), as_positive("sigma", sigma)
    if n <= _SUM_ALL:
        k = np.arange(n + 1)
        weight = np.exp(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1) - n * math.log(2))
    else:
        z, weight = np.polynomial.hermite_e.hermegauss(80)
        k, weight = n / 2 + z * math.sqrt(n) / 2, weight / math.sqrt(2 * math.pi)
    r, dr = _grid(0.0, n)

    def below(count):  # P(count / n times the largest of `count` |y| <= r), shape (k, r)
        with np.errstate(divide="ignore"):
            y = r / (count[:, None] / n)
        return np.exp(count[:, None] * np.log1p(-2 * ndtr(-y)))

    plus, minus = below(k), below(n - k)
    return sigma * float(weight @ ((plus + minus - 2 * plus * minus) @ dr))


def expected_square_hardmax(n: float, dim: int) -> float:
    """E|mean of hardmax attention|^2 over n tokens N(0, I) in R^dim, A = V = I, fresh queries of uniform direction.

    It is dim times the probability that one token is furthest in two directions, whose angle theta has the density
    proportional to sin^dim theta. In one dimension it is E M^2 for the midrange M.

    Parameters
    ----------
    n : number of tokens, any real n >= 1 (10^100 works); dim : dimension, at least 1.

    Returns
    -------
    float, to about 1e-4 of its value for dimensions up to 20

    Raises
    ------
    ValueError
        If n is not a finite number >= 1 or dim not an integer >= 1.

    Source: chapter 4.
    """
    n, dim = as_number("n", n, least=1), as_count("dim", dim, most=MOST_DIM)
    theta, weight, same = _same_token(n)
    log_constant = gammaln(dim / 2 + 1) - gammaln((dim + 1) / 2) - math.log(math.pi) / 2
    return dim * float((weight * np.exp(dim * np.log(np.sin(theta)) + log_constant)) @ same)


def _panels(cuts) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of 12-point Gauss-Legendre quadrature between successive cuts."""
    nodes, weights = np.polynomial.legendre.leggauss(12)
    half = np.diff(cuts)[:, None] / 2
    return (np.asarray(cuts)[:-1, None] + half * (nodes + 1)).reshape(-1), (half * weights).reshape(-1)


@lru_cache(maxsize=256)
def _same_token(n: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Angles, their quadrature weights, and P(one of n tokens is furthest in two directions at that angle).

    That is n E(1 - m)^(n - 1) over a token with coordinates a, b along the directions, m = P(Y > b or X > a) for
    another. Given a, b = a cos + t sin with t standard normal; m = Q(a) + P(Y > b, X <= a) has no cancellation.
    """
    log_n = math.log(n)
    level = math.sqrt(2 * max(log_n, 1.0))
    angles = [0.0, *(x / level for x in (0.5, 1.5, 3, 6, 12, 24) if x / level < math.pi), math.pi]
    theta, theta_weight = _panels(angles)
    log_count, weight = _panels([cut for cut in (-25.0, -8.0, -3.0, 0.0) if cut < log_n] + [min(log_n, 4.5)])
    a, a_weight = -ndtri_exp(log_count - log_n), weight * np.exp(log_count)  # n f(a) da
    t, t_weight = _panels([-9.0, -4.0, -1.5, 0.0, 1.5, 4.0, 9.0])
    t_weight = t_weight * np.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)
    share, share_weight = _panels([0.0, 0.02, 0.2, 0.6, 1.0])
    same = np.empty_like(theta)
    for i, (cos, sin) in enumerate(zip(np.cos(theta), np.sin(theta))):
        b = cos * a[:, None] + sin * t
        log_above = log_ndtr(-b)
        matters = log_above + log_n < math.log(100)  # elsewhere (1 - m)^(n - 1) is nothing
        if n < 1000:
            matters[:] = True
        x = np.broadcast_to(a[:, None], b.shape)[matters]
        y = -ndtri_exp(log_above[matters][:, None] + np.log(share))  # quantiles of Y given Y > b
        beside = np.exp(log_above[matters]) * (ndtr((x[:, None] - cos * y) / sin) @ share_weight)
        outside = np.minimum(ndtr(-x) + beside, 1 - 1e-16)
        power = np.zeros_like(b)
        power[matters] = np.exp((n - 1) * np.log1p(-outside))
        same[i] = a_weight @ power @ t_weight
    return theta, theta_weight, same
