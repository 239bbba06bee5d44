"""How the heads of one layer converge together: their errors, after the output projection, are vectors of one space.

Heads of a layer read the same keys, so what n keys do to one of them is not independent of what they do to another. The
error of the layer is the sum of its heads' errors, e = sum_h W_O^h (Gamma_n^h - Gamma^h), and all that one needs to
know of it are the inner products <e_h, e_g> (`gram_errors`). To first order these are E<e_h, e_g> = c_hg / n with a
matrix c that follows from the limit alone (`first_order_gram`). Chapter 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.models.heads import Head
from tokcx_lib.sampling.streaming import prefix_states
from tokcx_lib.validation import (
    as_count,
    as_kind,
    as_lengths,
    as_list,
    as_matrix,
    as_tensor,
    as_tokens,
    finite_answer,
    naming,
    rows_that_fit,
    shown,
)


class Limits(NamedTuple):
    """What heads give over all of a pool: `outputs` (h, m, d_v) at m queries, `spread` the size of their sum after W_O.

    `spread` is the root mean square over the queries of the distance of sum_h W_O^h Gamma^h from its mean over them.
    """

    outputs: Tensor
    spread: float


def _inputs(heads, outputs, queries, pool) -> tuple[list[Head], list[Tensor], Tensor, Tensor]:
    """Heads of one layer, their W_O, queries and pool, checked."""
    heads = [as_kind("heads", head, Head) for head in as_list("heads", heads, "heads")]
    dim = heads[0].W_K.shape[1]
    outputs = _as_outputs(outputs, [len(head.W_V) for head in heads])
    pool = as_tokens("pool", pool, dim).detach()
    return heads, outputs, as_tokens("queries", queries, dim).detach().to(pool), pool


def _as_outputs(outputs, sizes: list[int]) -> list[Tensor]:
    if isinstance(outputs, Tensor) and outputs.ndim == 3:
        outputs = outputs.unbind()
    if not isinstance(outputs, (list, tuple)) or len(outputs) != len(sizes):
        raise ValueError(f"outputs: expected a matrix W_O for each of {len(sizes)} heads, got {shown(outputs)}")
    found = [as_matrix("outputs", W, columns=size).detach() for W, size in zip(outputs, sizes)]
    if len({len(W) for W in found}) > 1:
        raise ValueError(f"outputs: expected matrices into one space, got shapes {[tuple(W.shape) for W in found]}")
    return found


def _projected(heads: Sequence[Head], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.stack(parts) for parts in zip(*(head.project(x) for head in heads)))


def pool_limits(heads: Sequence[Head], outputs: Sequence[Tensor], queries: Tensor, pool: Tensor) -> Limits:
    """Attention of queries (m, d) over a whole pool (N, d), for heads of one layer; `outputs`: W_O of each (d, d_v)."""
    heads, outputs, queries, pool = _inputs(heads, outputs, queries, pool)
    q = _projected(heads, queries)[0]
    _, k, v = _projected(heads, pool)
    with naming("queries, pool"):
        (state,) = prefix_states(q, k, v, [len(pool)])
    total = sum(o @ w.to(o).mT for o, w in zip(state.output, outputs, strict=True))
    spread = finite_answer("pool, outputs", (total - total.mean(0)).double().square().sum(-1).mean().sqrt())
    return Limits(state.output, spread.item())


def gram(errors: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Inner products of the heads' errors after W_O, mean over queries: (h, h), float64.

    Parameters
    ----------
    errors : (h, m, d_v), before W_O; outputs : W_O of each head, (d, d_v).
    """
    errors = as_tensor("errors", errors, ndim=3)
    if 0 in errors.shape:
        raise ValueError(f"errors: expected shape (h, m, d_v), none zero, got {tuple(errors.shape)}")
    outputs = _as_outputs(outputs, len(errors) * [errors.shape[2]])
    after = torch.stack([e.double() @ w.to(e.device).double().mT for e, w in zip(errors, outputs, strict=True)])
    return finite_answer("errors, outputs", torch.einsum("hmd,gmd->hg", after, after) / after.shape[1])


