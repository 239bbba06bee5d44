"""The exact bias of the moments of self-attention, budgets and their inversion, the phase diagram, `tokcx predict`."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tokcx_lib import records, runtime
from tokcx_lib.cli import main
from tokcx_lib.sampling.forms import random_head
from tokcx_lib.sampling.streaming import self_attention_moments
from tokcx_lib.studies import exact
from tokcx_lib.theory import budgets, moment_bias, rates
from tokcx_lib.theory.softmax_law import softmax_moments


def head(dim, horizon, seed=1):
    A, V = random_head(dim, seed)
    return horizon * A / torch.linalg.matrix_norm(A, 2), V


# ------------------------------------------------- the law of the load


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=60), st.floats(0.01, 3))
def test_load_law_has_the_moments_of_a_weighted_chi_squared(raw, top):
    beta = np.array([top, *raw])
    loads, weights, shares = moment_bias.load_law(beta)
    mean = (beta**2).sum()
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    assert weights @ loads**2 == pytest.approx(mean, rel=1e-9)
    assert weights @ loads**4 == pytest.approx(mean**2 + 2 * (beta**4).sum(), rel=1e-9)
    assert shares @ loads**2 == pytest.approx(beta**2, rel=1e-8, abs=1e-12)  # E (Bx)_i^2


def test_load_law_of_equal_singular_values_is_chi():
    for dim in (1, 2, 50):
        loads, weights, _ = moment_bias.load_law(np.ones(dim), 1e30)
        for power in (-0.5, 1, 7):
            assert weights @ loads**power == pytest.approx(
                stats.chi(dim).moment(power) if power > 0 else float(stats.chi(dim).expect(lambda s: s**power)),
                rel=1e-7,
            )
    loads, weights, _ = moment_bias.load_law([1.0], 1e100)  # far tails keep their relative accuracy
    assert weights @ (loads > 12.0) == pytest.approx(2 * stats.norm.sf(12.0), rel=0.5)


def test_load_law_does_not_depend_on_rounding_of_the_largest():
    A, _ = random_head(50, 5050)
    form = A / torch.linalg.matrix_norm(A, 2)
    for scale in np.linspace(0.3, 1, 8).tolist() + [0.76]:
        moment_bias.load_law(torch.linalg.svdvals(scale * form).numpy(), 250.0)


# ------------------------------------------------- the second moment


def test_one_dimension_by_direct_integration():
    for n, H in ((2, 0.5), (250, 1.5), (1e9, 2.0)):
        x = np.arange(0, 10, 0.08)
        density = 0.08 * np.sqrt(2 / np.pi) * np.exp(-(x**2) / 2)
        density[0] /= 2
        direct = density @ (softmax_moments(n, H * x).second_moment - (H * x) ** 2)
        assert moment_bias.second_moment_bias(n, [[H]]).item() == pytest.approx(direct, rel=1e-6)


def test_one_and_no_information():
    B, V = head(4, 1.3)
    # One token is reported as it is: second moment V V'.
    assert torch.allclose(moment_bias.second_moment_bias(1, B, V), V @ V.mT - V @ B @ B.mT @ V.mT, atol=1e-10)
    assert torch.allclose(moment_bias.second_moment_bias(10, 0 * B, V), V @ V.mT / 10)
    turned = torch.linalg.qr(torch.randn(4, 4, generator=runtime.stream(1), dtype=torch.float64)).Q
    bias = moment_bias.second_moment_bias(50, B)
    assert torch.allclose(
        moment_bias.second_moment_bias(50, turned @ B @ turned.mT), turned @ bias @ turned.mT, atol=1e-10
    )


@pytest.mark.parametrize("dim, n, horizon", [(1, 6, 1.2), (3, 5, 0.9), (3, 40, 1.5)])
def test_fresh_and_self_attention_against_simulation(dim, n, horizon):
    B, V = head(dim, horizon)
    lists = 20_000
    x = torch.randn(lists, n, dim, dtype=torch.float64, generator=runtime.stream(30, dim, n))
    fresh = torch.randn(lists, 1, dim, dtype=torch.float64, generator=runtime.stream(31, dim, n))
    queries = torch.randn(20_000, dim, dtype=torch.float64, generator=runtime.stream(32, dim))
    predicted = moment_bias.second_moment_bias(n, B, V)
    itself = predicted + moment_bias.own_token_bias(n, B, V, queries)
    limit = V @ B @ B.mT @ V.mT
    for query, expected in ((fresh, predicted), (x[:, :1], itself)):
        out = torch.softmax(query @ B.mT @ x.mT, -1) @ x @ V.mT
        drawn = out.mT @ out
        error = drawn.std(0) / lists**0.5
        assert ((drawn.mean(0) - limit - expected).abs() < 4.5 * error + 0.02 * (itself - predicted).abs()).all()


def test_shared_keys():
    """The covariance of the mean of self-attention, in one dimension: limit, projection, simulation."""
    n, lists = 200, 3000
    for H in (0.5, -0.4):
        limit = rates.influence_covariance([[H]]).item()
        assert limit == pytest.approx(H**2 + 2 * H + (1 - H**4) ** -1.5, rel=1e-12)
        z, x = torch.randn((2, 600, 1), dtype=torch.float64, generator=runtime.stream(33))
        projected = n * moment_bias.shared_keys_projection(n, [[H]], None, z, x).item()
        tokens = torch.randn(lists, n, 1, generator=runtime.stream(34), dtype=torch.float64).float()
        mean = torch.cat([(torch.softmax(H * part @ part.mT, -1) @ part).mean(1) for part in tokens.split(200)])
        drawn = n * mean.square()
        error = drawn.std().item() / lists**0.5
        assert abs(drawn.mean().item() - limit) < 4 * error + 0.05 * limit
        assert projected < drawn.mean().item() + 4 * error
        assert projected == pytest.approx(limit, rel=0.08)


def test_control_variates_have_mean_zero():
    """Errors with and without them agree in the mean, and are those of the library's own moments."""
    B, _ = head(3, 0.7)
    tokens = torch.randn(6000, 12, 3, generator=runtime.stream(35), dtype=torch.float64)
    found = exact.moment_errors(tokens, B)
    for one, other in ((found.plain, found.second),):
        gap = one - other
        assert (gap.mean(0).abs() < 4.5 * gap.std(0) / len(gap) ** 0.5).all()
    own = self_attention_moments(tokens[0], B, None, [12])
    second = own.cov[0] + own.mean[0, :, None] * own.mean[0]
    assert torch.allclose(found.plain[0], second - B @ B.mT, atol=1e-6)
    mean = torch.stack([self_attention_moments(part, B, None, [12]).mean[0] for part in tokens[:3000]])
    gap = found.shared[:3000] - mean[:, :, None] * mean[:, None, :]
    assert (gap.mean(0).abs() < 4.5 * gap.std(0) / 3000**0.5).all()
    assert found.second.var(0).sum() < found.plain.var(0).sum()  # and they earn their place


