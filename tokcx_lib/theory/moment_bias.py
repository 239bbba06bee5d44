"""The bias of the second moment of attention over n Gaussian tokens, exactly, in any dimension.

Whitened tokens z ~ N(0, I_d), logits <B x, z>, B = Sigma^{1/2} A Sigma^{1/2}, outputs V z. Given the query x, only the
projection of the tokens on u = Bx / |Bx| enters the weights, so that the laws of `softmax_law` at the load s = |Bx|
give

    E[Gamma_n Gamma_n' | x] = V (M_2(n, s) uu' + P(n, s) (I - uu')) V'      (fresh queries),

and what is left is an average over s^2 = x'B'Bx, a weighted chi-squared variable. Derivations: chapter 9.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.ndimage import map_coordinates
from scipy.optimize.elementwise import find_root
from torch import Tensor

from tokcx_lib.theory.rates import influence_covariance
from tokcx_lib.theory.softmax_law import MOST_TILT, MOST_TOKENS, map_error, self_moments, softmax_moments
from tokcx_lib.validation import as_array, as_matrix, as_number, as_square, as_tokens, finite_answer

_PATH = 0.15 * np.arange(-80, 81)  # along a path through the saddle point of the inverse Laplace transform
_TAIL = 40.0  # e^-40: what may be left out of the law of the load


def _as_forms(B, V) -> tuple[Tensor, Tensor]:
    B = as_square("B", B).detach().double()
    V = torch.eye(len(B), dtype=B.dtype) if V is None else as_matrix("V", V, columns=len(B)).detach().double()
    return B, V


def _require_loads(names: str, load) -> None:
    """Raise ValueError if a query looks nowhere, or further than the exact laws are computed."""
    if not load.min() > 0 or not load.max() <= MOST_TILT:
        found = f"{load.min():.4g} to {load.max():.4g}"
        raise ValueError(f"{names}: expected loads |Bx| above 0, up to {MOST_TILT:g}, got {found}")


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
        If B is not square and finite, V does not match it, n is out of range, or B so large that loads beyond 300
        matter.
    ArithmeticError
        If the law of the load does not sum to 1 within 1e-6: a check of the quadrature.

    Source: chapter 9.
    """
    n, (B, V) = as_number("n", n, 1, MOST_TOKENS), _as_forms(B, V)
    left, singular, _ = torch.linalg.svd(B)
    beta = singular.numpy()
    if beta[0] < 1e-12:  # a head that looks nowhere averages n tokens evenly
        return finite_answer("V", V @ V.mT) / n
    if beta[0] > MOST_TILT:
        raise ValueError(f"B: expected a horizon ||B||_2 up to {MOST_TILT:g}, got {beta[0]:.4g}")
    load, weight, shares = load_law(beta, n)
    _require_loads("B, n", load)
    spread = softmax_moments(n, load).participation
    # M_2 - s^2 = E(Gamma_n - s)^2 - 2 s^2 P, since E Gamma_n = s (1 - P): no digits lost.
    along = map_error(n, load) - 2 * load**2 * spread
    diagonal = weight @ spread + shares @ (along - spread)
    vectors = V @ left
    return finite_answer("V", (vectors * torch.from_numpy(diagonal)) @ vectors.mT)


