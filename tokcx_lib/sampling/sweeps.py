"""Monte Carlo over n: errors of attention over n tokens drawn from a law whose limit is known.

A replicate is one draw of the longest sample. Its prefixes give the errors at every n, so they share tokens, and fits
resample whole replicates. Replicate r draws from its own stream, `runtime.stream(seed, r)`: any subset of replicates
can be run again alone, with the same numbers. Draws are made on the CPU in float64, and then moved. Tables have one
row per replicate, n and setting, as `fits.fit_slope` wants them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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
    as_flag,
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


@dataclass(eq=False)
class MomentSweep:
    """Moments of self-attention over the first n of i.i.d. tokens against their limit, for heads that differ in scale.

    A head multiplies A by its scale, and so its horizon; in a replicate all heads and all n see the same tokens. In one
    dimension the tilts of all queries at all scales lie on one line, and one table of the map over that line serves
    them all: the work of a replicate grows like n times the largest horizon, not like n^2. Between the points of the
    table the map is a cubic with the right values and slopes; it is off by less than 1e-6 of the range of the tokens.

    Parameters
    ----------
    law : of tokens in R^d; A : (d, d), logit <A x, y>; lengths : increasing integers.
    V : (d_v, d) or None for the identity.
    scales : positive numbers, different from each other.
    limit : mean (d_v,) and covariance (d_v, d_v) of V grad K(AX), where there is one scale; or a function that returns
        them for a bilinear form. Computed if the law is Gaussian.
    tabulate : False for attention without the table also in one dimension.
    dtype : precision of attention, whose work grows like n^2; device : where it runs, default `runtime.device()`.

    Raises
    ------
    ValueError
        If shapes do not match, lengths do not increase, or the limit is missing.
    """

    law: Law
    A: Tensor
    lengths: Sequence[int]
    V: Tensor | None = None
    scales: Sequence[float] = (1.0,)
    limit: Moments | Callable[[Tensor], Moments] | None = None
    tabulate: bool = True
    dtype: torch.dtype = torch.float64
    device: torch.device | str | None = None

    def __post_init__(self):
        dim = as_law("law", self.law, "sample").dim
        self.scales = [as_positive("scales", scale) for scale in as_list("scales", self.scales, "positive numbers")]
        if len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales: expected positive numbers, each given once, got {self.scales}")
        self.A = as_square("A", self.A, dim)
        self.lengths = as_lengths("lengths", self.lengths, most=rows_that_fit(dim))
        self.V = None if self.V is None else as_matrix("V", self.V, columns=dim)
        self.tabulate, self.dtype = as_flag("tabulate", self.tabulate), as_dtype("dtype", self.dtype)
        self.device = runtime.device(self.device)
        self._limits = [self._limit(scale * self.A) for scale in self.scales]

    def table(self, replicates: int | Iterable[int], seed: int = 0) -> pd.DataFrame:
        """Errors of some replicates.

        Parameters
        ----------
        replicates : how many, or the numbers of those to run.

        Returns
        -------
        DataFrame
            scale, replicate, n, mean_error = ||m_n - m||_2 and cov_error = ||C_n - C||_F (covariances have divisor n).

        Raises
        ------
        ValueError
            If a replicate is not an integer >= 0.
        """
        tables = [self.errors(r, seed)[0] for r in tqdm(as_replicates(replicates), desc="replicates", leave=False)]
        return pd.concat(tables).sort_values(["scale", "replicate", "n"], ignore_index=True)

    def errors(self, replicate: int, seed: int = 0) -> tuple[pd.DataFrame, Tensor]:
        """One replicate: its rows of `table`, scale by scale, and its errors of the second moment.

        Returns
        -------
        (table, errors)
            errors : (1/n) sum_i Gamma_n(x_i) Gamma_n(x_i)' minus its limit, (scales, lengths, d_v, d_v), for
            `leave_one_out`.
        """
        replicate = as_count("replicate", replicate, least=0, most=2**62)
        tokens = self.law.sample(self.lengths[-1], runtime.stream(seed, replicate)).to(self.device, self.dtype)
        rows, second = [], []
        for scale, limit, found in zip(self.scales, self._limits, self._moments(tokens)):
            found = Moments(*(part.cpu() for part in found))
            errors = (part.tolist() for part in found.errors(limit))
            rows += [(scale, replicate, *row) for row in zip(self.lengths, *errors)]
            second.append(found.second_moment - limit.second_moment)
        return pd.DataFrame(rows, columns=["scale", "replicate", "n", "mean_error", "cov_error"]), torch.stack(second)

    def _limit(self, form: Tensor) -> Moments:
        """The limit for a bilinear form, as it was given or in closed form: of the right shapes, float64."""
        if self.limit is None:
            return gaussian_limit(self.law, form, self.V)
        found = self.limit(form) if callable(self.limit) else self.limit
        if found is self.limit and len(self.scales) > 1:
            raise ValueError(f"limit: expected a function of a bilinear form for several scales, got {shown(found)}")
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise ValueError(f"limit: expected a mean and a covariance, got {shown(found)}")
        mean, cov = (as_tensor("limit", part).double() for part in found)
        d_v = self.law.dim if self.V is None else len(self.V)
        if mean.shape != (d_v,) or cov.shape != (d_v, d_v):
            raise ValueError(
                f"limit: expected shapes {(d_v,)} and {(d_v, d_v)}, got {tuple(mean.shape)} and {tuple(cov.shape)}"
            )
        return Moments(mean, cov)

    def _moments(self, tokens: Tensor) -> list[Moments]:
        """Moments at each scale."""
        if self.tabulate and self.law.dim == 1:
            return scalar_moments(tokens, [scale * self.A.item() for scale in self.scales], self.V, self.lengths)
        stack = torch.stack([scale * self.A for scale in self.scales])
        mean, cov = self_attention_moments(tokens, stack, self.V, self.lengths)
        return [Moments(mean[:, i], cov[:, i]) for i in range(len(stack))]


def packed(matrices) -> Tensor:
    """Symmetric matrices (..., d, d) as vectors (..., d (d + 1) / 2) of the same norm, for `leave_one_out`.

    The entries of the upper triangle, row by row; those off the diagonal, which stand for two, times the root of 2 (in
    single precision).

    Raises
    ------
    ValueError
        If the matrices are not square.
    """
    matrices = as_tensor("matrices", matrices)
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2] or 0 in matrices.shape:
        raise ValueError(f"matrices: expected shape (..., d, d), none zero, got {tuple(matrices.shape)}")
    row, column = torch.triu_indices(*matrices.shape[-2:])
    weight = torch.where(row == column, 1.0, math.sqrt(2)).to(matrices)
    return finite_answer("matrices", matrices[..., row, column] * weight)


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
        If there is only one replicate, or products of errors overflow.
    """
    errors = as_array("errors", errors)
    if errors.ndim < 2 or len(errors) < 2:
        raise ValueError(f"errors: expected two or more replicates, got shape {errors.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        total = errors.sum(0, dtype=np.float64)
        found = np.stack([(error * (total - error)).sum(-1) for error in errors]) / (len(errors) - 1)
    if not np.isfinite(found).all():
        raise ValueError("errors: expected numbers whose products are finite, got larger ones")
    return found
