"""Exact averages of softmax over n independent tokens, at any n, by one integral.

A query sends the token j to the logit t y_j, with y_j its projection on the direction the query looks along. With
1/S = int e^{-l S} dl for the sum S of the weights e^{t y_j}, every average of softmax is an integral over l of averages
over *one* token,

    phi(l) = E e^{-l e^{ty}},   a_k(l) = E[y^k e^{ty} e^{-l e^{ty}}],   b_k(l) = E[y^k e^{2ty} e^{-l e^{ty}}],

which depend on the load t and not on n. In x = log l all are analytic in the strip |Im x| < pi/2, where the integrands
are bounded by what they are made of, divided by cos^2 Im x: the trapezoidal rule with step 1/4 is exact to 1e-14.
Derivations: chapter 9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.special import roots_gegenbauer, roots_legendre

from tokcx_lib.theory.laws import Empirical, Gaussian, Law, Rademacher, Uniform, UniformBall, UniformSphere
from tokcx_lib.validation import as_array, as_broadcast, as_number, shown

MOST_TOKENS = 1e250  # up to here no density of a token that matters underflows
STEP = 0.25  # of the trapezoidal rule in log l
MOST_TILT = 300.0  # loads of normal tokens, and tilts times the radius of bounded ones
_SPARE = 46.0  # e^-46 = 1e-20: what may be left out
_TABLES = (75.0, math.log(MOST_TOKENS))  # a table of averages serves n up to e^75 = 4e32, the other all n beyond
_PIECE = 4096  # of a correlation
_CHECK = 1e-8  # how far the sum of the weights may be from 1


class SoftmaxMoments(NamedTuple):
    """`mean` E Gamma_n, `second_moment` E Gamma_n^2 and `participation` E sum_j w_j^2, float64, of one shape."""

    mean: np.ndarray
    second_moment: np.ndarray
    participation: np.ndarray


class SelfMoments(NamedTuple):
    """Softmax with the query's own token kept apart: averages given that token, its weight being w_0.

    `mean` E Gamma_n, `second_moment` E Gamma_n^2, `own` E w_0, `own_square` E w_0^2, `own_cross` E[w_0 Gamma_n] and
    `participation` E sum_{j > 0} w_j^2 of the other tokens; float64, of one shape.
    """

    mean: np.ndarray
    second_moment: np.ndarray
    own: np.ndarray
    own_square: np.ndarray
    own_cross: np.ndarray
    participation: np.ndarray


class _Averages(NamedTuple):
    """phi, l a_k and l^2 b_k on a grid of x = log l; of a_k and b_k without the factors exp(log_a), exp(log_b)."""

    x: np.ndarray
    log_phi: np.ndarray
    a: (
        np.ndarray
    )  # (3, x): of 1, y and y - centre, the last with all its digits where l is small, and it nearly cancels
    log_a: np.ndarray
    b: np.ndarray  # (3, x): of 1, y^2 and (y - centre)^2
    log_b: np.ndarray


def softmax_moments(n, t, law: Law | None = None) -> SoftmaxMoments:
    """Mean, second moment and participation of softmax attention over n independent tokens, along one direction.

    With weights w_j = e^{t y_j} / S and Gamma_n = sum_j w_j y_j, for tokens whose projections y_j on the direction of
    the query have the given law, and a query that is none of them (fresh). For standard normal tokens t is the load.

    Parameters
    ----------
    n : number of tokens, real, from 1 to 1e250; t : tilt, up to 300, any sign, in units of 1/y. They broadcast.
    law : standard normal if None; else `Gaussian(variance)` in one dimension, `Rademacher(1)`, `Uniform(1)`,
        `Empirical` in one dimension, or `UniformSphere` or `UniformBall` in any dimension. |t| times the radius of
        the law, or its standard deviation if it is normal, is at most 300.

    Returns
    -------
    SoftmaxMoments
        Arrays of the broadcast shape. Accurate to about 1e-12 of their own size (the mean: of the size of |Gamma_n|).

    Raises
    ------
    ValueError
        If n, t or the law is not one of these.
    ArithmeticError
        If the weights do not sum to 1 within 1e-8: a check of the quadrature, made at every n and t.

    Source: chapter 9.
    """
    found = _map(n, t, law, _moments_at)
    return SoftmaxMoments(*found)


def map_error(n, t, law: Law | None = None) -> np.ndarray:
    """Mean square error E(Gamma_n - K'(t))^2 of attention at one query: variance and squared bias together.

    Parameters and errors as for `softmax_moments`; accurate to about 1e-12 of itself, however small.

    Source: chapter 9.
    """
    return _map(n, t, law, _error_at)[0]


def self_moments(n, t: float, own) -> SelfMoments:
    """The same for a query that is one of the n tokens, N(0, 1): its own projection is `own`, and n - 1 are random.

    Parameters
    ----------
    n : number of tokens, an own one included, real, from 1 to 1e250; t : one tilt, up to 300.
    own : projection of the query's own token on the direction it looks along. Broadcasts with n.

    Returns
    -------
    SelfMoments
        Arrays of the broadcast shape of n and own.

    Raises
    ------
    ValueError
        If n or t is out of range, or own is not finite.

    Source: chapter 9.
    """
    n, own = as_broadcast("n, own", _as_counts(n), as_array("t, own", own, -1e100, 1e100))
    t = as_number("t", t, -MOST_TILT, MOST_TILT)
    found = np.empty((6, *n.shape))
    for size in np.unique(n):
        here = n == size
        found[:, here] = _self_at(_averages(float(t), None, float(_table_of(size))), float(t), size, own[here])
    return SelfMoments(*found)


def _as_counts(n) -> np.ndarray:
    return as_array("n", n, 1, MOST_TOKENS)


def _as_tilts(t) -> np.ndarray:
    return as_array("t", t, -MOST_TILT, MOST_TILT)


def _table_of(n: np.ndarray) -> np.ndarray:
    """Which of the two tables serves each n."""
    return np.where(np.log(n) <= _TABLES[0], *_TABLES)


def _map(n, t, law, at: Callable) -> list[np.ndarray]:
    """`at(averages, n)` for every pair: the averages are computed once for each tilt."""
    n, t = as_broadcast("n, t", _as_counts(n), _as_tilts(t))
    results: list[np.ndarray] = []
    for tilt, log_n in np.unique(np.stack([t.ravel(), _table_of(n).ravel()], 1), axis=0):
        here = (t == tilt) & (_table_of(n) == log_n)
        parts = at(_averages(float(tilt), law, float(log_n)), n[here])
        results = results or [np.empty(n.shape) for _ in parts]
        for result, part in zip(results, parts):
            result[here] = part
    return results


def _moments_at(table: _Averages, n: np.ndarray) -> list[np.ndarray]:
    one, two = _powers(table, n)
    return [one @ table.a[1], two @ table.b[1] + _pairs(table, n, 1), two @ table.b[0]]


def _error_at(table: _Averages, n: np.ndarray) -> list[np.ndarray]:
    _, two = _powers(table, n)
    return [two @ table.b[2] + _pairs(table, n, 2)]


def _powers(table: _Averages, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """n phi^(n-1) dx with the factors of a and of b, shape (n, x); sum_j w_j = 1 is enforced."""
    base = np.log(n * STEP)[:, None] + (n - 1)[:, None] * table.log_phi
    one, two = np.exp(base + table.log_a), np.exp(base + table.log_b)
    off = np.abs(one @ table.a[0] - 1).max()
    if not off < _CHECK:
        raise ArithmeticError(f"softmax weights sum to 1 only within {off:.1g}: the quadrature has failed")
    return one, two


def _pairs(table: _Averages, n: np.ndarray, which: int) -> np.ndarray:
    """n (n - 1) int l a_k^2 phi^(n-2) dl."""
    with np.errstate(divide="ignore"):
        base = np.log(n * STEP) + np.log(n - 1)
    power = np.exp(base[:, None] + (n - 2)[:, None] * table.log_phi + 2 * table.log_a)
    return power @ table.a[which] ** 2


def _self_at(table: _Averages, t: float, n: float, own: np.ndarray) -> np.ndarray:
    """The fields of `SelfMoments` for one n and own projections (k,): shape (6, k)."""
    u = table.x + t * own[:, None]
    e = np.exp(np.minimum(u, 700.0))
    own_0, own_1, own_2 = np.exp(-e), np.exp(u - e), np.exp(2 * u - e)  # (l e^q)^k e^{-l e^q}, q its logit on itself
    alone = np.exp((n - 1) * table.log_phi)
    a = (n - 1) * np.exp((n - 2) * table.log_phi + table.log_a) * table.a[1]
    b = (n - 1) * np.exp((n - 2) * table.log_phi + table.log_b)
    pairs = (n - 1) * (n - 2) * np.exp((n - 3) * table.log_phi + 2 * table.log_a) * table.a[1] ** 2
    return STEP * np.stack(
        [
            own * (own_1 @ alone) + own_0 @ a,
            own**2 * (own_2 @ alone) + 2 * own * (own_1 @ a) + own_0 @ (b * table.b[1] + pairs),
            own_1 @ alone,
            own_2 @ alone,
            own * (own_2 @ alone) + own_1 @ a,
            own_0 @ (b * table.b[0]),
        ]
    )


def _averages(t: float, law: Law | None, log_n: float) -> _Averages:
    """Averages over one token on a grid of log l that serves every n of a table."""
    if law is None or isinstance(law, Gaussian):
        scale = 1.0
        if law is not None:
            if law.dim != 1 or law.mean.item() != 0 or law.cov.item() == 0:
                raise ValueError(
                    f"law: expected a centred Gaussian in one dimension, got dim {law.dim}, mean {law.mean}"
                )
            scale = math.sqrt(law.cov.item())
        _require_tilt(abs(t) * scale)
        table = _gaussian_averages(abs(t) * scale, log_n)
        sign = (math.copysign(scale, t), scale**2)  # y -> -y where t < 0
        flip = lambda part, unit: np.stack([part[0], unit * part[1], unit * part[2]])  # noqa: E731
        return table._replace(a=flip(table.a, sign[0]), b=flip(table.b, sign[1]))
    if isinstance(law, (UniformSphere, UniformBall)):
        power = law.dim / 2 - (1 if isinstance(law, UniformSphere) else 0)
        unit, weights = _gegenbauer(_node_count(t * law.radius), power)
        return _bounded_averages(t, law.radius * unit, weights, log_n)
    scalar = isinstance(law, (Rademacher, Uniform, Empirical))
    if not scalar or law.dim != 1:
        raise ValueError(
            "law: expected Gaussian, Rademacher, Uniform or Empirical in one dimension, UniformSphere or UniformBall, "
            f"got {shown(law)}" + (f" in {law.dim} dimensions" if scalar else "")
        )
    if isinstance(law, Rademacher):
        return _bounded_averages(t, np.array([-1.0, 1.0]), np.array([0.5, 0.5]), log_n)
    if isinstance(law, Uniform):
        unit, weights = roots_legendre(_node_count(t))
        return _bounded_averages(t, unit, weights / 2, log_n)
    return _bounded_averages(t, law.tokens[:, 0].double().cpu().numpy(), law.weights.double().cpu().numpy(), log_n)


@lru_cache(maxsize=512)
def _gaussian_averages(t: float, log_n: float) -> _Averages:
    """For y ~ N(0, 1) and t >= 0, by the trapezoidal rule in y.

    Beyond t = 1/2 the nodes are the points y with t y on the same grid as x: then x + t y is on it too, functions of
    it are evaluated once, and every average is a correlation of two sequences.
    """
    z = math.sqrt(2 * (log_n + _SPARE))  # no token beyond z
    lowest = -t * z if t > z else -(t**2 + z**2) / 2
    highest = 9.5 * t + 4.5 if log_n <= _TABLES[0] else 4.5  # with 10^32 tokens l S is never small beyond that
    first, last = math.floor(lowest / STEP), math.ceil(highest / STEP)
    x = STEP * np.arange(first, last + 1)
    lattice = t >= 0.5
    step = STEP / t if lattice else 0.5
    high = max(10.0, min(2 * t + 10, (5 - lowest) / t)) if lattice else 11.0
    j = np.arange(-math.ceil(10 / step), math.ceil(high / step) + 1)
    y = step * j
    if lattice:
        u = STEP * np.arange(first + j[0], last + j[-1] + 1)
        average = _correlate
    else:
        u = x[:, None] + t * y
        average = np.matmul

    def density(tilt):
        return step / math.sqrt(2 * math.pi) * np.exp(-((y - tilt) ** 2) / 2)

    e = np.exp(np.minimum(u, 700.0))
    normal = density(0.0)
    phi, rest = average(np.exp(-e), normal), average(-np.expm1(-e), normal)
    parts, logs = [], []
    for k, powers in ((1, (y, y - t)), (2, (y**2, (y - t) ** 2))):
        # The factor e^{k t y} goes into the Gaussian, as far as y < z: nothing under- or overflows.
        tilt = min(k * t, z)
        share = tilt / t if t else k
        kernel = density(tilt)
        weight = np.exp((k - share) * u - e)
        parts.append(np.stack([average(weight, kernel), *(average(weight, kernel * p) for p in powers)]))
        logs.append(share * x + tilt**2 / 2)
    # By parts, a_1 - t a_0 = -t l b_0, which does not cancel.
    parts[0][2] = -t * parts[1][0] * np.exp(logs[1] - logs[0])
    return _Averages(x, _log_phi(phi, rest), parts[0], logs[0], parts[1], logs[1])


def _correlate(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """`np.correlate` in pieces: it spreads longer products over threads, and takes a hundred times as long."""
    count = len(values) - len(kernel) + 1
    starts = range(0, len(kernel), _PIECE)
    return sum(np.correlate(values[i : i + _PIECE + count - 1], kernel[i : i + _PIECE]) for i in starts)


def _log_phi(phi: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """log phi from phi and 1 - phi, each with all its digits."""
    return np.where(rest < 0.5, np.log1p(-np.minimum(rest, 0.5)), np.log(np.maximum(phi, 1e-300)))


def _bounded_averages(t: float, y: np.ndarray, weights: np.ndarray, log_n: float) -> _Averages:
    """For a law on finitely many points: its atoms, or the nodes of a quadrature."""
    extent = abs(t) * np.abs(y).max()
    _require_tilt(extent)
    x = STEP * np.arange(math.floor(-(extent + log_n + _SPARE) / STEP), math.ceil((extent + 4.5) / STEP) + 1)
    u = x[:, None] + t * y
    e = np.exp(np.minimum(u, 700.0))
    phi, rest = np.exp(-e) @ weights, -np.expm1(-e) @ weights
    tilted = weights * np.exp(t * y - (t * y).max())
    centre = y @ tilted / tilted.sum()
    top = np.minimum(u.max(1), 0.0)  # its factor is kept apart: e^{2u} would underflow
    parts = []
    for k, columns in ((1, (y**0, y, y - centre)), (2, (y**0, y**2, (y - centre) ** 2))):
        parts.append((np.exp(k * (u - top[:, None]) - e) @ (weights * np.stack(columns)).T).T)
    # Where l e^{ty} is small for all y, the mean of (y - centre) e^{ty}, which is zero, is subtracted.
    small = u.max(1) < 0
    parts[0][2, small] = (np.exp(u - top[:, None]) * np.expm1(-e))[small] @ (weights * (y - centre))
    return _Averages(x, _log_phi(phi, rest), parts[0], top, parts[1], 2 * top)


def _require_tilt(extent: float) -> None:
    if not extent <= MOST_TILT:
        raise ValueError(f"t: expected |t| times the size of the law up to {MOST_TILT:g}, got {extent:.4g}")


def _node_count(extent: float) -> int:
    _require_tilt(abs(extent))
    return 64 * math.ceil(1 + abs(extent) / 5)  # e^{-l e^{ty}} is tame within pi/2|t| of the real axis


@lru_cache(maxsize=64)
def _gegenbauer(count: int, power: float) -> tuple[np.ndarray, np.ndarray]:
    """Gauss nodes and weights, summing to 1, for the density (1 - y^2)^(power - 1/2): a shadow of a sphere."""
    nodes, weights = roots_legendre(count) if power == 0.5 else roots_gegenbauer(count, power)
    return nodes, weights / weights.sum()
