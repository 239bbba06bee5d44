"""Sparse attention: what a query hears when it may read only some of the keys, or a summary of all of them.

Every scheme is a function of one form,

    scheme(q, k, v, positions, budget, generator) -> Partial

with queries q (..., m, d), keys k (n, d) and values v (n, d_v) of one sequence, the places `positions` (m,) of the
queries in that sequence, and a `budget`: how many keys, or how many rows of a summary, one query reads. Batch axes of q
are heads, or loads, that look at the same keys from the same places; random choices are made once for all of them. The
result is the output (..., m, d_v) and the logarithm (..., m) of what the scheme takes for the sum of all weights
e^{q.k}; for a scheme that keeps some keys with their own weights that is the sum over the kept keys, so that
`kept_mass` is the share of the attention that it kept.

`SCHEMES` names them. `random`, `window`, `strided`, `window + random` and `top-k` keep keys; `window + weighted` keeps
the keys of `window + random` and counts each random one for all those that it stands for; `low rank` reads random
combinations of the keys, `features` sums over all keys that were made in advance. Sources: sliding windows with random
keys, Zaheer et al. (2020) and Beltagy et al. (2020); strides, Child et al. (2019); low rank, Wang et al. (2020);
features, Choromanski et al. (2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.sampling.streaming import LOGITS, Partial, partial_attention
from tokcx_lib.validation import (
    as_attention,
    as_count,
    as_flag,
    as_indices,
    as_kind,
    as_positive,
    as_tensor,
    as_tokens,
    finite_answer,
    naming,
    rows_that_fit,
)

DENSE = 16  # a query that reads more than a 16th of all keys: cheaper to mask than to gather


def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, log_weights: Tensor | None = None) -> Partial:
    """Softmax attention in which query i reads only the keys `keys[i]`.

    Parameters
    ----------
    q : (..., m, d); k : (n, d); v : (n, d_v), of one precision.
    keys : (m, b), integers from 0 to n - 1, those of one query different from each other.
    log_weights : (m, b), added to the logits; zero if None.

    Returns
    -------
    Partial
        output (..., m, d_v) and lse (..., m), the log of the sum of the weights of the kept keys.

    Raises
    ------
    ValueError
        If shapes do not match, or a key is not there.
    """
    q, k, v = _as_one_sequence(q, k, v)
    keys = as_indices("keys", keys, most=len(k) - 1, ndim=2)
    if len(keys) != q.shape[-2]:
        raise ValueError(f"keys: expected shape ({q.shape[-2]}, b) with b >= 1, got {tuple(keys.shape)}")
    if log_weights is not None:
        log_weights = as_tensor("log_weights", log_weights).to(q)
        if log_weights.shape != keys.shape:
            raise ValueError(f"log_weights: expected shape {tuple(keys.shape)}, got {tuple(log_weights.shape)}")
    heads = q.reshape(-1, *q.shape[-2:])
    dense = keys.shape[1] * DENSE > len(k)
    width = len(heads) * len(k) if dense else keys.shape[1] * (k.shape[1] + v.shape[1])
    rows = max(1, LOGITS // (4 * width))
    parts = []
    for start in range(0, heads.shape[1], rows):
        here = slice(start, start + rows)
        added = None if log_weights is None else log_weights[here]
        parts.append((_masked if dense else _gathered)(heads[:, here], k, v, keys[here], added))
    output, lse = (torch.cat(part, 1) for part in zip(*parts))
    return Partial(output.reshape(*q.shape[:-1], v.shape[1]), lse.reshape(q.shape[:-1]))


def _as_one_sequence(q, k, v) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (..., m, d) with keys (n, d) and values (n, d_v) that have no batch axes."""
    with naming("q, k, v"):
        q, k, v = as_attention(q, k, v)
    if k.ndim != 2:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v: expected shapes (..., m, d), (n, d) and (n, d_v), got {shapes}")
    return q, k, v


def _gathered(q, k, v, keys, log_weights) -> Partial:
    logits = torch.einsum("hmd,mbd->hmb", q, k[keys])
    logits = logits if log_weights is None else logits + log_weights
    return Partial(torch.einsum("hmb,mbv->hmv", torch.softmax(logits, -1), v[keys]), torch.logsumexp(logits, -1))


def _masked(q, k, v, keys, log_weights) -> Partial:
    added = q.new_full((q.shape[1], len(k)), -math.inf)
    added.scatter_(1, keys, 0.0 if log_weights is None else log_weights)
    logits = q @ k.mT + added
    lse = torch.logsumexp(logits, -1)
    return Partial(torch.exp_(logits - lse[..., None]) @ v, lse)


