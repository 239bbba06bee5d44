"""Tails, shape and dependence of real tokens: how far the theory's assumptions hold for them.

The theorems of this book ask for independent sub-Gaussian tokens, and its sharp laws for Gaussian ones. What they need
of the law is its log-MGF along the directions in which heads look. This module measures that, on one-dimensional
samples (projections of tokens, logits of a head) and on tokens (n, d).

Empirical moments, tails and log-MGFs of n tokens describe these n tokens. Every statistic of the far tail depends on n
for Gaussian samples too, so each has its Gaussian value at the same n beside it (`normal_hill`, a normal sample of the
same size, `softmax_moments`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import integrate, special, stats
from torch import Tensor

from tokcx_lib.models.heads import Head
from tokcx_lib.theory.softmax_law import softmax_moments
from tokcx_lib.validation import (
    as_choice,
    as_count,
    as_flag,
    as_kind,
    as_list,
    as_number,
    as_positive,
    as_tensor,
    as_tokens,
    finite_answer,
    naming,
    rows_that_fit,
)

SIDES = ("both", "upper")
TAIL_SHARE = 0.01  # of a sample, in the Hill estimates of `logit_tails`
SHARES = (0.1, 0.03, 0.01, 0.003, 0.001)
GRID = 16  # points at which `subgaussian_ratio` looks at the log-MGF
QUERIES = 16  # queries whose logits are held at once


def _as_sample(name: str, x, least: int = 2) -> Tensor:
    """Samples along the last axis, shape (..., n), float64, none of them constant."""
    sample = as_tensor(name, x).detach().double()
    if sample.ndim == 0 or sample.shape[-1] < least or 0 in sample.shape:
        raise ValueError(f"{name}: expected shape (..., n) with n >= {least}, got {tuple(sample.shape)}")
    if (sample.amax(-1) == sample.amin(-1)).any():
        raise ValueError(f"{name}: expected samples that vary, got a constant one")
    return sample


def standardise(x) -> Tensor:
    """Samples (..., n) with mean 0 and variance 1 (divisor n) along the last axis, float64.

    Raises
    ------
    ValueError
        If a sample has fewer than two entries, is constant, or is not finite.
    """
    sample = _as_sample("x", x)
    centred = sample - sample.mean(-1, keepdim=True)
    return centred / finite_answer("x", centred.square().mean(-1, keepdim=True).sqrt())


# Not those of scipy.stats: they work on the CPU alone, and give NaN where third and fourth powers of x overflow.


def skewness(x) -> Tensor:
    """E z^3 of the standardised samples (..., n): 0 for a symmetric law, negative where the lower tail is longer."""
    return standardise(x).pow(3).mean(-1)


def excess_kurtosis(x) -> Tensor:
    """E z^4 - 3 of the standardised samples (..., n): 0 for a Gaussian law, -2 at least (two equal points)."""
    return standardise(x).pow(4).mean(-1) - 3


class Hill(NamedTuple):
    """Estimate of a tail index: `index`, its standard error `error`, and `count`, the largest values it rests on."""

    index: Tensor
    error: Tensor
    count: int


def hill(x, k: int | None = None, side: str = "both") -> Hill:
    """Hill's estimate of the tail index alpha of |x - mean|, P(|x - mean| > r) ~ r^-alpha, from the k largest values.

    With the order statistics X_1 >= X_2 >= ... it is 1 / mean of log(X_i / X_{k+1}) over i <= k, with standard error
    index / sqrt(k) for independent values (Hill, A simple general approach to inference about the tail of a
    distribution, Annals of Statistics 3, 1975).

    One estimate misleads. It has a finite value for every sample, and for Gaussian ones, which have no tail index, it
    is about 2 log(n/k), and grows with n: read it beside `normal_hill(k / n)`, and over several k (`hill_table`).
    Values below the Gaussian one speak of a heavier tail, and of a power law only if they settle as k falls.

    Parameters
    ----------
    x : (..., n), samples along the last axis.
    k : from 1 to n - 1; default a hundredth of the sample, at least 1. Larger k: less noise, more bias.
    side : "both" for |x - mean|, "upper" for x - mean.

    Raises
    ------
    ValueError
        If k or the side is not one of these, or fewer than k + 1 values exceed the mean ("upper").
    """
    sample = _as_sample("x", x)
    as_choice("side", side, SIDES)
    n = sample.shape[-1]
    k = max(1, round(TAIL_SHARE * n)) if k is None else as_count("k", k)
    if k >= n:
        raise ValueError(f"k: expected an integer below the number of values, {n}, got {k}")
    centred = sample - sample.mean(-1, keepdim=True)
    return _hill((centred.abs() if side == "both" else centred).topk(k + 1, -1).values)


def _hill(largest: Tensor) -> Hill:
    """From the k + 1 largest values (..., k + 1), in decreasing order."""
    k = largest.shape[-1] - 1
    if (largest[..., -1] <= 0).any():
        raise ValueError(f"k: expected fewer than the values above the mean, got {k}")
    index = 1 / (largest[..., :-1] / largest[..., -1:]).log().mean(-1)
    return Hill(index, index / math.sqrt(k), k)


def normal_hill(share: float, side: str = "both") -> float:
    """What `hill` tends to for Gaussian samples when k is this share of n: 1 / E[log(Z / u) | Z > u], u the quantile.

    About u^2 for large u, so 2 log(n / k) at leading order.

    Raises
    ------
    ValueError
        If the share is not in (0, 1), or above half for the upper side (there u <= 0).
    """
    as_choice("side", side, SIDES)
    most = 1.0 if side == "both" else 0.5
    if not 0 < as_number("share", share) < most:
        raise ValueError(f"share: expected a number between 0 and {most:g}, got {share}")
    beyond = share / 2 if side == "both" else share  # of the upper tail; the two sides of |Z| are alike
    u = -special.ndtri(beyond)
    # By parts, E[log(Z/u); Z > u] is the integral of P(Z > z) / z.
    excess, _ = integrate.quad(lambda z: math.exp(special.log_ndtr(-z) - math.log(beyond)) / z, u, u + 40, limit=200)
    return 1 / excess


def hill_table(x, shares=SHARES, side: str = "both") -> pd.DataFrame:
    """Hill estimates of one sample (n,) over several k, with the Gaussian value of each.

    Returns
    -------
    DataFrame
        k, share = k / n, hill, hill_error and normal_hill.
    """
    sample = _as_sample("x", as_tensor("x", x, ndim=1))
    rows = []
    for share in as_list("shares", shares, "shares"):
        share = as_number("shares", share)
        if not 0 < share < 1:
            raise ValueError(f"shares: expected numbers between 0 and 1, got {share}")
        k = max(1, round(share * len(sample)))
        with naming("x, shares"):
            found = hill(sample, k, side)
        null = normal_hill(k / len(sample), side)
        rows.append((k, k / len(sample), found.index.item(), found.error.item(), null))
    return pd.DataFrame(rows, columns=["k", "share", "hill", "hill_error", "normal_hill"])


def log_mgf(x, t) -> Tensor:
    """Empirical log-MGF K(t) = log mean e^{t (x - mean)} of centred samples.

    x : (..., n); t broadcasts with the leading axes, in units of 1/x. Returns shape (...).
    """
    sample = _as_sample("x", x)
    centred = sample - sample.mean(-1, keepdim=True)
    t = as_tensor("t", t).to(sample)
    try:
        torch.broadcast_shapes(t.shape, sample.shape[:-1])
    except RuntimeError as error:
        wanted = f"a shape that broadcasts with {tuple(sample.shape[:-1])}"
        raise ValueError(f"t: expected {wanted}, got {tuple(t.shape)}") from error
    return finite_answer("x, t", torch.logsumexp(t[..., None] * centred, -1) - math.log(sample.shape[-1]))


def subgaussian_ratio(x, side: str = "both", points: int = GRID) -> Tensor:
    """Smallest variance proxy over the variance: sup of 2 K(t) / (t^2 Var) over t, K the log-MGF of the centred sample.

    A centred law is sub-Gaussian with proxy v if K(t) <= v t^2 / 2 for all t; v is at least the variance, the limit of
    2 K(t) / t^2 at t = 0, so the ratio is at least 1: exactly 1 for Gaussian and Rademacher laws, more where a tail is
    heavier.

    The supremum is taken over |t| <= sqrt(2 log n) / sd, on a grid. Beyond, the empirical MGF of n Gaussian values is
    its largest term (chapter 9), and says nothing of the law. For a law that is not sub-Gaussian the ratio is finite
    too, and grows with n: it is the proxy that these n tokens need at the scales that attention over n tokens can see.

    Parameters
    ----------
    x : (..., n); side : "both", or "upper" for t > 0 only; points : of the grid, on each side.

    Returns
    -------
    Tensor of shape (...), dimensionless
    """
    z = standardise(x)
    as_choice("side", side, SIDES)
    upper = _upper_ratio(z, as_count("points", points))
    return upper if side == "upper" else torch.maximum(upper, _upper_ratio(-z, points))


def _upper_ratio(z: Tensor, points: int) -> Tensor:
    """sup of 2 K(t) / t^2 over 0 < t <= sqrt(2 log n), and the limit 1 at t = 0, of standardised samples (..., n)."""
    n = z.shape[-1]
    step = math.sqrt(2 * math.log(n)) / points
    largest = z.amax(-1)
    factor = torch.exp(step * (z - largest[..., None]))  # its powers are those of the whole grid, and cannot overflow
    power = torch.ones_like(factor)
    ratio = torch.ones_like(largest)
    for i in range(1, points + 1):
        t = i * step
        power *= factor
        ratio = torch.maximum(ratio, 2 * (t * largest + power.mean(-1).log()) / t**2)
    return ratio


def normal_log_mgf(n: int, t) -> Tensor:
    """Log-MGF of the n normal scores, quantiles of (i - 1/2) / n: about that of n normal values, at any t (m,).

    t^2 / 2 while t is well below sqrt(2 log n); beyond, as for n independent values, about t max - log n.
    """
    n = as_count("n", n, most=rows_that_fit(4))
    scores = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    t = as_tensor("t", t)
    if t.ndim != 1 or len(t) == 0:
        raise ValueError(f"t: expected shape (m,) with m >= 1, got {tuple(t.shape)}")
    return torch.stack([torch.logsumexp(u * scores, 0) for u in t]) - math.log(n)


class Quantiles(NamedTuple):
    """Quantiles of the `normal` law and of the standardised `sample` at the same probabilities, each (points,)."""

    normal: Tensor
    sample: Tensor


def qq(x, points: int = 41) -> Quantiles:
    """Quantiles for a QQ-plot: of the standard normal law, and of the standardised sample (n,).

    Probabilities are those of `points` equally spaced normal quantiles up to that of 1 - 1/(2 n), so the ends are about
    the smallest and largest values of the sample.
    """
    z = standardise(as_tensor("x", x, ndim=1))
    most = -special.ndtri(0.5 / len(z))
    points = as_count("points", points, least=2, most=rows_that_fit(4))
    normal = torch.linspace(-most, most, points, dtype=torch.float64)
    return Quantiles(normal, torch.quantile(z.cpu(), torch.special.ndtr(normal)))


def window_variance_ratio(x, window: int, pooled: bool = False) -> Tensor:
    """Design effect of windows: variance of the mean of a whole window, over that of as many independent tokens.

    1 for independent tokens. Where tokens of a window resemble each other it is larger, and n tokens in whole windows
    are worth n / ratio independent ones for a mean. It equals 1 + 2 sum_{k < window} (1 - k / window) rho_k for a
    stationary sequence with autocorrelations rho_k (Kish, Survey Sampling, 1965; the integrated autocorrelation time,
    cut at the window). Windows are taken to be independent of one another. From W windows its relative standard error
    is about sqrt(2 / W), where means of windows are nearly Gaussian.

    Parameters
    ----------
    x : (..., n), in the order of the text; window : tokens in one. A last, short window is left out.
    pooled : one ratio for all leading axes together, of the summed variances: for tokens as (d, n), that of the trace.

    Raises
    ------
    ValueError
        If there are fewer than two whole windows, or a sample is constant.
    """
    sample, pooled = _as_sample("x", x), as_flag("pooled", pooled)
    whole = _require_windows(sample.shape[-1], window)
    cut = finite_answer("x", sample[..., : whole * window])
    between = cut.reshape(*cut.shape[:-1], whole, window).mean(-1).var(-1)
    # With few windows the variance within the sample falls short of that of the law by the variance of its mean.
    total = cut.var(-1, correction=0) + between / whole
    return window * between.sum() / total.sum() if pooled else window * between / total


def position_share(x, window: int) -> Tensor:
    """Share of the variance of samples (..., n) that the place in the window explains: 0 none, 1 all of it.

    The variance over places of the mean over windows, less what that mean owes to chance, over the variance. It is part
    of no sampling error of whole windows, since each holds every place once; so the design effect may be below 1.

    Raises
    ------
    ValueError
        As for `window_variance_ratio`.
    """
    sample = _as_sample("x", x)
    whole = _require_windows(sample.shape[-1], window)
    cut = sample[..., : whole * window].reshape(*sample.shape[:-1], whole, window)
    within = cut.var(-2).mean(-1)  # at one place, over windows
    placed = (cut.mean(-2).var(-1) - within / whole).clamp(min=0)
    return placed / (placed + within)


def _require_windows(n: int, window: int) -> int:
    """Number of whole windows among n tokens."""
    if n // as_count("window", window) < 2:
        raise ValueError(f"window: expected at most {n // 2}, half of the tokens, got {window}")
    return n // window


def whiten(x) -> Tensor:
    """Whitened tokens (n, r), float64: mean 0, covariance I (divisor n) on the r directions in which tokens vary.

    Directions whose variance is below 1e-6 of the largest are left out: layer normalisation leaves one without any.
    """
    tokens = as_tokens("x", x).detach().double()
    centred = tokens - tokens.mean(0)
    if not centred.any():
        raise ValueError("x: expected tokens that vary, got one point")
    finite_answer("x", centred.square().sum())
    values, vectors = torch.linalg.eigh(centred.mT @ centred / len(centred))
    kept = values > 1e-6 * values[-1]
    return centred @ (vectors[:, kept] / values[kept].sqrt())


NORM_QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)


def token_geometry(x, window: int | None = None, outlier: float = 10.0) -> dict[str, float]:
    """Shape of a cloud of tokens (n, d): how far from round, and from Gaussian, it is.

    Parameters
    ----------
    x : (n, d); window : adds the design effect of the mean of the tokens, if given (`window_variance_ratio`).
    outlier : how many times the median of all coordinates makes an outlier.

    Returns
    -------
    dict
        mean_share : norm of the mean over the root of the mean square norm, 0 for centred tokens, 1 for a point.
        mean_cosine : mean cosine of two different tokens (anisotropy of Ethayarajh, EMNLP 2019).
        participation : (tr C)^2 / tr C^2 of the centred covariance C, the effective number of directions.
        top_share : share of the variance in the leading direction. rank : directions with any variance.
        outlier_variance, outlier_mean : coordinates whose variance, or |mean|, exceeds `outlier` times the median over
        coordinates. outlier_share : their part of the mean square norm.
        kurtosis_05, _50, _95, kurtosis_max : quantiles over coordinates of the excess kurtosis.
        norm_01 ... norm_99 : quantiles of |z|^2 / rank, z whitened; chi_01 ... the same of the chi-square law that
        Gaussian tokens have. norm_sd, chi_sd : their standard deviations.
        design_effect : of the mean of the tokens, trace over directions, with `window` only.
    """
    tokens, outlier = as_tokens("x", x).detach().double(), as_positive("outlier", outlier)
    if len(tokens) < 2 or (tokens == tokens[0]).all():
        raise ValueError(f"x: expected two or more tokens that vary, got shape {tuple(tokens.shape)}")
    finite_answer("x", tokens.square().sum())
    mean, variance = tokens.mean(0), tokens.var(0, correction=0)
    square = tokens.square().mean(0)
    n, unit = len(tokens), torch.nn.functional.normalize(tokens, dim=1)
    values = torch.linalg.eigvalsh((tokens - mean).mT @ (tokens - mean) / n)
    wide, off = variance > outlier * variance.median(), mean.abs() > outlier * mean.abs().median()
    varying = tokens.mT[variance > 0]
    kurtosis = excess_kurtosis(varying)
    z = whiten(tokens)
    row = {
        "mean_share": (mean.norm() / square.sum().sqrt()).item(),
        "mean_cosine": ((unit.sum(0).square().sum() - n) / (n * (n - 1))).item(),
        "participation": (values.sum() ** 2 / values.square().sum()).item(),
        "top_share": (values[-1] / values.sum()).item(),
        "rank": z.shape[1],
        "outlier_variance": int(wide.sum()),
        "outlier_mean": int(off.sum()),
        "outlier_share": (square[wide | off].sum() / square.sum()).item(),
        **{f"kurtosis_{100 * p:02.0f}": kurtosis.quantile(p).item() for p in (0.05, 0.5, 0.95)},
        "kurtosis_max": kurtosis.max().item(),
        **_norms(z),
    }
    if window is not None:
        row["design_effect"] = window_variance_ratio(varying, window, pooled=True).item()
    return row


def _norms(z: Tensor) -> dict[str, float]:
    """Quantiles and standard deviation of |z|^2 / rank for whitened tokens (n, rank), and those of Gaussian tokens."""
    rank, norms = z.shape[1], z.square().mean(1)
    return {
        **{f"norm_{100 * p:02.0f}": norms.quantile(p).item() for p in NORM_QUANTILES},
        **{f"chi_{100 * p:02.0f}": float(stats.chi2.ppf(p, rank)) / rank for p in NORM_QUANTILES},
        "norm_sd": norms.std().item(),
        "chi_sd": math.sqrt(2 / rank),
    }


def direction_tails(x, window: int | None = None) -> dict[str, float]:
    """Tails of one projection (n,): moments, Hill estimates over several k, sub-Gaussian ratios, design effect.

    Returns
    -------
    dict
        sd, skewness, excess_kurtosis; hill_SHARE for each share of `SHARES`, such as hill_0.01; subgaussian and
        subgaussian_upper, of t on both sides and t > 0 only; with `window` only, design_effect of the mean and
        `position_share`.
    """
    sample = _as_sample("x", as_tensor("x", x, ndim=1))
    row = {
        "sd": sample.std(correction=0).item(),
        "skewness": skewness(sample).item(),
        "excess_kurtosis": excess_kurtosis(sample).item(),
        **{f"hill_{share:g}": index for share, index in zip(SHARES, hill_table(sample)["hill"].tolist())},
        "subgaussian": subgaussian_ratio(sample).item(),
        "subgaussian_upper": subgaussian_ratio(sample, "upper").item(),
    }
    if window is not None:
        row["design_effect"] = window_variance_ratio(sample, window).item()
        row["position_share"] = position_share(sample, window).item()
    return row


def logit_tails(head: Head, queries, keys, window: int | None = None, quantiles=(0.05, 0.95)) -> dict[str, float]:
    """Tails of the logits of one head: of each query over all keys, then the median over queries.

    A query x sends key y to the logit l = <A x + shift, y>, and softmax depends on the law of l over keys through its
    log-MGF alone: with K the log-MGF of the centred logits, attention over many tokens spends itself on a share
    e^{2 K(1) - K(2)} of them, which is e^{-s^2} for Gaussian logits of load s (chapter 7). Since e^l sees the upper
    tail only, the one-sided columns matter.

    Parameters
    ----------
    head : as from `heads.heads`; queries (m, d), keys (n, d), tokens of its layer. Keys in the order of the text if a
        window is given; they may include the queries.
    window : adds design effects over windows of so many keys.
    quantiles : over queries, beside the median; NAME_05 and NAME_95 by default.

    Returns
    -------
    dict
        For each NAME the median over queries, and its quantiles:

        load : standard deviation s of the logits.
        skewness, excess_kurtosis, hill, hill_upper : of the standardised logits; Hill from the hundredth of the keys
        that is largest (`normal_hill(0.01)`, `normal_hill(0.01, "upper")` for Gaussian ones).
        upper_variance : share of the variance that lies above the mean, E z^2 1{z > 0}; 1/2 for Gaussian logits.
        quantile_999, largest : of z; 3.09 and about sqrt(2 log n) for Gaussian logits.
        subgaussian_upper : `subgaussian_ratio` of t > 0.
        log_mgf_ratio : K(1) / (s^2 / 2), the log-MGF at the temperature of the head; 1 for Gaussian logits.
        log_mgf_normal : the same ratio of as many normal scores at load s (`normal_log_mgf`).
        log_share : 2 K(1) - K(2), log of the effective share of these n keys, 1 / (n sum w^2).
        log_share_ratio : log_share / (-s^2), 1 for infinitely many Gaussian keys.
        log_share_normal : -log(n E sum w^2) of n independent Gaussian keys at load s, exactly (`softmax_moments`).
        position_share : of the variance of the logits, explained by the place in the window; this and what follows only
        with a window.
        log_share_placed : what log_share would be if the logits at each place were Gaussian with one variance w, that
        within places, around the mean logit m of the place: 2 K_m(1) - K_m(2) - w, K_m the log-MGF over places.
        effect_logits, effect_weights, effect_outputs : design effects (`window_variance_ratio`) of the mean logit, of
        the mean weight e^l, and of the output to first order, mean of e^{l - K}(V y - output), trace over V y.

    Raises
    ------
    ValueError
        If shapes do not match the head, or there are fewer than two windows of keys.
    """
    keys = as_tokens("keys", keys, as_kind("head", head, Head).W_K.shape[1]).detach()
    queries = as_tokens("queries", queries, head.W_Q.shape[1]).detach()
    quantiles = [as_number("quantiles", p, 0, 1) for p in as_list("quantiles", quantiles, "quantiles", least=0)]
    q, k, v = head.project(queries.double())[0], *head.project(keys)[1:]
    k, v = k.double(), v.double() - v.double().mean(0)
    with naming("queries, keys, window"):
        blocks = [_logit_block(block @ (k - k.mean(0)).mT, v, window) for block in q.split(QUERIES)]
    found = {name: torch.cat([block[name] for block in blocks]).cpu().numpy() for name in blocks[0]}
    loads = found["load"]
    found["log_mgf_normal"] = normal_log_mgf(len(keys), loads).numpy() / (loads**2 / 2)
    found["log_share_normal"] = -np.log(len(keys) * softmax_moments(len(keys), loads).participation)
    row = {}
    for name, values in found.items():
        row[name] = float(np.median(values))
        row.update({f"{name}_{100 * p:02.0f}": float(np.quantile(values, p)) for p in quantiles})
    return row


def _logit_block(logits: Tensor, v: Tensor, window: int | None) -> dict[str, Tensor]:
    """The statistics of `logit_tails` for some queries: centred logits (m, n), centred values (n, d_v)."""
    n = logits.shape[1]
    load = logits.square().mean(1).sqrt()
    z = logits / load[:, None]
    k = max(1, round(TAIL_SHARE * n))
    largest = z.topk(k + 1, 1).values
    weights = torch.softmax(logits, 1) * n  # e^{l - K(1)}
    log_mgf_one = torch.logsumexp(logits, 1) - math.log(n)
    log_share = -weights.square().mean(1).log()  # 2 K(1) - K(2)
    found = {
        "load": load,
        "skewness": z.pow(3).mean(1),
        "excess_kurtosis": z.pow(4).mean(1) - 3,
        "hill": _hill(z.abs().topk(k + 1, 1).values).index,
        "hill_upper": _hill(largest).index,
        "upper_variance": z.clamp(min=0).square().mean(1),
        "quantile_999": largest[:, max(0, round(0.001 * n) - 1)],
        "largest": largest[:, 0],
        "subgaussian_upper": _upper_ratio(z, GRID),
        "log_mgf_ratio": log_mgf_one / (load.square() / 2),
        "log_share": log_share,
        "log_share_ratio": -log_share / load.square(),
    }
    if window is not None:
        found["position_share"] = position_share(logits, window)
        found["log_share_placed"] = _placed_log_share(logits, window)
        found["effect_logits"] = window_variance_ratio(logits, window)
        found["effect_weights"] = window_variance_ratio(weights, window)
        found["effect_outputs"] = _output_effect(weights, v, window)
    return found


def _placed_log_share(logits: Tensor, window: int) -> Tensor:
    """2 K(1) - K(2) of Gaussian logits around the mean of their place in the window, from logits (m, n): (m,)."""
    whole = _require_windows(logits.shape[1], window)
    cut = logits[:, : whole * window].reshape(len(logits), whole, window)
    mean, within = cut.mean(1), cut.var(1).mean(1)
    once, twice = (torch.logsumexp(t * mean, 1) - math.log(window) for t in (1, 2))
    return 2 * once - twice - within


def _output_effect(weights: Tensor, v: Tensor, window: int) -> Tensor:
    """Design effect of the first-order error of the outputs, mean of weight (value - output), trace over values.

    weights (m, n) with mean 1, values (n, d_v); returns (m,).
    """
    whole = weights.shape[1] // window
    weights, v = weights[:, : whole * window], v[: whole * window]
    output = weights @ v / weights.sum(1, keepdim=True)
    by_window = weights.reshape(len(weights), whole, window)
    sums = torch.einsum("mwj,wjd->mwd", by_window, v.reshape(whole, window, -1))
    means = (sums - by_window.sum(2)[..., None] * output[:, None]) / window
    between = means.square().sum((1, 2)) / (whole - 1)
    distance = v.square().sum(1) - 2 * output @ v.mT + output.square().sum(1, keepdim=True)
    total = (weights.square() * distance).mean(1)
    return window * between / (total + between / whole)
