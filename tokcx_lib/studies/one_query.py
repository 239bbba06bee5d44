"""One query over n Gaussian tokens, drawn at any n and by plain quadrature: what the exact law is held against.

Chapter 9. `softmax_law` has means over draws; a typical draw and a second Gaussian identity need more than these.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.theory.softmax_law import MOST_TOKENS
from tokcx_lib.validation import as_count, as_number

MOST_LOAD = 20.0
MOST_SUMMED = 1e140  # tokens; with more, squares of weights underflow where nothing scales them
LEAST_TOKENS = 100.0
STEP = 0.05  # of the lattice of drawn tokens
_NORMAL = 1e8  # more tokens than that at one point are counted by a normal variable
_SIDE = 12.0  # e^(-12^2/2): what may be left out of the normaliser


class WeightPowers(NamedTuple):
    """Means over draws of `second` P_2 = sum w^2, `third` P_3 = sum w^3 and `second_squared` P_2^2."""

    second: float
    third: float
    second_squared: float


def query_errors(n: float, load: float, replicates: int, generator=None) -> Tensor:
    """Errors Gamma_n - s of a query of load s over n tokens, one for each draw of the tokens: (replicates,), float64.

    The tokens are standard normal ones rounded to a lattice of step 1/20, whose exponential moments are those of the
    normal law to rounding. Only the numbers of tokens at its points are drawn: Poisson variables of mean n p_j, so that
    n is met on average only. No digit is lost in Gamma_n - s: the tokens of the limit are subtracted at each point.

    Parameters
    ----------
    n : number of tokens, real, from 100 to 1e250; load : positive, up to 20; generator : a `torch.Generator` or a seed.

    Raises
    ------
    ValueError
        If n, the load or the number of replicates is out of range.

    Source: chapter 9.
    """
    n, load = as_number("n", n, LEAST_TOKENS, MOST_TOKENS), as_number("load", load, 1e-3, MOST_LOAD)
    replicates, stream = as_count("replicates", replicates), runtime.generator(generator)
    # Beyond the last point less than e^-20 tokens are expected.
    outermost = math.sqrt(2 * (math.log(n) + 20))
    low = min(load, outermost) - _SIDE
    high = max(load + _SIDE, outermost)
    y = STEP * torch.arange(math.floor(low / STEP), math.ceil(high / STEP) + 1, dtype=torch.float64)
    log_mean = math.log(n * STEP) - y**2 / 2 - math.log(2 * math.pi) / 2
    mean = log_mean.exp()
    shape = (replicates, len(y))
    few = mean < _NORMAL
    counts = torch.poisson(torch.where(few, mean, 0.0).expand(shape).contiguous(), generator=stream)
    normal = torch.randn(shape, generator=stream, dtype=torch.float64) * mean.sqrt()
    excess = torch.where(few, counts - mean, normal)
    weight = torch.exp(load * y - load**2 / 2 - math.log(n))  # of a token, in units of the mean sum of weights
    return excess @ (weight * (y - load)) / (1 + excess @ weight)


def weight_powers(n: float, load: float) -> WeightPowers:
    """Means of powers of softmax weights over n standard normal tokens at a load, by two trapezoidal rules.

    1/S^k = int l^(k-1) e^{-lS} dl / (k-1)! turns each into averages over one token, as in `softmax_law`; these are
    summed over a plain grid here, with none of that module's tables.

    Parameters
    ----------
    n : number of tokens, real, from 1 to 1e140; load : positive, up to 20.

    Raises
    ------
    ValueError
        If n or the load is out of range.

    Source: chapter 9.
    """
    n, load = as_number("n", n, 1, MOST_SUMMED), as_number("load", load, 1e-3, MOST_LOAD)
    outermost = math.sqrt(2 * (math.log(n) + 46))
    step = min(0.25, 0.25 / load)
    y = step * np.arange(-math.ceil(10 / step), math.ceil(max(outermost, 2 * load + 10) / step) + 1)
    log_density = math.log(step) - math.log(2 * math.pi) / 2 - y**2 / 2
    x = np.arange(-max(math.log(n) + load**2 / 2, load * outermost) - 20, 9.5 * load + 4.5, 0.25)
    u = x[:, None] + load * y
    e = np.exp(np.minimum(u, 700.0))
    two, three, four = (np.exp(k * u - e + log_density).sum(1) for k in (2, 3, 4))
    rest, phi = -np.expm1(-e) @ np.exp(log_density), np.exp(-e) @ np.exp(log_density)
    log_phi = np.where(rest < 0.5, np.log1p(-np.minimum(rest, 0.5)), np.log(np.maximum(phi, 1e-300)))
    one, half = np.exp((n - 1) * log_phi), np.exp((n / 2 - 1) * log_phi)
    pairs = (1 - 1 / n) * (n * two * half) ** 2
    whole = [n * two @ one, n * three @ one / 2, (n * four @ one + pairs.sum()) / 6]
    return WeightPowers(*(0.25 * float(part) for part in whole))