def full(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """Attention over all keys, which every scheme approximates; shapes as in `attend`."""
    return partial_attention(q, k, v)


def kept_mass(state: Partial, whole: Partial) -> Tensor:
    """Share (..., m) of a query's attention that lies on the keys a scheme has kept.

    With it the error is an identity: output - full output = (1 - mass) (output over the kept - output over the others).
    """
    as_kind("state", state, Partial), as_kind("whole", whole, Partial)
    return torch.exp(state.lse - whole.lse)


# ------------------------------------------------------------ which keys


def _inputs(q, k, v, positions, budget) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """What every scheme takes, checked."""
    q, k, v = _as_one_sequence(q, k, v)
    if as_count("budget", budget) > len(k):
        raise ValueError(f"budget: expected at most the number of keys, {len(k)}, got {budget}")
    return q, k, v, _as_positions(positions, len(k), q.shape[-2]), int(budget)


def _as_positions(positions, n: int, m: int | None = None) -> Tensor:
    """Places (m,) among n keys, on the CPU."""
    positions = as_indices("positions", positions, most=n - 1).cpu()
    if m is not None and len(positions) != m:
        raise ValueError(f"positions: expected one for each of {m} queries, got {len(positions)}")
    return positions


def _draw(m: int, n: int, count: int, generator, taken: Tensor | None = None) -> Tensor:
    """For each of m queries, `count` of n keys without replacement, none of those `taken` (m, b)."""
    lots = torch.rand(m, n, generator=runtime.generator(generator))
    if taken is not None:
        lots.scatter_(1, taken, 2.0)
    return lots.topk(count, dim=1, largest=False, sorted=False).indices


def window_keys(positions: Tensor, n: int, width: int) -> Tensor:
    """The `width` keys (m, width) around each position, its own among them; at the ends the window is shifted."""
    n = as_count("n", n)
    width, positions = as_count("width", width, most=n), _as_positions(positions, n)
    start = (positions - width // 2).clamp(0, n - width)
    return start[:, None] + torch.arange(width)


def strided_keys(positions: Tensor, n: int, budget: int) -> Tensor:
    """Keys (m, budget) at equal distances around the sequence, the query's own among them."""
    n = as_count("n", n)
    budget, positions = as_count("budget", budget, most=n), _as_positions(positions, n)
    return (positions[:, None] + (torch.arange(budget) * n) // budget) % n


# ------------------------------------------------------------ schemes


def random_keys(q, k, v, positions, budget, generator=None) -> Partial:
    """A random set of keys, drawn for each query on its own, without replacement."""
    q, k, v, positions, budget = _inputs(q, k, v, positions, budget)
    return attend(q, k, v, _draw(len(positions), len(k), budget, generator).to(k.device))


def shared_keys(q, k, v, positions, budget, generator=None) -> Partial:
    """A random set of keys, without replacement, the same for all queries."""
    q, k, v, _, budget = _inputs(q, k, v, positions, budget)
    keys = torch.randperm(len(k), generator=runtime.generator(generator))[:budget].to(k.device)
    return partial_attention(q, k[keys], v[keys])


def window(q, k, v, positions, budget, generator=None) -> Partial:
    """The keys around the query."""
    q, k, v, positions, budget = _inputs(q, k, v, positions, budget)
    return attend(q, k, v, window_keys(positions, len(k), budget).to(k.device))


def strided(q, k, v, positions, budget, generator=None) -> Partial:
    """Keys at equal distances, the query's own among them."""
    q, k, v, positions, budget = _inputs(q, k, v, positions, budget)
    return attend(q, k, v, strided_keys(positions, len(k), budget).to(k.device))


def window_random(q, k, v, positions, budget, generator=None, extra: int | None = None, weighted=False) -> Partial:
    """A window around the query, and random keys outside it.

    Parameters
    ----------
    budget : keys read, at least 2; `extra` of them are random, half if None. They are drawn for each query on its own.
    weighted : whether a random key counts for the (n - window) / extra keys outside the window that it stands for. Its
        logit is then raised by the logarithm of that number, and the sum of weights has the right mean.

    Raises
    ------
    ValueError
        If a window or the rest of the budget would be empty, or the budget exceeds the number of keys.
    """
    q, k, v, positions, budget = _inputs(q, k, v, positions, budget)
    n, weighted = len(k), as_flag("weighted", weighted)
    extra = budget // 2 if extra is None else as_count("extra", extra)
    if not 1 <= extra < budget:
        raise ValueError(f"extra: expected 1 to {budget - 1} random keys of a budget of {budget}, got {extra}")
    near = window_keys(positions, n, budget - extra)
    far = _draw(len(positions), n, extra, generator, taken=near)
    log_weights = None
    if weighted:
        log_weights = torch.zeros(len(near), budget, dtype=k.dtype)
        log_weights[:, budget - extra :] = math.log((n - budget + extra) / extra)
        log_weights = log_weights.to(k.device)
    return attend(q, k, v, torch.cat([near, far], 1).to(k.device), log_weights)


def window_weighted(q, k, v, positions, budget, generator=None, extra: int | None = None) -> Partial:
    """`window_random`, each random key counted for all those that it stands for."""
    return window_random(q, k, v, positions, budget, generator, extra, weighted=True)


def top_k(q, k, v, positions, budget, generator=None) -> Partial:
    """The keys with the largest logits. Finding them is not counted: this is what an oracle would read."""
    q, k, v, _, budget = _inputs(q, k, v, positions, budget)
    heads = q.reshape(-1, *q.shape[-2:])
    states = [attend(h, k, v, (h @ k.mT).topk(budget, sorted=False).indices) for h in heads]
    output, lse = torch.stack([s.output for s in states]), torch.stack([s.lse for s in states])
    return Partial(output.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1]))


def low_rank(q, k, v, positions, budget, generator=None) -> Partial:
    """Attention over `budget` random combinations of the n keys, and the same combinations of the values.

    Keys and values are centred first, which softmax cannot see, and the mean value is added back. The coefficients are
    N(0, 1/n), so that a combination is spread like a key: given the keys, the combinations are independent Gaussian
    tokens of the keys' own covariance (chapter 11). Wang et al. (2020) project like this with coefficients that are
    learned. The log-sum-exp is scaled to n keys.
    """
    q, k, v, _, budget = _inputs(q, k, v, positions, budget)
    n = len(k)
    mix = torch.randn(budget, n, generator=runtime.generator(generator)).to(k) / math.sqrt(n)
    mean = v.mean(0)
    state = partial_attention(q, mix @ (k - k.mean(0)), mix @ (v - mean))
    shift = math.log(n / budget) + q @ k.mean(0)
    return Partial(state.output + mean, state.lse + shift)


def features(q, k, v, positions, budget, generator=None) -> Partial:
    """Positive random features: e^{q.k} is the mean over w ~ N(0, I) of e^{w.q - |q|^2/2} e^{w.k - |k|^2/2}.

    With `budget` draws of w the sums over keys are made once for all queries, and a query reads one row of them for
    each feature. Keys are centred first, and queries and keys are scaled against each other so that they have the same
    root mean square length, which makes the estimate least noisy (chapter 11); both are free. Choromanski et al.
    (2021), with independent w.
    """
    (q, k, v), budget = _as_one_sequence(q, k, v), as_count("budget", budget, most=rows_that_fit(len(k)))
    _as_positions(positions, len(k), q.shape[-2])
    w = torch.randn(k.shape[1], budget, generator=runtime.generator(generator)).to(k)
    centre = k.mean(0)
    k = k - centre
    heads, states = q.reshape(-1, *q.shape[-2:]), []
    for h in heads:
        sizes = k.square().sum(1).mean(), h.square().sum(1).mean()
        balance = (sizes[0] / sizes[1]).pow(0.25) if all(sizes) else k.new_tensor(1.0)
        asked, keys = h * balance, k / balance
        log_q = asked @ w - asked.square().sum(1, keepdim=True) / 2
        log_k = keys @ w - keys.square().sum(1, keepdim=True) / 2
        top = log_k.amax(0)  # each feature is scaled by its own largest key: nothing over- or underflows
        phi_k = torch.exp(log_k - top)
        log_q = log_q + top
        peak = log_q.amax(1, keepdim=True)
        phi_q = torch.exp(log_q - peak)
        total = phi_q @ phi_k.sum(0)
        lse = finite_answer("q, k", total.log() + peak[:, 0] - math.log(budget) + h @ centre)
        states.append(Partial((phi_q @ (phi_k.mT @ v)) / total[:, None], lse))
    output, lse = torch.stack([s.output for s in states]), torch.stack([s.lse for s in states])
    return Partial(output.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1]))


