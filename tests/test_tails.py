"""Tails, shape and dependence, on samples of known laws and on a head whose logits are known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from tokcx_lib import runtime
from tokcx_lib.models.heads import Head
from tokcx_lib.studies.real_heads import tails
from tokcx_lib.theory import laws
from tokcx_lib.theory.softmax_law import softmax_moments

N = 100_000


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=runtime.generator(seed), dtype=torch.float64)


def uniform(n, seed=0):
    return torch.rand(n, generator=runtime.generator(seed), dtype=torch.float64)


def student(degrees, n=N):
    return torch.as_tensor(special.stdtrit(degrees, uniform(n).numpy()))


def laplace(n=N):
    u = uniform(n) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


RADEMACHER = torch.tensor([-1.0, 1.0]).repeat(N // 2)


@pytest.mark.parametrize(
    "sample, skewness, kurtosis, within",
    [
        (normal(N), 0, 0, 0.05),
        (RADEMACHER, 0, -2, 1e-12),
        (uniform(N), 0, -1.2, 0.02),
        (laplace(), 0, 3, 0.4),
        (-torch.log(uniform(N)), 2, 6, 0.9),  # exponential
    ],
)
def test_moments_of_known_laws(sample, skewness, kurtosis, within):
    assert tails.skewness(sample).item() == pytest.approx(skewness, abs=within)
    assert tails.excess_kurtosis(sample).item() == pytest.approx(kurtosis, abs=within)


def test_moments_are_those_of_scipy_and_do_not_overflow_where_its_do():
    x = normal(3, 1000).exp() + 2
    assert tails.skewness(x).numpy() == pytest.approx(stats.skew(x, axis=-1), rel=1e-12)
    assert tails.excess_kurtosis(x).numpy() == pytest.approx(stats.kurtosis(x, axis=-1), rel=1e-12)
    for measure in (tails.skewness, tails.excess_kurtosis):
        for scale in (1e-120, 1e120):
            assert torch.allclose(measure(scale * x), measure(x), rtol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.floats(-50, 50), st.floats(0.01, 100), st.integers(0, 10**6))
def test_nothing_depends_on_location_and_scale(shift, scale, seed):
    x = normal(3, 200, seed=seed).exp()
    y = shift + scale * x
    for measure in (
        tails.skewness, tails.excess_kurtosis, tails.subgaussian_ratio, lambda x: tails.hill(x, 20).index,
        lambda x: tails.window_variance_ratio(x, 10), lambda x: tails.position_share(x, 10),
    ):  # fmt: skip
        assert torch.allclose(measure(y), measure(x), rtol=1e-6, atol=1e-8)
    assert torch.allclose(tails.subgaussian_ratio(-x), tails.subgaussian_ratio(x))
    assert torch.allclose(tails.skewness(-x), -tails.skewness(x))
    assert (tails.subgaussian_ratio(x) >= tails.subgaussian_ratio(x, "upper")).all()
    assert (tails.subgaussian_ratio(x, "upper") >= 1).all()


@pytest.mark.parametrize("degrees", [1.5, 3])
def test_hill_finds_the_index_of_a_power_law(degrees):
    """Of Student's t the index is the number of degrees; three standard errors and the bias of a hundredth."""
    found = tails.hill(student(degrees), 300)
    assert found.error.item() == pytest.approx(found.index.item() / math.sqrt(300))
    assert abs(found.index.item() - degrees) < 3 * found.error.item() + 0.1


@pytest.mark.parametrize("side", tails.SIDES)
@pytest.mark.parametrize("share", [0.1, 0.01, 0.001])
def test_hill_of_gaussian_samples_is_its_gaussian_value(share, side):
    z = normal(40, 20_000, seed=3)
    found = tails.hill(z, round(share * 20_000), side).index
    spread = found.std().item() / math.sqrt(40)
    k = share * 20_000
    # 1/mean is biased upwards by a share 1/k.
    assert abs(found.mean().item() - tails.normal_hill(share, side) * (1 + 1 / k)) < 4 * spread + 0.01
    assert tails.normal_hill(share / 10, side) > tails.normal_hill(share, side) + 2


