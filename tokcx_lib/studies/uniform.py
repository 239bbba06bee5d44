"""The largest error of attention over a ball of queries, searched for by projected gradient ascent (chapter 2).

The theorem of the uniform rate bounds a supremum over all queries of a ball, and no list of queries measures one. A
search finds a lower bound of it, and the tests say how good that is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from tokcx_lib import runtime
from tokcx_lib.runtime import one_thread
from tokcx_lib.theory.laws import Law
from tokcx_lib.validation import (
    as_count,
    as_law,
    as_lengths,
    as_list,
    as_matrix,
    as_positive,
    as_replicates,
    as_square,
    as_tokens,
    as_vectors,
    finite_answer,
    rows_that_fit,
)

MOST_RADIUS = 1e150  # whose square is finite


class _Gap:
    """Norm and gradient of the error at many queries at once, in units of the ball: z = x / radius."""

    def __init__(self, law: Law, tokens: Tensor, radius: float, A: Tensor | None, V: Tensor | None):
        self.law, self.tokens, self.radius, self.A, self.V = law, tokens, radius, A, V

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """||Gamma_n - Gamma|| (q,) at z (q, d), and its gradient's direction (q, d).

        Gamma_n - Gamma = V (grad K_n - grad K)(A x), so half its square has the gradient A' (Hess K_n - Hess K) V' e.
        """
        x = self.radius * z
        t = x if self.A is None else x @ self.A.mT
        weights = torch.softmax(t @ self.tokens.mT, -1)
        mean = weights @ self.tokens
        gap = mean - self.law.tilted_mean(t)
        if self.V is not None:
            gap = gap @ self.V.mT
        back = gap if self.V is None else gap @ self.V
        weights *= back @ self.tokens.mT - (back * mean).sum(-1, keepdim=True)  # <y_j - mean, back>, weighted
        slope = weights @ self.tokens - torch.einsum("qij,qj->qi", self.law.tilted_cov(t), back)
        slope = slope if self.A is None else slope @ self.A
        return torch.linalg.vector_norm(gap, dim=-1), torch.nn.functional.normalize(slope, dim=-1, eps=1e-300)


def _into_ball(z: Tensor) -> Tensor:
    return z / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp(min=1.0)


def _ball_starts(count: int, dim: int, generator) -> Tensor:
    """Points of the unit ball: every other one on its boundary, where the largest error usually sits."""
    stream = runtime.generator(generator)
    z = torch.randn(count, dim, generator=stream, dtype=torch.float64)
    z = z / torch.linalg.vector_norm(z, dim=1, keepdim=True)
    depth = torch.rand(count, 1, generator=stream, dtype=torch.float64) ** (1 / dim)
    depth[::2] = 1.0
    return z * depth


@one_thread()
@torch.no_grad()
def largest_error(
    law: Law, tokens, radius: float, A=None, V=None, starts: int = 100, generator=None
) -> tuple[float, Tensor]:
    """The largest ||Gamma_n(x) - Gamma(x)|| over the ball |x| <= radius, and a query that attains it (chapter 2).

    Projected gradient ascent from many starts, all in one batch. A step follows the gradient's direction and is
    projected back into the ball; each start keeps its own step length, which grows after a success and shrinks after
    a failure. Starts that are far behind are dropped on the way: all make 8 steps, the best quarter 12 more, and the
    best sixteenth goes on until no step gains. The result is a lower bound on the supremum, and more starts can only
    raise it if they find a higher hill: the chapter and the tests compare with dense grids and with four times as many
    starts.

    Parameters
    ----------
    law : the law of the tokens, with ``tilted_mean`` and ``tilted_cov``.
    tokens : (n, d), a sample of it. Memory is of the order of starts x n.
    A : (d, d); V : (d_v, d); None for the identity.
    starts : number of starting queries, at least 4.

    Returns
    -------
    (error, query), a number and a tensor (d,)

    Raises
    ------
    ValueError
        If shapes do not match, the radius is not positive, or there are fewer than 4 starts.
    """
    tokens = as_tokens("tokens", tokens, as_law("law", law, "tilted_mean", "tilted_cov").dim)
    A = None if A is None else as_square("A", A, law.dim).to(tokens)
    V = None if V is None else as_matrix("V", V, columns=law.dim).to(tokens)
    radius = as_positive("radius", radius, most=MOST_RADIUS)
    gap = _Gap(law, tokens, radius, A, V)
    starts = as_count("starts", starts, least=4, most=rows_that_fit(len(tokens)))
    z = _ball_starts(starts, law.dim, generator).to(tokens)
    value, slope = (finite_answer("radius, A, V", part) for part in gap(z))
    step = torch.full((len(z), 1), 0.5).to(tokens)
    for steps, keep in ((8, math.ceil(starts / 4)), (12, math.ceil(starts / 16)), (80, 1)):
        for _ in range(steps):
            trial = _into_ball(z + step * slope)
            trial_value, trial_slope = gap(trial)
            better = (trial_value > value * (1 + 1e-9))[:, None]
            z, slope = torch.where(better, trial, z), torch.where(better, trial_slope, slope)
            value = torch.where(better[:, 0], trial_value, value)
            step = torch.where(better, 2.0 * step, 0.3 * step)
            if step.max() < 1e-6:
                break
        best = value.topk(min(keep, len(value))).indices
        z, slope, value, step = z[best], slope[best], value[best], step[best]
    return value[0].item(), as_vectors("query", radius * z[0], law.dim)


@one_thread()
def uniform_sweep(
    law: Law,
    radii: Sequence[float],
    lengths: Sequence[int],
    replicates: int | Iterable[int],
    seed: int,
    A=None,
    V=None,
    starts: int = 100,
) -> pd.DataFrame:
    """Largest error of attention over n tokens of a law, over all queries of a ball, by `largest_error` (chapter 2).

    Parameters
    ----------
    radii : radii R of the balls |x| <= R.
    lengths : increasing numbers of tokens.
    replicates : how many draws of the tokens, or the numbers of those to run.
    A : (d, d); V : (d_v, d); None for the identity.
    starts : starting queries of each search.

    Returns
    -------
    One row per replicate, n and radius: columns replicate, n, radius, error (the supremum found), depth (|x| / R of
    the query that attains it).

    Raises
    ------
    ValueError
        If shapes do not match, a radius is not positive, or lengths do not increase.
    """
    radii = [as_positive("radii", radius, most=MOST_RADIUS) for radius in as_list("radii", radii, "radii")]
    as_law("law", law, "sample", "tilted_mean", "tilted_cov")
    lengths = as_lengths("lengths", lengths, most=rows_that_fit(law.dim))
    rows = []
    for replicate in tqdm(as_replicates(replicates), desc="replicates", leave=False):
        tokens = law.sample(lengths[-1], runtime.stream(seed, replicate))
        for n in lengths:
            for radius in radii:
                error, query = largest_error(law, tokens[:n], radius, A, V, starts, runtime.stream(seed, replicate, 1))
                depth = torch.linalg.vector_norm(query).item() / radius
                rows.append({"replicate": replicate, "n": n, "radius": radius, "error": error, "depth": depth})
    return pd.DataFrame(rows)
