"""The theory of sparse attention against simulation and against brute force."""

import itertools
import math

import numpy as np
import pytest
import torch

from tokcx_lib import runtime
from tokcx_lib.studies.sparse import schemes, theory
from tokcx_lib.theory import laws, softmax_law


def test_drawn_keys_by_enumeration():
    """All lists of m keys of n, with replacement, of a small example."""
    stream = runtime.stream(1)
    q, k, v = (torch.randn(*shape, generator=stream, dtype=torch.float64) for shape in ((2, 3), (5, 3), (5, 2)))
    whole = schemes.full(q, k, v).output
    for m in (1, 2, 4):
        squares = []
        for keys in itertools.product(range(5), repeat=m):
            squares.append((schemes.full(q, k[list(keys)], v[list(keys)]).output - whole).square().sum(-1))
        found = theory.drawn_error(q, k, v, [1, 2, 4])[(1, 2, 4).index(m)]
        torch.testing.assert_close(found, torch.stack(squares).mean(0), rtol=1e-6, atol=0)


def test_drawn_keys_agree_with_the_exact_law_in_one_dimension():
    y = laws.Gaussian(1.0).sample(300, runtime.stream(2))
    for load, m in ((0.5, 20), (2.0, 50), (4.0, 200)):
        expected = softmax_law.map_error(m, load, laws.Empirical(y))
        found = theory.drawn_error(torch.tensor([[load]]).double(), y, y, [m])
        assert found.item() == pytest.approx(float(expected), rel=1e-6)


def test_a_subset_without_replacement_to_first_order():
    d, n, m = 4, 4000, 1000
    y = laws.Gaussian(torch.eye(d)).sample(n, runtime.stream(3))
    for load in (0.5, 1.0):
        q = load * torch.nn.functional.normalize(y[:2000], dim=1)
        error = schemes.output_error(
            schemes.random_keys(q, y, y, torch.arange(2000), m, runtime.stream(4)), schemes.full(q, y, y)
        )
        assert error.item() / d**0.5 == pytest.approx(float(theory.subset_error(load, d, m, n)), rel=0.06)
    assert theory.subset_error(1.0, d, n, n) == 0


def test_the_error_across_the_query():
    """(1 - 2M) P_b + P_n in each direction, M and P from log-sum-exps at the query and twice the query."""
    d, n, b, m = 16, 2000, 50, 400
    y = laws.Gaussian(torch.eye(d)).sample(n, runtime.stream(30))
    u = torch.nn.functional.normalize(torch.randn(m, d, generator=runtime.stream(31), dtype=torch.float64), dim=1)
    for load in (0.5, 1.5, 3.0):
        asked = torch.stack([load * u, 2 * load * u])
        every, places = schemes.full(asked, y, y), torch.arange(m)
        for name in ("random", "top-k", "strided"):
            state = schemes.SCHEMES[name](asked, y, y, places, b, runtime.stream(32))
            off = state.output[0] - every.output[0]
            seen = (off - (off * u).sum(1, keepdim=True) * u).square().sum(1).mean() / (d - 1)
            mass = schemes.kept_mass(state, every)[0]
            squares = [torch.exp(x.lse[1] - 2 * x.lse[0]) for x in (state, every)]
            told, planted = (((1 - c * mass) * squares[0] + squares[1]).mean() for c in (2, 1))
            assert seen.item() == pytest.approx(told.item(), rel=0.1), (load, name)
            if (planted / told - 1) > 0.3:  # M counted once: seen where the scheme keeps much of the attention
                assert seen.item() != pytest.approx(planted.item(), rel=0.1)


@pytest.mark.parametrize("load", [0.5, 1.0])
@pytest.mark.parametrize("b", [100, 1000])
def test_the_largest_weights_to_first_order(load, b):
    d, n = 8, 4000
    found = []
    for i in range(6):
        y = laws.Gaussian(torch.eye(d)).sample(n, runtime.stream(33, i))
        q = load * torch.nn.functional.normalize(y[:200].roll(1, 1), dim=1)
        state = schemes.top_k(q, y, y, torch.arange(200), b)
        found.append(schemes.output_error(state, schemes.full(q, y, y)).item() / d**0.5)
    told = float(theory.largest_error(load, d, b, n))
    assert np.mean(found) == pytest.approx(told, rel=0.015)
    assert theory.largest_error(load, d, n, n) == pytest.approx(0)
    assert told > float(theory.largest_error(load, 1, b, n)) / d**0.5  # the part across is not nothing