SCHEMES: dict[str, Callable[..., Partial]] = {
    "random": random_keys,
    "window": window,
    "strided": strided,
    "window + random": window_random,
    "window + weighted": window_weighted,
    "top-k": top_k,
    "low rank": low_rank,
    "features": features,
}
KEEPING = ("random", "window", "strided", "window + random", "top-k")  # keep keys with their own weights


def output_error(state: Partial, whole: Partial, unit: float = 1.0) -> Tensor:
    """Root mean square over queries of the distance between two outputs (..., m, d_v), in units of `unit`: (...).

    `whole` has the shape of `state`, or the last axes of it: then several states are compared with one.
    """
    as_kind("state", state, Partial), as_kind("whole", whole, Partial)
    wanted, found = whole.output.shape, state.output.shape
    if found[len(found) - len(wanted) :] != wanted:
        raise ValueError(f"state: expected outputs of shape (..., *{tuple(wanted)}) as in whole, got {tuple(found)}")
    return (state.output - whole.output).double().square().sum(-1).mean(-1).sqrt() / as_positive("unit", unit)


def value_spread(v: Tensor) -> float:
    """Root mean square distance of a value (n, d_v) from the mean value: the unit in which errors are given."""
    v = as_tokens("v", v).double()
    return finite_answer("v", (v - v.mean(0)).square().sum(1).mean().sqrt()).item()
