"""What a query loses when it reads n of its N keys, drawn at random: the exact law, of a past that ends.

Softmax over n of N independent keys is compared with softmax over all N, and not with its limit, from which it may be
far: with weights w over the n and W over the N, errors are averages of products such as sum_j w_j W_j. With one
integral for each denominator, S_n and S_N = S_n + S_R, R = N - n,

    E sum_j w_j W_j = n int b_0(l) phi(l)^(n-1) [int_0^l phi(m)^R dm] dl

in the notation of `softmax_law`, and so for the rest: one integral over l, of what another has summed up to l. The
first is taken on the grid of `softmax_law`; the second by the trapezoidal rule there with Gregory's corrections at its
end, which is right also where it is small: to about 1e-6.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.linalg import toeplitz

from tokcx_lib.theory import softmax_law
from tokcx_lib.theory.softmax_law import STEP
from tokcx_lib.validation import as_array, as_number

MOST_KEYS = 1e9
MOST_LOAD = 40.0
_ORDER = 8  # of differences in Gregory's formula


class DrawnError(NamedTuple):
    """Mean square errors, float64, of one shape: `along` the direction of the query, and of the `rest`."""

    along: np.ndarray
    rest: np.ndarray


def drawn_error(n, total: float, load: float) -> DrawnError:
    """Mean square distance between softmax over n of N normal keys and over all N, for a query of some load.

    `along` is E(Gamma_n - Gamma_N)^2 of the projections of the keys on the direction of the query; `rest` that of
    standard normal values that do not go with the logits, E sum_j (w_j - W_j)^2, w_j = 0 for keys that are not read.

    Parameters
    ----------
    n : numbers of keys that are read, real, from 1 to total; total : N, real, up to 1e9; load : from 0 to 40.

    Returns
    -------
    DrawnError, arrays of the shape of n, to about 1e-6 of their numbers where n is no more than half of N

    Raises
    ------
    ValueError
        If a number is out of range.
    """
    total = as_number("total", total, 1, MOST_KEYS)
    n = as_array("n", n, 1, total)
    load = as_number("load", load, 0, MOST_LOAD)
    table = softmax_law._averages(load, None, softmax_law._TABLES[0])
    some = n[n < total]
    ends = [_products(table, count) for count in (some, np.array([total]))]
    found = [np.zeros(n.shape), np.zeros(n.shape)]
    for error, read, whole, crossed in zip(found, *ends, _crossed(table, some, total)):
        error[n < total] = np.maximum(read + whole - 2 * crossed, 0)
    return DrawnError(*found)


def _products(table, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E(Gamma_n - limit)^2 and E sum_j w_j^2."""
    _, two = softmax_law._powers(table, n)
    return two @ table.b[2] + softmax_law._pairs(table, n, 2), two @ table.b[0]


def _crossed(table, n: np.ndarray, total: float) -> tuple[np.ndarray, np.ndarray]:
    """E(Gamma_n - limit)(Gamma_N - limit) and E sum_j w_j W_j."""
    n, rest = n[:, None], total - n[:, None]
    first, second = np.exp(table.log_a) * table.a[2], np.exp(table.log_b)  # l a_1 and l^2 b_k, from the limit
    up_to = _up_to(len(table.x))
    # The R other keys, summed up to l: their weights, over l, and their projections.
    weights = np.exp(table.x + rest * table.log_phi) @ up_to * np.exp(-table.x)
    projections = rest * first * np.exp((rest - 1) * table.log_phi) @ up_to
    own = n * np.exp((n - 1) * table.log_phi)
    pairs = n * (n - 1) * np.exp((n - 2) * table.log_phi) * first**2
    crossed = (own * second * weights) @ table.b[2] + (pairs * weights + own * first * projections).sum(1)
    return STEP * crossed, STEP * ((own * second * weights) @ table.b[0])


@lru_cache(maxsize=8)
def _up_to(count: int) -> np.ndarray:
    """Matrix that integrates up to each point of a grid: values (..., count) times it."""
    gregory = [1.0]  # then -1/2, -1/12, -1/24, -19/720, ...: of differences of order 0, 1, 2, ... at the end
    for k in range(1, _ORDER + 2):
        gregory.append(-sum(c / (k + 1 - i) for i, c in enumerate(gregory)))
    back = np.ones(count)  # weights of the values, from the end backwards
    for order, c in enumerate(gregory[1:]):
        back[: order + 1] += [c * (-1) ** i * math.comb(order, i) for i in range(order + 1)]
    return STEP * toeplitz([back[0], *np.zeros(count - 1)], back)
