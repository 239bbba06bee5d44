"""Monte Carlo over n: errors of attention over n tokens drawn from a law whose limit is known.

A replicate is one draw of the longest sample. Its prefixes give the errors at every n, so they share tokens, and fits
resample whole replicates. Replicate r draws from its own stream, `runtime.stream(seed, r)`: any subset of replicates
can be run again alone, with the same numbers. Draws are made on the CPU in float64, and then moved. Tables have one
row per replicate, n and setting, as `fits.fit_slope` wants them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from tokcx_lib import runtime
from tokcx_lib.attention import attention_map
from tokcx_lib.laws import Gaussian, Law
from tokcx_lib.streaming import Moments, prefix_states, self_attention_moments
from tokcx_lib.validation import (
    MOST_DIM,
    as_array,
    as_count,
    as_dtype,
    as_law,
    as_lengths,
    as_list,
    as_matrix,
    as_number,
    as_positive,
    as_square,
    as_tensor,
    as_tokens,
    as_vectors,
    as_wide,
    finite_answer,
    rows_that_fit,
    shown,
)

MOST_RADIUS = 1e150  # whose square is finite
MESH = 0.15  # step of the table of a scalar map, in units of 1 / (largest token - smallest token)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for many small operations: starting more for each costs more than it gains, above all on a busy CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
@torch.no_grad()
def pointwise_sweep(
    law: Law, queries, lengths: Sequence[int], replicates: int | Iterable[int], seed: int, A=None, V=None
) -> pd.DataFrame:
    """Error Gamma_n(x) - Gamma(x) of attention over n tokens of a law, at fixed queries (chapter 2).

    Parameters
    ----------
    queries : (q, d); A : (d, d), None for the identity; V : (d_v, d), None for the identity.
    lengths : increasing numbers of tokens.
    replicates : how many draws of the tokens, or the numbers of those to run.

    Returns
    -------
    One row per replicate, n and query: columns replicate, n, query (its index), error (the norm), and the error's
    entries e0, e1, …

    Raises
    ------
    ValueError
        If shapes do not match or lengths do not increase.
    """
    queries = as_wide("queries", as_tokens("queries", queries, as_law("law", law, "sample", "tilted_mean").dim))
    lengths = as_lengths("lengths", lengths, most=rows_that_fit(law.dim))
    limit = attention_map(law, queries, A, V)
    chosen = _numbers(replicates)
    gaps = []
    for replicate in tqdm(chosen, desc="replicates", leave=False):
        tokens = law.sample(lengths[-1], runtime.stream(seed, replicate))
        gaps += [attention_map(tokens[:n], queries, A, V) - limit for n in lengths]
    gap = torch.stack(gaps).flatten(0, 1)
    names = ["replicate", "n", "query"]
    table = pd.MultiIndex.from_product([chosen, lengths, range(len(queries))], names=names).to_frame(index=False)
    table["error"] = finite_answer("queries, A, V", torch.linalg.vector_norm(gap, dim=1)).numpy()
    return table.assign(**{f"e{i}": column.numpy() for i, column in enumerate(gap.T)})


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


@_one_thread()
@torch.no_grad()
def largest_error(
    law: Law, tokens, radius: float, A=None, V=None, starts: int = 100, generator=None
) -> tuple[float, Tensor]:
    """The largest ||Gamma_n(x) - Gamma(x)|| over the ball |x| <= radius, and a query that attains it (chapter 2).

    Projected gradient ascent from many starts, all in one batch. A step follows the gradient's direction and is
    projected back into the ball; each start keeps its own step length, which grows after a success and shrinks after
    a failure. Starts that are far behind are dropped on the way: all make 8 steps, the best quarter 12 more, and the best
    sixteenth goes on until no step gains. The result is a lower bound on the supremum, and more starts can only
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


@_one_thread()
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
    for replicate in tqdm(_numbers(replicates), desc="replicates", leave=False):
        tokens = law.sample(lengths[-1], runtime.stream(seed, replicate))
        for n in lengths:
            for radius in radii:
                error, query = largest_error(law, tokens[:n], radius, A, V, starts, runtime.stream(seed, replicate, 1))
                depth = torch.linalg.vector_norm(query).item() / radius
                rows.append({"replicate": replicate, "n": n, "radius": radius, "error": error, "depth": depth})
    return pd.DataFrame(rows)


