"""The largest error over a ball, against dense grids, more starts and another optimiser; and the two sweeps."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize

from tokcx_lib import runtime
from tokcx_lib.sampling import fits, sweeps
from tokcx_lib.studies import uniform
from tokcx_lib.theory import laws, rates
from tokcx_lib.theory.attention import attention_map

LAWS = {"gaussian": lambda d: laws.Gaussian(torch.eye(d)), "uniform": laws.Uniform, "rademacher": laws.Rademacher}


def errors(law, tokens, x, A=None, V=None):
    return (attention_map(tokens, x, A, V) - attention_map(law, x, A, V)).norm(dim=-1)


def grid(dim: int, radius: float) -> torch.Tensor:
    r = torch.linspace(0, radius, 161, dtype=torch.float64)
    if dim == 1:
        return torch.cat([-r, r])[:, None]
    angle = torch.linspace(0, 2 * math.pi, 241, dtype=torch.float64)
    r, angle = torch.meshgrid(r, angle, indexing="ij")
    return torch.stack([r * angle.cos(), r * angle.sin()], -1).view(-1, 2)


@pytest.mark.parametrize("dim, starts", [(1, 16), (2, 24)])
@pytest.mark.parametrize("kind", LAWS)
@pytest.mark.parametrize("radius", [0.5, 1.0, 2.0, 4.0])
def test_agrees_with_a_dense_grid(dim, starts, kind, radius):
    law = LAWS[kind](dim)
    for replicate in range(2):
        tokens = law.sample(201, runtime.stream(1, replicate))  # odd: signs never balance
        found, query = uniform.largest_error(law, tokens, radius, starts=starts, generator=replicate)
        dense = torch.cat([errors(law, tokens, x) for x in grid(dim, radius).split(8000)]).max().item()
        assert found == pytest.approx(dense, rel=0.01)
        assert found >= dense * (1 - 1e-3)
        assert query.norm() <= radius * (1 + 1e-12)
        assert errors(law, tokens, query[None]).item() == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("radius", [0.5, 1.0, 2.0])
def test_does_not_move_from_100_to_400_starts_in_eight_dimensions(radius):
    law = laws.Gaussian(torch.eye(8))
    for replicate, n in itertools.product(range(3), (100, 1000)):
        tokens = law.sample(n, runtime.stream(2, replicate))
        few, _ = uniform.largest_error(law, tokens, radius, starts=100, generator=replicate)
        many, _ = uniform.largest_error(law, tokens, radius, starts=400, generator=50 + replicate)
        assert many == pytest.approx(few, rel=0.01)
        on_sphere = radius * laws.UniformSphere(8).sample(2000, replicate)
        assert errors(law, tokens, on_sphere).max() <= few


def test_agrees_with_another_optimiser_with_a_head_and_values():
    rng = np.random.default_rng(3)
    A, V = torch.tensor(rng.normal(size=(3, 3))) / 2, torch.tensor(rng.normal(size=(2, 3)))
    law = laws.GaussianMixture([0.4, 0.6], rng.normal(size=(2, 3)), np.stack([np.eye(3), 0.2 * np.eye(3)]))
    tokens = law.sample(300, 5)
    found, _ = uniform.largest_error(law, tokens, 1.5, A, V, generator=1)

    def loss(x):
        x = torch.tensor(x, requires_grad=True)
        value = -errors(law, tokens, x, A, V)
        value.backward()
        return value.item(), x.grad.numpy()

    ball = {"type": "ineq", "fun": lambda x: 1.5**2 - x @ x, "jac": lambda x: -2 * x}
    best = max(
        -minimize(loss, rng.normal(size=3) / 2, jac=True, method="SLSQP", constraints=ball).fun for _ in range(20)
    )
    assert found == pytest.approx(best, rel=1e-4)


def test_gradient_is_that_of_autograd():
    law = laws.Uniform(4)
    tokens = law.sample(50, 1)
    A, V = torch.randn(4, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    value = errors(law, tokens, 0.7 * z, A, V)
    value.sum().backward()
    found, slope = uniform._Gap(law, tokens, 0.7, A, V)(z.detach())
    assert torch.allclose(found, value.detach())
    assert torch.allclose(slope, torch.nn.functional.normalize(z.grad, dim=1), atol=1e-9)


def test_uniform_sweep_is_tidy_and_replicates_can_be_run_alone():
    law = laws.Gaussian(torch.eye(2))
    table = uniform.uniform_sweep(law, (0.5, 1.0), (50, 100, 200), 4, seed=6, starts=16)
    assert list(table.columns) == ["replicate", "n", "radius", "error", "depth"]
    assert len(table) == 4 * 3 * 2 and not table.isna().any(axis=None)
    assert (table["depth"] <= 1 + 1e-12).all() and (table["error"] > 0).all()
    wide = table.pivot(index=["replicate", "n"], columns="radius", values="error")
    assert (wide[1.0] >= wide[0.5]).all()  # the larger ball holds the smaller one
    alone = uniform.uniform_sweep(law, (0.5, 1.0), (50, 100, 200), [2], seed=6, starts=16)
    pd.testing.assert_frame_equal(alone, table[table["replicate"] == 2].reset_index(drop=True))
    slope = fits.fit_slope(table[table["radius"] == 0.5], "error")
    assert slope.low <= slope.exponent <= slope.high


@pytest.mark.parametrize(
    "kind, dim, radius", [("gaussian", 1, 0.5), ("gaussian", 2, 1.0), ("uniform", 2, 1.0), ("rademacher", 3, 2.0)]
)
def test_the_proven_constant_bounds_what_is_measured(kind, dim, radius):
    law = LAWS[kind](dim)
    table = uniform.uniform_sweep(law, [radius], [1, 10, 100], 20, seed=8, starts=16)
    worst = (table["error"] * table["n"] ** 0.5).groupby(table["n"]).mean().max()
    eye = torch.eye(dim)
    bound = {"cov": eye} if kind == "gaussian" else {"support": dim**0.5, "spread": law.cov.trace().item() ** 0.5}
    assert worst < rates.uniform_constant(radius, eye, **bound)


def test_pointwise_sweep_against_the_attention_map():
    law = laws.Rademacher(2)
    queries = torch.tensor([[0.5, 0.0], [0.0, 2.0], [1.0, 1.0]])
    A, V = [[1.0, 0.5], [0.0, 1.0]], [[1.0, 2.0]]
    table = sweeps.pointwise_sweep(law, queries, [10, 40], [3, 5], 9, A, V)
    assert list(table.columns) == ["replicate", "n", "query", "error", "e0"] and len(table) == 2 * 2 * 3
    tokens = law.sample(40, runtime.stream(9, 5))
    gap = attention_map(tokens[:10], queries[1], A, V) - attention_map(law, queries[1], A, V)
    row = table.query("replicate == 5 and n == 10 and query == 1")
    assert row["e0"].item() == pytest.approx(gap.item()) and row["error"].item() == pytest.approx(abs(gap.item()))


def test_pointwise_sweep_spreads_as_the_limit_law_says():
    law = laws.Uniform(1)
    table = sweeps.pointwise_sweep(law, [[1.0]], [400], 2000, seed=10)
    spread = 400 * table["e0"].var()
    assert spread == pytest.approx(rates.clt_covariance(law, 1.0).item(), rel=0.12)


def test_threads_are_left_as_they_were():
    threads = torch.get_num_threads()
    sweeps.pointwise_sweep(laws.Uniform(1), [[1.0]], [5], 1, seed=0)
    with pytest.raises(ValueError):
        uniform.largest_error(laws.Uniform(1), [[0.1]], -1.0)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda law: uniform.uniform_sweep(law, [0.0], [10], 1, 0), "radii"),
        (lambda law: uniform.uniform_sweep(law, [1.0], [10, 5], 1, 0), "lengths"),
        (lambda law: uniform.uniform_sweep(law, [1.0], [10], 0, 0), "replicates"),
        (lambda law: uniform.uniform_sweep(law, [1.0], [10], 1, 0, A=[[1.0]]), "A"),
        (lambda law: sweeps.pointwise_sweep(law, [[1.0]], [10], 1, 0), "queries"),
        (lambda law: sweeps.pointwise_sweep(law, [[1.0, 0.0]], [0], 1, 0), "lengths"),
        (lambda law: sweeps.pointwise_sweep(law, [[1.0, 0.0]], [5], 1, 0, V=[[1.0]]), "V"),
        (lambda law: uniform.largest_error(law, [[1.0, 0.0]], 1.0, starts=3), "starts"),
        (lambda law: uniform.largest_error(law, [[1.0]], 1.0), "tokens"),
        (lambda law: uniform.largest_error(law, [[1.0, math.inf]], 1.0), "tokens"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        call(laws.Uniform(2))
