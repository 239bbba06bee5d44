"""Chapter 5: the sweep against a plain implementation, first-order constants, whitening, the experiments."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcx_lib import runtime
from tokcx_lib.bench import peer
from tokcx_lib.sampling import fits, forms, sweeps
from tokcx_lib.studies.gaussian import reach_cases, value_matrices
from tokcx_lib.studies.registry import EXPERIMENTS
from tokcx_lib.theory import geometry, laws, rates

NAMES = ["gaussian_spectra", "gaussian_dimensions", "gaussian_reach", "gaussian_values"]


def plain_errors(tokens, A, V, variance):
    """Errors by the definition, in numpy: the whole matrix of weights, the limit written out."""
    logits = tokens @ A.T @ tokens.T
    weights = np.exp(logits - logits.max(1, keepdims=True))
    output = weights @ tokens @ V.T / weights.sum(1, keepdims=True)
    C = variance**3 * V @ A @ A.T @ V.T
    centred = output - output.mean(0)
    return np.linalg.norm(output.mean(0)), np.linalg.norm(centred.T @ centred / len(tokens) - C)


def test_the_sweep_agrees_with_a_plain_implementation():
    d, variance, seed, lengths, scales = 50, 0.1, 5_050, [200, 500, 1000], [1.0, 14.0, 50.0]
    law = laws.Gaussian(variance * torch.eye(d, dtype=torch.float64))
    A, V = forms.random_head(d, seed)
    found = sweeps.MomentSweep(law, A, lengths, V, scales, dtype=torch.float32).table(6, seed)
    rows = []
    for scale in scales:
        for r in range(6):
            tokens = law.sample(lengths[-1], runtime.stream(seed, r)).numpy()
            for n in lengths:
                rows.append((scale, r, n, *plain_errors(tokens[:n], scale * A.numpy(), V.numpy(), variance)))
    plain = pd.DataFrame(rows, columns=found.columns)
    assert np.allclose(found.mean_error, plain.mean_error, rtol=1e-4)
    size = np.linalg.norm(variance**3 * V @ A @ A.T @ V.T) * found.scale**2  # of C: what float32 rounds
    assert (abs(found.cov_error - plain.cov_error) < 1e-4 * plain.cov_error + 1e-6 * size).all()
    for scale in scales:
        for error in ("mean_error", "cov_error"):
            a, b = (fits.fit_slope(t[t.scale == scale], error) for t in (found, plain))
            assert b.low - 1e-3 < a.exponent < b.high + 1e-3 and abs(a.exponent - b.exponent) < 1e-3


def test_the_plain_algorithm_of_the_comparison_is_the_definition():
    A, V = forms.random_head(7, 3)
    tokens = laws.Gaussian(torch.eye(7)).sample(300, 4).float()
    mean, cov = peer.plain_moments(tokens, A, V)
    C = V @ A @ A.mT @ V.mT
    expected = plain_errors(tokens.double().numpy(), A.numpy(), V.numpy(), 1.0)
    assert torch.linalg.vector_norm(mean).item() == pytest.approx(expected[0], rel=1e-4)
    assert torch.linalg.matrix_norm(cov - C).item() == pytest.approx(expected[1], rel=1e-4)


def test_the_comparison_times_both_by_turns():
    table = peer.compare(5, 0.1, [1.0, 2.0], [20, 40], repeats=2, seed=1)
    assert table.method.tolist() == ["stream", "plain"] * 2 and (table.seconds > 0).all()


@settings(max_examples=25, deadline=None)
@given(h=st.floats(-0.95, 0.95), w=st.floats(0.1, 10))
def test_constants_in_one_dimension(h, w):
    found = rates.moment_constants([[h]], [[w]])
    assert found.mean == pytest.approx(w**2 * (h**2 + 2 * h + (1 - h**4) ** -1.5), rel=1e-9, abs=1e-12)
    # E phi^2 by quadrature, from the definition.
    q = h**2 / (1 + h**2)
    y = np.linspace(-60, 60, 200_001)
    weight = np.exp(-(y**2) / 2 * (1 - 2 * q)) / math.sqrt(2 * math.pi)  # of e^{Q y^2}
    turn = (2 * q * (1 - q) * y**2 - 2 * q) / math.sqrt(1 + h**2)
    own = h**2 * (y**2 - 1)
    phi_squared = (own * np.exp(-q * y**2 / 2) + turn) ** 2 * weight
    assert found.cov == pytest.approx(w**4 * phi_squared.sum() * (y[1] - y[0]), rel=1e-6, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), dim=st.integers(2, 6), horizon=st.floats(0.05, 0.95))
def test_constants_do_not_depend_on_the_basis(seed, dim, horizon):
    stream = runtime.stream(seed)
    B, W, mix = torch.randn((3, dim, dim), generator=stream, dtype=torch.float64)
    B = horizon * B / torch.linalg.matrix_norm(B, 2)
    turn = torch.linalg.qr(mix).Q
    a, b = rates.moment_constants(B, W), rates.moment_constants(turn @ B @ turn.mT, W @ turn.mT)
    assert a == pytest.approx(b, rel=1e-8)
    # A direct sum of heads that share nothing but the tokens' pull: independent when one of them is zero.
    assert rates.moment_constants(torch.zeros(dim, dim), W).mean == pytest.approx(W.square().sum().item(), rel=1e-12)


def test_constants_are_met_by_simulation():
    # Squared errors times n, over many replicates of a small head: within four standard errors and second order.
    B = torch.tensor([[0.35, 0.2], [-0.1, 0.3]], dtype=torch.float64)
    W = torch.tensor([[1.0, 0.5], [0.0, 2.0]], dtype=torch.float64)
    law = laws.Gaussian(torch.eye(2, dtype=torch.float64))
    table = sweeps.MomentSweep(law, B, [2000], W).table(300, seed=7)
    known = rates.moment_constants(B, W)
    for error, constant in (("mean_error", known.mean), ("cov_error", known.cov)):
        square = 2000 * table[error] ** 2
        assert abs(square.mean() - constant) < 4 * square.sem() + 0.02 * constant


def test_constants_reject_bad_input():
    with pytest.raises(ValueError, match="B: expected a horizon below 1"):
        rates.moment_constants(torch.eye(2))
    with pytest.raises(ValueError, match="W"):
        rates.moment_constants(0.5 * torch.eye(2), torch.eye(3))


def test_power_law_form_has_the_spectrum_asked_for():
    for decay in (0.0, 0.5, 1.0, math.inf):
        found = torch.linalg.svdvals(forms.power_law_form(6, 1, decay))
        expected = torch.arange(1, 7, dtype=torch.float64) ** -decay
        assert torch.allclose(found, expected, atol=1e-12)
    with pytest.raises(ValueError, match="decay"):
        forms.power_law_form(3, decay=-1.0)


def test_random_head_has_entries_of_the_right_size():
    A, V = forms.random_head(200, 1)
    assert V.std().item() * math.sqrt(200) == pytest.approx(1, abs=0.02)
    assert torch.linalg.matrix_norm(A).item() == pytest.approx(1, abs=0.05)  # E||W_K'W_Q||_F^2 = d
    assert torch.equal(A, forms.random_head(200, 1)[0]) and not torch.equal(A, forms.random_head(200, 2)[0])


def test_reach_and_one_sided_horizon_vary_at_equal_coupling():
    cases = reach_cases(8, 50.0, 10.0, 3)
    coupling = {name: geometry.coupling(A, cov) for name, (cov, A) in cases.items()}
    one_sided = {name: geometry.coupling(A, cov, "one") for name, (cov, A) in cases.items()}
    reaches = {name: geometry.reach(cov) for name, (cov, A) in cases.items()}
    assert list(coupling.values()) == pytest.approx([1.0] * 4)
    assert reaches == pytest.approx({"round": 1.0, "stretched": 1.0, "far": 10.0, "aligned": 1.0})
    assert one_sided["stretched"] > 2 and one_sided["far"] == pytest.approx(one_sided["stretched"])
    assert one_sided["round"] == pytest.approx(1) and one_sided["aligned"] == pytest.approx(1)


def test_value_matrices_split_the_leading_direction():
    values = value_matrices(6, 2)
    assert torch.allclose(values["along"] + values["across"], values["identity"])
    form = forms.power_law_form(6, 2)
    assert torch.linalg.matrix_norm(values["along"] @ form, 2).item() == pytest.approx(1)
    assert torch.linalg.matrix_norm(values["across"] @ form, 2).item() == pytest.approx(1 / 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_unit_can_be_run_alone(name):
    experiment = EXPERIMENTS[name]
    config = {**experiment.config("quick"), "lengths": [20, 40], "horizons": [0.5, 2.0]}
    config |= {"dim": 5} if "dim" in config else {"factors": {"1": 2, "5": 1}}
    plan = experiment.plan(config, torch.device("cpu"))
    unit = plan.units[-1]
    once, again = plan.work(*unit).table, plan.work(*unit).table
    pd.testing.assert_frame_equal(once, again)
    assert (once[list(experiment.keys)] == list(unit)).all(axis=None)
    assert (once[["mean_error", "cov_error"]] > 0).all(axis=None)


def test_values_by_linearity_are_the_sweep():
    experiment = EXPERIMENTS["gaussian_values"]
    config = {**experiment.config("quick"), "lengths": [50, 100], "horizons": [1.0], "dim": 6}
    table = experiment.plan(config, torch.device("cpu")).work(3).table
    law = laws.Gaussian(torch.eye(6, dtype=torch.float64))
    form = forms.power_law_form(6, config["seed"])
    for name, V in value_matrices(6, config["seed"]).items():
        expected = sweeps.MomentSweep(law, form, [50, 100], V, dtype=torch.float32).table([3], config["seed"])
        found = table[table["values"] == name]
        for error in ("mean_error", "cov_error"):
            assert np.allclose(found[error], expected[error], rtol=1e-3)
