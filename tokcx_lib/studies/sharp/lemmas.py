"""What the lemmas of the sharp exponent claim, measured: each pair of numbers would part if a constant were wrong.

A bound that holds with room to spare cannot be checked by holding. So each function here looks where its lemma is an
equality, or measures the exponent that it names. Chapter 10.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from tokcx_lib import runtime
from tokcx_lib.sampling import binned, fits
from tokcx_lib.theory import rates
from tokcx_lib.validation import as_array, as_count, as_kind, as_list, as_number, as_positive

_FLAT = 700.0  # e^700 is the largest power that is taken


def own_moment(theta: float, horizons) -> np.ndarray:
    """E e^{theta (g - s^2/2)} for the logit g of a standard normal query on itself, d = 1, by quadrature.

    Its largest value over the horizons, at horizon 1, is (1 - theta)^{-1/2}, the constant of the lemma on own tokens.

    Parameters
    ----------
    theta : from 0 to 0.99; horizons : numbers >= 0, of any shape.
    """
    theta, h = as_number("theta", theta, 0, 0.99), as_array("horizons", horizons, 0)
    z = np.linspace(-120, 120, 24_001)
    power = theta * (h[..., None] * z**2 - (h[..., None] * z) ** 2 / 2) - z**2 / 2
    return np.exp(power).sum(-1) * (z[1] - z[0]) / math.sqrt(2 * math.pi)


def pair_constant(horizon: float) -> float:
    """n k E |double sum - single sum|^2 of the lemma on pairs, the same for every n; d = 1, horizon^2 < 1/2.

    E h^2 - E g^2 + E h(x, z) h(z, x) with Psi = horizon^2: (1 - 2 Psi)^{-1/2} + Psi (1 - 2 Psi)^{-3/2} less (1 -
    Psi^2)^{-3/2}, and for the product the Gaussian integral with the precision [[1 + Psi, -2 H], [-2 H, 1 + Psi]].
    """
    h = as_positive("horizon", horizon)
    psi = h**2
    if not psi < 0.5:
        raise ValueError(f"horizon: expected a number whose square is below 1/2, got {horizon}")
    square = (1 - 2 * psi) ** -0.5 + psi * (1 - 2 * psi) ** -1.5 - (1 - psi**2) ** -1.5
    det = (1 + psi) ** 2 - 4 * psi  # (1 - psi)^2
    variance, covariance = (1 + psi) / det, 2 * h / det
    # (z - Hx)(x - Hz) = (1 + Psi) xz - H (x^2 + z^2)
    return square + ((1 + psi) * covariance - 2 * h * variance) / math.sqrt(det)


def pair_gaps(horizon: float, lengths: Sequence[int], tokens: int, seed: int) -> pd.DataFrame:
    """n k times the mean square of double sum less single sum, over drawn tokens: columns n, measured, stderr.

    `tokens` are drawn for each of the lengths n, in replicates of n, k = n - 1.
    """
    h, lengths, rows = as_positive("horizon", horizon), as_list("lengths", lengths, "integers"), []
    tokens = as_count("tokens", tokens, least=2, most=10**7)
    for n in lengths:
        n = as_count("lengths", n, least=2, most=min(tokens // 2, 10**4))
        y = torch.randn(tokens // n, n, generator=runtime.stream(seed, n), dtype=torch.float64)
        single = (rates.influence(y[..., None], [[h]])[..., 0] - h * y).mean(1)
        double = []
        for z in y.split(max(1, 4_000_000 // n**2)):
            t = h * z[:, :, None]
            pulls = (z[:, None, :] - t) * torch.exp(t * z[:, None, :] - t**2 / 2)
            double.append(pulls.sum((1, 2)) - torch.diagonal(pulls, dim1=1, dim2=2).sum(1))
        squares = n * (n - 1) * (torch.cat(double) / (n * (n - 1)) - single).square()
        rows.append((n, squares.mean().item(), squares.std().item() / math.sqrt(len(squares))))
    return pd.DataFrame(rows, columns=["n", "measured", "stderr"])


def query_errors(reduced: Sequence[float], lengths: Sequence[int], replicates: int, seed: int) -> pd.DataFrame:
    """Mean size of the error of one query at reduced loads sigma, d = 1, over n standard normal tokens in bins.

    Columns sigma, n, replicate, error, and share: the error over sqrt(2/pi) e^{s^2/2} sqrt((1 + s^2)/n), the mean size
    of the normal limit.
    """
    sigma = as_array("reduced", reduced, 0, 1).ravel()
    replicates, rows = as_count("replicates", replicates, most=10**5), []
    for n in as_list("lengths", lengths, "integers"):
        n = as_count("lengths", n, least=binned.LEAST, most=10**15)
        s = sigma * math.sqrt(2 * math.log(n))
        normal = np.exp(s**2 / 2) * np.sqrt(2 / math.pi * (1 + s**2) / n)
        for r in range(replicates):
            tokens = binned.draw(n, runtime.stream(seed, n, r), bins=2000)
            places = torch.cat([tokens.points, tokens.outer]).numpy()
            counts = torch.cat([tokens.counts, torch.ones_like(tokens.outer)]).numpy()
            powers = np.minimum(s[:, None] * places - s[:, None] ** 2 / 2, _FLAT)
            weights = counts * np.exp(powers)
            errors = np.abs((weights * (places - s[:, None])).sum(1) / weights.sum(1))
            rows += [(a, n, r, e, e / b) for a, e, b in zip(sigma.tolist(), errors.tolist(), normal.tolist())]
    return pd.DataFrame(rows, columns=["sigma", "n", "replicate", "error", "share"])


def largest_and_sum(sizes: Sequence[int], level: float) -> tuple[float, float]:
    """Pr(max |xi_j| > level) and Pr(|sum xi_j| > level) for independent signs of the given sizes, by enumeration.

    Two signs of one size meet the lemma with equality: 1 = 2 times 1/2.
    """
    sizes, level = as_array("sizes", sizes, 0).ravel().tolist(), as_number("level", level, 0)
    if not 1 <= len(sizes) <= 16:
        raise ValueError(f"sizes: expected 1 to 16 numbers, got {len(sizes)}")
    sums = [abs(sum(s * a for s, a in zip(sizes, signs))) for signs in itertools.product((1, -1), repeat=len(sizes))]
    return float(max(map(abs, sizes)) > level), sum(total > level for total in sums) / len(sums)


def query_exponents(errors: pd.DataFrame) -> pd.DataFrame:
    """Exponents of `query_errors` beside phi(sigma), and beside phi less what the powers of log n take from it.

    Up to sigma = 1/2 the latter is that of the mean size of the normal limit; beyond, the largest tokens give the error
    the factor (log n)^{(1 - sigma)/2}.
    """
    errors = as_kind("errors", errors, pd.DataFrame)
    if missing := {"sigma", "n", "replicate", "error", "share"} - set(errors):
        raise ValueError(f"errors: expected the columns of query_errors, got none of {', '.join(sorted(missing))}")
    rows = []
    for sigma, part in errors.groupby("sigma"):
        fit = fits.fit_slope(part, "error")
        log_n = np.log([part["n"].min(), part["n"].max()])
        if sigma <= 0.5:
            phi = 0.5 - sigma**2
            sizes = np.log((part["error"] / part["share"]).groupby(part["n"]).first())
            claim = (sizes.iloc[0] - sizes.iloc[-1]) / (log_n[1] - log_n[0])
        else:
            phi = (1 - sigma) ** 2
            claim = phi - (1 - sigma) / 2 * np.log(log_n[1] / log_n[0]) / (log_n[1] - log_n[0])
        rows.append((sigma, fit.exponent, fit.stderr, phi, claim))
    return pd.DataFrame(rows, columns=["sigma", "measured", "±", "phi", "with logs"])


def minimax_means(n: float, psi: float, replicates: int, seed: int) -> float:
    """E|first coordinate of the mean| n^{1/(4 psi)} / sqrt(2 log n) for the law that attains the sub-Gaussian exponent.

    Three kinds of keys and three of queries, drawn as multinomial counts; n from 10 to 10^12, psi >= 1/2.
    """
    n, psi = as_count("n", n, least=10, most=10**12), as_number("psi", psi, 0.5, 1e3)
    replicates = as_count("replicates", replicates, most=10**6)
    seed = torch.randint(2**62, (1,), generator=runtime.stream(seed, n)).item()
    rng, level, share = np.random.default_rng(seed), math.sqrt(2 * math.log(n)), n ** (-1 / (4 * psi))
    keys = rng.multinomial(n, [1 - 1 / n, 0.5 / n, 0.5 / n], replicates)
    queries = rng.multinomial(n, [1 - share, share / 2, share / 2], replicates)
    mean = np.zeros(replicates)
    for tilt, count in zip((0.0, 1.0, -1.0), queries.T):
        up, down = float(n) ** tilt * keys[:, 1], float(n) ** -tilt * keys[:, 2]
        mean += count / n * level * (up - down) / (keys[:, 0] + up + down)
    return float(np.abs(mean).mean() / (share * level))
