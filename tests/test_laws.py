"""Laws against numerical integration, against each other, and against their own samples."""

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from tokcx_lib.theory import laws

DIMS = st.integers(1, 5)
SEEDS = st.integers(0, 2**32 - 1)


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


def random_law(kind: str, dim: int, seed: int):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(dim, dim))
    cov = root @ root.T / dim
    if kind == "gaussian":
        return laws.Gaussian(cov, rng.normal(size=dim))
    if kind == "rademacher":
        return laws.Rademacher(dim)
    if kind == "uniform":
        return laws.Uniform(dim)
    if kind == "sphere":
        return laws.UniformSphere(max(dim, 2), 0.3 + 2 * rng.random())
    if kind == "ball":
        return laws.UniformBall(dim, 0.3 + 2 * rng.random())
    if kind == "mixture":
        weights = rng.dirichlet(np.ones(3))
        return laws.GaussianMixture(weights, rng.normal(size=(3, dim)), np.stack([cov, 2 * cov, 0.1 * cov]))
    return laws.Empirical(rng.normal(size=(7, dim)), rng.dirichlet(np.ones(7)))


KINDS = ["gaussian", "rademacher", "uniform", "sphere", "ball", "mixture", "empirical"]


@pytest.mark.parametrize("kind", KINDS)
@given(dim=DIMS, seed=SEEDS, scale=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 5.0]))
@settings(max_examples=25, deadline=None)
def test_mean_and_covariance_are_derivatives_of_the_log_mgf(kind, dim, seed, scale):
    law = random_law(kind, dim, seed)
    t = tensor(scale * np.random.default_rng(seed + 1).normal(size=law.dim))
    step = 1e-4
    eye = step * torch.eye(law.dim, dtype=torch.float64)
    gradient = (law.log_mgf(t + eye) - law.log_mgf(t - eye)) / (2 * step)
    jacobian = (law.tilted_mean(t + eye) - law.tilted_mean(t - eye)) / (2 * step)
    size = 1 + law.tilted_mean(t).abs().max() + law.tilted_cov(t).abs().max()
    assert torch.allclose(law.tilted_mean(t), gradient, rtol=0, atol=1e-6 * size.item() ** 2)
    assert torch.allclose(law.tilted_cov(t), jacobian, rtol=0, atol=1e-6 * size.item() ** 2)


