"""The bias of the second moment of attention over n Gaussian tokens, exactly, in any dimension.

Whitened tokens z ~ N(0, I_d), logits <B x, z>, B = Sigma^{1/2} A Sigma^{1/2}, outputs V z. Given the query x, only the
projection of the tokens on u = Bx / |Bx| enters the weights, so that the laws of `softmax_law` at the load s = |Bx| give

    E[Gamma_n Gamma_n' | x] = V (M_2(n, s) uu' + P(n, s) (I - uu')) V'      (fresh queries),

and what is left is an average over s^2 = x'B'Bx, a weighted chi-squared variable. Derivations: chapter 9.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.interpolate import RectBivariateSpline
from torch import Tensor

from tokcx_lib.softmax_law import map_error, self_moments, softmax_moments
from tokcx_lib.validation import as_matrix, as_positive, as_tensor, as_tokens

_PATH = 0.15 * np.arange(-80, 81)  # along a path through the saddle point of the inverse Laplace transform
_TAIL = 40.0  # e^-40: what may be left out of the law of the load


def _as_forms(B, V) -> tuple[Tensor, Tensor]:
    B = as_tensor("B", B, ndim=2).double()
    B = as_matrix("B", B, columns=B.shape[0]).double()
    V = torch.eye(len(B), dtype=B.dtype) if V is None else as_matrix("V", V, columns=len(B)).double()
    return B, V


def second_moment_bias(n: float, B, V=None) -> Tensor:
    """E[Gamma_n(x) Gamma_n(x)'] - E[Gamma(x) Gamma(x)'] for n Gaussian tokens and fresh Gaussian queries.

    Parameters
    ----------
    n : number of tokens, real, from 1 to 1e250.
    B : (d, d), the bilinear form in units of the tokens, Sigma^{1/2} A Sigma^{1/2}.
    V : (d_v, d), values of *whitened* tokens, that is V Sigma^{1/2} for a head with value matrix V; None: the identity.

    Returns
    -------
    Tensor of shape (d_v, d_v), float64, to about 1e-8 of its norm

    Raises
    ------
    ValueError
        If B is not square and finite, V does not match it, or n is out of range.
    ArithmeticError
        If the law of the load does not sum to 1 within 1e-6: a check of the quadrature.

    Source: chapter 9.
    """
    B, V = _as_forms(B, V)
    left, singular, _ = torch.linalg.svd(B)
    beta = singular.numpy()
    if beta[0] < 1e-12:  # a head that looks nowhere averages n tokens evenly
        return V @ V.mT / as_positive("n", n)
    load, weight, shares = load_law(beta, float(n))
    spread = softmax_moments(n, load).participation
    # M_2 - s^2 = E(Gamma_n - s)^2 - 2 s^2 P, since E Gamma_n = s (1 - P): no digits lost.
    along = map_error(n, load) - 2 * load**2 * spread
    diagonal = weight @ spread + shares @ (along - spread)
    vectors = V @ left
    return (vectors * torch.from_numpy(diagonal)) @ vectors.mT


def load_law(beta, n: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quadrature for the load s = |Bx| of a Gaussian query, B with singular values `beta`.

    s^2 is a weighted chi-squared variable. Its density is the inverse Laplace transform of its moment generating
    function, along a path of steepest descent through the saddle point, so that far tails keep their relative accuracy.

    Parameters
    ----------
    beta : (d,), singular values, not all zero.
    n : how far the tails matter: down to a probability of e^-40 / n.

    Returns
    -------
    (loads, weights, shares)
        Nodes (k,), weights (k,) with E f(s) = weights @ f, and shares (d, k) with E[f(s) u_i^2] = shares[i] @ f for u =
        Bx / s in the basis of the left singular vectors.

    Raises
    ------
    ValueError
        If beta holds nothing positive or something negative.
    ArithmeticError
        If the weights do not sum to 1 within 1e-6.

    Source: chapter 9 (saddle-point inversion: classical).
    """
    beta = np.asarray(beta, dtype=float)
    if beta.ndim != 1 or not (np.isfinite(beta) & (beta >= 0)).all() or not beta.max() > 0:
        raise ValueError(f"beta: expected singular values, one of them positive, got {beta}")
    scale = beta.max() ** 2
    rate = beta[beta > 1e-9 * beta.max()] ** 2 / scale
    mean, deviation = rate.sum(), math.sqrt(2 * (rate**2).sum())
    step = 0.25 * min(deviation / mean, 1.2)  # of log s^2
    log_q, theta = _reach(rate, step, math.log(n) + _TAIL)
    q = np.exp(log_q)
    curve = rate / (1 - 2 * theta[:, None] * rate)  # (q, d)
    second, third = 2 * (curve**2).sum(1), 8 * (curve**3).sum(1)
    # theta + i v / sqrt(second) + third / (6 second^2) v^2: the real part of the exponent falls like v^2.
    bend = (third / (6 * second**2))[:, None] * _PATH**2
    path = theta[:, None] + 1j * _PATH / np.sqrt(second)[:, None] + bend
    slope = 1j / np.sqrt(second)[:, None] + (third / (3 * second**2))[:, None] * _PATH
    factor = 1 - 2 * path[..., None] * rate
    exponent = -0.5 * np.log(factor).sum(-1) - path * q[:, None]
    wave = np.exp(exponent) * slope * (_PATH[1] - _PATH[0]) / (2j * np.pi)
    # z_i^2 times the density of z_i is that of a chi variable with two degrees more: one more factor to the power -1.
    density = np.einsum("qv,qvi->iq", wave, 1 / factor).real
    shares = np.zeros((len(beta), len(q)))
    shares[beta > 1e-9 * beta.max()] = rate[:, None] * density * step  # dq / q = step
    weights = shares.sum(0)
    if abs(weights.sum() - 1) > 1e-6:
        raise ArithmeticError(f"the law of the load sums to 1 only within {abs(weights.sum() - 1):.1g}")
    return np.sqrt(scale * q), weights, shares


