"""Exponents and constants of the book's theorems."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokcx_lib.theory.geometry import root
from tokcx_lib.theory.laws import Law
from tokcx_lib.validation import (
    as_choice,
    as_law,
    as_matrix,
    as_number,
    as_positive,
    as_square,
    as_vectors,
    as_wide,
    finite_answer,
)

_EXPONENTS = {
    "reported": lambda psi: 1 / (2 * (1 + 32 * psi)),
    "balance": lambda psi: 1 / (2 * (1 + psi)),
    "subgaussian": lambda psi: min(0.5, 1 / (4 * psi)),
    "gaussian": lambda psi: min(0.5, 1 / (1 + psi)),
    "bias": lambda psi: min(1.0, (math.sqrt(1 + 4 / psi) - 1) / 2),
}


def exponent(psi: float, kind: str) -> float:
    """Exponent beta of the error n^-beta of the moments of self-attention, for a coupling psi = H^2 > 0.

    Parameters
    ----------
    kind :
        ``reported``: 1/(2(1 + 32 psi)), Theorem 4.4 of Bohbot, Letrouit, Peyré and Vialard (ICML 2026);
        ``balance``: 1/(2(1 + psi)), the reference curve drawn by the same authors;
        ``subgaussian``: min(1/2, 1/(4 psi)), a lower bound on the exponent of sub-Gaussian tokens (ours, chapter 10);
        ``gaussian``: min(1/2, 1/(1 + psi)), the exponent of Gaussian tokens (ours, chapter 10);
        ``bias``: min(1, (sqrt(1 + 4/psi) - 1)/2), the exponent of the bias of the second moment (ours, chapter 10).

    Raises
    ------
    ValueError
        If psi is not positive and finite, or the kind is not one of these.
    """
    return _EXPONENTS[as_choice("kind", kind, _EXPONENTS)](as_positive("psi", psi))


def hardmax_mean(n: float, sigma: float = 1.0) -> float:
    """Asymptote of E|mean of the transformed tokens| under hardmax: sigma ln 4 / (2 sqrt(2 ln n)), n > 1.

    For scalar tokens N(0, sigma^2). Source: Proposition 5.1 of Bohbot, Letrouit, Peyré and Vialard (ICML 2026).
    """
    if not as_positive("n", n) > 1:
        raise ValueError(f"n: expected a number greater than 1, got {n}")
    return as_positive("sigma", sigma) * math.log(4) / (2 * math.sqrt(2 * math.log(n)))


def clt_covariance(law: Law, t) -> Tensor:
    """Covariance S(t) of the limit of sqrt(n) (grad K_n - grad K)(t), for attention over n tokens of a law (chapter 2).

    S(t) = e^{K(2t) - 2K(t)} (Hess K(2t) + g g'), g = grad K(2t) - grad K(t). With a value matrix the error of
    attention at the query x has covariance V S(A x) V' / n to first order. Classical: the delta method.

    Parameters
    ----------
    law : a law of `laws`, with log-MGF finite around 2t.
    t : (..., d), tilts t = A x; for d = 1 a number is accepted.

    Returns
    -------
    Tensor of shape (..., d, d), in the precision of t; infinite where the factor overflows

    Raises
    ------
    ValueError
        If t does not match the law or is not finite.
    """
    t = as_vectors("t", t, as_law("law", law, "log_mgf", "tilted_mean", "tilted_cov").dim)
    growth = torch.exp(law.log_mgf(2 * t) - 2 * law.log_mgf(t))
    shift = law.tilted_mean(2 * t) - law.tilted_mean(t)
    return growth[..., None, None] * (law.tilted_cov(2 * t) + shift[..., :, None] * shift[..., None, :])


class MomentConstants(NamedTuple):
    """First-order limits of n E||m_n - m||^2 (`mean`) and n E||C_n - C||_F^2 (`cov`)."""

    mean: float
    cov: float


def moment_constants(B, W=None) -> MomentConstants:
    """Constants of the moments of self-attention over Gaussian tokens: root mean square errors sqrt(constant / n).

    In whitened coordinates z, with G = B B', Q = G (I + G)^-1 and R(z) = det(I + G)^-1/2 e^{z'Qz/2}, a token z moves
    the mean by psi(z) / n and the second moment by phi(z) / n,

        psi(z) = B z + R(z) (I - Q) z,
        phi(z) = B z z' B' - G + R(z) [(I - Q) z z' Q + Q z z' (I - Q) - 2 Q],

    and the constants are E||W psi||^2, the trace of `influence_covariance`, and E||W phi W'||_F^2, by Gaussian fourth
    moments (chapter 5).

    Parameters
    ----------
    B : (d, d), Sigma^{1/2} A Sigma^{1/2}; W : (d_v, d), V Sigma^{1/2}, None for the identity.

    Raises
    ------
    ValueError
        If shapes do not match, or the horizon ||B||_2 is not below 1: then the constants are infinite.
    """
    B = as_square("B", B).double()
    dim = len(B)
    one = torch.eye(dim, dtype=torch.float64)
    W = one if W is None else as_matrix("W", W, columns=dim).double()
    metric, G = W.mT @ W, B @ B.mT
    mean = torch.trace(metric @ influence_covariance(B)).item()

    Q = G @ torch.linalg.inv(one + G)
    mass = torch.linalg.det(one - G @ G).rsqrt().item()  # E R^2, in units of the tilted law below
    plain, tilted = [(B, B)], [(one - Q, Q), (Q, one - Q)]
    # R tilts N(0, I) to the covariance (I - Q)^-1 = I + G with mass 1, and R^2 to (I - 2Q)^-1.
    cov = (
        _quartic(plain, G, plain, G, one, metric)
        + 2 * _quartic(plain, G, tilted, 2 * Q, one + G, metric)
        + mass * _quartic(tilted, 2 * Q, tilted, 2 * Q, torch.linalg.inv(one - 2 * Q), metric)
    )
    return MomentConstants(as_number("constant of B and W", mean), as_number("constant of B and W", cov))


def _quartic(left, shift_left, right, shift_right, cov, metric) -> float:
    """E <sum a z z' c' - shift, sum a z z' c' - shift> for z ~ N(0, cov), with <X, Y> = tr(metric X metric Y)."""
    total = torch.trace(metric @ shift_left @ metric @ shift_right)
    for pairs, other in ((left, shift_right), (right, shift_left)):
        total -= sum(torch.trace(metric @ a @ cov @ c.mT @ metric @ other) for a, c in pairs)
    for a, c in left:
        for e, f in right:
            x, y = f.mT @ metric @ a @ cov, c.mT @ metric @ e @ cov
            turned = f.mT @ metric @ a @ cov @ e.mT @ metric @ c @ cov
            total += torch.trace(x) * torch.trace(y) + torch.trace(x @ y) + torch.trace(turned)
    return total.item()


def influence_covariance(B, V=None) -> Tensor:
    """Covariance of V psi(z), z ~ N(0, I), with psi the `influence` of one token: the limit of n Cov(m_n).

    V (G + B + B' + det(I - G^2)^{-1/2} (I - G^2)^{-1}) V' with G = BB'. It is also what queries share, since they read
    the same keys: the covariance of the transformed tokens has this / n less than their second moment, to first order.

    Parameters
    ----------
    B : (d, d) with ||B||_2 < 1, Sigma^{1/2} A Sigma^{1/2}; V : (d_v, d), V Sigma^{1/2}, None for the identity.

    Raises
    ------
    ValueError
        If shapes do not match or ||B||_2 >= 1: the influence function then has no variance.

    Source: chapters 5 and 9.
    """
    B = as_square("B", B).detach().double()
    horizon = torch.linalg.matrix_norm(B, 2).item()
    if not horizon < 1:
        raise ValueError(f"B: expected a horizon below 1, beyond which the covariance is infinite, got {horizon:.4g}")
    one, G = torch.eye(len(B), dtype=B.dtype), B @ B.mT
    rest = one - G @ G
    found = G + B + B.mT + torch.linalg.inv(rest) / torch.linalg.det(rest).sqrt()
    if V is not None:
        V = as_matrix("V", V, columns=len(B)).detach().double()
        found = V @ found @ V.mT
    return finite_answer("V", found)


def influence(z, B) -> Tensor:
    """Influence of one whitened token on the mean of self-attention over Gaussian tokens, V = I (chapter 10).

    psi(z) = B z + det(I + BB')^{-1/2} e^{z'Qz/2} (I - Q) z, Q = BB'(I + BB')^{-1}: the mean m_n of self-attention is
    the mean of psi over the tokens, up to terms of smaller order.

    Parameters
    ----------
    z : (..., d), whitened tokens; B : (d, d), cov^{1/2} A cov^{1/2}, the logit of query z_i and key z_j is z_j' B z_i.

    Returns
    -------
    Tensor of shape (..., d), in units of whitened tokens; infinite where the exponential overflows

    Raises
    ------
    ValueError
        If shapes do not match, or anything is NaN or infinite.
    """
    z, B, Q, lift = _influence_parts(z, B)
    return z @ B.mT + lift[..., None] * (z - z @ Q)


def influence_square(z, B) -> Tensor:
    """As `influence`, for the second moment (1/n) sum_i Gamma_n(x_i) Gamma_n(x_i)': shape (..., d, d), symmetric.

    psi_2(z) = Bzz'B' - BB' + det(I + BB')^{-1/2} e^{z'Qz/2} (Qzz'(I - Q) + (I - Q)zz'Q - 2Q).
    """
    z, B, Q, lift = _influence_parts(z, B)
    near, rest, image = z @ Q, z - z @ Q, z @ B.mT
    cross = near[..., :, None] * rest[..., None, :]
    own = image[..., :, None] * image[..., None, :] - B @ B.mT
    return own + lift[..., None, None] * (cross + cross.mT - 2 * Q)


def _influence_parts(z, B) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, B, Q and det(I + BB')^{-1/2} e^{z'Qz/2} (...)."""
    B = as_square("B", B)
    z = as_vectors("z", as_wide("z", z), len(B))
    B = B.to(z)
    one_plus = finite_answer("B", torch.eye(len(B)).to(z) + B @ B.mT)
    try:
        Q = torch.linalg.solve(one_plus, B @ B.mT)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"B: expected a form whose I + BB' can be inverted in {B.dtype}, got a larger one") from error
    Q = (Q + Q.mT) / 2
    return z, B, Q, torch.exp(((z @ Q) * z).sum(-1) / 2 - torch.linalg.slogdet(one_plus).logabsdet / 2)