def gaussian_limit(law: Gaussian, A, V=None) -> Moments:
    """Mean (d_v,) and covariance (d_v, d_v) of V grad K(AX) for Gaussian tokens X ~ law, in closed form.

    The map is V (mean + cov A x), so m = V (mean + cov A mean) and C = V cov A cov A' cov V' (chapter 1).

    Raises
    ------
    ValueError
        If the law is not Gaussian, or A or V does not match it.
    """
    if not isinstance(law, Gaussian):
        raise ValueError(f"limit, law: only Gaussian tokens have one in closed form here; give it for {shown(law)}")
    matrix = law.cov.double() @ as_square("A", A, law.dim).double()
    mean = law.mean.double() + matrix @ law.mean.double()
    if V is not None:
        V = as_matrix("V", V, columns=law.dim).double()
        matrix, mean = V @ matrix, V @ mean
    return Moments(mean, finite_answer("A, V", matrix @ law.cov.double() @ matrix.mT))


def power_law_form(dim: int, seed: int = 0, decay: float = 1.0) -> Tensor:
    """A bilinear form (dim, dim) with singular values k^-decay, k = 1, ..., dim, in two random bases, float64.

    For tokens of covariance I its horizon is 1 and its mean square load the sum of their squares: from 1 (rank one, where
    `decay` is infinite) to dim (flat, where it is 0).

    Raises
    ------
    ValueError
        If `dim` is not a positive integer or `decay` is negative.
    """
    decay = as_number("decay", decay, least=0, finite=False)
    stream = runtime.generator(seed)
    dim = as_count("dim", dim, most=MOST_DIM)
    shape = (2, dim, dim)
    bases, upper = torch.linalg.qr(torch.randn(shape, generator=stream, dtype=torch.float64))
    left, right = bases * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]  # one sign on every machine
    return left / torch.arange(1, dim + 1, dtype=torch.float64) ** decay @ right.mT


