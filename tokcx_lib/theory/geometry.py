"""Reach, horizon, load and coupling: how far a head looks into its tokens.

For one head with bilinear form A (logit <A x, y>) and tokens of covariance cov = Sigma:

* **reach** ||Sigma||_2: how far the tokens spread;
* **horizon** H = ||Sigma^{1/2} A Sigma^{1/2}||_2 (two-sided) or H_1 = ||Sigma^{1/2} A||_2 (one-sided);
* **coupling** Psi = H^2 (two-sided) or Psi_1 = ||Sigma||_2 H_1^2 (one-sided), with Psi <= Psi_1;
* **load** s(x) = ||Sigma^{1/2} (A x + shift)||: standard deviation of the logits of the query x.

Sources: reach, horizon and coupling are those of Bohbot, Letrouit, Peyré and Vialard (ICML 2026); the load is this
book's name for the quantity that its laws depend on. For tokens that are not Gaussian a *bound* needs the
sub-Gaussian matrix in place of the covariance; measurements on real heads use the covariance and say so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokcx_lib.validation import as_choice, as_covariance, as_number, as_square, as_vector, as_vectors, finite_answer

SIDES = ("one", "two")


def root(cov) -> Tensor:
    """Symmetric square root (d, d) of a covariance (d, d). Raises ValueError if `cov` is not one."""
    cov = as_covariance("cov", cov)
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def reach(cov) -> float:
    """Spectral reach ||Sigma||_2, the largest eigenvalue of a covariance (d, d); units of token squared."""
    return torch.linalg.eigvalsh(as_covariance("cov", cov)).max().item()


def horizon(A, cov, sided: str = "two") -> float:
    """Attention horizon: H = ||Sigma^{1/2} A Sigma^{1/2}||_2, dimensionless, or one-sided H_1 = ||Sigma^{1/2} A||_2.

    Parameters
    ----------
    A : (d, d), bilinear form with logit <A x, y>.
    cov : (d, d), covariance of the tokens.
    sided : "two" (both query and key are measured in token units) or "one" (keys only).

    Raises
    ------
    ValueError
        If `cov` is not a covariance, `A` does not match it, or `sided` is neither "one" nor "two".
    """
    as_choice("sided", sided, SIDES)
    half = root(cov)
    B = half @ as_square("A", A, half.shape[0]).to(half)
    B = finite_answer("A, cov", B @ half if sided == "two" else B)
    return torch.linalg.matrix_norm(B, 2).item()


def coupling(A, cov, sided: str = "two") -> float:
    """Attention-reach coupling: Psi = H^2 (two-sided) or Psi_1 = ||Sigma||_2 H_1^2 (one-sided), dimensionless.

    Parameters and errors as for `horizon`.
    """
    squared = as_number("horizon of A and cov", horizon(A, cov, sided), most=1e150) ** 2
    return squared if sided == "two" else as_number("coupling of A and cov", reach(cov) * squared)


def load(x, A, cov, shift=None) -> Tensor:
    """Load s(x) = ||Sigma^{1/2} (A x + shift)||: the standard deviation of the logits <A x + shift, Y>.

    Parameters
    ----------
    x : (..., d), queries. With tokens of mean m, either pass x - m and shift A m + c, or x and shift c: the same.
    A : (d, d); cov : (d, d), the centred covariance of the keys.
    shift : (d,), default zero: W_K' b_Q / sqrt(d_k) of a head with a query bias.

    Returns
    -------
    Tensor of shape (...), in units of the logits

    Raises
    ------
    ValueError
        If shapes do not match or `cov` is not a covariance.
    """
    cov = as_covariance("cov", cov)
    dim = cov.shape[0]
    t = as_vectors("x", x, dim).to(cov) @ as_square("A", A, dim).to(cov).mT
    if shift is not None:
        t = t + as_vector("shift", shift, dim).to(cov)
    return finite_answer("x, A, cov, shift", ((t @ cov) * t).sum(-1).clamp(min=0).sqrt())
