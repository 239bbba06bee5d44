"""The pointwise covariance and the uniform constant, against simulation, quadrature and formulas written out again."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from tokcx_lib.theory import laws, rates
from tokcx_lib.theory.attention import attention_map


@pytest.mark.parametrize(
    "law, t",
    [
        (laws.Gaussian([[1.0, 0.6], [0.6, 0.5]]), [0.5, -0.3]),
        (laws.Rademacher(2), [0.8, -0.4]),
        (laws.Uniform(2), [1.5, 0.5]),
        (laws.Gaussian(1.0, [2.0]), [0.7]),
        (laws.UniformBall(3, 2.0), [0.5, 0.0, 0.2]),
    ],
)
def test_clt_covariance_against_a_million_samples(law, t):
    t = torch.tensor(t, dtype=torch.float64)
    y = law.sample(1_000_000, 7)
    # One token's term in the linearised error; its moments need neither K(2t) nor the formula.
    terms = (y - law.tilted_mean(t)) * torch.exp(y @ t - law.log_mgf(t))[:, None]
    products = (terms[:, :, None] * terms[:, None, :]).flatten(1)
    error = (products.mean(0) - rates.clt_covariance(law, t).flatten()).abs()
    assert (error < 5 * products.std(0) / 1000 + 1e-12).all()
    assert (products.mean(0) - rates.clt_covariance(law, t).flatten()).norm() < 0.03 * products.mean(0).norm()


@pytest.mark.parametrize("law", [laws.Gaussian(torch.eye(2)), laws.Rademacher(2), laws.Uniform(2)])
def test_clt_covariance_is_that_of_attention_itself(law):
    """A million tokens, as a thousand lists of a thousand: the covariance of sqrt(n) (Gamma_n - Gamma)."""
    t = torch.tensor([0.5, 0.2], dtype=torch.float64)
    y = law.sample(1_000_000, 3).reshape(1000, 1000, law.dim)
    weights = torch.softmax(y @ t, -1)
    gaps = 1000**0.5 * (torch.einsum("rn,rnd->rd", weights, y) - law.tilted_mean(t))
    assert torch.allclose(gaps.T @ gaps / 1000, rates.clt_covariance(law, t), rtol=0.15, atol=0.1)
    assert torch.allclose(gaps[0] / 1000**0.5, attention_map(y[0], t, None) - attention_map(law, t, None))


def test_clt_covariance_closed_forms_and_shapes():
    t = torch.tensor([[0.3], [-1.7], [4.0]], dtype=torch.float64)
    signs = rates.clt_covariance(laws.Rademacher(1), t)
    assert signs.shape == (3, 1, 1)
    assert torch.allclose(signs[:, 0, 0], 1 / torch.cosh(t[:, 0]) ** 4, rtol=1e-10)
    gauss = rates.clt_covariance(laws.Gaussian(0.49), t)[:, 0, 0]
    s2 = 0.49 * t[:, 0] ** 2
    assert torch.allclose(gauss, torch.exp(s2) * (0.49 + 0.49 * s2), rtol=1e-12)
    assert rates.clt_covariance(laws.Uniform(1), 2.0).item() == pytest.approx(
        quad(lambda y: (y - 1 / math.tanh(2) + 0.5) ** 2 * math.exp(4 * y) / 2, -1, 1)[0] / (math.sinh(2) / 2) ** 2
    )


def test_the_chaining_constant_is_dudleys_integral():
    integral = quad(lambda v: math.sqrt(math.log(5 / v)), 0, 0.5, epsabs=1e-12)[0]
    assert rates._CHAINING == pytest.approx(4 * math.sqrt(2) * integral, rel=1e-9)


def test_compact_constant_written_out():
    A = np.diag([0.5, -2.0, 0.0])
    V = np.array([[3.0, 0.0, 0.0]])
    integral = quad(lambda v: math.sqrt(math.log(5 / v)), 0, 0.5, epsabs=1e-12)[0]
    tilt, rank = 0.7 * 2.0, 2
    denominator = 2 * 2 * tilt * 0.9 * math.exp(tilt * 1.3)
    numerator = 2 * (0.9 + 4 * math.sqrt(2) * integral * math.sqrt(rank) * tilt * 1.3 * 0.9 * math.exp(tilt * 1.3))
    expected = 3 * (numerator + 1.3 * denominator)
    assert rates.uniform_constant(0.7, A, support=1.3, spread=0.9, V=V) == pytest.approx(expected, rel=1e-9)


def test_subgaussian_constant_is_the_best_of_its_family():
    cov = np.diag([4.0, 1.0])
    A = np.array([[0.5, 0.0], [0.0, 0.0]])
    s, d, k = 0.8 * 2 * 0.5, 2, 1

    def constant(delta):
        growth = math.exp(2 * s**2 / (1 - 2 * delta))
        l_n = math.sqrt(6 * math.sqrt(3) * d / math.e**2 * growth / delta ** (2 + k / 2))
        l_d = math.sqrt(2 / math.e * growth / delta ** (1 + k / 2))
        bad = math.sqrt(1.5 * math.e**2 * k**2) / (math.log(2) / s) ** 2 * (math.sqrt(d) + 2 * s)
        return 4 * math.sqrt(d) + 4 * rates._CHAINING * math.sqrt(k) * s * l_n + 16 * s**2 * l_d + bad

    best = min(constant(delta) for delta in np.linspace(0.001, 0.499, 9999))
    found = rates.uniform_constant(0.8, A, cov=cov)
    assert 2 * best <= found * (1 + 1e-9)  # the factor is ||V cov^{1/2}||
    assert found == pytest.approx(2 * best, rel=1e-4)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_moment_bounds_of_the_subgaussian_proof(k):
    """L_D and L_N against the moments they bound, for Gaussian tokens, by quadrature over r = |Z|."""
    s = 0.7

    def density(r):
        return r ** (k - 1) * math.exp(-(r**2) / 2) / (2 ** (k / 2 - 1) * math.gamma(k / 2))

    for delta in (0.1, 0.2, 0.3):
        growth = math.exp(2 * s**2 / (1 - 2 * delta))
        moment = quad(lambda r: r**2 * math.exp(2 * s * r) * density(r), 0, 40)[0]
        assert moment <= 2 / math.e * growth / delta ** (1 + k / 2)
        moment = quad(lambda r: r**4 * math.exp(2 * s * r) * density(r), 0, 40)[0]
        assert moment <= 6 * math.sqrt(3) * k / math.e**2 * growth / delta ** (2 + k / 2)


def test_uniform_constant_grows_and_saturates_to_infinity():
    eye = torch.eye(2)
    for kind in ({"support": 1.0}, {"cov": eye}):
        values = [rates.uniform_constant(radius, eye, **kind) for radius in (0.1, 1.0, 3.0, 10.0, 1000.0)]
        assert all(a < b for a, b in zip(values, values[1:]))
        assert values[-1] == math.inf
    zero = torch.zeros(2, 2)
    assert rates.uniform_constant(1.0, zero, support=1.0, spread=0.5) == pytest.approx(1.0)
    assert rates.uniform_constant(1.0, zero, cov=eye) == pytest.approx(4 * math.sqrt(2))


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: rates.clt_covariance(laws.Uniform(2), [1.0]), "t"),
        (lambda: rates.clt_covariance(laws.Uniform(1), [math.nan]), "t"),
        (lambda: rates.uniform_constant(0.0, [[1.0]], support=1.0), "radius"),
        (lambda: rates.uniform_constant(1.0, [[1.0]]), "support"),
        (lambda: rates.uniform_constant(1.0, [[1.0]], support=1.0, cov=[[1.0]]), "support"),
        (lambda: rates.uniform_constant(1.0, [[1.0]], support=-1.0), "support"),
        (lambda: rates.uniform_constant(1.0, [[1.0]], support=1.0, spread=0.0), "spread"),
        (lambda: rates.uniform_constant(1.0, [[1.0]], cov=[[1.0]], spread=1.0), "spread"),
        (lambda: rates.uniform_constant(1.0, [[1.0, 0.0]], support=1.0), "A"),
        (lambda: rates.uniform_constant(1.0, [[1.0]], cov=[[1.0, 0.0], [0.0, 1.0]]), "A"),
        (lambda: rates.uniform_constant(1.0, [[1.0]], cov=[[-1.0]]), "cov"),
        (lambda: rates.uniform_constant(1.0, [[1.0]], support=1.0, V=[[1.0, 0.0]]), "V"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        call()
