"""Causal attention over Gaussian tokens: how often a key is read, and what that does to the mean of the outputs.

Query i reads the i - 1 keys before it, so key j is read by all that come later, each time with the weight of one key
among i - 1. To first order the mean of the outputs is a sum over tokens of B z_j + c_j g(z_j), with c_j = sum of
1/(i - 1) over i > j, about log(n/j), and g the part of `rates.influence` that a token has as a key. Derivations:
chapter 13.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import log_ndtr, logsumexp
from torch import Tensor

from tokcx_lib.theory import rates
from tokcx_lib.validation import (
    as_count,
    as_matrix,
    as_number,
    as_positive,
    as_square,
    as_tokens,
    as_vectors,
    as_wide,
    finite_answer,
)

_NODES, _SHARES = np.polynomial.laguerre.laggauss(60)  # of the weights log(n/j), which are exponential


def reading_weights(n: int) -> Tensor:
    """How often each of n keys is read, in units of one key among all: c_j = sum of 1/(i - 1) over i > j.

    Returns
    -------
    Tensor of shape (n,), float64: key j = 1 first, about log(n/j); the last key, which nobody reads, has 0. Their mean
    is (n - 1)/n.

    Raises ValueError if n is not an integer >= 1.

    Source: chapter 13.
    """
    steps = 1 / torch.arange(1, as_count("n", n), dtype=torch.float64)  # of the queries i = 2 … n
    return torch.cat([steps.flip(0).cumsum(0).flip(0), steps.new_zeros(1)])


def key_influence(z, B) -> Tensor:
    """The part of `rates.influence` that a token has as a key: g(z) = psi(z) - B z, shape (..., d)."""
    B = as_square("B", B)
    z = as_vectors("z", as_wide("z", z), len(B))
    return finite_answer("z", rates.influence(z, B) - z @ B.to(z).mT)


def first_order(z, B) -> Tensor:
    """Mean of causal self-attention over the tokens z to first order: the mean of B z_j + c_j g(z_j), V = I.

    Parameters
    ----------
    z : (n, d), whitened tokens in the order of the sequence; B : (d, d), cov^{1/2} A cov^{1/2}.

    Returns
    -------
    Tensor of shape (d,), in units of whitened tokens

    Raises
    ------
    ValueError
        If shapes do not match, or anything is NaN or infinite.

    Source: chapter 13.
    """
    B = as_square("B", B)
    z = as_tokens("z", z, len(B)).double()
    B = B.to(z)
    found = z.mean(0) @ B.mT + (reading_weights(len(z)) @ key_influence(z, B)) / len(z)
    return finite_answer("z", found)


def mean_covariance(B, V=None) -> Tensor:
    """Limit of n Cov(m_n), m_n the mean of *causal* self-attention over n Gaussian tokens, ||B||_2 < 1.

    V (G + B + B' + 2 det(I - G^2)^{-1/2} (I - G^2)^{-1}) V' with G = BB': that of `rates.influence_covariance`, with
    the pull of the keys twice. In one dimension Psi + 2H + 2 (1 - Psi^2)^{-3/2}.

    Parameters
    ----------
    B : (d, d) with ||B||_2 < 1; V : (d_v, d), V Sigma^{1/2}, None for the identity.

    Raises
    ------
    ValueError
        If shapes do not match or ||B||_2 >= 1: a token's pull then has no variance.

    Source: chapter 13.
    """
    found = rates.influence_covariance(B)
    B = as_square("B", B).detach().double()
    V = torch.eye(len(B), dtype=B.dtype) if V is None else as_matrix("V", V, columns=len(B)).detach().double()
    pull = found - B @ B.mT - B - B.mT
    return finite_answer("V", V @ (found + pull) @ V.mT)


def stable_factor(psi: float) -> float:
    """How much wider the alpha-stable limit of the mean is under the causal mask: Gamma(1 + alpha)^{1/alpha}.

    alpha = 1 + 1/Psi, for a coupling Psi >= 1; at Psi = 1 it is sqrt(2), the ratio of standard deviations of the pulls
    for every Psi below.

    Raises ValueError if psi is not a finite number >= 1.

    Source: chapter 13.
    """
    psi = as_positive("psi", psi)
    if psi < 1:
        raise ValueError(f"psi: expected a coupling of at least 1, below which the limit is Gaussian, got {psi}")
    alpha = 1 + 1 / psi
    return math.gamma(1 + alpha) ** (1 / alpha)


def level_ratio(horizon: float, n: float) -> float:
    """How much larger the largest pull of n tokens is under the causal mask than over all pairs, in one dimension.

    Ratio of the levels that one token is expected to exceed, c_j |g(z_j)| against |g(z_j)|. For H >= 1 it tends to
    `stable_factor` as n grows, by powers of 1/log n: the tail of g is a power times a power of the logarithm.

    Parameters
    ----------
    horizon : H, from 0.1 to 100; n : tokens, from 10 to 10^100.

    Raises ValueError if a number is out of its range.

    Source: chapter 13.
    """
    H, n = as_number("horizon", horizon, 0.1, 100), as_number("n", n, 10, 1e100)
    with_mask, without = (_log_level(H, math.log(n), mask) for mask in (True, False))
    return math.exp(with_mask - without)


def _log_level(H: float, log_n: float, mask: bool) -> float:
    """log r with n P(c |g(z)| > r) = 1, z ~ N(0, 1), and c exponential or, without a mask, 1."""
    a = 1 + H**2

    def place(log_r: float) -> float:  # z > 0 with log g(z) = log r, by its logarithm
        def excess(x):
            return x + (a - 1) / a * math.exp(2 * x) / 2 - 1.5 * math.log(a) - log_r

        return math.exp(brentq(excess, min(log_r, 0.0) - 50, 10))

    def excess(log_r: float) -> float:
        shifts = -np.log(_NODES) if mask else np.zeros(1)
        tails = np.array([math.log(2) + log_ndtr(-place(log_r + shift)) for shift in shifts])
        return log_n + (logsumexp(tails, b=_SHARES) if mask else tails[0])

    return brentq(excess, -20.0, 2000.0, xtol=1e-10)