@pytest.mark.parametrize("kind", KINDS)
def test_at_zero_tilt_a_law_is_itself(kind):
    law = random_law(kind, 3, seed=5)
    zero = torch.zeros(law.dim, dtype=torch.float64)
    assert abs(law.log_mgf(zero).item()) < 1e-14
    assert torch.allclose(law.tilted_mean(zero), law.mean, atol=1e-13)
    assert torch.allclose(law.tilted_cov(zero), law.cov, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_mean_covariance_and_mgf_of_the_law(kind):
    law = random_law(kind, 3, seed=11)
    n = 400_000
    sample = law.sample(n, torch.Generator().manual_seed(1))
    assert sample.shape == (n, law.dim) and sample.dtype == torch.float64
    t = 0.5 * torch.ones(law.dim, dtype=torch.float64) / law.cov.diagonal().sqrt().max()
    for empirical, exact, spread in (
        (sample.mean(0), law.mean, sample.std(0)),
        (torch.exp(sample @ t).mean(), law.log_mgf(t).exp(), torch.exp(sample @ t).std()),
    ):
        assert ((empirical - exact).abs() < 5 * spread / n**0.5).all()
    centred = sample - law.mean
    products = (centred[:, :, None] * centred[:, None, :]).reshape(n, -1)
    error = (products.mean(0) - law.cov.reshape(-1)).abs()
    assert (error < 5 * products.std(0) / n**0.5 + 1e-12).all()


@given(t=st.floats(-30, 30))
@settings(max_examples=60, deadline=None)
def test_one_dimensional_densities_against_quadrature(t):
    def tilted(density, low, high):
        peak = max(t * low, t * high)
        moments = [
            quad(lambda y: y**k * np.exp(t * y - peak) * density(y), low, high, epsabs=1e-12, epsrel=1e-11, limit=200)[
                0
            ]
            for k in range(3)
        ]
        mean = moments[1] / moments[0]
        return np.log(moments[0]) + peak, mean, moments[2] / moments[0] - mean**2

    point = tensor([t])
    for law, density in (
        (laws.Uniform(1), lambda y: 0.5),
        (laws.UniformBall(1), lambda y: 0.5),
        (laws.UniformBall(3), lambda y: 0.75 * (1 - y**2)),  # the projection of a ball is the first coordinate
    ):
        k, mean, variance = tilted(density, -1, 1)
        at = torch.zeros(law.dim, dtype=torch.float64)
        at[0] = point[0]
        assert law.log_mgf(at).item() == pytest.approx(k, abs=1e-8)
        assert law.tilted_mean(at)[0].item() == pytest.approx(mean, abs=1e-8)
        assert law.tilted_cov(at)[0, 0].item() == pytest.approx(variance, abs=1e-7)


@pytest.mark.parametrize("dim", [2, 3, 8, 50, 2000])
@pytest.mark.parametrize("r", [1e-6, 0.1, 1.0, 30.0, 599.0, 601.0, 5000.0, 3e5])
def test_sphere_against_mpmath(dim, r):
    nu = mpmath.mpf(dim) / 2 - 1
    with mpmath.workdps(40):
        k = mpmath.loggamma(nu + 1) + nu * mpmath.log(2 / mpmath.mpf(r)) + mpmath.log(mpmath.besseli(nu, r))
        ratio = mpmath.besseli(nu + 1, r) / mpmath.besseli(nu, r)
        curvature = 1 - ratio**2 - (dim - 1) * ratio / r
    law = laws.UniformSphere(dim, radius=2.0)
    t = torch.zeros(dim, dtype=torch.float64)
    t[0] = r / 2
    assert law.log_mgf(t).item() == pytest.approx(float(k), rel=1e-12, abs=1e-11)
    assert law.tilted_mean(t)[0].item() == pytest.approx(2 * float(ratio), rel=1e-10)
    assert law.tilted_cov(t)[0, 0].item() == pytest.approx(4 * float(curvature), abs=1e-9)


def test_laws_that_coincide():
    t = torch.linspace(-8, 8, 41, dtype=torch.float64)[:, None]
    signs = laws.Empirical([[-1.0], [1.0]])
    for a, b in (
        (laws.Rademacher(1), signs),
        (laws.Uniform(1), laws.UniformBall(1)),
        (laws.Gaussian(2.0, [1.0]), laws.GaussianMixture([1.0], [[1.0]], [[2.0]])),
    ):
        for method in ("log_mgf", "tilted_mean", "tilted_cov"):
            assert torch.allclose(getattr(a, method)(t), getattr(b, method)(t), rtol=1e-9, atol=1e-11), (a, method)


def test_extreme_tilts_stay_finite_and_inside_the_support():
    for law in (laws.Rademacher(3), laws.Uniform(3), laws.UniformSphere(3), laws.UniformBall(3)):
        for size in (1e-300, 1e-8, 1e3, 1e6):
            t = size * torch.ones(3, dtype=torch.float64)
            mean = law.tilted_mean(t)
            assert torch.isfinite(law.log_mgf(t)) and torch.isfinite(law.tilted_cov(t)).all()
            assert (mean >= 0).all() and (mean <= 1 + 1e-12).all()


def test_batches_precision_and_seeds():
    law = laws.UniformSphere(4)
    t = torch.randn(2, 3, 4)
    assert law.log_mgf(t).shape == (2, 3) and law.tilted_mean(t).shape == (2, 3, 4)
    assert law.tilted_cov(t).shape == (2, 3, 4, 4) and law.tilted_mean(t).dtype == torch.float32
    assert torch.equal(law.sample(5, 3), law.sample(5, torch.Generator().manual_seed(3)))
    assert not torch.equal(law.sample(5), law.sample(5))


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: laws.Gaussian([[1.0, 2.0], [0.0, 1.0]]), "cov"),
        (lambda: laws.Gaussian([[1.0, 2.0], [2.0, 1.0]]), "cov"),
        (lambda: laws.Gaussian([[1.0, 0.0]]), "cov"),
        (lambda: laws.Gaussian(float("nan")), "cov"),
        (lambda: laws.Gaussian(-1.0), "cov"),
        (lambda: laws.Gaussian(torch.eye(2), mean=[1.0]), "mean"),
        (lambda: laws.UniformSphere(1), "dim"),
        (lambda: laws.UniformSphere(3, radius=0), "radius"),
        (lambda: laws.Rademacher(0), "dim"),
        (lambda: laws.Uniform(2).sample(0), "n"),
        (lambda: laws.Uniform(2).log_mgf([1.0]), "t"),
        (lambda: laws.Uniform(2).tilted_mean([1.0, float("inf")]), "t"),
        (lambda: laws.Empirical(torch.zeros(0, 2)), "tokens"),
        (lambda: laws.Empirical([[float("nan")]]), "tokens"),
        (lambda: laws.Empirical([[1.0], [2.0]], [0.5, 0.6]), "weights"),
        (lambda: laws.GaussianMixture([1.0], [[0.0]], [[[1.0]], [[1.0]]]), "covs"),
        (lambda: laws.Gaussian("wide"), "cov"),
    ],
)
def test_bad_input_is_named(make, names):
    with pytest.raises(ValueError, match=rf"^{names}: .*(expected|got)"):
        make()