def test_hill_table_is_hill_at_each_share():
    table = tails.hill_table(student(2), (0.1, 0.01))
    assert table["k"].tolist() == [N // 10, N // 100]
    assert table["hill"][1] == pytest.approx(tails.hill(student(2)).index.item())
    assert table["hill"][1] < 3 < table["normal_hill"][1]


def test_subgaussian_ratio_of_known_laws():
    gaussian = tails.subgaussian_ratio(normal(20, N // 5, seed=1)).mean().item()
    assert gaussian == pytest.approx(1.0, abs=0.04)
    assert tails.subgaussian_ratio(RADEMACHER).item() == 1
    assert tails.subgaussian_ratio(uniform(N)).item() == pytest.approx(1, abs=1e-3)
    # Bernoulli(p): the optimal proxy is (1 - 2p) / (2 log((1 - p)/p)) (Kearns and Saul 1998), at t = 2 log((1 - p)/p).
    p = 0.1
    sample = (torch.arange(N) < p * N).double()
    optimal = (1 - 2 * p) / (2 * math.log((1 - p) / p)) / (p * (1 - p))
    assert tails.subgaussian_ratio(sample).item() == pytest.approx(optimal, abs=0.05)
    assert tails.subgaussian_ratio(sample, "upper", points=200).item() == pytest.approx(
        tails.subgaussian_ratio(sample, points=200).item()
    )
    # Not sub-Gaussian: the ratio grows with the sample.
    quantiles = [
        torch.logit((torch.arange(n, dtype=torch.float64) + 0.5) / n) for n in (100, 1000, N)
    ]  # of the logistic law
    ratios = [tails.subgaussian_ratio(sample).item() for sample in quantiles]
    assert 1.05 < ratios[0] < ratios[1] < ratios[2]
    # A long lower tail does not show on the upper side.
    skew = torch.log(uniform(N))
    assert tails.subgaussian_ratio(skew, "upper").item() < 1.001 < 1.5 < tails.subgaussian_ratio(skew).item()


def test_subgaussian_ratio_is_its_definition():
    x = student(5, 500)
    t = math.sqrt(2 * math.log(500)) / x.std(correction=0) * torch.arange(1, 9) / 8
    values = torch.cat([2 * tails.log_mgf(x, u) / (u**2 * x.var(correction=0)) for u in torch.cat([t, -t])[:, None]])
    assert tails.subgaussian_ratio(x, points=8).item() == pytest.approx(max(1.0, values.max().item()), rel=1e-9)


def test_log_mgf_of_normal_scores_is_gaussian_then_its_largest_term():
    small, large = tails.normal_log_mgf(N, torch.tensor([1.0, 30.0]))
    assert small.item() == pytest.approx(0.5, abs=2e-3)
    assert large.item() == pytest.approx(30 * -special.ndtri(0.5 / N) - math.log(N), abs=0.01)


def test_qq_of_a_gaussian_is_the_diagonal_and_of_student_is_steeper():
    normal_quantiles, sample = tails.qq(3 + 2 * normal(N), 21)
    inner = normal_quantiles.abs() < 3
    assert (sample - normal_quantiles)[inner].abs().max() < 0.05
    assert (normal_quantiles + normal_quantiles.flip(0)).abs().max() < 1e-9
    assert tails.qq(student(4)).sample[-1] > 6
    z = tails.standardise(normal(1001))
    assert tails.qq(z, 3).sample[1].item() == pytest.approx(z.median().item())


def autoregressive(rho, shape, seed=0):
    z = normal(*shape, seed=seed)
    x = torch.empty_like(z)
    x[..., 0] = z[..., 0]
    for i in range(1, shape[-1]):
        x[..., i] = rho * x[..., i - 1] + math.sqrt(1 - rho**2) * z[..., i]
    return x


@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.5, 0.9])
def test_design_effect_of_autoregressive_windows(rho):
    window, windows = 50, 4000
    x = autoregressive(rho, (windows, window)).reshape(-1)
    lags = torch.arange(1, window, dtype=torch.float64)
    effect = 1 + 2 * ((1 - lags / window) * rho**lags).sum().item()
    assert tails.window_variance_ratio(x, window).item() == pytest.approx(effect, rel=4 * math.sqrt(2 / windows))
    both = torch.stack([x, 3 * normal(len(x), seed=9)])
    pooled = tails.window_variance_ratio(both, window, pooled=True).item()
    assert pooled == pytest.approx((effect + 9) / 10, rel=4 * math.sqrt(2 / windows))


def test_design_effect_where_windows_are_constant_or_alike():
    constant = normal(40).repeat_interleave(25)
    assert tails.window_variance_ratio(constant, 25).item() == pytest.approx(25, rel=0.03)
    alike = normal(25).repeat(40)
    assert tails.window_variance_ratio(alike, 25).item() == pytest.approx(0, abs=1e-12)
    assert tails.position_share(alike, 25).item() == pytest.approx(1)
    assert tails.position_share(constant, 25).item() == pytest.approx(0)
    mixed = normal(50).repeat(2000) + 2 * normal(100_000, seed=4)
    placed = normal(50).var().item()
    assert tails.position_share(mixed, 50).item() == pytest.approx(placed / (placed + 4), rel=0.05)


def test_geometry_of_a_gaussian_cloud_and_of_a_sphere():
    dim, n = 8, 40_000
    scales = torch.tensor([6.0, 1, 1, 1, 1, 1, 1, 1], dtype=torch.float64)
    x = normal(n, dim) * scales + 2.0
    found = tails.token_geometry(x, 20)
    variance = scales.square()
    assert found["mean_share"] == pytest.approx(math.sqrt(32 / (32 + variance.sum())), abs=0.01)
    assert found["participation"] == pytest.approx((variance.sum() ** 2 / variance.square().sum()).item(), rel=0.05)
    assert found["top_share"] == pytest.approx(36 / 43, abs=0.01)
    assert (found["rank"], found["outlier_variance"], found["outlier_mean"]) == (8, 1, 0)
    assert found["kurtosis_50"] == pytest.approx(0, abs=0.1) and found["design_effect"] == pytest.approx(1, abs=0.2)
    for name in ("norm_01", "norm_50", "norm_99", "norm_sd"):
        assert found[name] == pytest.approx(found[name.replace("norm", "chi")], rel=0.07)
    sphere = tails.token_geometry(laws.UniformSphere(dim, 1.0).sample(n, runtime.generator(1)))
    assert sphere["mean_cosine"] == pytest.approx(0, abs=1e-3) and sphere["mean_share"] < 0.02
    assert sphere["norm_sd"] < 0.01 and sphere["participation"] == pytest.approx(dim, rel=0.01)
    units = torch.nn.functional.normalize(normal(30, 3) + 1, dim=1)
    pairs = (units @ units.mT).triu(1).sum().item() / (30 * 29 / 2)
    assert tails.token_geometry(normal(30, 3) + 1)["mean_cosine"] == pytest.approx(pairs)


def test_whitening_leaves_out_directions_without_variance():
    x = normal(2000, 3) @ torch.tensor([[1.0, 2, 0, 1], [0, 1, 1, 2], [3, 0, 1, 4]]).double() + 5
    z = tails.whiten(x)
    assert z.shape == (2000, 3) and z.mean(0).abs().max() < 1e-9
    assert (z.mT @ z / 2000 - torch.eye(3)).abs().max() < 1e-9


def head_of(load):
    """A head whose logits for the query e_1 are `load` times the first coordinate of the key; values: the keys."""
    eye = torch.eye(2, dtype=torch.float64)
    return Head(0, 0, load * eye, eye, eye, None, 1.0)


@pytest.mark.parametrize("load", [0.5, 1.5, 8.0])
def test_logits_of_gaussian_tokens_are_those_of_the_theory(load):
    n = 60_000
    keys, query = normal(n, 2, seed=6), torch.tensor([[1.0, 0.0]]).double()
    found = tails.logit_tails(head_of(load), query, keys, 100)
    assert found["load"] == pytest.approx(load, rel=0.02) and found["load_05"] == found["load_95"]
    assert found["skewness"] == pytest.approx(0, abs=0.05) and found["upper_variance"] == pytest.approx(0.5, abs=0.02)
    assert found["hill"] == pytest.approx(tails.normal_hill(0.01), rel=0.15)
    assert found["hill_upper"] == pytest.approx(tails.normal_hill(0.01, "upper"), rel=0.2)
    assert found["quantile_999"] == pytest.approx(3.09, abs=0.15)
    assert found["log_mgf_ratio"] == pytest.approx(found["log_mgf_normal"], rel=0.1)
    weights = torch.softmax(load * keys[:, 0], 0)
    assert found["log_share"] == pytest.approx(math.log(1 / (n * weights.square().sum())))
    assert found["log_share_ratio"] == pytest.approx(-found["log_share"] / found["load"] ** 2)
    exact = -math.log(n * softmax_moments(n, found["load"]).participation)
    assert found["log_share_normal"] == pytest.approx(exact)
    assert found["log_share"] == pytest.approx(exact, abs=0.1 if load < 5 else 2.5)  # frozen: one draw of few tokens
    for effect in ("effect_logits", "effect_weights", "effect_outputs"):
        assert found[effect] == pytest.approx(1, abs=0.35)


def test_design_effects_of_logits_see_windows_that_are_alike():
    """Every window holds one token many times over: each mean is worth one token a window."""
    keys = normal(3000, 2, seed=7).repeat_interleave(10, 0)
    queries = torch.tensor([[1.0, 0.0], [0.3, -0.2]]).double()
    found = tails.logit_tails(head_of(1.0), queries, keys, 10)
    for effect in ("effect_logits", "effect_weights", "effect_outputs"):
        assert found[effect] == pytest.approx(10, rel=0.01)
    assert "effect_logits" not in tails.logit_tails(head_of(1.0), queries, keys)


def test_logits_that_depend_on_the_place_have_the_share_of_their_places():
    """Four places with logits 0, 0, 0, 5 and Gaussian noise of load 0.7 around them."""
    places = torch.tensor([0.0, 0.0, 0.0, 5.0], dtype=torch.float64)
    keys = normal(200_000, 2, seed=10)
    keys[:, 0] = 0.7 * keys[:, 0] + places.repeat(50_000)
    found = tails.logit_tails(head_of(1.0), torch.tensor([[1.0, 0.0]]).double(), keys, 4)
    sums = [torch.exp(t * places).mean().item() for t in (1, 2)]
    assert found["log_share_placed"] == pytest.approx(2 * math.log(sums[0]) - math.log(sums[1]) - 0.49, abs=0.01)
    assert found["log_share"] == pytest.approx(found["log_share_placed"], abs=0.02)
    assert found["position_share"] == pytest.approx(places.var().item() / (places.var().item() + 0.49), abs=0.01)
    assert found["log_share_normal"] < found["log_share"] - 1


def test_effect_of_outputs_is_that_of_their_first_order_error():
    keys, v = normal(600, 2, seed=8), normal(600, 3, seed=9)
    weights = torch.softmax(keys[:, 0], 0)[None] * 600
    output = weights[0] @ v / 600
    error = weights[0][:, None] * (v - output)
    expected = tails.window_variance_ratio(error.mT, 20, pooled=True).item()
    assert tails._output_effect(weights, v, 20).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tails.standardise(torch.ones(5)), "x: expected samples that vary"),
        (lambda: tails.skewness([1.0]), "x: expected shape"),
        (lambda: tails.hill(normal(10), 10), "k: expected an integer below"),
        (lambda: tails.hill(normal(10), 9, "upper"), "k: expected fewer"),
        (lambda: tails.hill(normal(10), 2, "lower"), "side: expected one of both, upper"),
        (lambda: tails.normal_hill(0.7, "upper"), "share: expected"),
        (lambda: tails.subgaussian_ratio([1.0, math.nan]), "x: expected finite"),
        (lambda: tails.window_variance_ratio(normal(10), 6), "window: expected at most 5"),
        (lambda: tails.position_share(normal(10), 6), "window: expected at most 5"),
        (lambda: tails.qq(normal(2, 5)), "x: expected 1 axes"),
        (lambda: tails.token_geometry(normal(5)), "x: expected 2 axes"),
        (lambda: tails.logit_tails(head_of(1.0), normal(1, 2), normal(5, 3)), "keys: expected shape"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_direction_tails_say_what_the_measures_say():
    x = student(6, 20_000)
    found = tails.direction_tails(x, 100)
    assert found["hill_0.01"] == pytest.approx(tails.hill(x).index.item())
    assert found["subgaussian"] == pytest.approx(tails.subgaussian_ratio(x).item())
    assert found["design_effect"] == pytest.approx(tails.window_variance_ratio(x, 100).item())
    assert np.isfinite(list(found.values())).all() and found["position_share"] < 0.05