def load_law(beta, n: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quadrature for the load s = |Bx| of a Gaussian query, B with singular values `beta`.

    s^2 is a weighted chi-squared variable. Its density is the inverse Laplace transform of its moment generating
    function, along a path of steepest descent through the saddle point, so that far tails keep their relative accuracy.

    Parameters
    ----------
    beta : (d,), singular values, not all zero.
    n : how far the tails matter, down to a probability of e^-40 / n, and how fine the nodes are.

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
    beta, n = as_array("beta", beta), as_number("n", n, 1, MOST_TOKENS)
    if beta.ndim != 1 or not (np.isfinite(beta) & (beta >= 0)).all() or not beta.max() > 0:
        raise ValueError(f"beta: expected singular values, one of them positive, got {beta}")
    rate = (beta[beta > 1e-9 * beta.max()] / beta.max()) ** 2  # at most 1, exactly
    mean, deviation = rate.sum(), math.sqrt(2 * (rate**2).sum())
    step = 0.25 * min(deviation / mean, 1.2)  # of log s^2
    step = min(step, math.sqrt(0.5 / max(math.log(n), 1)))  # what is averaged over loads narrows like 1 / sqrt(log n)
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
    return beta.max() * np.sqrt(q), weights, shares


def _reach(rate: np.ndarray, step: float, tail: float) -> tuple[np.ndarray, np.ndarray]:
    """Grid of log q, and the saddle points, as far as the Chernoff bound of the density exceeds e^-tail."""
    log_q = math.log(rate.sum()) + step * np.arange(-math.ceil(120 / step), math.ceil(math.log(40 + 20 * tail) / step))
    q = np.exp(log_q)
    # The saddle point solves sum rate / (1 - 2 theta rate) = q, for w = 1 - 2 theta max(rate) > 0.

    def excess(log_w, q):
        return (rate / (1 - rate + np.exp(log_w)[:, None] * rate)).sum(1) - q

    log_w = find_root(excess, (np.full_like(q, -200.0), np.full_like(q, 200.0)), args=(q,)).x
    theta = (1 - np.exp(log_w)) / 2
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
    x, n = as_tokens("queries", queries, len(B)).detach().double(), as_number("n", n, 2, MOST_TOKENS)
    tilt = x @ B.mT
    load = torch.linalg.vector_norm(tilt, dim=1)
    _require_loads("B, queries", load)
    u = tilt / load[:, None]
    own = (u * x).sum(1)
    beside = x - own[:, None] * u
    at = _self_table(n, load, own, ("second_moment", "own_square", "own_cross", "participation"), less_fresh=True)
    mixed = (at["own_cross"][:, None] * u).mT @ beside
    total = ((at["second_moment"] - at["participation"])[:, None] * u).mT @ u + mixed + mixed.mT
    total = total + (at["own_square"][:, None] * beside).mT @ beside
    total = total / len(x) + at["participation"].mean() * torch.eye(len(B), dtype=B.dtype)
    return finite_answer("V, queries", V @ total @ V.mT)


def _self_table(n: float, load: Tensor, own: Tensor, names, less_fresh: bool = False) -> dict[str, Tensor]:
    """Fields of `softmax_law.self_moments` at many pairs of one shape, by a table and cubic splines (to about 1e-6).

    `less_fresh`: the second moment and the participation less those of a fresh query.
    """
    place, values = [], []
    for part, count in ((load, 33), (own, 97)):
        low, high = part.min().item() - 1e-6, part.max().item() + 1e-6
        values.append(np.linspace(low, high, count))
        place.append(((part - low) / (high - low) * (count - 1)).numpy())
    rows = [self_moments(n, s, values[1]) for s in values[0]]
    tables = {name: np.stack([getattr(row, name) for row in rows]) for name in names}
    if less_fresh:
        fresh = softmax_moments(n, values[0])
        tables["second_moment"] -= fresh.second_moment[:, None]
        tables["participation"] -= fresh.participation[:, None]
    return {
        name: torch.from_numpy(map_coordinates(table, place, order=3, mode="mirror")) for name, table in tables.items()
    }


def shared_keys_projection(n: float, B, V=None, tokens=None, queries=None) -> Tensor:
    """What queries share at finite n, as far as single tokens explain it: the covariance of the projection of m_n.

    Conditioned on one of its tokens z, the mean of n transformed tokens is xi(z) / n with xi(z) = E[Gamma_n(z)] + (n -
    1) E_x[Gamma_n(x) | z is a key], exactly; the covariance of the sum of these (Hajek's projection) is E[xi xi'] / n,
    a lower bound for Cov m_n as a matrix, and n times it tends to `rates.influence_covariance`. It is averaged here
    over given tokens z and queries x. Where the coupling is below 1/3, so that the limit's products have a finite
    variance, what is averaged is the difference from the limit, which is known exactly.

    Parameters
    ----------
    n, B, V : as for `own_token_bias`, with ||B||_2 < 1.
    tokens : (m, d), Gaussian tokens N(0, I_d), for z; queries : (q, d), independent of them, q even, for x.

    Returns
    -------
    Tensor of shape (d_v, d_v), float64: an estimate of Cov m_n, with the noise of the average

    Raises
    ------
    ValueError
        If shapes do not match, n < 2, or ||B||_2 >= 1.

    Source: chapter 9 (projection: Hajek 1968).
    """
    n = as_number("n", n, 2, MOST_TOKENS)
    limit = influence_covariance(B) / n
    B, V = _as_forms(B, V)
    z = as_tokens("tokens", tokens, len(B)).detach().double()
    x = as_tokens("queries", queries, len(B)).detach().double()
    if len(x) % 2:
        raise ValueError(f"n, queries: expected n >= 2 and an even number of queries, got {n:g} and {len(x)}")
    for name, part in (("tokens", z), ("queries", x)):
        _require_loads(f"B, {name}", torch.linalg.vector_norm(part @ B.mT, dim=1))
    key = [_as_key(n, z, half @ B.mT) for half in x.chunk(2)]  # two halves: their product has no bias
    tilt = z @ B.mT
    load = torch.linalg.vector_norm(tilt, dim=1)
    u = tilt / load[:, None]
    own = (u * z).sum(1)
    at = _self_table(n, load, own, ("mean", "own"))
    itself = at["mean"][:, None] * u + at["own"][:, None] * (z - own[:, None] * u)
    finite, infinite = ([part + own_part for part in parts] for parts, own_part in zip(zip(*key), (itself, tilt)))
    total = finite[0].mT @ finite[1] / (n * len(z))
    if torch.linalg.matrix_norm(B, 2) ** 2 < 1 / 3:
        total = total + limit - infinite[0].mT @ infinite[1] / (n * len(z))
    return finite_answer("V, tokens, queries", V @ ((total + total.mT) / 2) @ V.mT)


def _as_key(n: float, z: Tensor, tilt: Tensor) -> tuple[Tensor, Tensor]:
    """(n - 1) E_x[Gamma_n(x) | z is a key], and its limit, averaged over queries x and -x with tilts (q, d)."""
    load = torch.linalg.vector_norm(tilt, dim=1)
    u = tilt / load[:, None]
    height = z @ u.mT
    at, back = (_self_table(n, load.expand_as(height), part, ("mean", "own")) for part in (height, -height))
    along, weight = (at["mean"] - back["mean"]) / 2, (at["own"] + back["own"]) / 2
    finite = (along - weight * height) @ u + weight.sum(1, keepdim=True) * z
    up, down = (torch.exp(sign * load * height - load**2 / 2) for sign in (1, -1))
    infinite = (up + down).sum(1, keepdim=True) * z / 2 - (up - down) @ tilt / 2
    return (n - 1) / len(tilt) * finite, infinite / len(tilt)