def test_the_record_agrees_with_the_exact_law():
    table, meta = records.load("second_moment_bias")
    config = meta["config"]
    A, V = random_head(config["dim"], config["head_seed"])
    V = V * config["variance"] ** 0.5
    for (n, horizon), rows in table.groupby(["n", "horizon"]):
        bias = moment_bias.second_moment_bias(n, horizon * A / torch.linalg.matrix_norm(A, 2), V)
        size = torch.linalg.matrix_norm(bias).item()
        assert rows["second_along"].sem() < 0.02 * size
        assert abs(rows["second_along"].mean() - size) < 4 * rows["second_along"].sem() + 0.005 * size  # own token
        assert rows["second_dot"].mean() ** 0.5 == pytest.approx(rows["second_along"].mean(), rel=0.02)


# ------------------------------------------------- budgets


def test_token_budget():
    budget = budgets.token_budget(3)
    assert budget == (math.exp(4.5), math.exp(18))
    assert budgets.token_budget(0) == (1, 1)
    assert budgets.token_budget(100).clt == math.inf


@settings(max_examples=25, deadline=None)
@given(st.floats(0.3, 9), st.floats(0.03, 0.8))
def test_sample_complexity_inverts_the_law(load, error):
    n = budgets.sample_complexity(load, error)
    assert budgets.relative_error(n, load) <= error * (1 + 1e-9)
    if n > 1:
        assert budgets.relative_error(max(1, n - max(1, 1e-6 * n)), load) > error * (1 - 1e-9)
    assert budgets.sample_complexity(load, error / 2) > n


