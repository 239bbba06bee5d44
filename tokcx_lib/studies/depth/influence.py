"""What one token does to a stack in one dimension, to first order, and how that scales with the number of tokens.

After l layers the error of the query x is, to first order, a mean over the tokens, (1/n) sum_j psi_l(x, y_j). Gaussian
integrals keep psi_l among sums of terms q(x, y) exp(alpha y^2/2 + beta x y - gamma x^2/2) with polynomials q, so it is
computed exactly, layer by layer (`influences`). The largest alpha decides about the rate; it belongs to a set of layers
in which the token's pull stops (`strongest_path`). Tokens are N(0, 1) and stay so: `stacks.scalar_stack`. Chapter 12.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.special import ndtri_exp
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.sampling import binned
from tokcx_lib.validation import as_kind, as_list, as_number, as_positive, as_tensor, finite_answer

MOST_LAYERS = 12  # the number of terms doubles with every layer
DIGITS = 12  # of alpha, beta, gamma, in which equal ones are told from different ones

Polynomial = dict[tuple[int, int], float]  # (i, j): coefficient of x^i y^j


class Influence(NamedTuple):
    """psi(x, y) = sum of q(x, y) exp(alpha y^2/2 + beta x y - gamma x^2/2), `terms`: {(alpha, beta, gamma): q}."""

    terms: dict[tuple[float, float, float], Polynomial]

    @property
    def alphas(self) -> list[float]:
        """The different alpha, increasing."""
        return sorted({alpha for alpha, _, _ in self.terms})

    def at(self, x: float, y) -> Tensor:
        """psi(x, y) at tokens y (m,), float64."""
        x, y = as_number("x", x), as_tensor("y", y, ndim=1).double()
        found = torch.zeros_like(y)
        for (alpha, beta, gamma), q in self.terms.items():
            factor = sum(c * x**i * y**j for (i, j), c in q.items())
            found += factor * torch.exp(alpha * y**2 / 2 + beta * x * y - gamma * x**2 / 2)
        return finite_answer("x, y", found)

    def over_queries(self) -> Influence:
        """The mean of psi over queries x ~ N(0, 1): what one token does to the mean of the tokens. No x in it."""
        found: dict = {}
        for pull, q in self.terms.items():
            _add(found, *_scattered(q, pull, 0.0))
        return Influence(found)

    def log_size(self, digits: float) -> tuple[float, float]:
        """Logarithm of |psi(0, y)| at the largest of 10^digits tokens, P(|Y| > y) = 10^-digits, and its sign."""
        log_n = as_positive("digits", digits, most=1e6) * math.log(10)
        y = -float(ndtri_exp(-log_n - math.log(2)))
        parts = [
            (alpha * y**2 / 2, sum(c * y**j for (i, j), c in q.items() if i == 0))
            for (alpha, _, _), q in self.terms.items()
        ]
        top = max(power for power, _ in parts)
        total = sum(factor * math.exp(power - top) for power, factor in parts)
        return top + (math.log(abs(total)) if total else -math.inf), math.copysign(1.0, total)

    def exponent(self, low: float, high: float) -> float:
        """How fast the pull of the largest of n tokens, |psi(0, y)| / n, falls from n = 10^low to 10^high.

        If the influence has no variance, this is the exponent of the mean over the tokens as well.
        """
        low, high = as_positive("low", low), as_positive("high", high)
        if not low < high:
            raise ValueError(f"high: expected a number greater than low = {low:g}, got {high:g}")
        rise = self.log_size(high)[0] - self.log_size(low)[0]
        return 1 - rise / ((high - low) * math.log(10))


def _add(terms: dict, pull: tuple[float, float, float], q: Polynomial, factor: float = 1.0) -> None:
    """Add factor * q to the term of a pull, in place."""
    held = terms.setdefault(tuple(round(part, DIGITS) for part in pull), {})
    for power, c in q.items():
        held[power] = held.get(power, 0.0) + factor * c


def _product(p: Polynomial, q: Polynomial) -> Polynomial:
    found: Polynomial = {}
    for (i, j), a in p.items():
        for (k, m), b in q.items():
            found[i + k, j + m] = found.get((i + k, j + m), 0.0) + a * b
    return found


def _scattered(q: Polynomial, pull: tuple[float, float, float], h: float) -> tuple[tuple, Polynomial]:
    """A term with a key Y ~ N(h x, 1) in the place of its query x, averaged over Y: its pull and its polynomial.

    With e^{alpha y^2/2 + beta Y y - gamma Y^2/2}, the key is N(centre, 1 / (1 + gamma)), centre = (beta y + h x) /
    (1 + gamma), and what is left is again such a term.
    """
    alpha, beta, gamma = pull
    variance = 1 / (1 + gamma)
    centre = {(1, 0): h * variance, (0, 1): beta * variance}
    moments: list[Polynomial] = [{(0, 0): 1.0}, centre]
    for k in range(2, max(i for i, _ in q) + 1):
        after = _product(centre, moments[-1])
        for power, c in moments[-2].items():
            after[power] = after.get(power, 0.0) + (k - 1) * variance * c
        moments.append(after)
    found: Polynomial = {}
    for (i, j), c in q.items():
        for power, d in _product({(0, j): c * math.sqrt(variance)}, moments[i]).items():
            found[power] = found.get(power, 0.0) + d
    return (alpha + beta**2 * variance, beta * h * variance, h**2 * gamma * variance), found


def _moved(q: Polynomial, h: float) -> list[tuple[int, Polynomial]]:
    """q(Y, y) times 1 + (Y - h x) h x, a power of x at a time: [(k, polynomial in Y and y that goes with x^k)]."""
    weight = {(i + 1, j): h * c for (i, j), c in q.items()}
    return [(0, q), (1, weight), (2, {power: -(h**2) * c for power, c in q.items()})]


def influences(horizons: Sequence[float], value: float = 1.0) -> list[Influence]:
    """Influence psi_l(x, y) of a token y on a query x after each layer l of `stacks.scalar_stack(horizons, value)`.

    psi_l = psi_{l-1} + c E[psi_{l-1}(Y, y) (1 + (Y - h x) h x)] + c e^{h x y - h^2 x^2/2} (y - h x), Y ~ N(h x, 1),
    c = value / (1 + value h): own, moved keys and fresh. At most 12 layers.
    """
    horizons = [as_positive("horizons", h) for h in as_list("horizons", horizons, "positive numbers")]
    value = as_positive("value", value)
    if len(horizons) > MOST_LAYERS:
        raise ValueError(f"horizons: expected at most {MOST_LAYERS} layers, got {len(horizons)}")
    found, before = [], Influence({})
    for h in horizons:
        share, after = value / (1 + value * h), {}
        for pull, q in before.terms.items():
            _add(after, pull, q)
            for power, part in _moved(q, h):
                handed, scattered = _scattered(part, pull, h)
                _add(after, handed, {(i + power, j): c for (i, j), c in scattered.items()}, share)
        _add(after, (0.0, h, h**2), {(0, 1): 1.0, (1, 0): -h}, share)
        before = Influence(after)
        found.append(before)
    return found


class Path(NamedTuple):
    """How the strongest pull travels: the numbers of the layers in which it stops, from 1, its coupling Psi_J, and
    `positions`, where it is met in each of them, in units of the token's own place."""

    layers: tuple[int, ...]
    coupling: float
    positions: tuple[float, ...]


