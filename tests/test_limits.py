"""Limits of bounded laws against integrals that are known, and against sampled queries."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from tokcx_lib.sampling import sweeps
from tokcx_lib.sampling.forms import random_head
from tokcx_lib.sampling.streaming import self_attention_moments
from tokcx_lib.theory import laws, limits

KINDS = {"sphere": laws.UniformSphere, "ball": laws.UniformBall, "cube": laws.Uniform, "signs": laws.Rademacher}


def random_form(dim, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(2, dim, dim)))


def distance(found, wanted):
    return (torch.linalg.matrix_norm(found - wanted) / torch.linalg.matrix_norm(wanted)).item()


@pytest.mark.parametrize("dim", [3, 8, 50])
def test_sphere_at_infinite_scale_against_an_integral(dim):
    # The map is then Sz/|Sz|, and E[a_i g_i^2 / sum a_j g_j^2] of normal g is one integral of Laplace transforms.
    A, V = random_form(dim, dim)
    left, singular, _ = torch.linalg.svd(A)
    a = (singular**2 / (singular**2).mean()).numpy()

    def integrand(u, i):
        lam = np.exp(u)
        return lam * a[i] / (1 + 2 * lam * a[i]) * np.exp(-0.5 * np.log1p(2 * lam * a).sum())

    share = [quad(integrand, -60, 60, args=(i,), epsabs=1e-11, epsrel=1e-9, limit=400)[0] for i in range(dim)]
    assert sum(share) == pytest.approx(1, abs=1e-8)
    frame = V @ left
    wanted = frame @ torch.diag(torch.tensor(share, dtype=torch.float64)) @ frame.mT
    found, error = limits.bounded_limit(laws.UniformSphere(dim), 1e9 * A, V, points=2**13)
    assert distance(found.cov, wanted) < 4 * error + 1e-7 and error < 4e-4
    assert found.mean.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
@given(dim=st.integers(2, 6), seed=st.integers(0, 10**6))
@settings(max_examples=6, deadline=None)
def test_small_scales_are_linear(kind, dim, seed):
    # grad K(t) = cov t + O(t^3)
    law = KINDS[kind](dim)
    A, V = random_form(dim, seed)
    matrix = 1e-4 * V @ law.cov @ A
    found, error = limits.bounded_limit(law, 1e-4 * A, V, points=2**10)
    assert distance(found.cov, matrix @ law.cov @ matrix.mT) < 5 * error + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_against_sampled_queries(kind):
    law, (A, V) = KINDS[kind](4), random_form(4, 3)
    A = 3 * A
    found, error = limits.bounded_limit(law, A, V, points=2**12)
    output = law.tilted_mean(law.sample(400_000, 5) @ A.mT) @ V.mT
    products = (output[:, :, None] * output[:, None, :]).reshape(len(output), -1)
    noise = (products.var(0).sum() / len(output)).sqrt() / torch.linalg.matrix_norm(found.cov)
    assert noise < 0.01  # otherwise the comparison says nothing
    assert distance(found.cov, products.mean(0).reshape(4, 4)) < 4 * (noise.item() + error)


def test_the_stated_error_is_the_error():
    law, (A, _) = laws.Uniform(5), random_form(5, 8)
    fine = limits.bounded_limit(law, 2 * A, points=2**16)
    coarse = [limits.bounded_limit(law, 2 * A, points=2**8, seed=seed) for seed in range(12)]
    distances = np.array([distance(c.moments.cov, fine.moments.cov) for c in coarse])
    stated = np.array([c.error for c in coarse])
    assert stated.min() > 20 * fine.error
    assert 0.5 < np.sqrt((distances**2).mean()) / np.sqrt((stated**2).mean()) < 2


def test_signs_are_summed_exactly():
    # One coordinate sees only itself: E tanh(a x)^2 = tanh(a)^2.
    found, error = limits.bounded_limit(laws.Rademacher(3), torch.diag(torch.tensor([0.5, 1.0, 4.0])))
    assert error == 0
    wanted = torch.diag(torch.tanh(torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)) ** 2)
    assert torch.allclose(found.cov, wanted, atol=1e-14)


def test_the_same_seed_gives_the_same_limit():
    law, (A, _) = laws.UniformBall(3), random_form(3, 1)
    one, again, other = (limits.bounded_limit(law, A, points=2**8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.moments.cov, again.moments.cov) and not torch.equal(one.moments.cov, other.moments.cov)


def test_float32_attention_is_good_enough_at_the_largest_scale():
    # Logits of the order of 10^4 are known to 10^-3 in float32; moments hardly feel it.
    A, V = random_head(50, 6_050)
    x = laws.UniformSphere(50).sample(2000, 1)
    one, two = (self_attention_moments(x.to(kind), 1e5 * A, V, [500, 2000]) for kind in (torch.float32, torch.float64))
    assert (torch.linalg.matrix_norm(one.cov - two.cov) < 1e-5 * torch.linalg.matrix_norm(two.cov)).all()
    assert (torch.linalg.vector_norm(one.mean - two.mean, dim=-1) < 1e-5).all()


def test_bad_input():
    A = torch.eye(3)
    for name, arguments in {
        "law": (laws.Gaussian(torch.eye(3)), A),
        "A": (laws.UniformBall(3), torch.eye(2)),
        "V": (laws.UniformBall(3), A, torch.eye(2)),
        "points": (laws.UniformBall(3), A, None, 100),
        "repeats": (laws.UniformBall(3), A, None, 64, 1),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            limits.bounded_limit(*arguments)


def test_convergence_to_the_limit():
    law, (A, V) = laws.UniformBall(3), random_form(3, 2)
    limit = limits.bounded_limit(law, A, V, points=2**12).moments
    table = sweeps.MomentSweep(law, A, [100, 1600], V, limit=limit).table(30, seed=4)
    few, many = table.groupby("n")[["mean_error", "cov_error"]].mean().to_numpy()
    assert (np.abs(few / many / 4 - 1) < 0.35).all()  # sixteen times the tokens, a quarter of the error