def test_a_window_with_weighted_random_keys_to_first_order():
    d, n, b = 4, 3000, 1000
    y = laws.Gaussian(torch.eye(d)).sample(n, runtime.stream(34))
    q = 0.5 * torch.nn.functional.normalize(torch.randn(1500, d, generator=runtime.stream(35)).double(), dim=1)
    state = schemes.window_weighted(q, y, y, torch.arange(1500), b, runtime.stream(36))
    found = schemes.output_error(state, schemes.full(q, y, y)).item() / d**0.5
    told = float(theory.weighted_error(0.5, d, b, n))
    assert found == pytest.approx(told, rel=0.05)
    assert told / theory.subset_error(0.5, d, b, n) == pytest.approx(1.29, abs=0.01)


def test_the_covariance_of_two_influences():
    d, load, r = 3, 0.8, 0.6
    stream = runtime.stream(5)
    y, z = (torch.randn(500_000, d, generator=stream, dtype=torch.float64) for _ in range(2))
    z = r * y + math.sqrt(1 - r**2) * z
    t = torch.tensor([load, 0.0, 0.0], dtype=torch.float64)
    a, b = (torch.exp(x @ t - load**2 / 2)[:, None] * (x - t) for x in (y, z))
    product = (a * b).sum(1)
    expected = float(theory.pair_covariance(load, d, r))
    assert abs(product.mean().item() - expected) < 4.5 * product.std().item() / len(y) ** 0.5
    assert expected > 10 * product.std().item() / len(y) ** 0.5


def test_variance_of_a_mean_of_serial_influences():
    """Against the double sum over all pairs, and against its limit."""
    load, d, r = 1.2, 5, 0.7
    for count, stride in ((1, 1), (6, 1), (6, 3)):
        pairs = [
            theory.pair_covariance(load, d, r ** (stride * abs(i - j))) for i in range(count) for j in range(count)
        ]
        assert theory.mean_variance(load, d, r, count, stride) == pytest.approx(sum(pairs) / count**2 / d)
    long = theory.mean_variance(load, d, r, 200_000) * 200_000
    one = theory.mean_variance(load, d, r, 1)
    assert long / one == pytest.approx(theory.inflation(load, d, r), rel=1e-3)
    assert theory.inflation(1e-6, d, r) == pytest.approx((1 + r) / (1 - r))
    assert theory.inflation(3.0, d, r) < theory.inflation(1.0, d, r) < theory.inflation(1e-6, d, r)
    assert theory.inflation(1.0, d, 0.0) == 1


