"""Monte Carlo over n: errors of attention over n tokens drawn from a law whose limit is known.

A replicate is one draw of the longest sample. Its prefixes give the errors at every n, so they share tokens, and fits
resample whole replicates. Replicate r draws from its own stream, `runtime.stream(seed, r)`: any subset of replicates
can be run again alone, with the same numbers. Draws are made on the CPU in float64, and then moved. Tables have one
row per replicate, n and setting, as `fits.fit_slope` wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from tokcx_lib import runtime
from tokcx_lib.runtime import one_thread
from tokcx_lib.sampling.scalar import scalar_moments
from tokcx_lib.sampling.streaming import self_attention_moments
from tokcx_lib.theory.attention import attention_map
from tokcx_lib.theory.laws import Law
from tokcx_lib.theory.limits import Moments, gaussian_limit
from tokcx_lib.validation import (
    as_array,
    as_count,
    as_dtype,
    as_law,
    as_lengths,
    as_list,
    as_matrix,
    as_positive,
    as_replicates,
    as_square,
    as_tensor,
    as_tokens,
    as_wide,
    finite_answer,
    rows_that_fit,
    shown,
)


@one_thread()
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
    chosen = as_replicates(replicates)
    gaps = []
    for replicate in tqdm(chosen, desc="replicates", leave=False):
        tokens = law.sample(lengths[-1], runtime.stream(seed, replicate))
        gaps += [attention_map(tokens[:n], queries, A, V) - limit for n in lengths]
    gap = torch.stack(gaps).flatten(0, 1)
    names = ["replicate", "n", "query"]
    table = pd.MultiIndex.from_product([chosen, lengths, range(len(queries))], names=names).to_frame(index=False)
    table["error"] = finite_answer("queries, A, V", torch.linalg.vector_norm(gap, dim=1)).numpy()
    return table.assign(**{f"e{i}": column.numpy() for i, column in enumerate(gap.T)})


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

    The mean over replicates is the squared norm of the mean error, without bias (a U-statistic): the norm of a mean
    over few replicates carries the noise of every entry, while errors of different replicates are independent.

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
        return scalar_moments(tokens, [scale * self.A.item() for scale in self.scales], self.V, self.lengths)

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
    for replicate in tqdm(as_replicates(replicates), desc="replicates", leave=False):
        rows += heads.errors(replicate, seed, dtype, place)[0]
    return pd.DataFrame(rows, columns=_COLUMNS).sort_values(["scale", "replicate", "n"], ignore_index=True)
