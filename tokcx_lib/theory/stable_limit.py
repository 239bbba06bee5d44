"""The tail of the influence of a token, and the stable law that the mean of self-attention tends to, Psi > 1.

Whitened tokens z ~ N(0, I_d), B = Sigma^{1/2} A Sigma^{1/2}, W = V Sigma^{1/2}, Q = BB'(I + BB')^{-1} and the
influence psi(z) = Bz + D e^{z'Qz/2} (I - Q)z, D = det(I + BB')^{-1/2}. Let q = Psi/(1 + Psi) be the largest eigenvalue
of Q, of multiplicity m, and P the projection on its eigenspace. Far out

    Pr(|W psi| > r) ~ factor Pr(Y > r),   Y = scale rho^k e^{q rho^2/2},   rho^2 chi-squared with m degrees of freedom,

with k = 1 if WP is not zero (the head reports something of where it looks) and k = 0 else, and n times the mean of n
independent W psi, over a_n, tends to a symmetric stable law of index alpha = 1/q. Derivations: chapter 10.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy import special, stats

from tokcx_lib.validation import as_array, as_flag, as_matrix, as_number, as_square

_SAME = 1e-9  # eigenvalues of Q, relative to the largest, that count as one
_STEP = 0.05  # of the trapezoidal rule in log x
_FINE = 0.01  # of the one over a coordinate of a token
_HALVINGS = 60
_SLICES = 24


class StableLimit(NamedTuple):
    """Tail of |W psi|: index `alpha`, multiplicity `m`, `seen` (k = 1), and the numbers `scale` and `factor`."""

    alpha: float
    multiplicity: int
    seen: bool
    scale: float
    factor: float

    def log_leading(self, r) -> np.ndarray:
        """log Pr(Y > r) of the leading factor Y alone, for numbers r > 0 of any shape; the tail is `factor` times that.

        Raises ValueError if an r is not positive.
        """
        log_r = np.log(_as_levels(r)) - math.log(self.scale)
        # log Y = k log rho + rho^2 / (2 alpha), increasing in rho.
        low, high = np.zeros_like(log_r), np.sqrt(2 * self.alpha * np.maximum(log_r, 0)) + 2.0
        for _ in range(_HALVINGS):
            rho = (low + high) / 2
            with np.errstate(divide="ignore"):
                under = self.seen * np.log(rho) + rho**2 / (2 * self.alpha) < log_r
            low, high = np.where(under, rho, low), np.where(under, high, rho)
        return _log_chi(low, self.multiplicity)


def _as_levels(r) -> np.ndarray:
    r = as_array("r", r)
    if not (r > 0).all():
        raise ValueError(f"r: expected positive numbers, got {r if r.ndim == 0 else r.ravel()[:8]}")
    return r


def _log_chi(rho: np.ndarray, m: int) -> np.ndarray:
    """log Pr(chi_m > rho): exact for m = 1, 2; else by `scipy`, and by the leading term of the tail far out."""
    if m == 1:
        return math.log(2) + special.log_ndtr(-rho)
    if m == 2:
        return -(rho**2) / 2
    with np.errstate(divide="ignore"):
        found = np.log(special.gammaincc(m / 2, rho**2 / 2))
        far = (m - 2) * np.log(rho) - rho**2 / 2 + (1 - m / 2) * math.log(2) - special.gammaln(m / 2)
    return np.where(rho > 30 + m, far, found)


def stable_limit(B, W=None) -> StableLimit:
    """Index and constants of the tail of |W psi|, and with it of the stable law of the mean of self-attention.

    Parameters
    ----------
    B : (d, d), Sigma^{1/2} A Sigma^{1/2}, with ||B||_2 > 1; W : (d_v, d), V Sigma^{1/2}, not zero; None: the identity.

    Raises
    ------
    ValueError
        If shapes do not match, the coupling ||B||_2^2 is not above 1 (then the limit is normal), or W is zero.

    Source: chapter 10.
    """
    B = as_square("B", B).detach().double()
    dim = len(B)
    W = torch.eye(dim, dtype=B.dtype) if W is None else as_matrix("W", W, columns=dim).detach().double()
    values, vectors = torch.linalg.eigh(B @ B.mT)
    psi = values[-1].item()
    if not psi > 1:
        raise ValueError(f"B: expected a coupling ||B||_2^2 above 1, got {psi:.4g}")
    if not W.any():
        raise ValueError("W: expected a matrix that is not zero, got zeros")
    q, top = (values / (1 + values)).numpy(), psi / (1 + psi)
    alpha, first = 1 + 1 / psi, q > top * (1 - _SAME)
    rest = q[~first]
    widened = float(np.prod(1 - alpha * rest) ** -0.5)  # E e^{alpha z'Q'z/2} over the other directions
    images = (W @ vectors).numpy()
    m, log_det = int(first.sum()), torch.log1p(values).sum().item()
    seen = bool(np.linalg.norm(images[:, first]) > _SAME * np.linalg.norm(images))
    scale = math.exp(-log_det / 2)
    if seen:
        # E |W theta|^alpha over the sphere of the eigenspace, from a normal vector g = |g| theta.
        size = 2 ** (alpha / 2) * math.exp(special.gammaln((m + alpha) / 2) - special.gammaln(m / 2))
        shares = np.linalg.svd(images[:, first], compute_uv=False) ** 2
        return StableLimit(alpha, m, True, scale * (1 - top), normal_moment(shares, alpha) / size * widened)
    shares = np.linalg.svd(images[:, ~first] * (1 - rest) * (1 - alpha * rest) ** -0.5, compute_uv=False) ** 2
    return StableLimit(alpha, m, False, scale, normal_moment(shares, alpha) * widened)


def normal_moment(variances, power: float) -> float:
    """E (sum_i v_i g_i^2)^{power/2} for independent standard normal g_i, variances v_i >= 0, 0 < power < 2.

    With p = power/2 it is p/Gamma(1 - p) int_0^inf (1 - prod_i (1 + 2 x v_i)^{-1/2}) x^{-p-1} dx, one integral.

    Raises
    ------
    ValueError
        If a variance is negative or not finite, or the power is not between 0 and 2.

    Source: classical; chapter 10.
    """
    variances = as_array("variances", variances, 0).ravel()
    p = as_number("power", power, 0, 2) / 2
    if not 0 < p < 1:
        raise ValueError(f"power: expected a number between 0 and 2, got {power}")
    total = variances.sum()
    if total == 0:
        return 0.0
    u = _STEP * np.arange(-40 / (_STEP * (1 - p)), 40 / (_STEP * p))  # log of x times the sum of the variances
    log_mean = -0.5 * np.log1p(2 * np.exp(u)[:, None] * variances / total).sum(1)
    integral = _STEP * np.sum(-np.expm1(log_mean) * np.exp(-p * u))
    return float(p / math.gamma(1 - p) * integral * total**p)


def log_tail(r, horizons, values=(1.0, 1.0), along: bool = False) -> np.ndarray:
    """log Pr(|W psi| > r) for two-dimensional tokens, B and W diagonal, by one integral; r of any shape.

    Parameters
    ----------
    r : numbers > 0; horizons : two numbers, the first positive and not the smaller: the diagonal of B.
    values : two numbers >= 0, not both zero, the diagonal of W.
    along : count those only whose W psi is closer to the first axis than to the second.

    Notes
    -----
    For a token (y, x) the size of W psi grows with |y| for a fixed x: each x asks for one y, by bisection.

    Raises
    ------
    ValueError
        If r, the horizons or the values are none of these.

    Source: chapter 10.
    """
    r, h, w = _as_levels(r), as_array("horizons", horizons, 0), as_array("values", values, 0)
    along = as_flag("along", along)
    if h.shape != (2,) or not h[0] >= h[1] or not h[0] > 0:
        raise ValueError(f"horizons: expected two numbers, the first the larger and positive, got {horizons}")
    if w.shape != (2,) or not w.any():
        raise ValueError(f"values: expected two numbers that are not both zero, got {values}")
    q, log_scale = h**2 / (1 + h**2), -0.5 * np.log1p(h**2).sum()
    reach = math.sqrt(2 * (max(math.log(r.max()), 0) + 60) / q[0]) + 5
    x = np.arange(0, reach, _FINE)
    target = np.log(r)[..., None]
    low, high = np.zeros(target.shape[:-1] + x.shape), np.full(target.shape[:-1] + x.shape, 2 * reach)

    def parts(y, x):
        lift = np.exp(np.minimum(log_scale + (q[0] * y**2 + q[1] * x**2) / 2, 690.0))
        return w[0] * (h[0] + lift * (1 - q[0])) * y, w[1] * (h[1] + lift * (1 - q[1])) * x

    for _ in range(_HALVINGS):
        y = (low + high) / 2
        first, second = parts(y, x)
        with np.errstate(divide="ignore"):
            outside = (
                2 * np.log(np.maximum(first, second))
                + np.log1p((np.minimum(first, second) / np.maximum(np.maximum(first, second), 1e-300)) ** 2)
                > 2 * target
            )
        low, high = np.where(outside, low, y), np.where(outside, y, high)
    # Four quadrants, and the trapezoidal rule over x >= 0: half the weight at 0.
    logs = math.log(4 * _FINE) - x**2 / 2 - 0.5 * math.log(2 * math.pi) + special.log_ndtr(-low)
    logs[..., 0] -= math.log(2)
    if along:
        # The y beyond the bound, in slices of one probability each.
        shares = np.log((np.arange(_SLICES) + 0.5) / _SLICES)
        y = -special.ndtri_exp(special.log_ndtr(-low)[..., None] + shares)
        first, second = parts(y, x[:, None])
        with np.errstate(divide="ignore"):
            logs = logs + np.log((first >= second).mean(-1))
    return special.logsumexp(logs, axis=-1)


def typical_scale(n, horizon: float) -> np.ndarray:
    """a_n/n in one dimension, n Pr(|psi| > a_n) = 1: the unit of the mean of self-attention over n tokens.

    In it the limit has Pr(|limit| > x) ~ x^-alpha. Arrays of n >= 2; horizon up to 1e100.
    """
    n = as_array("n", n, 2)
    h = as_number("horizon", horizon, 0, 1e100)
    q = h**2 / (1 + h**2)
    y = stats.norm.isf(1 / (2 * n))
    return (h * y + np.exp(q * y**2 / 2) * (1 - q) * y / math.sqrt(1 + h**2)) / n
