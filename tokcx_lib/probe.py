"""The study of one model on one text: the geometry of every head, and how fast its moments converge.

Tokens are pooled over the windows that the model reads. The covariance stands where a bound would want the
sub-Gaussian matrix, so H, Psi and the loads describe these tokens; they are not constants of a theorem.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from tokcx_lib import geometry, runtime
from tokcx_lib.heads import Head, TextModel, heads, layer_streams, tokenize
from tokcx_lib.streaming import Moments, effective_tokens, prefix_moments
from tokcx_lib.validation import as_count


def collect_tokens(model: TextModel, text, layers: Sequence[int], tokens: int | None = None) -> list[Tensor]:
    """The first `tokens` tokens (n, d) that enter each of several layers, float32; all of the text's if None.

    Raises
    ------
    ValueError
        If the text is shorter than the tokens asked for, or a layer does not exist.
    """
    ids = tokenize(model, text) if isinstance(text, str) else text
    if tokens is not None and len(ids) < tokens:
        raise ValueError(f"text: expected at least {tokens} tokens, got {len(ids)}")
    parts: list[list[Tensor]] = [[] for _ in layers]
    count = 0
    with tqdm(total=tokens, unit=" tokens", desc="model", leave=False) as bar:
        for batch in layer_streams(model, ids, layers):
            for part, x in zip(parts, batch):
                part.append(x)
            count += len(batch[0])
            bar.update(len(batch[0]))
            if tokens is not None and count >= tokens:
                break
    return [torch.cat(part)[:tokens] for part in parts]


def token_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and centred covariance (d, d), divisor n, of tokens (n, d), in float64."""
    mean = x.mean(0, dtype=torch.float64)
    cov = sum((part := block.double() - mean).mT @ part for block in x.split(65_536)) / len(x)
    return mean, (cov + cov.mT) / 2


def head_geometry(head: Head, x: Tensor, cov: Tensor, half: Tensor | None = None) -> dict[str, float]:
    """Reach, H, H_1, Psi, Psi_1, the median and 95% load, and the scale of the values of a head.

    Tokens are (n, d), with centred covariance (d, d) and its root `half` (d, d), if it is at hand. The values V y of
    single tokens have covariance V Sigma V'; `value_spread` is the root of its trace, `value_cov` its Frobenius norm:
    natural units for errors of moments.

    The load of a token that is not centred is ||Sigma^{1/2}(A x + shift)||: the mean of the keys cancels in softmax,
    that of the queries acts like a shift (chapter 1).
    """
    A, cov = head.A, cov.to(head.A)
    loads = geometry.load(x.double(), A, cov, shift=head.shift)
    values = head.V @ cov @ head.V.mT
    # The definitions of `geometry`, with one decomposition of the covariance for all of them.
    half = geometry.root(cov) if half is None else half
    reach = torch.linalg.matrix_norm(half, 2).item() ** 2
    two, one = (torch.linalg.matrix_norm(B, 2).item() for B in (half @ A @ half, half @ A))
    return {
        "reach": reach,
        "horizon": two,
        "horizon_one_sided": one,
        "coupling": two**2,
        "coupling_one_sided": reach * one**2,
        "load_median": loads.median().item(),
        "load_95": loads.quantile(0.95).item(),
        "value_spread": values.trace().sqrt().item(),
        "value_cov": torch.linalg.matrix_norm(values).item(),
    }


def probe(
    model: TextModel,
    text,
    layers: Sequence[int] | None = None,
    tokens: int = 100_000,
    queries: int = 2048,
    seed: int = 0,
) -> pd.DataFrame:
    """Geometry of heads on a text: one row a head.

    Parameters
    ----------
    model : from `heads.load_model`; text : a string or token ids (n,).
    layers : default all.
    tokens : how many tokens of the text to use; queries : how many of them, drawn at random, stand for all queries.

    Returns
    -------
    DataFrame
        layer, head, reach, horizon (two-sided), horizon_one_sided, coupling, coupling_one_sided, load_median, load_95,
        value_spread and value_cov (see `head_geometry`), and effective_N: the median over queries of 1/sum w^2 over N keys drawn at random without replacement, for
        N = 1000, 10000, ... and all tokens.

    Raises
    ------
    ValueError
        If the text is shorter than the tokens asked for, or a layer does not exist.
    """
    every = heads(model)
    layers = sorted(set(range(every[-1].layer + 1) if layers is None else layers))
    tokens = as_count("tokens", tokens, least=2)
    order = torch.randperm(tokens, generator=runtime.generator(seed))
    asked = torch.randperm(tokens, generator=runtime.generator(seed + 1))[: as_count("queries", queries)]
    lengths = [n for n in (10**k for k in range(3, 12)) if n < tokens] + [tokens]
    rows = []
    inputs = dict(zip(layers, collect_tokens(model, text, layers, tokens)))
    chosen = [head for head in every if head.layer in inputs]
    for head in tqdm(chosen, unit=" heads", desc="heads", leave=False):
        x = inputs[head.layer]
        if head.head == 0:  # the heads of a layer share its tokens
            _, cov = token_moments(x)
            half = geometry.root(cov)
        q, k, _ = head.project(x)
        effective = effective_tokens(q[asked], k[order], lengths).median(-1).values
        row = {"layer": head.layer, "head": head.head, **head_geometry(head, x[asked], cov, half)}
        rows.append({**row, **{f"effective_{n}": e.item() for n, e in zip(lengths, effective)}})
    return pd.DataFrame(rows)


def self_attention(head: Head, x: Tensor, seed: int = 0) -> Moments:
    """Mean (d_v,) and covariance (d_v, d_v) of one head's self-attention over all tokens (n, d)."""
    order = torch.randperm(len(x), generator=runtime.generator(seed)).to(x.device)
    mean, cov = prefix_moments(*head.project(x[order]), [len(x)])
    return Moments(mean[0], cov[0])


def moment_errors(
    head: Head, pool: Tensor, limits: dict[str, Moments], lengths: Sequence[int], replicates: int, seed: int
) -> pd.DataFrame:
    """Errors of the moments of self-attention over n tokens drawn i.i.d. with replacement from a pool.

    Parameters
    ----------
    pool : (N, d), tokens to draw from.
    limits : named moments to compare with, from `self_attention`.
    lengths : increasing n; the prefixes of one replicate share tokens.
    seed : replicate r of head h in layer l draws from its own stream, so any of them can be re-run alone.

    Returns
    -------
    DataFrame
        layer, head, replicate, n and, for each limit NAME, mean_error_NAME = ||m_n - m||_2 and
        cov_error_NAME = ||C_n - C||_F.
    """
    q, k, v = head.project(pool)
    rows = []
    for replicate in range(replicates):
        stream = runtime.stream(seed, head.layer, head.head, replicate)
        drawn = torch.randint(len(pool), (lengths[-1],), generator=stream).to(pool.device)
        mean, cov = prefix_moments(q[drawn], k[drawn], v[drawn], lengths)
        for i, n in enumerate(lengths):
            row = {"layer": head.layer, "head": head.head, "replicate": replicate, "n": n}
            for name, limit in limits.items():
                row[f"mean_error_{name}"] = torch.linalg.vector_norm(mean[i] - limit.mean).item()
                row[f"cov_error_{name}"] = torch.linalg.matrix_norm(cov[i] - limit.cov).item()
            rows.append(row)
    return pd.DataFrame(rows)