def random_head(dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """A = W_K' W_Q / sqrt(dim) and V of a head whose three matrices have independent entries N(0, 1 / dim), float64.

    Raises
    ------
    ValueError
        If `dim` is not a positive integer.
    """
    dim = as_count("dim", dim, most=MOST_DIM)
    shape = (3, dim, dim)
    query, key, value = torch.randn(shape, generator=runtime.stream(seed), dtype=torch.float64) / math.sqrt(dim)
    return key.mT @ query / math.sqrt(dim), value


def moment_sweep(
    law: Law,
    A,
    V,
    lengths: Sequence[int],
    replicates: int | Iterable[int],
    seed: int = 0,
    limit: Moments | None = None,
    dtype: torch.dtype = torch.float64,
    device=None,
) -> pd.DataFrame:
    """Errors of the moments of self-attention over the first n of i.i.d. tokens, for every n in `lengths`.

    Parameters
    ----------
    law : of tokens in R^d; A : (d, d), logit <A x, y>; V : (d_v, d) or None for the identity.
    lengths : increasing integers.
    replicates : how many, or the numbers of those to run.
    limit : mean (d_v,) and covariance (d_v, d_v) of V grad K(AX); computed if the law is Gaussian.
    dtype : precision of attention; the work grows like replicates x n^2.

    Returns
    -------
    DataFrame
        replicate, n, mean_error = ||m_n - m||_2 and cov_error = ||C_n - C||_F (covariances have divisor n).

    Raises
    ------
    ValueError
        If shapes do not match, lengths do not increase, a replicate is not an integer >= 0, or the limit is missing.
    """
    find = None if limit is None else lambda form: limit
    table = _sweep(_Heads(law, A, V, [1.0], lengths, find, tabulate=False), replicates, seed, dtype, device)
    return table.drop(columns="scale")


def horizon_sweep(
    law: Law,
    A,
    V,
    scales: Sequence[float],
    lengths: Sequence[int],
    replicates: int | Iterable[int],
    seed: int = 0,
    limit: Callable[[Tensor], Moments] | None = None,
    dtype: torch.dtype = torch.float64,
    device=None,
) -> pd.DataFrame:
    """`moment_sweep` for A multiplied by each of `scales`: the same tokens seen by heads of growing horizon.

    In one dimension the tilts of all queries at all scales lie on one line, and so one table of the map over that
    line serves them all: the work grows like n times the largest horizon, not like n^2. Between the points of the
    table the map is a cubic with the right values and slopes; it is off by less than 1e-6 of the range of the tokens.

    Parameters
    ----------
    scales : positive numbers, different from each other.
    limit : for a law that is not Gaussian, a function that returns the limit for a bilinear form.

    Others, and errors, as for `moment_sweep`.

    Returns
    -------
    DataFrame
        As `moment_sweep`, with a first column, scale.
    """
    return _sweep(_Heads(law, A, V, scales, lengths, limit), replicates, seed, dtype, device)


def horizon_errors(
    law: Law,
    A,
    V,
    scales: Sequence[float],
    lengths: Sequence[int],
    replicate: int,
    seed: int = 0,
    limit: Callable[[Tensor], Moments] | None = None,
    dtype: torch.dtype = torch.float64,
    device=None,
) -> tuple[pd.DataFrame, Tensor]:
    """One replicate of `horizon_sweep`, and its errors of the second moment.

    Returns
    -------
    (table, errors)
        The rows of `horizon_sweep` for this replicate, scale by scale, and (1/n) sum_i Gamma_n(x_i) Gamma_n(x_i)' minus
        its limit, shape (scales, lengths, d_v, d_v), for `leave_one_out`.
    """
    heads = _Heads(law, A, V, scales, lengths, limit)
    replicate, dtype = as_count("replicate", replicate, least=0, most=2**62), as_dtype("dtype", dtype)
    rows, second = heads.errors(replicate, seed, dtype, runtime.device(device))
    return pd.DataFrame(rows, columns=_COLUMNS), second


def leave_one_out(errors) -> np.ndarray:
    """Inner product of every replicate's error with the mean error of the others, shape (replicates, ...).

    The mean over replicates is the squared norm of the mean error, without bias (a U-statistic): the norm of a mean over
    few replicates carries the noise of every entry, while errors of different replicates are independent.

    Parameters
    ----------
    errors : (replicates, ..., entries), at least two replicates.

    Raises
    ------
    ValueError
        If there is only one replicate.
    """
    errors = as_array("errors", errors)
    if errors.ndim < 2 or len(errors) < 2:
        raise ValueError(f"errors: expected two or more replicates, got shape {errors.shape}")
    total = errors.sum(0, dtype=np.float64)
    return np.stack([(error * (total - error)).sum(-1) for error in errors]) / (len(errors) - 1)


def _as_limit(limit, dim: int, V) -> Moments:
    """A limit (mean, cov) of the right shapes, in float64."""
    d_v = dim if V is None else as_matrix("V", V, columns=dim).shape[0]
    if not isinstance(limit, (tuple, list)) or len(limit) != 2:
        raise ValueError(f"limit: expected a mean and a covariance, got {shown(limit)}")
    mean, cov = (as_tensor("limit", part).double() for part in limit)
    if mean.shape != (d_v,) or cov.shape != (d_v, d_v):
        raise ValueError(
            f"limit: expected shapes {(d_v,)} and {(d_v, d_v)}, got {tuple(mean.shape)} and {tuple(cov.shape)}"
        )
    return Moments(mean, cov)


def _numbers(replicates: int | Iterable[int]) -> list[int]:
    """Numbers of the replicates to run."""
    if isinstance(replicates, Iterable) and getattr(replicates, "ndim", 1):
        given = as_list("replicates", replicates, "numbers of replicates")
        numbers = [as_count("replicates", r, least=0, most=2**62) for r in given]
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"replicates: expected different numbers, at least one, got {numbers}")
        return numbers
    return list(range(as_count("replicates", replicates)))


_COLUMNS = ["scale", "replicate", "n", "mean_error", "cov_error"]


