"""What a query loses when it reads some of its keys, in four orders, and how many of them it takes.

A policy is an order in which a query reads its keys; reading n of them means the first n of that order, with softmax
over those alone. The error is the distance between that output and the one over all keys, in units of the spread of the
values. `keys_needed` turns errors at a list of lengths into a number of keys, `jackknife` says how sure that is.

drawn : at random, without replacement.
latest : those nearest in position first, which for a causal query are the latest.
first_latest : the first position of the window, where many heads put weight that they do not use, then the nearest.
heaviest : largest weight first, an order that no cache can know in advance. It is not the best one: where many keys
    share the attention evenly, those drawn at random stand for the rest, and the heaviest do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

POLICIES = ("drawn", "latest", "first_latest", "heaviest")
LEVEL = 0.95  # of intervals
ROUNDING = 1e-10  # mean square errors below this are nothing but rounding


def lengths_up_to(most: int) -> list[int]:
    """Numbers of keys at which errors are measured: the powers of the root of 2, rounded, up to `most`, and that.

    With powers of 2 alone, budgets of orders in which the error falls all at once come out up to 40% too low.
    """
    powers = {round(2 ** (half / 2)) for half in range(2 * most.bit_length())}
    return sorted({n for n in powers if n < most} | {most})


def shared_ranks(seen: Tensor, distance: Tensor, draws: Tensor) -> dict[str, Tensor]:
    """The places of keys, from 0, in the orders that do not look at logits; keys that are not seen come last.

    Parameters
    ----------
    seen : (1 or h, r, m), bool; distance : (r, m), from query to key, in positions.
    draws : (r, m), random numbers in [0, 1).

    Returns
    -------
    dict of Tensor (1 or h, r, m), float32, which compares faster than integers
    """
    first = torch.zeros(1, dtype=torch.int64, device=seen.device)
    early = {"drawn": draws, "latest": distance, "first_latest": distance.index_fill(-1, first, -1)}
    return {policy: _ranks(torch.where(seen, each, math.inf)) for policy, each in early.items()}


def heaviest_ranks(logits: Tensor) -> Tensor:
    """The places of keys, from 0, in the order of their logits (h, r, m), largest first: float32."""
    return _ranks(-logits)


def _ranks(early: Tensor) -> Tensor:
    order = early.argsort(stable=True, dim=-1)
    places = torch.arange(order.shape[-1], dtype=torch.float32, device=order.device)
    return torch.empty_like(places).expand_as(order).clone().scatter_(-1, order, places.expand_as(order))


def errors(logits: Tensor, values: Tensor, full: Tensor, rank: Tensor, lengths: Sequence[int]) -> Tensor:
    """Squared distances between outputs over the first n keys of an order and over all: (len(lengths), h, r).

    Parameters
    ----------
    logits : (h, r, m); values : (m, d); full : (h, r, d), the outputs over all keys.
    rank : (1 or h, r, m). A key of rank -1, such as a sink, is always read.
    """
    found = []
    for n in lengths:
        if n >= logits.shape[-1]:  # all of them
            found.append(torch.zeros_like(full[..., 0]))
            continue
        read = rank < n
        some = read.flatten(0, -2).any(0).nonzero()[:, 0]  # keys that no query reads cost no time
        kept = logits[..., some].masked_fill(~read[..., some], -math.inf)
        found.append((torch.softmax(kept, -1) @ values[some] - full).square().sum(-1))
    return torch.stack(found)


def keys_needed(lengths: Sequence[int], squares: np.ndarray, error: float) -> float:
    """The number of keys from which on the root mean square error stays at or below `error`.

    Parameters
    ----------
    lengths : increasing, the last of them all N keys; squares : (len(lengths),), mean square errors at these, 0 at the
        last. Between two of them the mean square is taken for a power of 1/n - 1/N; up to the first where nothing but
        rounding is left of it (of a sliding window, that is before the last), for a line in 1/n, which is exact for
        keys of equal weight that are drawn without replacement.

    Returns
    -------
    float, a real number, which varies smoothly with the errors; `whole` rounds it up
    """
    above = np.flatnonzero(np.asarray(squares[:-1]) > error**2)
    if len(above) == 0:
        return float(lengths[0])
    left = 1 / np.asarray(lengths, dtype=float) - 1 / lengths[-1]
    few, many = above[-1], above[-1] + 1
    part = error**2 / squares[few]
    if squares[many] > ROUNDING:
        wanted = left[few] * part ** (math.log(left[few] / left[many]) / math.log(squares[few] / squares[many]))
    else:
        wanted = left[many] + part * (left[few] - left[many])
    return float(1 / (max(wanted, left[many]) + 1 / lengths[-1]))


def whole(keys: float) -> float:
    """The smallest whole number of keys that is enough; NaN of NaN."""
    return float(np.ceil(keys * (1 - 1e-12)))


class Estimate(NamedTuple):
    """A number found from all windows, with its interval over them; NaN where there is one window only."""

    value: float
    low: float
    high: float


def jackknife(measure: Callable[[np.ndarray], float], windows: np.ndarray) -> Estimate:
    """A positive number and its 95% interval, on the scale of its logarithm, from the windows left out one by one.

    Parameters
    ----------
    measure : of windows (w, ...), to a positive number, smoothly: what is rounded has no interval of any width where
        windows left out do not change it; windows : (W, ...), independent of each other.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 11; Student's t of W - 1 degrees.
    """
    value, count = measure(windows), len(windows)
    if count < 2:
        return Estimate(value, math.nan, math.nan)
    logs = np.log([measure(np.delete(windows, left_out, axis=0)) for left_out in range(count)])
    deviation = math.sqrt((count - 1) / count * np.square(logs - logs.mean()).sum())
    reach = math.exp(min(stats.t.ppf((1 + LEVEL) / 2, count - 1) * deviation, 700.0))
    return Estimate(value, value / reach, value * reach)