def test_sample_complexity_far_out():
    load = 2.0
    clt = (1 + load**2) * math.exp(load**2) / (1e-4 * load) ** 2
    assert budgets.sample_complexity(load, 1e-4) == pytest.approx(clt, rel=1e-3)
    assert budgets.sample_complexity(25, 0.01) > 1e100
    assert budgets.sample_complexity(1, 2.0) == 1


def test_the_error_falls_with_n():
    n = np.geomspace(1, 1e30, 40)
    for load in (0.1, 1.0, 4.0, 12.0, 30.0):
        assert (np.diff(budgets.relative_error(n, load)) < 0).all()


def test_predict(capsys):
    assert main(["predict", "--load", "2", "--error", "0.1"]) == 0
    assert "3104" in capsys.readouterr().out
    assert main(["predict", "--load", "5", "--tokens", "1e6"]) == 0
    found = softmax_moments(1e6, 5.0)
    assert f"{float(found.mean):.4g} of 5" in capsys.readouterr().out
    assert main(["predict", "--horizon", "1.5", "--tokens", "250"]) == 0
    out = capsys.readouterr().out
    assert "n^-0.3077" in out and "1.741" in out
    for wrong in (
        [],
        ["--error", "1"],
        ["--load", "-1"],
        ["--load", "60", "--error", "1e-3"],
        ["--load", "1", "--tokens", "0"],
    ):
        assert main(["predict", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_phase_diagram():
    import pandas as pd
    from matplotlib.figure import Figure

    from tokcx_lib import plots

    figure = Figure()
    ax = figure.subplots()
    plots.phase_diagram(ax, heads=pd.DataFrame({"load": [1.0, 5.0], "tokens": [100, 100]}))
    figure.canvas.draw()
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    for line, factor in zip(dashed, (0.5, 2.0)):
        s, n = line.get_data()
        inside = n < 1e12
        assert np.log(n[inside]) == pytest.approx(factor * s[inside] ** 2)
    assert len(ax.collections[-1].get_offsets()) == 2


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: moment_bias.second_moment_bias(10, torch.zeros(2, 3)), "B"),
        (lambda: moment_bias.second_moment_bias(10, torch.eye(2), torch.eye(3)), "V"),
        (lambda: moment_bias.second_moment_bias(0.5, torch.eye(2)), "n"),
        (lambda: moment_bias.load_law([0.0, 0.0]), "beta"),
        (lambda: moment_bias.load_law([-1.0]), "beta"),
        (lambda: moment_bias.own_token_bias(10, torch.eye(2), None, torch.zeros(3)), "queries"),
        (lambda: moment_bias.own_token_bias(1, torch.eye(2), None, torch.zeros(3, 2)), "n"),
        (lambda: rates.influence_covariance(torch.eye(2)), "B"),
        (
            lambda: moment_bias.shared_keys_projection(
                9, 0.5 * torch.eye(2), None, torch.zeros(3, 2), torch.zeros(3, 2)
            ),
            "n",
        ),
        (lambda: budgets.token_budget(-1), "load"),
        (lambda: budgets.token_budget(math.nan), "load"),
        (lambda: budgets.relative_error(10, 0.0), "load"),
        (lambda: budgets.sample_complexity(0, 0.1), "load"),
        (lambda: budgets.sample_complexity(1, -0.1), "error"),
        (lambda: budgets.sample_complexity(60, 1e-3), "load"),
    ],
)
def test_bad_input_is_named(make, names):
    with pytest.raises(ValueError, match=rf"^{names}.*(expected|got)"):
        make()
