"""Scalar self-attention over up to 10^15 Gaussian tokens, from counts in bins.

In one dimension the map Gamma_n depends on one number, the tilt, and on the tokens through sums of y^k e^{ty}. So it
is enough to know how many tokens lie in each of some thousand bins: the counts are multinomial, and are drawn without
drawing the tokens. Only the outermost tokens, which the sums feel one by one, are drawn exactly. Chapter 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import log_ndtr, ndtr, ndtri, ndtri_exp
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.sampling.scalar import between
from tokcx_lib.theory import rates
from tokcx_lib.theory.limits import Moments
from tokcx_lib.validation import as_count, as_kind, as_list, as_number, as_positive, as_tensor, finite_answer, naming

BINS = 10_000
OUTER = 64  # tokens expected beyond the bins, drawn one by one
LEAST = 500  # tokens
MESH = 0.3  # step of the table of the map, in units of 1 / (range of the tokens)
MOST_ROWS = 10**8
_ROWS = 256  # of the table of the map, at a time


class BinnedTokens(NamedTuple):
    """Scalar tokens: `counts` (bins,) of them at `points` (bins,), and some more at `outer` (m,). All float64."""

    points: Tensor
    counts: Tensor
    outer: Tensor

    @property
    def n(self) -> float:
        return self.counts.sum().item() + len(self.outer)

    def add(self, y: float) -> BinnedTokens:
        """The same tokens and one more, at y."""
        return self._replace(outer=torch.cat([self.outer, self.outer.new_tensor([y])]))

    def mean(self, values) -> float:
        """Mean over the tokens of a function of a token, values((m,)) -> (m,)."""
        return ((self.counts @ values(self.points) + values(self.outer).sum()) / self.n).item()


def draw(n: int, generator=None, bins: int = BINS, limit: float = math.inf) -> BinnedTokens:
    """n tokens N(0, 1), conditioned to |y| < limit, as counts in bins of one width; the outermost ones exactly.

    The bins end where 64 tokens are expected beyond. Rounding to the middle of a bin of width h adds h^2/12 to the
    variance; the points are drawn in by that factor, so that theirs is 1 (Sheppard's correction).

    Parameters
    ----------
    n : number of tokens, from 500 to 10^15; bins : an even number.
    limit : all tokens are closer to zero; it must leave some of the outermost tokens room.

    Raises
    ------
    ValueError
        If n is not an integer in that range, bins is odd or smaller than 2, or limit lies within the bins.

    Source: chapter 10; the law of counts is classical.
    """
    n, bins = as_count("n", n, least=LEAST, most=10**15), as_count("bins", bins, least=2, most=10**8)
    limit = as_number("limit", limit, finite=False)
    if bins % 2:
        raise ValueError(f"bins: expected an even number, got {bins}")
    rng = np.random.default_rng(torch.randint(2**62, (1,), generator=runtime.generator(generator)).item())
    edge = -ndtri(OUTER / n / 2)
    if not limit > edge:
        raise ValueError(f"limit: expected a number greater than {edge:.4g}, the edge of the bins, got {limit}")
    beyond, cut = ndtr(-edge), ndtr(-limit)
    count = rng.binomial(n, 2 * (beyond - cut) / (1 - 2 * cut))
    outer = -ndtri(rng.uniform(cut, beyond, count)) * rng.choice([-1.0, 1.0], count)
    edges = np.linspace(-edge, 0, bins // 2 + 1)
    mass = np.diff(ndtr(edges))
    mass = np.concatenate([mass, mass[::-1]])
    counts = rng.multinomial(n - count, mass / mass.sum())
    middle = (edges[1:] + edges[:-1]) / 2
    points = np.concatenate([middle, -middle[::-1]]) / _rounding(edges[1] - edges[0])
    return BinnedTokens(*(torch.as_tensor(part, dtype=torch.float64) for part in (points, counts, outer)))


def beyond(level: float, generator=None) -> float:
    """A token N(0, 1) conditioned to be at least `level`, from 0 to 30.

    Raises ValueError if the level is not a number in that range.
    """
    level = as_number("level", level, 0, 30)
    u = torch.rand(1, generator=runtime.generator(generator), dtype=torch.float64).item()
    return -float(ndtri_exp(log_ndtr(-level) + math.log1p(-u)))


def _rounding(width: float) -> float:
    """Standard deviation of N(0, 1) rounded to the middle of a bin."""
    return math.sqrt(1 + width**2 / 12)


def coarsen(tokens: BinnedTokens) -> BinnedTokens:
    """The same tokens in bins of twice the width (an even number of bins): what the width does to a result."""
    if len(as_kind("tokens", tokens, BinnedTokens).points) % 2:
        raise ValueError(f"tokens: expected an even number of bins, got {len(tokens.points)}")
    points, counts = tokens.points.reshape(-1, 2), tokens.counts.reshape(-1, 2)
    width = (points[0, 1] - points[0, 0]).item()
    return tokens._replace(points=points.mean(1) * _rounding(width) / _rounding(2 * width), counts=counts.sum(1))


def self_attention(draws: Sequence[BinnedTokens], slopes: Sequence[float], mesh: float = MESH) -> list[Moments]:
    """Moments of scalar self-attention over each of several sets of tokens, V = 1, logits a x y for each slope a > 0.

    One table of the map over the line of tilts serves all slopes; between its points the map is a cubic with the right
    values and slopes. Work: bins x (largest slope) x (range of the tokens)^2 / mesh, for all sets of tokens in one
    matrix product.

    Parameters
    ----------
    draws : sets of tokens on the same points.
    mesh : step of the table in units of 1 / (range of the tokens).

    Returns
    -------
    One `Moments` a slope: mean (draws,) and cov (draws,), with divisor n.

    Raises
    ------
    ValueError
        If a slope or the mesh is not positive, there is no draw, or the points differ.
    """
    slopes, mesh = [as_positive("slopes", a) for a in as_list("slopes", slopes, "slopes")], as_positive("mesh", mesh)
    draws = [as_kind("draws", tokens, BinnedTokens) for tokens in as_list("draws", draws, "sets of tokens")]
    points = draws[0].points
    if any(not torch.equal(points, tokens.points) for tokens in draws):
        raise ValueError("draws: expected all on the same points, got others")
    counts = torch.stack([tokens.counts for tokens in draws], 1)  # (bins, draws)
    outer = torch.nn.utils.rnn.pad_sequence([tokens.outer for tokens in draws])  # (m, draws), padded with zeros
    there = torch.nn.utils.rnn.pad_sequence([torch.ones_like(tokens.outer) for tokens in draws])
    reach = max(points.abs().max().item(), outer.abs().max().item() if outer.numel() else 0.0)
    largest = max(slopes) * reach
    tilts = torch.linspace(-largest, largest, _rows("slopes, mesh", 4 * largest * reach / mesh), dtype=torch.float64)
    step = tilts[1] - tilts[0]
    first, rise = _table(tilts, points, counts, outer, there)
    total = counts.sum(0) + there.sum(0)
    found = []
    for a in slopes:
        place = (a * points + largest) / step
        inner = between(first, rise * step, place[:, None].expand(-1, len(draws)))
        rest = between(first, rise * step, (a * outer + largest) / step)
        mean = ((counts * inner).sum(0) + (there * rest).sum(0)) / total
        square = (counts * (inner - mean) ** 2).sum(0) + (there * (rest - mean) ** 2).sum(0)
        found.append(Moments(mean, square / total))
    return found


def _rows(names: str, steps: float) -> int:
    """Rows of a table of the map."""
    if not steps <= MOST_ROWS:
        raise ValueError(f"{names}: expected a table of at most {MOST_ROWS:,} rows, got {steps:.3g}")
    return math.ceil(steps) + 2


def _table(tilts, points, counts, outer, there) -> tuple[Tensor, Tensor]:
    """Softmax mean and variance (tilts, draws) of the tokens at each tilt; the variance is the slope of the map."""
    powers = torch.cat([counts * points[:, None] ** k for k in range(3)], 1)
    sums = []
    for t in tilts[:, None].split(_ROWS):
        # e^{ty - t²/2} is at most e^{y²/2}: no overflow.
        inner = (torch.exp(t * points - t**2 / 2) @ powers).reshape(len(t), 3, -1)
        weights = there * torch.exp(t[:, :, None] * outer - t[:, :, None] ** 2 / 2)
        sums.append(inner + torch.stack([(weights * outer**k).sum(1) for k in range(3)], 1))
    mass, one, two = torch.cat(sums).unbind(1)
    return one / mass, two / mass - (one / mass) ** 2


def weighted_attention(tilts: Tensor, points: Tensor, counts: Tensor, mesh: float = MESH) -> Tensor:
    """Softmax attention at tilts (q,) over scalar tokens of which `counts` (m,) lie at `points` (m,): (q,), float64.

    Points may lie anywhere: after a layer, the tokens of a bin are still together, and no longer evenly spaced.
    Many tilts share one table of the map, with steps of `mesh` / (range of the points), as in `self_attention`.
    """
    mesh = as_positive("mesh", mesh)
    tilts = as_tensor("tilts", tilts, ndim=1).double()
    points, counts = as_tensor("points", points, ndim=1).double(), as_tensor("counts", counts, ndim=1).double()
    if len(tilts) == 0 or points.shape != counts.shape:
        raise ValueError(
            f"tilts, points, counts: expected shapes (q,), (m,) and (m,), got "
            f"{', '.join(str(tuple(part.shape)) for part in (tilts, points, counts))}"
        )
    if not (counts >= 0).all() or not counts.any():
        raise ValueError("counts: expected numbers >= 0, one of them positive")
    low, high = tilts.min(), tilts.max()
    rows = ((high - low) * (points.max() - points.min())).item() / mesh
    rows = _rows("tilts, points, mesh", min(rows, len(tilts)))  # more are not made
    exact = rows >= len(tilts) or low == high  # the tilts themselves are fewer than the rows of a table
    grid = tilts if exact else torch.linspace(low.item(), high.item(), rows, dtype=torch.float64)
    kept = counts > 0
    points, logs = points[kept], counts[kept].log()
    powers = torch.stack([points**k for k in range(1, 3)], 1)
    sums = torch.cat([torch.softmax(t * points + logs, -1) @ powers for t in grid[:, None].split(_ROWS)])
    first = finite_answer("points, counts", sums)[:, 0]
    if exact:
        return first
    step = grid[1] - grid[0]
    return between(first, (sums[:, 1] - first**2) * step, (tilts - low) / step)


def influence_means(tokens: BinnedTokens, slope: float) -> tuple[float, float]:
    """Means over tokens of the two influence functions (`rates.influence`), d = 1: of the mean and the square."""
    form = [[as_positive("slope", slope)]]
    as_kind("tokens", tokens, BinnedTokens)
    with naming("slope"):
        first = tokens.mean(lambda y: rates.influence(y[:, None], form)[:, 0])
        return first, tokens.mean(lambda y: rates.influence_square(y[:, None], form)[:, 0, 0])