# Dudley's integral of sqrt(log(5/v)) over v in (0, 1/2), with the constant 4 sqrt(2) of the chaining sum (chapter 2).
_CHAINING = (
    4 * math.sqrt(2) * (math.sqrt(math.log(10)) / 2 + 2.5 * math.sqrt(math.pi) * math.erfc(math.sqrt(math.log(10))))
)


@np.errstate(over="ignore")  # infinite then
def uniform_constant(radius: float, A, *, support: float | None = None, spread: float | None = None, cov=None, V=None):
    """A constant C with E sup_{|x| <= radius} ||Gamma_n(x) - Gamma(x)|| <= C / sqrt(n) for every n >= 1 (chapter 2).

    Give either `support` (and `spread`) or `cov`; k is the rank of A and c = 5.09… the constant of the chaining.

    * Tokens within `support` = rho of their mean, E||Y - EY||^2 <= `spread`^2, tilts up to tau = radius ||A||_2:
      C = 2 ||V|| spread (1 + (c sqrt(k) + 2) tau rho e^{tau rho}).
    * Sub-Gaussian tokens with matrix `cov`, K(t) <= t' cov t / 2, loads up to s = radius ||cov^{1/2} A||_2: with W =
      V cov^{1/2}, C = ||W|| (4 sqrt(d) + 4 c sqrt(k) s L_N + 16 s^2 L_D + e sqrt(3/2) k s^2 (sqrt(d) + 2s) / log(2)^2),
      where L_N^2 = 6 sqrt(3) d e^{-2} delta^{-2 - k/2} e^{2 s^2/(1 - 2 delta)} and
      L_D^2 = 2 e^{-1} delta^{-1 - k/2} e^{2 s^2/(1 - 2 delta)}, for the best delta in (0, 1/2).

    Reported without constants as Theorem 3.4 of Bohbot, Letrouit, Peyré and Vialard (ICML 2026); constants and
    derivation are this book's.

    Parameters
    ----------
    radius : radius of the ball of queries.
    A : (d, d), bilinear form with logit <A x, y>.
    support : radius of a ball around the mean that holds all tokens.
    spread : root mean square distance of a token from the mean; default `support`.
    cov : (d, d), sub-Gaussian matrix of centred tokens (for Gaussian tokens, their covariance).
    V : (d_v, d), value matrix; None for the identity.

    Returns
    -------
    float, infinite where the exponential overflows

    Raises
    ------
    ValueError
        If not exactly one of `support` and `cov` is given, a number is not positive, or shapes do not match.
    """
    radius = as_positive("radius", radius)
    A = as_square("A", A).double()
    dim = len(A)
    V = torch.eye(dim, dtype=A.dtype) if V is None else as_matrix("V", V, columns=dim).double()
    if (support is None) == (cov is None):
        raise ValueError("support: expected exactly one of support and cov, got " + ("none" if cov is None else "both"))
    if support is not None:
        rho = as_positive("support", support)
        spread = rho if spread is None else as_positive("spread", spread)
        tilt = radius * torch.linalg.matrix_norm(A, 2).item()
        rank = torch.linalg.matrix_rank(A).item()
        chain = _CHAINING * math.sqrt(rank) + 2
        growth = float(np.exp(tilt * rho))
        return 2 * torch.linalg.matrix_norm(V, 2).item() * spread * (1 + chain * tilt * rho * growth)
    if spread is not None:
        raise ValueError(f"spread: expected None where cov is given, got {spread}")
    half = root(cov).double()
    A = half @ as_square("A", A, len(half))
    load = radius * torch.linalg.matrix_norm(A, 2).item()
    rank = torch.linalg.matrix_rank(A).item()
    best = min(_subgaussian(load, dim, rank, i / 1000) for i in range(1, 500))
    return torch.linalg.matrix_norm(V @ half, 2).item() * best


def _subgaussian(s: float, dim: int, rank: int, delta: float) -> float:
    """The constant of whitened sub-Gaussian tokens for one delta; see `uniform_constant`."""
    if s > 1e75:
        return math.inf
    growth = float(np.exp(s**2 / (1 - 2 * delta) - (1 + rank / 4) * math.log(delta)))
    numerator = math.sqrt(6 * math.sqrt(3) * dim) / math.e * growth
    denominator = math.sqrt(2 / math.e * delta) * growth
    rare = math.e * math.sqrt(1.5) / math.log(2) ** 2 * rank * s**2 * (math.sqrt(dim) + 2 * s)
    chained = _CHAINING * math.sqrt(rank) * s * numerator if s else 0.0
    return 4 * (math.sqrt(dim) + chained) + 16 * s**2 * denominator + rare