def gram_errors(
    heads: Sequence[Head],
    outputs: Sequence[Tensor],
    queries: Tensor,
    pool: Tensor,
    limits: Limits,
    lengths: Sequence[int],
    replicates: int,
    seed: int,
) -> Tensor:
    """`gram` of the errors of the heads of a layer over n tokens, which they share, drawn from a pool with replacement.

    Parameters
    ----------
    heads : of one layer; outputs : their W_O. queries : (m, d); pool : (N, d); limits : `pool_limits` of these.
    lengths : increasing n; the prefixes of one replicate share tokens.
    seed : replicate r draws from the stream (seed, layer, r).

    Returns
    -------
    Tensor (replicates, lengths, h, h), float64. The square of the layer's error is the sum of all entries; those of its
    heads are on the diagonal.
    """
    heads, outputs, queries, pool = _inputs(heads, outputs, queries, pool)
    lengths = as_lengths("lengths", lengths, most=rows_that_fit(pool.shape[1]))
    q = _projected(heads, queries)[0]
    if as_kind("limits", limits, Limits).outputs.shape != (*q.shape[:2], outputs[0].shape[1]):
        raise ValueError(f"limits: expected those of these heads and queries, got shape {tuple(limits.outputs.shape)}")
    found = []
    for replicate in range(as_count("replicates", replicates)):
        stream = runtime.stream(seed, heads[0].layer, replicate)
        drawn = pool[torch.randint(len(pool), (lengths[-1],), generator=stream).to(pool.device)]
        _, k, v = _projected(heads, drawn)
        states = prefix_states(q, k, v, lengths)
        with naming("queries, pool"):
            found.append(torch.stack([gram(state.output - limits.outputs, outputs) for state in states]))
    return torch.stack(found).cpu()


def first_order_gram(heads: Sequence[Head], outputs: Sequence[Tensor], queries: Tensor, pool: Tensor) -> Tensor:
    """The matrix c of E<e_h, e_g> ~ c_hg / n, for n tokens drawn from a pool: (h, h), float64.

    With the weights w_h of a query over the N tokens of the pool, c_hg = N sum_j w_hj w_gj <u_hj, u_gj>, where
    u_hj = W_O^h (value_j - Gamma^h): the cross-covariance of two ratio estimates (delta method), mean over queries.

    Parameters
    ----------
    heads : of one layer; outputs : their W_O; queries : (m, d); pool : (N, d). Memory grows like h d_v N.
    """
    heads, outputs, queries, pool = _inputs(heads, outputs, queries, pool)
    q = _projected(heads, queries)[0].double()
    _, k, v = (part.double() for part in _projected(heads, pool))
    W = torch.stack([w.double() for w in outputs]).to(v)
    inner = torch.einsum("hda,gdb->hgab", W, W)
    count, size = len(heads), v.shape[-1]
    total = torch.zeros(count, count, dtype=torch.float64, device=v.device)
    for query in q.unbind(1):
        weights = torch.softmax((k @ query[..., None])[..., 0], -1)  # (h, N)
        gap = v - (weights[:, None] @ v)
        pulls = (weights[..., None] * gap).movedim(0, 1).reshape(len(pool), -1)  # (N, h d_v)
        cross = (pulls.mT @ pulls).reshape(count, size, count, size)
        total += len(pool) * torch.einsum("hagb,hgab->hg", cross, inner)
    return finite_answer("pool, queries, outputs", total / q.shape[1])


def correlation(grams: Tensor) -> Tensor:
    """Correlation of the errors of heads, (..., h, h): mean inner products over the root of those on the diagonal.

    Parameters
    ----------
    grams : (replicates, ..., h, h), of `gram_errors`.
    """
    grams = as_tensor("grams", grams)
    if grams.ndim < 3 or grams.shape[-1] != grams.shape[-2] or 0 in grams.shape:
        raise ValueError(f"grams: expected shape (replicates, ..., h, h), none zero, got {tuple(grams.shape)}")
    mean = finite_answer("grams", grams.mean(0))
    size = mean.diagonal(dim1=-2, dim2=-1).sqrt()
    if not (size > 0).all():
        raise ValueError("grams: expected positive mean squares on the diagonal")
    return mean / (size[..., :, None] * size[..., None, :])
