"""How fast a real head converges: its moments under self-attention, and its map at fixed queries.

There is no closed form for a law of real tokens, so a large sample stands for it.

* **Moments.** The law is that of a *pool* of tokens, and its limit is known without error: self-attention over the
  whole pool (`pool_moments`). Replicates draw from the pool with replacement, one token at a time or whole windows
  (`moment_errors`). How far the pool is from the law that it was drawn from is its *noise floor*: the distance between
  the moments of half of it and of all of it, which for an average of independent terms is as large, in mean square.
* **Map.** The outputs of fixed queries, over tokens drawn from the pool (`drawn_map_errors`) or over running text.
  There a stream of tokens is cut into segments, and the outputs over the start of each segment are compared to those
  over all the *other* segments (`map_errors`), so that reference and replicate share no token. The noise floor is half
  the distance between the outputs over the two halves of the stream.
* **Gaussian twin.** The same head on Gaussian tokens of the same mean and covariance, where limits are in closed form
  (`twin_errors`) and errors of the map follow from the exact law of chapter 9 (`twin_map_error`). What real tokens do
  beyond their first two moments is the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.models.heads import Head
from tokcx_lib.sampling.streaming import Partial, merge, prefix_moments, prefix_states, stream_states
from tokcx_lib.theory import softmax_law
from tokcx_lib.theory.laws import Gaussian
from tokcx_lib.theory.limits import Moments, gaussian_limit
from tokcx_lib.validation import (
    as_count,
    as_kind,
    as_lengths,
    as_list,
    as_number,
    as_tokens,
    finite_answer,
    naming,
    rows_that_fit,
    shown,
)

LOAD_POINTS = 60  # loads at which the exact law is evaluated; between them, a cubic spline in logarithms


def pool_moments(head: Head, pool: Tensor, alpha: float = 1.0) -> tuple[Moments, Moments]:
    """Self-attention over half of a pool and over all of it: mean (d_v,) and covariance (d_v, d_v) of each.

    Parameters
    ----------
    pool : (N, d), tokens in an order that makes its first half like its second, such as windows in random order.
    alpha : factor of the logits.

    Returns
    -------
    (half, whole) : Moments, from one pass over the pool
    """
    pool, alpha = _as_tokens("pool", pool, head), as_number("alpha", alpha)
    if len(pool) < 2:
        raise ValueError("pool: expected at least two tokens, got one")
    q, k, v = head.project(pool)
    with naming("pool"):
        mean, cov = prefix_moments(alpha * q, k, v, [len(pool) // 2, len(pool)])
    return Moments(mean[0], cov[0]), Moments(mean[1], cov[1])


def moment_errors(
    head: Head,
    pool: Tensor,
    limit: Moments,
    lengths: Sequence[int],
    replicates: int,
    seed: int,
    window: int = 1,
    alpha: float = 1.0,
) -> pd.DataFrame:
    """Errors of the moments of self-attention over n tokens drawn from a pool, with replacement.

    Parameters
    ----------
    pool : (N, d), tokens to draw from; limit : moments of self-attention over all of it.
    lengths : increasing n; the prefixes of one replicate share tokens.
    seed : replicate r of head h in layer l draws from its own stream, so any of them can be run again alone.
    window : tokens drawn at once, neighbours in the pool: 1 for independent draws, or the width of the contexts that
        the pool consists of; then N and all lengths are multiples of it.
    alpha : factor of the logits.

    Returns
    -------
    DataFrame
        replicate, n, mean_error = ||m_n - m||_2 and cov_error = ||C_n - C||_F.

    Raises
    ------
    ValueError
        If lengths do not increase, or the pool or a length is not made of whole windows.
    """
    pool, lengths = _as_tokens("pool", pool, head), _as_lengths(lengths)
    alpha, limit = as_number("alpha", alpha), _as_limit(limit, head)
    q, k, v = head.project(pool)
    rows = []
    for replicate in range(as_count("replicates", replicates)):
        drawn = _draw(head, pool, lengths, replicate, seed, window)
        with naming("pool"):
            found = prefix_moments(alpha * q[drawn], k[drawn], v[drawn], lengths)
        rows += _rows(replicate, lengths, found, limit)
    return pd.DataFrame(rows, columns=["replicate", "n", "mean_error", "cov_error"])


def _as_tokens(name: str, tokens, head: Head) -> Tensor:
    """Tokens (n, d) that a head reads."""
    return as_tokens(name, tokens, as_kind("head", head, Head).W_K.shape[1]).detach()


def _as_lengths(lengths) -> list[int]:
    return as_lengths("lengths", lengths, most=rows_that_fit(1))


def _as_limit(limit, head: Head) -> Moments:
    limit = as_kind("limit", limit, Moments)
    if limit.mean.shape != (len(head.W_V),) or limit.cov.shape != 2 * (len(head.W_V),):
        raise ValueError(f"limit: expected moments in dimension {len(head.W_V)}, got shape {tuple(limit.mean.shape)}")
    return limit


def _draw(head: Head, pool: Tensor, lengths: list[int], replicate: int, seed: int, window: int = 1) -> Tensor:
    """Indices (n,) of tokens drawn from a pool with replacement, whole windows at a time."""
    window = as_count("window", window)
    if any(n % window for n in (len(pool), *lengths)):
        raise ValueError(f"window: expected pool and lengths in multiples of {window}, got {len(pool)} and {lengths}")
    stream = runtime.stream(seed, head.layer, head.head, replicate)
    starts = window * torch.randint(len(pool) // window, (lengths[-1] // window,), generator=stream)
    return (starts[:, None] + torch.arange(window)).reshape(-1).to(pool.device)


def drawn_map_errors(
    head: Head, queries: Tensor, pool: Tensor, lengths: Sequence[int], replicates: int, seed: int
) -> pd.DataFrame:
    """Errors of the map at fixed queries (m, d), over the tokens that `moment_errors` draws with the same seed.

    Returns
    -------
    DataFrame
        replicate, n and map_error: root mean square over queries of ||Gamma_n - Gamma||, Gamma over the whole pool.
    """
    pool, lengths = _as_tokens("pool", pool, head), _as_lengths(lengths)
    q = head.project(_as_tokens("queries", queries, head).to(pool))[0]
    _, k, v = head.project(pool)
    with naming("queries, pool"):
        (limit,) = prefix_states(q, k, v, [len(pool)])
    rows = []
    for replicate in range(as_count("replicates", replicates)):
        drawn = _draw(head, pool, lengths, replicate, seed)
        for n, state in zip(lengths, prefix_states(q, k[drawn], v[drawn], lengths)):
            error = finite_answer("pool", _mean_square(state.output - limit.output).sqrt())
            rows.append((replicate, n, error.item()))
    return pd.DataFrame(rows, columns=["replicate", "n", "map_error"])


def _rows(replicate: int, lengths: Sequence[int], found: Moments, limit: Moments) -> list[tuple]:
    return [(replicate, *row) for row in zip(lengths, *(part.tolist() for part in found.errors(limit)))]


def twin_limit(head: Head, law: Gaussian) -> Moments:
    """Moments of a head on Gaussian tokens at infinitely many tokens (`limits.gaussian_limit`)."""
    _require_twin(head, law)
    return gaussian_limit(law, head.A, head.V, head.shift)


def _require_twin(head: Head, law: Gaussian) -> None:
    as_kind("head", head, Head), as_kind("law", law, Gaussian)
    if law.dim != head.W_K.shape[1]:
        raise ValueError(f"law: expected tokens of dimension {head.W_K.shape[1]}, which the head reads, got {law.dim}")


def twin_errors(
    head: Head, law: Gaussian, lengths: Sequence[int], replicates: int, seed: int, device=None
) -> pd.DataFrame:
    """Errors of the moments of a head on Gaussian tokens: rows as those of `moment_errors`, in float32."""
    limit = twin_limit(head, law)
    lengths = as_lengths("lengths", lengths, most=rows_that_fit(law.dim))
    rows = []
    for replicate in range(as_count("replicates", replicates)):
        stream = runtime.stream(seed, head.layer, head.head, replicate)
        tokens = law.sample(lengths[-1], stream).to(runtime.device(device), torch.float32)
        found = prefix_moments(*head.project(tokens), lengths)
        rows += _rows(replicate, lengths, found, limit)
    return pd.DataFrame(rows, columns=["replicate", "n", "mean_error", "cov_error"])


def segment_states(heads: Sequence[Head], queries: Tensor, blocks: Iterable[Tensor], lengths: Sequence[int]):
    """Attention of fixed queries over the first n tokens of a segment, for the heads of one layer.

    Parameters
    ----------
    heads : h heads of equal sizes that read the same tokens.
    queries : (m, d), tokens of that layer.
    blocks : the segment, block by block, (b, d) each; they are projected and dropped.
    lengths : increasing n.

    Returns
    -------
    list of Partial, one a length: output (h, m, d_v), lse (h, m)
    """
    heads = [as_kind("heads", head, Head) for head in as_list("heads", heads, "heads")]
    q = torch.stack([head.project(_as_tokens("queries", queries, head))[0] for head in heads])
    if not isinstance(blocks, Iterable) or getattr(blocks, "ndim", 3) < 3:
        raise ValueError(f"blocks: expected tokens (b, d), block by block, got {shown(blocks)}")

    def keys_and_values():
        for x in blocks:
            x = _as_tokens("blocks", x, heads[0])
            _, k, v = zip(*(head.project(x) for head in heads))
            yield torch.stack(k), torch.stack(v)

    lengths = _as_lengths(lengths)
    with naming("queries, blocks"):
        return list(stream_states(q, keys_and_values(), lengths))


def map_errors(segments: Sequence[Sequence[Partial]]) -> tuple[Tensor, Tensor]:
    """Mean square errors over queries of the map of each segment's prefixes, against all other segments.

    Parameters
    ----------
    segments : of each segment the states of `segment_states`; the last is that of the whole segment.

    Returns
    -------
    (errors, floor)
        errors (segments, lengths, h): mean over queries of ||Gamma_n - Gamma||^2. floor (h,): what the reference adds
        to them, estimated by a quarter of the mean square distance between the outputs over the two halves of the
        segments: the mean square error of an average over all of them, if errors average out.

    Raises
    ------
    ValueError
        If there are fewer than two segments.
    """
    segments = [as_list("segments", states, "states") for states in as_list("segments", segments, "lists of states")]
    for states in segments:
        for state in states:
            as_kind("segments", state, Partial)
    count = len(segments)
    if count < 2:
        raise ValueError(f"segments: expected two or more, got {count}")
    whole = [states[-1] for states in segments]
    before, after = [None], [None]  # states over the segments before and after each
    for i in range(count - 1):
        before.append(_joined(before[-1], whole[i]))
        after.append(_joined(after[-1], whole[count - 1 - i]))
    errors = []
    for i, states in enumerate(segments):
        reference = _joined(before[i], after[count - 1 - i]).output
        errors.append(torch.stack([_mean_square(state.output - reference) for state in states]))
    half = count // 2
    return torch.stack(errors), _mean_square(before[half].output - after[count - half].output) / 4


def _joined(a: Partial | None, b: Partial | None) -> Partial:
    return b if a is None else a if b is None else merge(a, b)


def _mean_square(difference: Tensor) -> Tensor:
    """Mean over queries of the squared norm of (..., m, d_v): (...), float64."""
    return difference.double().square().sum(-1).mean(-1)


def twin_map_error(head: Head, queries: Tensor, law: Gaussian, lengths: Sequence[float]) -> np.ndarray:
    """Mean over queries of E||Gamma_n(x) - Gamma(x)||^2 if the keys were Gaussian: exact at any n, nothing fitted.

    A query of load s looks along u = Sigma^{1/2}(A x + shift) / s. The component of the output along u has the error
    `softmax_law.map_error`, and those orthogonal to u do not enter the weights: each has the variance of a weighted
    mean, E sum w^2 (chapter 9). With M = Sigma^{1/2} V'V Sigma^{1/2} that makes u'Mu map_error + (tr M - u'Mu) P.

    Parameters
    ----------
    queries : (m, d), tokens of the head's layer, whatever their law.
    law : of the keys; lengths : numbers of tokens.

    Returns
    -------
    Array (lengths,), in units of the outputs squared
    """
    _require_twin(head, law)
    n = as_list("lengths", lengths, "numbers of tokens")
    n = np.array([as_number("lengths", length, 1, softmax_law.MOST_TOKENS) for length in n])[:, None]
    queries = _as_tokens("queries", queries, head)
    cov = law.cov.double()
    t = queries.double().to(cov.device) @ head.A.to(cov).mT + head.shift.to(cov)
    pull = t @ cov  # Sigma t, so that u' M u = |V Sigma t|^2 / s^2
    load = (pull * t).sum(-1).clamp(min=1e-12).sqrt()
    if not load.max() <= softmax_law.MOST_TILT / 1.001:
        raise ValueError(f"queries: expected loads up to {softmax_law.MOST_TILT:g}, got {load.max():.4g}")
    along = (pull @ head.V.to(cov).mT).square().sum(-1) / load.square()
    total = (head.V.to(cov) @ cov @ head.V.to(cov).mT).trace()
    s, along, total = load.cpu().numpy(), along.cpu().numpy(), total.item()
    grid = np.geomspace(0.999 * s.min(), 1.001 * s.max(), LOAD_POINTS)

    def at_loads(values: np.ndarray) -> np.ndarray:
        return np.exp(CubicSpline(np.log(grid), np.log(values), axis=1)(np.log(s)))

    error = at_loads(softmax_law.map_error(n, grid))
    share = at_loads(softmax_law.softmax_moments(n, grid).participation)
    return (along * error + np.maximum(total - along, 0.0) * share).mean(1)
