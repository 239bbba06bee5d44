"""Binned self-attention against plain softmax; the law of the draws; the influence functions against integrals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tokcx_lib import runtime
from tokcx_lib.sampling import binned
from tokcx_lib.studies import extremes
from tokcx_lib.studies.registry import EXPERIMENTS
from tokcx_lib.theory import laws, rates

SLOPES = [0.5, 2.0, 3.0]


def plain(tokens, slope):
    """Mean and variance of self-attention over tokens (n,), with the whole matrix of weights."""
    y = tokens.numpy()
    logits = slope * np.outer(y, y)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    out = weights @ y / weights.sum(1)
    return out.mean(), out.var()


def spread_out(tokens):
    return torch.cat([torch.repeat_interleave(tokens.points, tokens.counts.long()), tokens.outer])


@settings(max_examples=8, deadline=None)
@given(n=st.integers(500, 1500), seed=st.integers(0, 10**6))
def test_moments_are_those_of_plain_softmax(n, seed):
    draws = [binned.draw(n, runtime.stream(seed, r), bins=200) for r in range(2)]
    draws[1] = draws[1].add(6.0)
    for slope, found in zip(SLOPES, binned.self_attention(draws, SLOPES)):
        for tokens, mean, cov in zip(draws, *found):
            assert (mean.item(), cov.item()) == pytest.approx(plain(spread_out(tokens), slope), rel=1e-5, abs=2e-6)


def test_a_bin_is_as_good_as_its_tokens():
    """Rounding 4,000 tokens to bins changes the moments by far less than they fluctuate."""
    y = torch.randn(4000, generator=runtime.stream(1), dtype=torch.float64)
    edge, bins = 2.5, 1000
    width = 2 * edge / bins
    inside = y.abs() < edge
    counts = torch.histc(y[inside], bins, -edge, edge)
    points = (torch.arange(bins, dtype=torch.float64) + 0.5) * width - edge
    rounded = binned.BinnedTokens(points, counts, y[~inside])
    for slope, found in zip(SLOPES, binned.self_attention([rounded], SLOPES)):
        assert (found.mean.item(), found.cov.item()) == pytest.approx(plain(y, slope), rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("n", [10**4, 10**8, 10**12])
def test_halving_bins_and_mesh_changes_little(n):
    draws = [binned.draw(n, runtime.stream(2, r)) for r in range(20)]
    slopes = [0.5, 1.5, 3.0]
    there = binned.self_attention(draws, slopes)
    coarse = binned.self_attention([binned.coarsen(tokens) for tokens in draws], slopes)
    fine = binned.self_attention(draws, slopes, mesh=binned.MESH / 2)
    for slope, a, b, c in zip(slopes, there, coarse, fine):
        error, gap = a.mean.abs().mean(), (a.cov - slope**2).abs().mean()
        assert (a.mean - b.mean).abs().max() < 0.01 * error and (a.cov - b.cov).abs().max() < 0.01 * gap
        assert (a.mean - c.mean).abs().max() < 1e-4 * error and (a.cov - c.cov).abs().max() < 1e-4 * gap


def test_draws_are_normal():
    n = 10**6
    draws = [binned.draw(n, runtime.stream(3, r)) for r in range(400)]
    assert all(tokens.n == n for tokens in draws)
    for power, value, var in ((1, 0.0, 1.0), (2, 1.0, 2.0), (4, 3.0, 96.0)):
        means = np.array([tokens.mean(lambda y: y**power) for tokens in draws])
        assert abs(means.mean() - value) < 4 * math.sqrt(var / n / 400)
        assert 0.8 < means.var() / (var / n) < 1.25
    ends = np.array([[tokens.outer.min(), tokens.outer.max()] for tokens in draws])
    exact = extremes.sample_extremes(n, 4000, runtime.stream(4)).numpy()
    for side in (0, 1):
        assert stats.ks_2samp(ends[:, side], exact[:, side]).pvalue > 1e-3


def test_conditioned_draws():
    n = 10**5
    level = math.sqrt(2 * math.log(n))
    counts, others = [], []
    for r in range(300):
        tokens = binned.draw(n, runtime.stream(5, r), limit=level)
        assert tokens.outer.abs().max() < level
        counts.append(len(tokens.outer))
        others.append(binned.beyond(level, runtime.stream(6, r)))
    mass = stats.norm.sf(level)
    expected = n * (binned.OUTER / n - 2 * mass) / (1 - 2 * mass)
    assert abs(np.mean(counts) - expected) < 4 * math.sqrt(expected / 300)
    assert stats.kstest(others, lambda y: 1 - stats.norm.sf(y) / mass).pvalue > 1e-3
    assert min(others) >= level


def test_influence_functions_are_integrals_over_the_query():
    rng = np.random.default_rng(7)
    B = torch.tensor(rng.normal(size=(2, 2)))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    grid = torch.tensor(np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2))
    weight = torch.tensor(np.outer(weights, weights).reshape(-1) / (2 * np.pi))
    for z in torch.tensor(rng.normal(size=(3, 2))):
        t = grid @ B.mT
        kernel = (z - t) * torch.exp(t @ z - (t**2).sum(1) / 2)[:, None]
        assert torch.allclose(rates.influence(z, B), B @ z + weight @ kernel, atol=1e-6)
        cross = torch.einsum("q,qi,qj->ij", weight, t, kernel)
        image = B @ z
        expected = torch.outer(image, image) - B @ B.mT + cross + cross.mT
        assert torch.allclose(rates.influence_square(z, B), expected, atol=1e-5)


def test_influence_has_mean_zero():
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    for H in (-0.8, 0.6, 1.2):
        for values in (rates.influence(z[:, None], [[H]])[:, 0], rates.influence_square(z[:, None], [[H]])[:, 0, 0]):
            assert abs(torch.trapezoid(values * density, z)) < 1e-8


def test_self_attention_is_an_average_of_influences():
    """Mean and second moment in d = 2 against the means of the influence functions, over the same tokens."""
    B = torch.tensor([[0.4, 0.1], [-0.2, 0.3]], dtype=torch.float64)
    sizes, gaps = [], []
    for r in range(20):
        z = laws.Gaussian(torch.eye(2)).sample(2000, runtime.stream(9, r))
        out = torch.softmax(z @ B.mT @ z.mT, 1) @ z
        first = out.mean(0)
        second = out.mT @ out / len(z) - B @ B.mT
        linear = rates.influence(z, B).mean(0), rates.influence_square(z, B).mean(0)
        sizes.append([first.norm().item(), second.norm().item()])
        gaps.append([(first - linear[0]).norm().item(), (second - linear[1]).norm().item()])
    # The remainder is of order 1/n; for the second moment most of it is the bias.
    assert (np.mean(gaps, 0) < np.mean(sizes, 0) * [0.02, 0.15]).all()


def test_influence_means_are_means():
    tokens = binned.draw(1000, runtime.stream(8), bins=100)
    y = spread_out(tokens)[:, None]
    first, second = binned.influence_means(tokens, 1.5)
    assert first == pytest.approx(rates.influence(y, [[1.5]]).mean().item(), rel=1e-12)
    assert second == pytest.approx(rates.influence_square(y, [[1.5]]).mean().item(), rel=1e-12)


@pytest.mark.parametrize("name", ["sharp_rate", "sharp_lift"])
def test_a_block_of_replicates_can_be_run_alone(name):
    experiment = EXPERIMENTS[name]
    config = {**experiment.full, "lengths": [1000, 3000], "replicates": 5, "block": 2, "bins": 400}
    plan = experiment.plan(config, torch.device("cpu"))
    assert plan.units == [(n, block) for n in (1000, 3000) for block in range(3)]
    last = plan.work(3000, 2).table
    assert set(last.replicate) == {4} and len(last) == len(config["horizons"])
    whole = experiment.plan({**config, "block": 5}, torch.device("cpu")).work(3000, 0).table
    again = whole[whole.replicate == 4].reset_index(drop=True)
    assert np.allclose(again["mean"], last["mean"], rtol=1e-6)
    if name == "sharp_lift":
        assert (whole["lift"] > 0).all()


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: binned.draw(100), "n:"),
        (lambda: binned.draw(10**16), "n:"),
        (lambda: binned.draw(1000, bins=3), "bins:"),
        (lambda: binned.draw(10**6, limit=1.0), "limit:"),
        (lambda: binned.beyond(-1.0), "level:"),
        (lambda: binned.self_attention([], [1.0]), "draws:"),
        (lambda: binned.self_attention([binned.draw(1000, 1)], [-1.0]), "slopes:"),
        (lambda: binned.self_attention([binned.draw(1000, 1), binned.draw(2000, 1)], [1.0]), "draws:"),
        (lambda: binned.self_attention([binned.draw(1000, 1)], [1.0], mesh=0), "mesh:"),
        (lambda: rates.influence([1.0, 2.0], [[1.0]]), "z:"),
        (lambda: rates.influence([1.0], [[1.0, 2.0]]), "B:"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        call()