def path(horizons: Sequence[float], layers: Sequence[int]) -> Path:
    """The path of a pull that stops in `layers` (numbers from 1, increasing), read by queries N(0, 1) in the last.

    A query of the k-th of them is N(h Y, 1) around the query Y of the next one: variances C_k = 1 + h_k^2 C_{k+1}, from
    C = 1 above the last one. Psi_J = C_1 - 1, and the pull of a token at y is met at (h_1 C_2 / C_1) y in the first
    layer, and in each next one at h_k C_{k+1} / C_k times the place before.
    """
    horizons = [as_positive("horizons", h) for h in as_list("horizons", horizons, "positive numbers")]
    chosen = [int(as_number("layers", j)) for j in as_list("layers", layers, "numbers of layers")]
    if any(not 1 <= j <= len(horizons) for j in chosen) or any(a >= b for a, b in zip(chosen, chosen[1:])):
        raise ValueError(f"layers: expected increasing numbers from 1 to {len(horizons)}, got {chosen}")
    spread, ratios = 1.0, []
    for j in reversed(chosen):
        h, above = horizons[j - 1], spread
        spread = 1 + h**2 * above
        ratios.append(h * above / spread)
    return Path(tuple(chosen), spread - 1, tuple(np.cumprod(ratios[::-1]).tolist()))


def strongest_path(horizons: Sequence[float]) -> Path:
    """The path whose coupling is the largest: `path` of the layers that add to C on the way down, of all others none.

    Along it every position is closer to zero than the one before (chapter 12), so that each is a place where there are
    tokens whenever the pull comes from one of them.
    """
    horizons = [as_positive("horizons", h) for h in as_list("horizons", horizons, "positive numbers")]
    spread, chosen = 1.0, []
    for number in range(len(horizons), 0, -1):
        stopped = 1 + horizons[number - 1] ** 2 * spread
        if stopped > spread:
            spread = stopped
            chosen.append(number)
    return path(horizons, chosen[::-1])


FIRST_ORDER = ["n", "stack", "layer", "replicate", "first_query", "first_mean"]


def first_order(config: dict) -> pd.DataFrame:
    """First-order errors over the very tokens that the record `depth_scalar` was made of, drawn again from its seeds.

    Parameters
    ----------
    config : that of the record: stacks (horizons of their layers), lengths, replicates, bins, seed.

    Returns
    -------
    DataFrame, one row a length, stack, layer and replicate. first_query: mean over the tokens of psi_l(0, y), to be
    compared with probe_0; first_mean: that of psi_l averaged over queries, to be compared with mean.
    """
    config = as_kind("config", config, dict)
    missing = [key for key in ("stacks", "lengths", "replicates", "bins", "seed") if key not in config]
    if missing:
        raise ValueError(f"config: expected that of the record depth_scalar, got none of {', '.join(missing)}")
    found = {name: influences(horizons) for name, horizons in config["stacks"].items()}
    rows = []
    for n in config["lengths"]:
        streams = [runtime.stream(config["seed"], n, r) for r in range(config["replicates"])]
        draws = [binned.draw(n, stream, config["bins"]) for stream in streams]
        for name, layers in found.items():
            for layer, psi in enumerate(layers, 1):
                query, mean = _means(draws, psi), _means(draws, psi.over_queries())
                rows += [(n, name, layer, r, *pair) for r, pair in enumerate(zip(query, mean))]
    return pd.DataFrame(rows, columns=FIRST_ORDER)


def _means(draws: list[binned.BinnedTokens], psi: Influence) -> list[float]:
    """Mean of psi(0, y) over each set of tokens; all sets are on the same points."""
    inside = psi.at(0.0, draws[0].points)
    outside = psi.at(0.0, torch.cat([tokens.outer for tokens in draws])).split([len(t.outer) for t in draws])
    return [((t.counts @ inside + part.sum()) / t.n).item() for t, part in zip(draws, outside)]
