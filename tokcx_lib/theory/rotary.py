"""Rotary positions: what a head converges to when each key is turned by an angle that grows with its distance.

A key of M pairs of coordinates (planes) at distance delta from the query is seen turned by delta theta_m in plane m, so
that the query q has the tilt t_delta = R_delta' q there. Vectors have the two coordinates of a plane side by side.
Derivations: chapter 13.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.special import ive
from torch import Tensor

from tokcx_lib.theory.laws import Law
from tokcx_lib.theory.softmax_law import MOST_TILT, softmax_moments
from tokcx_lib.validation import (
    as_array,
    as_broadcast,
    as_count,
    as_law,
    as_number,
    as_positive,
    as_tensor,
    as_vector,
    finite_answer,
)

HALF = 2 * 1.8954942670339809  # twice the root of sin(x)/x = 1/2: n theta at which a plane keeps half
_ROWS = 2**16  # distances at a time


def frequencies(base: float, dim: int) -> np.ndarray:
    """Angles per token of the planes of a head: theta_m = base^(-2m/dim), m = 0 … dim/2 - 1, in radians.

    Parameters
    ----------
    base : greater than 1; dim : the even dimension of the head.

    Raises ValueError if the base is not greater than 1 or dim is not a positive even integer.

    Source: Su et al., RoFormer (2021).
    """
    base, dim = as_number("base", base), as_count("dim", dim, least=2, most=2**20)
    if base <= 1:
        raise ValueError(f"base: expected a number greater than 1, got {base}")
    if dim % 2:
        raise ValueError(f"dim: expected an even number, got {dim}")
    return base ** (-2 * np.arange(dim // 2) / dim)


def plane_factor(n, theta) -> np.ndarray:
    """Share of a plane's signal that is left over n distances 1 … n: |sin(n theta/2) / (n sin(theta/2))|.

    The length of the mean of n unit vectors at the angles theta, 2 theta, …, n theta (Dirichlet's kernel); 1 if theta
    is a multiple of 2 pi. n and theta (radians) broadcast; n >= 1.

    Source: classical; chapter 13.
    """
    n, theta = as_broadcast("n, theta", as_array("n", n, least=1, most=1e15), as_array("theta", theta))
    half = np.remainder(theta, 2 * math.pi) / 2  # in [0, pi)
    low = np.minimum(half, math.pi - half)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.abs(np.sin(n * half) / (n * np.sin(half)))
    return np.where(n * low < 1e-8, 1.0, np.minimum(found, 1.0))


def half_length(theta) -> np.ndarray:
    """Number of tokens at which a slow plane keeps half of its signal: 3.79 / theta, for theta << 1."""
    theta = as_array("theta", theta)
    if not (theta > 0).all():
        raise ValueError("theta: expected positive angles, got one that is not")
    return HALF / theta


def turned(q, theta, distances) -> Tensor:
    """Tilts t_delta of a query for keys at these distances: plane m of q turned back by delta theta_m.

    Parameters
    ----------
    q : (2M,), scale included; theta : (M,) radians; distances : (n,).

    Returns
    -------
    Tensor of shape (n, 2M), float64

    Raises ValueError if shapes do not match, or anything is NaN or infinite.
    """
    theta = as_tensor("theta", theta, ndim=1).double()
    q = as_vector("q", q, 2 * len(theta)).double().reshape(-1, 2)
    angle = as_tensor("distances", distances, ndim=1).double()[:, None] * theta
    x, y = q.unbind(1)
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.stack([cos * x + sin * y, cos * y - sin * x], 2).flatten(1)


def distance_average(law: Law, q, theta, n: int) -> Tensor:
    """What a rotary head reports over many tokens of a law at the distances 1 … n: a ratio of means over distances.

    sum_delta grad K(t_delta) e^{K(t_delta)} / sum_delta e^{K(t_delta)}, for values equal to the keys.

    Parameters
    ----------
    law : of the keys, in 2M dimensions; q : (2M,); theta : (M,) radians; n : distances.

    Returns
    -------
    Tensor of shape (2M,), float64

    Raises
    ------
    ValueError
        If shapes do not match, or K is infinite at one of the tilts.

    Source: chapter 13.
    """
    law, n = as_law("law", law, "log_mgf", "tilted_mean"), as_count("n", n)
    theta = as_tensor("theta", theta, ndim=1)
    q = as_vector("q", q, law.dim)
    top, above, below = -math.inf, 0.0, 0.0
    for start in range(0, n, _ROWS):
        tilts = turned(q, theta, torch.arange(start + 1, min(start + _ROWS, n) + 1))
        height = law.log_mgf(tilts)
        new = max(top, height.max().item())
        weight, keep = torch.exp(height - new), math.exp(top - new)
        above, below = above * keep + weight @ law.tilted_mean(tilts), below * keep + weight.sum()
        top = new
    return finite_answer("q", above / below)


def torus_average(q, mean, variance: float = 1.0) -> Tensor:
    """Limit of `distance_average` as n grows, for keys N(mean, variance I) and angles without an integer relation.

    mean + variance sum_m |q_m| I_1(r_m)/I_0(r_m) mean_m/|mean_m|, r_m = |q_m||mean_m|, over planes m: of the query only
    its lengths |q_m| are left, and without a mean nothing is.

    Parameters
    ----------
    q, mean : (2M,); variance : of each coordinate of a key.

    Returns
    -------
    Tensor of shape (2M,), float64

    Raises ValueError if shapes do not match or are odd, or the variance is not positive.

    Source: chapter 13.
    """
    q = as_tensor("q", q, ndim=1).double()
    if len(q) == 0 or len(q) % 2:
        raise ValueError(f"q: expected an even number of coordinates, two a plane, got {len(q)}")
    mean, variance = as_vector("mean", mean, len(q)).double(), as_positive("variance", variance)
    lengths, sizes = (v.reshape(-1, 2).norm(dim=1) for v in (q, mean))
    r = (lengths * sizes).numpy()
    pattern = torch.as_tensor(ive(1, r) / ive(0, r))
    unit = torch.where(sizes[:, None] > 0, mean.reshape(-1, 2) / sizes[:, None].clamp(min=1e-300), 0.0)
    return finite_answer("q", mean + variance * ((lengths * pattern)[:, None] * unit).flatten())


def mean_lengths(n, q, theta) -> np.ndarray:
    """Lengths, plane by plane, of the mean output over n keys N(0, I) at the distances 1 … n, exact at every n.

    (1 - P) |q_m| times `plane_factor`, with P the participation E sum w^2 of n keys at load |q|: turning keys of an
    isotropic law changes neither the weights' law nor P.

    Parameters
    ----------
    n : number of keys, at least 1; q : (2M,), of a length up to 300, q = 0 excluded; theta : (M,).

    Returns
    -------
    (M,), in units of a key's standard deviation

    Raises ValueError if shapes do not match, or q is zero or too long.

    Source: chapter 13.
    """
    n = as_count("n", n)
    theta = as_tensor("theta", theta, ndim=1).double()
    q = as_vector("q", q, 2 * len(theta)).double()
    load = as_positive("q: its length", q.norm().item(), most=MOST_TILT)
    kept = 1 - softmax_moments(float(n), load).participation
    return kept * q.reshape(-1, 2).norm(dim=1).numpy() * plane_factor(float(n), theta.numpy())


def slow_planes(base: float, dim: int, n: float) -> int:
    """How many planes of a head keep at least half of their signal over n keys: those with theta_m <= 3.79 / n."""
    return int((frequencies(base, dim) * as_number("n", n, least=1) <= HALF).sum())
