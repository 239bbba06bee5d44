"""Draws of the outermost of n Gaussian tokens, at any n, and the mean of hardmax attention over them (chapter 4).

Hardmax attention reads extreme tokens only, so of n tokens N(0, I) only the outermost need to be drawn: their law is
that of order statistics, and n may be 10^12 or 10^30. Derivations: chapter 4.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.spatial import ConvexHull
from scipy.special import chdtri, ndtri_exp
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.validation import MOST_DIM, as_count, as_number, as_tokens, finite_answer, rows_that_fit


def _as_whole_number(n, least: int) -> float:
    number = as_number("n", n, least)
    if number != math.floor(number):
        raise ValueError(f"n: expected an integer >= {least}, got {n}")
    return number


def sample_extremes(n: int, replicates: int, generator=None) -> Tensor:
    """Smallest and largest of n tokens N(0, 1), drawn without drawing the others; any n >= 2 (10^300 works).

    The largest of n uniform variables is U^(1/n). Given it, the others are uniform below it, so that the smallest of
    all is, as a share of the largest, 1 - U'^(1/(n-1)) with another uniform U'. In logarithms, no digit is lost.

    Returns
    -------
    Tensor of shape (replicates, 2), float64: columns min and max.

    Raises
    ------
    ValueError
        If n is not an integer >= 2 or replicates not an integer >= 1.

    Source: classical (order statistics of a sample).
    """
    n, replicates = _as_whole_number(n, least=2), as_count("replicates", replicates, most=rows_that_fit(8))
    stream = runtime.generator(generator)
    u = torch.rand(replicates, 2, generator=stream, dtype=torch.float64, device=stream.device).cpu().numpy()
    log_u = np.log1p(-u) / [n, n - 1]  # 1 - u is never 0
    largest = -ndtri_exp(np.log(-np.expm1(log_u[:, 0])))
    smallest = ndtri_exp(np.log(-np.expm1(log_u[:, 1])) + log_u[:, 0])
    return torch.from_numpy(np.stack([smallest, largest], 1))


def outer_tokens(n: int, dim: int, count: int, generator=None) -> Tensor:
    """The `count` outermost of n tokens N(0, I) in R^dim, from the outside in, without drawing the others.

    The ranks P(|y| > radius) of n tokens are n uniform variables; the smallest of them are partial sums of exponential
    variables, divided by the sum of n + 1 of these. Directions are uniform.

    Returns
    -------
    Tensor of shape (count, dim), float64.

    Raises
    ------
    ValueError
        If dim or count is not an integer >= 1, or n not an integer >= count.

    Source: classical (Rényi's representation of order statistics).
    """
    dim = as_count("dim", dim, most=MOST_DIM)
    count = as_count("count", count, most=rows_that_fit(2 * dim))
    n = _as_whole_number(n, least=count)
    stream = runtime.generator(generator)
    z = torch.randn(count, dim, generator=stream, dtype=torch.float64, device=stream.device)
    u = torch.rand(count, generator=stream, dtype=torch.float64, device=stream.device)
    partial = torch.cumsum(-torch.log1p(-u), 0)
    # The sum of the n + 1 - count others is a Gamma variable: Wilson and Hilferty's cube is exact to about 1/n.
    rest = n + 1 - count
    w = torch.randn(1, generator=stream, dtype=torch.float64, device=stream.device)
    rank = partial / (partial[-1] + rest * (1 - 1 / (9 * rest) + w / (3 * math.sqrt(rest))).clamp(min=0) ** 3)
    radius = torch.from_numpy(np.sqrt(chdtri(dim, rank.cpu().numpy())))
    return radius[:, None] * torch.nn.functional.normalize(z.cpu(), dim=1)


def steiner_point(tokens) -> Tensor:
    """Mean of hardmax attention over queries of uniform direction (A = V = I): the Steiner point of the convex hull.

    In one dimension that is the midrange. In the plane each vertex of the hull counts by its exterior angle / 2 pi:
    the share of directions in which it is the furthest token.

    Parameters
    ----------
    tokens : (n, 1) or (n, 2); in the plane at least three, not on one line.

    Returns
    -------
    Tensor of shape (1,) or (2,), float64.

    Raises
    ------
    ValueError
        If the shape is another, or a token is NaN or infinite.

    Source: classical (convex geometry); chapter 4.
    """
    tokens = as_tokens("tokens", tokens).detach().double()
    n, dim = tokens.shape
    if dim == 1:
        return finite_answer("tokens", tokens.amax(0) + tokens.amin(0)) / 2
    if dim != 2 or n < 3 or torch.linalg.matrix_rank(tokens - tokens[0]) < 2:
        raise ValueError(f"tokens: expected shape (n, 1), or (n, 2) with a triangle in it, got {tuple(tokens.shape)}")
    points = tokens.cpu().numpy()
    corners = points[ConvexHull(points).vertices]  # counter-clockwise
    edges = np.roll(corners, -1, axis=0) - corners
    heading = np.arctan2(edges[:, 1], edges[:, 0])
    turn = np.mod(heading - np.roll(heading, 1), 2 * np.pi)
    return torch.from_numpy(turn @ corners / (2 * np.pi))


def steiner_estimate(tokens, frames: int, generator=None) -> Tensor:
    """An unbiased estimate of the Steiner point, in any dimension, from random orthonormal frames of directions.

    The Steiner point is d E[h(u) u], u uniform on the sphere, h(u) = max_j <u, y_j>. Each frame u_1 ... u_d gives
    sum_i u_i (h(u_i) - h(-u_i)) / 2, which is right for a single token, and so in the mean has little left to average.

    Parameters
    ----------
    tokens : (n, d); frames : number of frames, so that 2 d frames directions are asked.

    Returns
    -------
    Tensor of shape (d,), float64, for which E<first, second> = E|Steiner point|^2 if two estimates are independent.

    Raises
    ------
    ValueError
        If tokens are not of shape (n, d), NaN or infinite, or frames is not an integer >= 1.

    Source: classical (convex geometry); chapter 4.
    """
    tokens = as_tokens("tokens", tokens).double()
    dim = tokens.shape[1]
    frames = as_count("frames", frames, most=rows_that_fit(3 * dim**2))
    stream = runtime.generator(generator)
    z = torch.randn(frames, dim, dim, generator=stream, dtype=torch.float64, device=stream.device)
    u = torch.linalg.qr(z).Q.mT.reshape(-1, dim).to(tokens)
    heights = u @ tokens.mT
    return finite_answer("tokens", ((heights.amax(1) + heights.amin(1)) / 2) @ u / frames)