class _Heads:
    """Heads that differ in scale, on tokens of one law: limits, and the errors of a replicate."""

    def __init__(self, law: Law, A, V, scales, lengths, limit, tabulate: bool = True):
        self.law, self.V = as_law("law", law, "sample"), V
        self.tabulate = tabulate and law.dim == 1
        self.scales = [as_positive("scales", scale) for scale in as_list("scales", scales, "positive numbers")]
        if len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales: expected positive numbers, each given once, got {self.scales}")
        self.A = as_square("A", A, law.dim)
        self.lengths = as_lengths("lengths", lengths, most=rows_that_fit(law.dim))
        if limit is not None and not callable(limit):
            raise ValueError(f"limit: expected a function of a bilinear form, got {shown(limit)}")
        find = limit or (lambda form: gaussian_limit(law, form, V))
        self.limits = [_as_limit(find(scale * self.A), law.dim, V) for scale in self.scales]

    def moments(self, tokens: Tensor) -> list[Moments]:
        if not self.tabulate:
            stack = torch.stack([scale * self.A for scale in self.scales])
            mean, cov = self_attention_moments(tokens, stack, self.V, self.lengths)
            return [Moments(mean[:, i], cov[:, i]) for i in range(len(stack))]
        return _scalar_moments(tokens, [scale * self.A.item() for scale in self.scales], self.V, self.lengths)

    def errors(self, replicate: int, seed: int, dtype, place) -> tuple[list[tuple], Tensor]:
        """Rows of the table, and errors of the second moment (scales, lengths, d_v, d_v)."""
        tokens = self.law.sample(self.lengths[-1], runtime.stream(seed, replicate)).to(place, dtype)
        rows, second = [], []
        for scale, limit, found in zip(self.scales, self.limits, self.moments(tokens)):
            found = Moments(*(part.cpu() for part in found))
            mean_error = torch.linalg.vector_norm(found.mean - limit.mean, dim=-1)
            cov_error = torch.linalg.matrix_norm(found.cov - limit.cov)
            rows += [(scale, replicate, *row) for row in zip(self.lengths, mean_error.tolist(), cov_error.tolist())]
            second.append(found.second_moment - limit.second_moment)
        return rows, torch.stack(second)


def _sweep(heads: _Heads, replicates, seed, dtype, device) -> pd.DataFrame:
    """One row a scale, replicate and n."""
    place, dtype = runtime.device(device), as_dtype("dtype", dtype)
    rows = []
    for replicate in tqdm(_numbers(replicates), desc="replicates", leave=False):
        rows += heads.errors(replicate, seed, dtype, place)[0]
    return pd.DataFrame(rows, columns=_COLUMNS).sort_values(["scale", "replicate", "n"], ignore_index=True)


def _scalar_moments(tokens: Tensor, slopes: Sequence[float], V, lengths: Sequence[int]) -> list[Moments]:
    """Moments of scalar self-attention, values V y, for logits a x y with each slope a."""
    y = as_tokens("tokens", tokens, dim=1)[:, 0]
    width = (y.max() - y.min()).clamp(min=torch.finfo(y.dtype).tiny)
    reach = (max(abs(a) for a in slopes) * y.abs().max()).clamp(min=torch.finfo(y.dtype).tiny)
    count = int((2 * reach * width / MESH).ceil().item()) + 2
    if count > len(y) * len(slopes):  # the queries themselves are fewer than the points of a table
        return [self_attention_moments(tokens, [[a]], V, lengths) for a in slopes]
    grid = torch.linspace(-reach.item(), reach.item(), count, dtype=y.dtype, device=y.device)
    step = grid[1] - grid[0]
    # Tilted first and second moments of the tokens; the variance is the slope of the map.
    pairs = torch.stack([y, y * y], -1)
    values = V if V is None else as_matrix("V", V, columns=1).double()
    found: list[list[Moments]] = [[] for _ in slopes]
    for n, state in zip(lengths, prefix_states(grid[:, None], y[:, None], pairs, lengths)):
        first, second = state.output.unbind(-1)
        rise = (second - first**2) * step
        for a, moments in zip(slopes, found):
            place = (a * y[:n] + reach) / step
            left = place.long().clamp(0, count - 2)
            output = hermite_cubic(place - left, first[left], first[left + 1], rise[left], rise[left + 1]).double()
            mean, cov = output.mean()[None], output.var(correction=0)[None, None]
            if values is not None:
                mean, cov = values.to(mean) @ mean, values.to(cov) @ cov @ values.to(cov).mT
            moments.append(Moments(mean, cov))
    return [Moments(*(torch.stack(parts) for parts in zip(*moments))) for moments in found]


def hermite_cubic(u: Tensor, start: Tensor, end: Tensor, rise_start: Tensor, rise_end: Tensor) -> Tensor:
    """Cubic on [0, 1] with the given values and slopes at its ends (Hermite). Shapes broadcast."""
    names = "u", "start", "end", "rise_start", "rise_end"
    given = [as_tensor(name, part) for name, part in zip(names, (u, start, end, rise_start, rise_end))]
    u, start, end, rise_start, rise_end = given
    try:
        torch.broadcast_shapes(*(part.shape for part in given))
    except RuntimeError as error:
        raise ValueError(f"{', '.join(names)}: expected shapes that broadcast ({error})") from error
    jump = end - start
    curved = u * (rise_start + rise_end - 2 * jump)
    return finite_answer(", ".join(names), start + u * (rise_start + u * (3 * jump - 2 * rise_start - rise_end + curved)))