def _reach(rate: np.ndarray, step: float, tail: float) -> tuple[np.ndarray, np.ndarray]:
    """Grid of log q, and the saddle points, as far as the Chernoff bound of the density exceeds e^-tail."""
    log_q = math.log(rate.sum()) + step * np.arange(-math.ceil(120 / step), math.ceil(math.log(40 + 20 * tail) / step))
    q = np.exp(log_q)
    # The saddle point solves sum rate / (1 - 2 theta rate) = q; in w = 1 - 2 theta max(rate) > 0, by bisection.
    low, high = np.full_like(q, -200.0), np.full_like(q, 200.0)  # of log w
    for _ in range(80):
        middle = (low + high) / 2
        above = (rate / (1 - rate + np.exp(middle)[:, None] * rate)).sum(1) > q
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    theta = (1 - np.exp((low + high) / 2)) / 2
    bound = -0.5 * np.log1p(-2 * theta[:, None] * rate).sum(1) - theta * q
    inside = bound > np.where(theta > 0, -tail, -_TAIL)
    return log_q[inside], theta[inside]


def own_token_bias(n: float, B, V=None, queries=None) -> Tensor:
    """What self-attention adds to `second_moment_bias`: the query is one of the n tokens, and attends to itself too.

    The mean over the given queries x of E[Gamma_n Gamma_n' | x is a token] - E[Gamma_n Gamma_n' | x is fresh]. For n
    Gaussian queries it is of the order of 1/n; a few thousand of them give it to a few per cent.

    Parameters
    ----------
    n : number of tokens, real, >= 2; B : (d, d); V : (d_v, d) or None: as for `second_moment_bias`.
    queries : (m, d), Gaussian queries N(0, I_d).

    Returns
    -------
    Tensor of shape (d_v, d_v), float64

    Raises
    ------
    ValueError
        If shapes do not match, or n < 2.

    Source: chapter 9.
    """
    B, V = _as_forms(B, V)
    x = as_tokens("queries", queries, len(B)).double()
    if not n >= 2:
        raise ValueError(f"n: expected at least 2 tokens, got {n}")
    tilt = x @ B.mT
    load = torch.linalg.vector_norm(tilt, dim=1)
    u = tilt / load[:, None]
    own = (u * x).sum(1)
    beside = x - own[:, None] * u
    # Smooth functions of (load, own): a table of them, and cubic splines.
    loads, owns = (np.linspace(part.min().item() - 1e-9, part.max().item() + 1e-9, 25) for part in (load, own))
    fresh = softmax_moments(n, loads)
    rows = [self_moments(n, s, owns) for s in loads]
    extra = {
        "second_moment": np.stack([row.second_moment for row in rows]) - fresh.second_moment[:, None],
        "own_cross": np.stack([row.own_cross for row in rows]),
        "own_square": np.stack([row.own_square for row in rows]),
        "participation": np.stack([row.participation for row in rows]) - fresh.participation[:, None],
    }
    at = {
        name: torch.from_numpy(RectBivariateSpline(loads, owns, table)(load.numpy(), own.numpy(), grid=False))
        for name, table in extra.items()
    }
    mixed = (at["own_cross"][:, None] * u).mT @ beside
    total = ((at["second_moment"] - at["participation"])[:, None] * u).mT @ u + mixed + mixed.mT
    total = total + (at["own_square"][:, None] * beside).mT @ beside
    total = total / len(x) + at["participation"].mean() * torch.eye(len(B), dtype=B.dtype)
    return V @ total @ V.mT


def shared_keys_covariance(B, V=None) -> Tensor:
    """Limit of n Cov(m_n) for self-attention of Gaussian tokens with coupling below 1: what queries share by sharing keys.

    V (G + B + B' + det(I - G^2)^{-1/2} (I - G^2)^{-1}) V' with G = BB': the covariance of the influence function of one
    token. The covariance of the transformed tokens has this / n less than their second moment, to first order.

    Parameters
    ----------
    B : (d, d) with ||B||_2 < 1; V : (d_v, d) or None: as for `second_moment_bias`.

    Raises
    ------
    ValueError
        If shapes do not match or ||B||_2 >= 1: the influence function then has no variance.

    Source: chapter 9.
    """
    B, V = _as_forms(B, V)
    horizon = torch.linalg.matrix_norm(B, 2).item()
    if not horizon < 1:
        raise ValueError(f"B: expected a horizon ||B||_2 below 1, got {horizon:.4g}")
    eye, G = torch.eye(len(B), dtype=B.dtype), B @ B.mT
    rest = eye - G @ G
    return V @ (G + B + B.mT + torch.linalg.inv(rest) / torch.linalg.det(rest).sqrt()) @ V.mT