def test_errors_in_a_serial_sequence():
    """A window's bias and noise together, against `window_mean` at a turned token; no error where all keys are read."""
    d, r, load, b, n = 6, 0.8, 0.7, 31, 4000
    x = torch.zeros(d, dtype=torch.float64)
    x[0] = d**0.5
    t = load * torch.eye(d, dtype=torch.float64)[1]
    bias = (theory.window_mean(x, t, r, torch.arange(b) - b // 2) - t).square().sum().item() / d
    noise = theory.mean_variance(load, d, r, b) - theory.mean_variance(load, d, r, n)
    assert theory.serial_error("window", load, d, r, b, n) == pytest.approx(math.sqrt(bias + noise))
    assert bias > 0.1 * noise
    assert theory.serial_error("random", load, d, r, n, n) == theory.serial_error("strided", load, d, r, n, n) == 0
    assert theory.serial_error("random", load, d, 0.0, b, n) == pytest.approx(float(theory.subset_error(load, d, b, n)))
    with pytest.raises(ValueError, match="scheme: expected 'random', 'window' or 'strided', got 'top-k'"):
        theory.serial_error("top-k", load, d, r, b, n)


def test_the_mean_of_a_window_around_a_token():
    """A ratio of Monte Carlo means of numerator and denominator, given the token in the middle."""
    d, r, load = 4, 0.8, 0.9
    x = torch.tensor([1.5, -0.5, 1.0, 0.3], dtype=torch.float64)
    t = load * torch.nn.functional.normalize(torch.tensor([1.0, 1.0, 0.2, -1.0], dtype=torch.float64), dim=0)
    lags = torch.arange(-3, 4)
    top = torch.zeros(d, dtype=torch.float64)
    bottom = torch.zeros((), dtype=torch.float64)
    for lag in lags.tolist():
        c = r ** abs(lag)
        y = c * x + math.sqrt(1 - c**2) * torch.randn(
            200_000, d, generator=runtime.stream(6, lag + 3), dtype=torch.float64
        )
        w = torch.exp(y @ t)
        top, bottom = top + w @ y / len(y), bottom + w.mean()
    found = theory.window_mean(x, t, r, lags)
    torch.testing.assert_close(top / bottom, found, rtol=0, atol=9e-3)
    assert torch.linalg.vector_norm(found - t) > 0.3
    torch.testing.assert_close(theory.window_mean(x, t, 0.0, torch.arange(1, 5)), t)


@pytest.mark.parametrize("n, load", [(10, 0.5), (50, 1.0), (1000, 3.0), (1000, 8.0)])
def test_the_mass_of_the_largest_weights(n, load):
    logits = load * torch.randn(4000, n, generator=runtime.stream(7, n), dtype=torch.float64)
    mass = torch.softmax(logits, 1).sort(1, descending=True).values.cumsum(1)
    ks = np.array([1, 3, 8])
    for k, expected in zip(ks, theory.top_mass(n, load, ks)):
        sample = mass[:, k - 1]
        assert abs(sample.mean().item() - expected) < 4.5 * sample.std().item() / 4000**0.5 + 2e-4


def test_the_mass_of_the_largest_weights_at_very_many_keys():
    """Far from frozen it is a share of a Gaussian tail; frozen, it nears the Poisson-Dirichlet law."""
    n, load = 1e9, 2.0
    k = 10_000
    level = -math.sqrt(2) * torch.erfinv(torch.tensor(2 * k / n - 1, dtype=torch.float64)).item()
    share = 0.5 * math.erfc((level - load) / math.sqrt(2))
    assert theory.top_mass(n, load, k) == pytest.approx(share, abs=2e-4)
    gaps = []
    for log10 in (5, 20, 80):
        n = 10.0**log10
        load = 2.0 * math.sqrt(2 * math.log(n))
        gaps.append(abs(1 - theory.top_mass(n, load, 4) - theory.frozen_missing_mass(2.0, 4)))
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.02


def test_the_frozen_law_against_poisson_points():
    """Weights T_j^-sigma of the arrival times T_j of a Poisson process, the j-th largest first."""
    for sigma in (1.5, 2.5):
        steps = torch.empty(1500, 3000, dtype=torch.float64).exponential_(generator=runtime.stream(8))
        weights = steps.cumsum(1) ** -sigma
        # what is left after 3000 points, on average
        rest = weights[:, -1:] * 3000 / (sigma - 1)
        mass = weights.cumsum(1) / (weights.sum(1, keepdim=True) + rest)
        for k in (1, 4, 32):
            sample = 1 - mass[:, k - 1]
            expected = float(theory.frozen_missing_mass(sigma, k))
            assert abs(sample.mean().item() - expected) < 4.5 * sample.std().item() / 1500**0.5 + 1e-3
    far = theory.frozen_missing_mass(1.5, np.array([1000, 100_000]))
    assert math.log(far[0] / far[1]) / math.log(100) == pytest.approx(0.5, abs=0.01)


def test_what_bad_input_gets():
    with pytest.raises(ValueError, match="reduced_load: expected a number above 1"):
        theory.frozen_missing_mass(1.0, 3)
    with pytest.raises(ValueError, match="n, k: expected k from 1 to n - 1"):
        theory.top_mass(10, 1.0, 10)
    with pytest.raises(ValueError, match="draws"):
        theory.drawn_error([[1.0]], [[1.0]], [[1.0]], [0])
