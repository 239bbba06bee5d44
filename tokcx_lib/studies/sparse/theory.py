"""What theory says of sparse attention: exact laws where there are any, first-order errors elsewhere (chapter 11).

Whitened Gaussian keys of dimension d, with values equal to keys, and a query of load s, unless said otherwise. First
order means: with the sum of the weights of the keys read at its mean. For keys drawn at random that is right in mean
square for budgets beyond e^{3 s^2/2}, to leading exponential order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import betaincc, gammainc, gammaincc, log_ndtr, ndtri, ndtri_exp
from scipy.special import gamma as gamma_function
from torch import Tensor

from tokcx_lib.theory.softmax_law import MOST_TOKENS
from tokcx_lib.validation import (
    as_array,
    as_attention,
    as_count,
    as_list,
    as_number,
    as_positive,
    as_tensor,
    as_vectors,
    finite_answer,
)

MOST_LOAD = 26.0  # e^{s^2}, and what it multiplies, is finite up to here
MOST_TOP_LOAD = 300.0  # the work of `top_mass` grows with its square
MOST_SPREAD = 1e4  # the work of `drawn_error` grows with it
STEP = 0.5  # of the trapezoidal rule in log l, as in `softmax_law`; here it is exact to 1e-8


def drawn_error(q: Tensor, k: Tensor, v: Tensor, draws: Sequence[int]) -> Tensor:
    """E ||o_m - o||^2 for attention over m keys drawn with replacement from n given keys, o that over all n: exact.

    The n keys are a law like any other, and the m drawn ones independent tokens of it: the exact law of chapter 9 gives
    the error, for any keys and any values, without an assumption about either. With e_j = n w_j, w_j the weights of the
    query over all keys, and values centred at its output,

        E ||o_m - o||^2 = int l [m b(l) phi(l)^(m-1) + m (m-1) |a(l)|^2 phi(l)^(m-2)] dl,

    phi = mean of e^{-l e_j}, a = mean of v_j e_j e^{-l e_j}, b = mean of |v_j|^2 e_j^2 e^{-l e_j}.

    Parameters
    ----------
    q : (m, d); k : (n, d); v : (n, d_v). draws : numbers of keys to draw.

    Returns
    -------
    Tensor (len(draws), m), float64
    """
    q, k, v = (part.double() for part in as_attention(q, k, v))
    if q.ndim != 2 or k.ndim != 2:
        raise ValueError(f"q, k: expected shapes (m, d) and (n, d), got {tuple(q.shape)} and {tuple(k.shape)}")
    counts = [as_count("draws", count, most=2**53) for count in as_list("draws", draws, "numbers of keys")]
    counts = torch.tensor(counts, dtype=torch.float64)[:, None]
    return finite_answer("v", torch.stack([_drawn(query @ k.mT, v, counts) for query in q], 1))


def _drawn(logits: Tensor, v: Tensor, m: Tensor) -> Tensor:
    n = len(logits)
    logits = logits - torch.logsumexp(logits, 0) + math.log(n)  # of e_j, which has mean 1
    v = v - torch.softmax(logits, 0) @ v
    low, high = logits.min().item(), logits.max().item()
    if not high - low <= MOST_SPREAD:
        raise ValueError(f"q, k: expected logits of a query that differ by up to {MOST_SPREAD:g}, got {high - low:.3g}")
    x = torch.arange(-high - 25.0 - math.log(m.max().item()), -low + 5.0, STEP, dtype=torch.float64)
    total, square = 0.0, v.square().sum(1)
    for part in x.split(64):
        u = torch.exp((part[:, None] + logits).clamp(max=700.0))  # l e_j
        decay = torch.exp(-u)
        log_phi, once = decay.mean(1).log(), u * decay
        a, b = (once @ v / n).square().sum(1), (u * once) @ square / n
        one, two = m * b * torch.exp((m - 1) * log_phi), m * (m - 1) * a * torch.exp((m - 2) * log_phi)
        total = total + (one + two).nan_to_num().sum(1)  # 0 times infinity, where phi has underflowed
    return STEP * total


def subset_error(load: float, dim: int, budget, n: float) -> np.ndarray:
    """First-order root mean square error of `budget` random keys of n, drawn without replacement, in value spreads.

    sqrt((1/m - 1/n) e^{s^2} (d + s^2) / d): the variance of the influence of one key, over the number of keys, less the
    part that the n keys share.
    """
    n, load, dim = as_number("n", n, least=1), as_number("load", load, 0, MOST_LOAD), as_count("dim", dim)
    budget = as_array("budget", budget, 1, n)
    return np.sqrt((1 / budget - 1 / n) * math.exp(load**2) * (dim + load**2) / dim)


def weighted_error(load: float, dim: int, budget, n: float) -> np.ndarray:
    """First-order root mean square error of `window + weighted` on independent keys, in value spreads.

    Half of the budget is read for sure, and the others, n - w with w = m/2, are estimated from r = m - w random ones:
    ((n - w)/n) sqrt((1/r - 1/(n - w)) e^{s^2} (d + s^2) / d). Close to the square root of 2 times `subset_error`.
    """
    n, load, dim = as_number("n", n, least=2), as_number("load", load, 0, MOST_LOAD), as_count("dim", dim)
    budget = as_array("budget", budget, 2, n)
    extra = budget // 2
    others = n - budget + extra
    noise = (1 / extra - 1 / others).clip(0)
    return others / n * np.sqrt(noise * math.exp(load**2) * (dim + load**2) / dim)


def largest_error(load: float, dim: int, budget, n: float) -> np.ndarray:
    """First-order root mean square error of the `budget` keys of largest weight, of n independent ones, in spreads.

    With z the level that a share budget/n of the keys lies above, M = Q(z - s) their share of the attention (Q the
    upper tail of a standard normal law), the kept keys are off along the query by h = density(z - s) / M, and across it
    in each of d - 1 directions by a variance (1 - 2 M) P_b + P_n, P the sum of the squared weights over the kept keys
    and over all: e^{s^2} Q(z - 2s) / (n M^2) and e^{s^2} / n.
    """
    n, load, dim = as_number("n", n, least=1), as_number("load", load, 0, MOST_LOAD), as_count("dim", dim)
    level = -ndtri(as_array("budget", budget, 1, n) / n)  # -oo where all keys are kept
    log_mass = log_ndtr(load - level)
    along = np.exp(-((level - load) ** 2) / 2 - log_mass) / math.sqrt(2 * math.pi)
    kept = np.exp(load**2 + log_ndtr(2 * load - level) - 2 * log_mass) / n
    across = (1 - 2 * np.exp(log_mass)) * kept + math.exp(load**2) / n
    return np.sqrt((along**2 + (dim - 1) * across.clip(0)) / dim)


# ------------------------------------------------------------ serial dependence


def pair_covariance(load: float, dim: int, correlation) -> np.ndarray:
    """tr Cov of the influences of two keys whose correlation is r: e^{r s^2} (r d + r^2 s^2).

    The influence of a key y on attention at the tilt t, |t| = s, is e^{<t, y> - s^2/2} (y - t).
    """
    load, dim = as_number("load", load, 0, MOST_LOAD), as_count("dim", dim)
    r = as_array("correlation", correlation, -1, 1)
    return np.exp(r * load**2) * (r * dim + r**2 * load**2)


def mean_variance(load: float, dim: int, correlation: float, count: int, stride: float = 1.0) -> float:
    """E ||mean of the influences of `count` keys at equal distances||^2 in a serial sequence, in value spreads squared.

    Parameters
    ----------
    correlation : of neighbours in the sequence; stride : distance of successive keys read.
    """
    correlation, stride = as_number("correlation", correlation, -1, 1), as_positive("stride", stride)
    if correlation < 0 and stride != round(stride):
        raise ValueError(f"stride: expected an integer where the correlation is negative, got {stride}")
    count = as_count("count", count, most=10**8)
    if count == 1:
        return float(pair_covariance(load, dim, 1.0)) / dim
    gaps = np.arange(1, count)
    between = pair_covariance(load, dim, correlation ** (stride * gaps))
    return float(pair_covariance(load, dim, 1.0) + 2 * ((1 - gaps / count) * between).sum()) / (count * dim)


def inflation(load: float, dim: int, correlation: float) -> float:
    """How many consecutive keys of a long window are worth one independent key, to first order: at least 1 if r >= 0.

    The sum over all lags g of e^{r^|g| s^2} (r^|g| d + r^2|g| s^2), over its term at lag 0. For s -> 0 it is
    (1 + r) / (1 - r), and it falls as the load grows: a sharper query forgets sooner.
    """
    if not -1 < as_number("correlation", correlation) < 1:
        raise ValueError(f"correlation: expected a number strictly between -1 and 1, got {correlation}")
    lags = math.ceil(40 / max(-math.log(max(abs(correlation), 1e-17)), 1e-9))
    terms = pair_covariance(load, dim, correlation ** np.arange(1, lags + 1))
    return 1 + 2 * float(terms.sum()) / float(pair_covariance(load, dim, 1.0))


def window_mean(x: Tensor, t: Tensor, correlation: float, lags) -> Tensor:
    """First-order mean (..., d) of attention over keys at `lags` from a token x (..., d), given it; tilt t (..., d).

    Given x, the key at lag g is N(r x, (1 - r^2) I) with r = correlation^|g|. Its weight has the mean e^{c}, c = r <t,
    x> + (1 - r^2) s^2 / 2, and under its own tilt it has the mean r x + (1 - r^2) t; the window averages these with the
    weights e^c. Global attention is t, so the bias is the mean of r (x - r t).
    """
    x = as_tensor("x", x)
    t = as_vectors("t", t, x.shape[-1] if x.ndim else 1).to(x)
    if x.shape != t.shape and x.ndim != 1 and t.ndim != 1 or x.ndim == 0:
        raise ValueError(f"x, t: expected shapes (..., d) that broadcast, got {tuple(x.shape)} and {tuple(t.shape)}")
    correlation, lags = as_number("correlation", correlation, -1, 1), as_tensor("lags", lags)
    if lags.ndim != 1 or len(lags) == 0 or (lags != lags.round()).any():
        raise ValueError(f"lags: expected integers (k,) with k >= 1, got shape {tuple(lags.shape)}")
    r = correlation ** lags.abs().to(x)
    s2, own = (t * t).sum(-1), (t * x).sum(-1)
    finite_answer("x, t", s2 + own)
    share = torch.softmax(r * own[..., None] + (1 - r**2) * s2[..., None] / 2, -1)
    return (share @ r)[..., None] * x + (1 - share @ r**2)[..., None] * t


def serial_error(scheme: str, load: float, dim: int, correlation: float, budget: int, n: int) -> float:
    """First-order root mean square error in a serial sequence, in value spreads, of a query at a turned token.

    Noise: the variance of the mean influence of the keys read, less what all n keys share. A window has a bias as well,
    that of `window_mean` at a token x with <t, x> = 0 and |x|^2 = dim.

    Parameters
    ----------
    scheme : random, window or strided; correlation : of neighbours; budget : keys read of n.
    """
    n, budget = as_count("n", n, most=10**8), as_count("budget", budget)
    correlation, load = as_number("correlation", correlation, 0, 1), as_number("load", load, 0, MOST_LOAD)
    if budget > n:
        raise ValueError(f"budget: expected at most the number of keys, {n}, got {budget}")
    whole = mean_variance(load, dim, correlation, n)
    if scheme == "random":
        apart = max(mean_variance(load, dim, correlation, 1) - whole, 0.0) * n / max(n - 1, 1)
        return math.sqrt(apart * (1 / budget - 1 / n))
    if scheme not in ("window", "strided"):
        raise ValueError(f"scheme: expected 'random', 'window' or 'strided', got {scheme!r}")
    stride = n / budget if scheme == "strided" else 1.0
    square = max(mean_variance(load, dim, correlation, budget, stride) - whole, 0.0)
    if scheme == "window":
        lags = torch.arange(budget) - budget // 2
        r = correlation ** lags.abs().double()
        p = torch.softmax((1 - r**2) * load**2 / 2, 0)
        square += float((p @ r) ** 2 + (p @ r**2) ** 2 * load**2 / dim)
    return math.sqrt(square)


# ------------------------------------------------------------ the largest weights


def top_mass(n: float, load: float, k) -> np.ndarray:
    """Expected share of attention on the k largest of n weights, exact: logits are standard normal times the load.

    With 1/S = int e^{-l S} dl as in chapter 9, and a token of logit sy among the k largest if fewer than k of the n - 1
    others lie above it, under the tilt e^{-l e^{sY}}:

        E M_k = n E int e^{sy - l e^{sy}} phi^{n-1} P(Bin(n-1, p) < k) dl,   p = E[e^{-l e^{sY}}; Y > y] / phi(l).

    Parameters
    ----------
    n : number of keys, real, >= 2; load : s > 0; k : integers from 1 to n - 1, any shape.

    Returns
    -------
    Array of the shape of k, to about 1e-4 for k up to 10^4

    Raises
    ------
    ArithmeticError
        If all weights do not sum to 1 within 1e-3: a check of the quadrature, made every time.
    """
    s, n = as_positive("load", load, most=MOST_TOP_LOAD), as_number("n", n, 2, MOST_TOKENS)
    ranks, log_n = as_array("k", k), math.log(n)
    if not ((ranks >= 1) & (ranks < n) & (ranks == ranks.round())).all():
        raise ValueError(f"n, k: expected k from 1 to n - 1, integers, got n = {n:g} and k = {ranks}")
    z = math.sqrt(2 * (log_n + 35))  # no key beyond it
    step = max(min(0.05, 0.2 / s, 0.6 / (z * math.sqrt(ranks.max()))), 1e-3)  # the level of rank k is that sharp
    y = np.arange(-8.0, z, step)
    normal = step / math.sqrt(2 * math.pi) * np.exp(-(y**2) / 2)
    filled = -float(ndtri_exp(min(math.log(60) - log_n, -1e-3)))  # a level with many keys above it
    x = np.arange(-s * min(z, s + z / 3 + 4) - log_n - 20, max(-s * filled, -log_n) + 9, STEP / 2)
    found, total = np.zeros(ranks.shape), 0.0
    for part in np.array_split(x, max(1, len(x) * len(y) // 2**20)):
        u = part[:, None] + s * y
        e = np.exp(np.minimum(u, 700))
        kept = normal * np.exp(-e)
        rest = (normal * -np.expm1(-e)).sum(1)
        power = np.exp((n - 1) * np.log1p(-np.minimum(rest, 1 - 1e-16)))
        above = np.cumsum(kept[:, ::-1], 1)[:, ::-1] - kept / 2
        share = np.clip(above / kept.sum(1, keepdims=True).clip(1e-300), 0, 1)
        weight = n * STEP / 2 * power[:, None] * e * kept
        total += weight.sum()
        matters = weight > 1e-12
        weight, expected = weight[matters], share[matters] * (n - 1)  # how many lie above
        for i in np.ndindex(ranks.shape):
            rank, unsure = ranks[i], np.abs(expected - ranks[i]) < 8 * math.sqrt(ranks[i]) + 20
            chance = (expected < rank).astype(float)
            chance[unsure] = betaincc(rank, n - rank, expected[unsure] / (n - 1))
            found[i] += weight @ chance
    if not abs(total - 1) < 1e-3:
        raise ArithmeticError(f"softmax weights sum to {total:.6g}, not 1: the quadrature has failed")
    return found / total


def frozen_missing_mass(reduced_load: float, k) -> np.ndarray:
    """E[1 - M_k] in the frozen phase, n -> oo at reduced load sigma > 1: the k largest of Poisson-Dirichlet weights.

    With a = 1 / sigma and c = Gamma(1 - a): (1/c) int u^{-a} e^{-u} (1 - c / (u^{-a} e^{-u} + gamma(1 - a, u)))^k du
    (chapter 11). For large k it falls like k^{-(sigma - 1)}.

    Raises
    ------
    ValueError
        If the reduced load is not above 1.
    """
    sigma, ranks = as_positive("reduced_load", reduced_load), as_array("k", k, least=0)
    if not sigma > 1:
        raise ValueError(f"reduced_load: expected a number above 1, where attention is frozen, got {reduced_load}")
    a = 1 / sigma
    c = float(gamma_function(1 - a))
    # In log u, where the integrand is smooth: it decays like u^{1-a} to the left, so the range grows as sigma nears 1.
    log_u = np.arange(-40 / (1 - a), math.log(60.0), 0.01)
    u = np.exp(log_u)
    density = np.exp((1 - a) * log_u - u) / c * 0.01
    heavy = np.exp(-a * log_u - u)
    ratio = (heavy - c * gammaincc(1 - a, u)) / (heavy + c * gammainc(1 - a, u))
    return (density * np.clip(ratio, 0, 1) ** ranks[..., None]).sum(-1)
