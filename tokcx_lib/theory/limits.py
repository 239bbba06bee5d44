"""Moments of the transformed tokens at infinitely many tokens, for Gaussian laws and for laws of bounded support.

Gaussian tokens have both moments in closed form. For laws of bounded support the map V grad K(Ax) is in closed form
(`laws`); its covariance over the query X is an integral that is not. Scrambled Sobol points integrate it, a few times
over with independent scramblings, and the spread of the repeats is the error. These laws are symmetric, so the mean is
zero.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtri
from scipy.stats import qmc
from torch import Tensor

from tokcx_lib.theory.laws import Gaussian, Law, Rademacher, Uniform, UniformBall, UniformSphere
from tokcx_lib.validation import (
    as_count,
    as_kind,
    as_matrix,
    as_square,
    as_vector,
    finite_answer,
    naming,
    rows_that_fit,
    shown,
)

BOUNDED = (UniformSphere, UniformBall, Uniform, Rademacher)  # the laws that `bounded_limit` takes


class Moments(NamedTuple):
    """`mean` (..., d_v) and `cov` (..., d_v, d_v) of tokens, mostly transformed ones, float64.

    Those of a sample have the divisor n. Further axes come first: one for the lengths, one for each setting.
    """

    mean: Tensor
    cov: Tensor

    @property
    def second_moment(self) -> Tensor:
        """E[oo'] = cov + mean mean', (..., d_v, d_v)."""
        return self.cov + self.mean[..., :, None] * self.mean[..., None, :]

    def errors(self, limit: Moments) -> tuple[Tensor, Tensor]:
        """||m_n - m||_2 and ||C_n - C||_F against a limit (m, C), both (...), in its precision and on its device."""
        mean, cov = self.mean.to(limit.mean) - limit.mean, self.cov.to(limit.cov) - limit.cov
        return torch.linalg.vector_norm(mean, dim=-1), torch.linalg.matrix_norm(cov)

    def seen_through(self, V: Tensor) -> Moments:
        """Moments of V o, for outputs o of these moments: mean (..., d_w) and cov (..., d_w, d_w) for V (d_w, d_v)."""
        V = V.to(self.cov)
        return Moments(self.mean @ V.mT, V @ self.cov @ V.mT)


class Limit(NamedTuple):
    """`moments`: mean (d_v,) and covariance (d_v, d_v), float64; `error`: standard error of the covariance, relative.

    The error is that of the whole matrix in the Frobenius norm, divided by the norm of the covariance.
    """

    moments: Moments
    error: float


def gaussian_limit(law: Gaussian, A, V=None, shift=None) -> Moments:
    """Mean (d_v,) and covariance (d_v, d_v) of V grad K(AX + shift) for Gaussian tokens X ~ law, in closed form.

    The map is V (mean + cov (A x + shift)), so m = V (mean + cov (A mean + shift)) and C = V cov A cov A' cov V'
    (chapter 1).

    Parameters
    ----------
    A : (d, d); V : (d_v, d) or None for the identity; shift : (d,) or None for zero.

    Raises
    ------
    ValueError
        If the law is not Gaussian, or A, V or shift does not match it.
    """
    if not isinstance(law, Gaussian):
        expected = "a Gaussian law, whose limit has a closed form, or the limit itself"
        raise ValueError(f"limit, law: expected {expected}, got {shown(law)}")
    mean, cov = law.mean.double(), law.cov.double()
    matrix = cov @ as_square("A", A, law.dim).to(cov)
    mean = mean + matrix @ mean
    if shift is not None:
        mean = mean + cov @ as_vector("shift", shift, law.dim).to(cov)
    if V is not None:
        V = as_matrix("V", V, columns=law.dim).to(cov)
        matrix, mean = V @ matrix, V @ mean
    return Moments(mean, finite_answer("A, V", matrix @ cov @ matrix.mT))


def bounded_limit(law: Law, A, V=None, points: int = 2**16, repeats: int = 16, seed: int = 0) -> Limit:
    """Mean and covariance of V grad K(AX) for X ~ law, one of the bounded laws of `laws` (chapter 6).

    Tokens uniform on a sphere or in a ball: in the singular bases of A = L diag(s) R' the query is R'X, again uniform,
    and its map lies along diag(s) R'X. Flipping the sign of a coordinate changes nothing, so the covariance is diagonal
    there: d means to integrate, not d^2. Signs in few dimensions: the sum over all of them, without error.

    Parameters
    ----------
    law : UniformSphere, UniformBall, Uniform or Rademacher.
    A : (d, d); V : (d_v, d) or None for the identity.
    points : of one repeat, a power of two; repeats : independent scramblings, at least two.

    Raises
    ------
    ValueError
        If the law is another, shapes do not match, or points is not a power of two.
    """
    as_kind("law", law, *BOUNDED)
    points = as_count("points", points, most=min(2**30, rows_that_fit(8 * (law.dim + 2))))
    repeats, seed = as_count("repeats", repeats, least=2), as_count("seed", seed, least=0, most=2**128)
    if points & (points - 1):
        raise ValueError(f"points: expected a power of two, got {points}")
    A = as_square("A", A, law.dim).double()
    frame = torch.eye(law.dim, dtype=A.dtype) if V is None else as_matrix("V", V, columns=law.dim).to(A)
    spherical = isinstance(law, (UniformSphere, UniformBall))
    if spherical:
        left, singular, _ = torch.linalg.svd(A)
        A, frame = torch.diag(singular), frame @ left
    exact = isinstance(law, Rademacher) and 2**law.dim <= points
    found = []
    for repeat in range(1 if exact else repeats):
        queries = _all_signs(law.dim) if exact else _spread(law, points, [seed, repeat])
        with naming("A"):
            output = law.tilted_mean(queries @ A.mT)
        second = torch.diag((output**2).mean(0)) if spherical else output.mT @ output / len(output)
        found.append(frame @ second @ frame.mT)
    cov = finite_answer("A, V", torch.stack(found).mean(0))
    noise = 0.0 if exact else (torch.stack(found).var(0).sum() / repeats).sqrt().item()
    return Limit(Moments(cov.new_zeros(len(cov)), cov), noise / (torch.linalg.matrix_norm(cov).item() or 1.0))


def _all_signs(dim: int) -> Tensor:
    bits = np.arange(2**dim)[:, None] >> np.arange(dim) & 1
    return torch.from_numpy(2.0 * bits - 1.0)


def _spread(law: Law, points: int, seed: list[int]) -> Tensor:
    """Points (points, dim) spread evenly over a law: Sobol points, scrambled, carried from the unit cube."""
    extra = 2 if isinstance(law, UniformBall) else 0  # a ball is the shadow of a sphere in two more dimensions
    sobol = qmc.Sobol(law.dim + extra, scramble=True, rng=np.random.default_rng(seed))
    u = sobol.random(points).clip(2.0**-32)  # a coordinate may come out as zero, whose normal quantile is infinite
    if isinstance(law, Uniform):
        return torch.from_numpy(2 * u - 1)
    if isinstance(law, Rademacher):
        return torch.from_numpy(np.where(u < 0.5, -1.0, 1.0))
    sphere = torch.nn.functional.normalize(torch.from_numpy(ndtri(u)), dim=-1)
    return law.radius * sphere[:, : law.dim].contiguous()
