"""The hardmax laws against mpmath, closed forms, simulation and each other; outermost tokens against all of them."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad

from tokcx_lib import runtime
from tokcx_lib.studies import extremes
from tokcx_lib.theory import hardmax, rates
from tokcx_lib.theory.attention import hardmax_map
from tokcx_lib.theory.laws import Gaussian


def by_mpmath(n, digits=25):
    """E|M| from max|y| and max y, with ncdf in high precision and the tail kept as a tail."""
    with mpmath.workdps(digits):
        n = mpmath.mpf(n)
        level = mpmath.sqrt(2 * mpmath.log(n)) if n > 3 else mpmath.mpf(1)

        def integrand(r):
            tail = mpmath.erfc(r / mpmath.sqrt(2)) / 2
            log_both = n * mpmath.log1p(-2 * tail) if r > 0 else -mpmath.inf
            return mpmath.exp(n * mpmath.log1p(-tail)) - mpmath.exp(log_both)

        cuts = [-14, -7, -3, -1, 0] + [level * k / 8 for k in range(1, 13)] + [level * 2, level * 2 + 8, level * 2 + 16]
        return float(mpmath.quad(integrand, cuts))


@pytest.mark.parametrize("n", [1.0, 1.5, 3, 10, 1e3, 1e6, 1e12, 1e18])
def test_midrange_against_mpmath(n):
    assert hardmax.expected_abs_midrange(n) == pytest.approx(by_mpmath(n), abs=1e-9)


def test_midrange_closed_forms():
    assert hardmax.expected_abs_midrange(1) == pytest.approx(math.sqrt(2 / math.pi), abs=1e-12)
    # Two tokens: M is N(0, 1/2).
    assert hardmax.expected_abs_midrange(2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-12)
    assert hardmax.expected_abs_midrange(2, sigma=3.0) == pytest.approx(3 / math.sqrt(math.pi), abs=1e-12)
    m = np.array([[-1.0, 0.0], [0.3, 2.0]])
    assert hardmax.midrange_cdf(2, m) == pytest.approx(stats.norm.cdf(m * math.sqrt(2)), abs=1e-9)
    assert hardmax.midrange_cdf(1, m, sigma=2.0) == pytest.approx(stats.norm.cdf(m / 2), abs=1e-9)
    assert hardmax.expected_abs_hardmax(1) == pytest.approx(math.sqrt(2 / math.pi), abs=1e-9)


@pytest.mark.parametrize(
    "n, value",
    [(10, 0.34197), (1e2, 0.23937), (1e3, 0.19398), (1e4, 0.16718), (1e6, 0.13566), (1e9, 0.11016), (1e12, 0.09507)],
)
def test_midrange_table(n, value):
    assert hardmax.expected_abs_midrange(n) == pytest.approx(value, abs=1.5e-5)


def test_midrange_tends_to_the_asymptote_and_falls():
    sizes = [10.0**k for k in (1, 2, 3, 6, 12, 18, 30, 100, 300)]
    ratios = [hardmax.expected_abs_midrange(n) / rates.hardmax_mean(n) for n in sizes]
    assert all(a > b > 1 for a, b in zip(ratios, ratios[1:]))
    assert ratios[-1] == pytest.approx(1, abs=2e-3)
    values = [hardmax.expected_abs_midrange(n) for n in (9e3, 9.999e3, 1e4, 1.001e4)]  # where the grid changes
    assert all(a > b for a, b in zip(values, values[1:]))


@pytest.mark.parametrize("n", [3, 40.5, 1e4, 1e12])
def test_midrange_mean_is_that_of_its_distribution(n):
    """The two formulas of the theorem, derived in different ways, agree: E|M| = 2 int P(M <= -m) dm."""
    mean = 2 * quad(lambda m: float(hardmax.midrange_cdf(n, -m)), 0, 6, points=[0.1, 0.5], epsabs=1e-9, limit=100)[0]
    assert mean == pytest.approx(hardmax.expected_abs_midrange(n), abs=1e-7)


@pytest.mark.parametrize("n", [2, 5, 300, 10**12])
def test_midrange_distribution_against_simulation(n):
    middle = extremes.sample_extremes(n, 50_000, 3).mean(1).numpy()
    grid = np.linspace(-2, 2, 161)  # the distribution is smooth: a table of it serves the test
    table = hardmax.midrange_cdf(n, grid)
    assert (np.diff(table) >= 0).all()
    inside = np.abs(middle) < 2
    assert inside.mean() > 0.99
    found = np.searchsorted(np.sort(middle), grid) / len(middle)
    assert np.abs(found - table).max() < 1.95 / math.sqrt(len(middle))  # Kolmogorov-Smirnov at 0.1%


def self_attention(tokens):
    share = (tokens > 0).double().mean(1)
    return share * tokens.amax(1) + (1 - share) * tokens.amin(1)


@pytest.mark.parametrize("n, replicates", [(2, 200_000), (10, 200_000), (100, 50_000), (5000, 2000)])
def test_self_attention_against_simulation(n, replicates):
    stream = runtime.stream(1, n)
    found = torch.cat(
        [
            self_attention(torch.randn(block, n, dtype=torch.float64, generator=stream)).abs()
            for block in [max(1, 10**6 // n)] * math.ceil(replicates / max(1, 10**6 // n))
        ]
    )
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - hardmax.expected_abs_hardmax(n)) < 4 * error


def test_self_attention_is_what_the_hardmax_map_gives():
    tokens = Gaussian(1.0).sample(500, 5)
    assert hardmax_map(tokens, tokens, None).mean() == pytest.approx(self_attention(tokens.T).item(), abs=1e-12)


def test_self_attention_sum_and_quadrature_agree(monkeypatch):
    exact = [hardmax.expected_abs_hardmax(n) for n in (1200, 2000)]
    monkeypatch.setattr(hardmax, "_SUM_ALL", 1000)
    assert [hardmax.expected_abs_hardmax(n) for n in (1200, 2000)] == pytest.approx(exact, abs=1e-6)


def test_self_attention_joins_fresh_queries():
    for n in (10**6, 10**12, 10**18):
        gap = hardmax.expected_abs_hardmax(n) / hardmax.expected_abs_midrange(n) - 1
        assert -1e-12 < gap < 20 * math.log(n) ** 2 / n
    assert hardmax.expected_abs_hardmax(50, sigma=2.0) == pytest.approx(2 * hardmax.expected_abs_hardmax(50))


# ------------------------------------------------- any dimension, fresh queries


@pytest.mark.parametrize("dim", [1, 2, 3, 8])
def test_square_closed_forms(dim):
    """One token is its own mean; two tokens report their midpoint."""
    assert hardmax.expected_square_hardmax(1, dim) == pytest.approx(dim, rel=1e-4)
    assert hardmax.expected_square_hardmax(2, dim) == pytest.approx(dim / 2, rel=1e-4)


@pytest.mark.parametrize("n", [3, 10, 1e3, 1e6, 1e12, 1e30])
def test_square_in_one_dimension_is_that_of_the_midrange(n):
    square = 4 * quad(lambda m: m * float(hardmax.midrange_cdf(n, -m)), 0, 6, points=[0.1, 0.5], limit=100)[0]
    assert hardmax.expected_square_hardmax(n, 1) == pytest.approx(square, rel=1e-4)


@pytest.mark.parametrize(
    "n, dim, replicates", [(3, 2, 4000), (50, 2, 2000), (10**6, 2, 1000), (4, 8, 2000), (300, 8, 400)]
)
def test_square_against_simulation(n, dim, replicates):
    stream, drawn = runtime.stream(15, n, dim), []
    for _ in range(replicates):
        tokens = extremes.outer_tokens(n, dim, min(n, 1000), stream)
        if dim == 2:
            drawn.append(extremes.steiner_point(tokens).square().sum())
        else:
            drawn.append(extremes.steiner_estimate(tokens, 32, stream) @ extremes.steiner_estimate(tokens, 32, stream))
    drawn = torch.stack(drawn)
    error = drawn.std() / replicates**0.5
    assert abs(drawn.mean() - hardmax.expected_square_hardmax(n, dim)) < 4 * error


def test_square_has_its_power_of_log_n():
    """The mean square falls like (2 ln n)^{-(d + 1) / 2}; in one dimension with the constant pi^2 / 12."""
    for dim in (1, 2, 3):
        first, last = (hardmax.expected_square_hardmax(n, dim) for n in (1e100, 1e300))
        assert math.log(first / last) / math.log(3) == pytest.approx((dim + 1) / 2, abs=0.02)
    assert last > 0
    assert hardmax.expected_square_hardmax(1e300, 1) * 2 * math.log(1e300) == pytest.approx(math.pi**2 / 12, rel=5e-3)


# ------------------------------------------------------------- extremes


@pytest.mark.parametrize("n", [2, 3, 50])
def test_extremes_have_the_law_of_all_tokens(n):
    ends = extremes.sample_extremes(n, 20_000, 7)
    tokens = torch.randn(20_000, n, dtype=torch.float64, generator=runtime.stream(8, n))
    for drawn, full in (
        (ends[:, 0], tokens.amin(1)),
        (ends[:, 1], tokens.amax(1)),
        (ends.prod(1), tokens.amin(1) * tokens.amax(1)),
    ):
        assert stats.ks_2samp(drawn.numpy(), full.numpy()).pvalue > 1e-3


def test_extremes_at_any_number():
    for n in (10**15, 10.0**300):
        ends = extremes.sample_extremes(n, 1000, 1)
        assert torch.isfinite(ends).all() and (ends[:, 0] < ends[:, 1]).all()
        level = float(stats.norm.isf(1 / n))
        assert ends[:, 1].mean() == pytest.approx(level + 0.5772 / level, abs=0.05)


@pytest.mark.parametrize("dim", [1, 2, 8])
def test_outer_tokens_have_the_law_of_all_tokens(dim):
    n, count = 60, 20
    radii, firsts = [], []
    stream = runtime.stream(9, dim)
    for _ in range(2000):
        outer = extremes.outer_tokens(n, dim, count, stream)
        assert outer.shape == (count, dim)
        radii.append(outer.norm(dim=1))
        firsts.append(outer[0, 0])
    radii = torch.stack(radii)
    assert (radii.diff(dim=1) <= 0).all()
    everything = torch.randn(2000, n, dim, dtype=torch.float64, generator=stream)
    norms, order = everything.norm(dim=2).sort(dim=1, descending=True)
    for rank in (0, 4, count - 1):
        assert stats.ks_2samp(radii[:, rank].numpy(), norms[:, rank].numpy()).pvalue > 1e-3
    furthest = everything[torch.arange(2000), order[:, 0], 0]
    assert stats.ks_2samp(torch.stack(firsts).numpy(), furthest.numpy()).pvalue > 1e-3


def test_all_tokens_may_be_outer_tokens():
    outer = torch.cat([extremes.outer_tokens(5, 1, 5, runtime.stream(10, r)) for r in range(2000)])
    assert stats.kstest(outer[:, 0].numpy(), stats.norm.cdf).pvalue > 1e-3


def test_steiner_point_is_the_mean_of_hardmax_attention():
    tokens = Gaussian(torch.eye(2)).sample(300, 11)
    angle = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64)[:-1]
    queries = torch.stack([angle.cos(), angle.sin()], 1)
    mean = torch.stack([hardmax_map(tokens, part, None).mean(0) for part in queries.split(4000)]).mean(0)
    assert torch.allclose(extremes.steiner_point(tokens), mean, atol=1e-3)
    line = Gaussian(1.0).sample(9, 12)
    assert extremes.steiner_point(line).item() == pytest.approx((line.max() + line.min()).item() / 2)
    square = torch.tensor([[0.0, 0.0], [1, 0], [1, 1], [0, 1], [0.5, 0.2]])
    assert torch.allclose(extremes.steiner_point(square), torch.tensor([0.5, 0.5], dtype=torch.float64))


def test_steiner_estimate_is_unbiased():
    tokens = Gaussian(torch.eye(2)).sample(40, 13) + 1
    drawn = torch.stack([extremes.steiner_estimate(tokens, 3, runtime.stream(14, r)) for r in range(3000)])
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - extremes.steiner_point(tokens)).abs() < 4 * error).all()
    one = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    assert torch.allclose(extremes.steiner_estimate(one, 1, 0), one[0])  # a single token: exactly


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: hardmax.expected_abs_midrange(0.5), "n"),
        (lambda: hardmax.expected_abs_midrange(float("nan")), "n"),
        (lambda: hardmax.expected_abs_midrange(math.inf), "n"),
        (lambda: hardmax.expected_abs_midrange(10, sigma=0), "sigma"),
        (lambda: hardmax.expected_abs_midrange(10, sigma=-1), "sigma"),
        (lambda: hardmax.midrange_cdf(0, 0.0), "n"),
        (lambda: hardmax.midrange_cdf(5, float("nan")), "m"),
        (lambda: hardmax.expected_abs_hardmax(2.5), "n"),
        (lambda: hardmax.expected_abs_hardmax(0), "n"),
        (lambda: hardmax.expected_abs_hardmax(5, sigma=math.inf), "sigma"),
        (lambda: hardmax.expected_square_hardmax(0, 2), "n"),
        (lambda: hardmax.expected_square_hardmax(5, 0), "dim"),
        (lambda: extremes.sample_extremes(1, 5), "n"),
        (lambda: extremes.sample_extremes(5, 0), "replicates"),
        (lambda: extremes.outer_tokens(5, 2, 6), "n"),
        (lambda: extremes.outer_tokens(5, 0, 3), "dim"),
        (lambda: extremes.outer_tokens(5, 2, 0), "count"),
        (lambda: extremes.steiner_point(torch.zeros(4, 3)), "tokens"),
        (lambda: extremes.steiner_point([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]), "tokens"),
        (lambda: extremes.steiner_point([[float("nan")]]), "tokens"),
        (lambda: extremes.steiner_estimate(torch.zeros(4), 3), "tokens"),
        (lambda: extremes.steiner_estimate(torch.zeros(4, 3), 0), "frames"),
    ],
)
def test_bad_input_is_named(make, names):
    with pytest.raises(ValueError, match=rf"^{names}: .*(expected|got)"):
        make()
