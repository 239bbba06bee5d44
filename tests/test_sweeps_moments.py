"""Sweeps of the moments against a plain softmax, and slopes against curves whose exponent is known."""

import numpy as np
import pandas as pd
import pytest
import torch

from tokcx_lib import runtime
from tokcx_lib.sampling import fits, forms, scalar, sweeps
from tokcx_lib.theory import geometry, laws, limits

LENGTHS = [1, 2, 7, 40, 60]


def eye(dim):
    return torch.eye(dim, dtype=torch.float64)


def softmax_errors(tokens, A, V, m, C):
    """The two errors of self-attention over all tokens, with the whole matrix of weights, in numpy."""
    x = tokens.numpy()
    logits = x @ np.asarray(A).T @ x.T
    weights = np.exp(logits - logits.max(1, keepdims=True))
    outputs = weights / weights.sum(1, keepdims=True) @ x @ np.asarray(V).T
    cov = np.cov(outputs.T, bias=True).reshape(outputs.shape[1], -1)
    return np.linalg.norm(outputs.mean(0) - m), np.linalg.norm(cov - C)


def random_case(dim, seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(dim, dim))
    law = laws.Gaussian(root @ root.T / dim, rng.normal(size=dim))
    return law, rng.normal(size=(dim, dim)), rng.normal(size=(2, dim))


@pytest.mark.parametrize("dim", [1, 3])
def test_the_sweep_is_plain_softmax(dim):
    law, A, V = random_case(dim, seed=dim)
    m, C = (part.numpy() for part in limits.gaussian_limit(law, A, V))
    table = sweeps.MomentSweep(law, A, LENGTHS, V, tabulate=False).table(3, seed=5)
    assert list(table.columns) == ["scale", "replicate", "n", "mean_error", "cov_error"]
    assert len(table) == 3 * len(LENGTHS)
    for row in table.itertuples():
        tokens = law.sample(LENGTHS[-1], runtime.stream(5, row.replicate))[: row.n]
        expected = softmax_errors(tokens, A, V, m, C)
        assert (row.mean_error, row.cov_error) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dim", [1, 3])
def test_heads_together_are_each_of_them_alone(dim):
    law, A, V = random_case(dim, seed=10 + dim)
    scales = [0.01, 1.0, 6.0]
    lengths = [100, 400, 1500]
    together = sweeps.MomentSweep(law, A, lengths, V, scales).table([0, 3], seed=1)
    for scale, rows in together.groupby("scale"):
        head = sweeps.MomentSweep(law, scale * torch.as_tensor(A), lengths, V, tabulate=False)
        alone = head.table([0, 3], seed=1).assign(scale=scale)
        pd.testing.assert_frame_equal(rows.reset_index(drop=True), alone, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["heavy", "gap", "equal", "zero", "few"])
def test_table_of_a_scalar_map_serves_awkward_tokens(kind):
    tokens = {
        "heavy": torch.randn(800, 1, generator=runtime.stream(1), dtype=torch.float64) ** 5,
        "gap": torch.tensor([[-8.0]] * 700 + [[9.0]], dtype=torch.float64),
        "equal": torch.full((700, 1), 3.0, dtype=torch.float64),
        "zero": torch.zeros(700, 1, dtype=torch.float64),
        "few": torch.tensor([[-8.0], [9.0]], dtype=torch.float64),
    }[kind]
    slopes = [-0.7, 0.0, 1.3]
    lengths = sorted({1, 2, len(tokens)})
    width = (tokens.max() - tokens.min()).item()
    found = scalar.scalar_moments(tokens, slopes, [[-2.0]], lengths)
    for slope, moments in zip(slopes, found):
        for i, n in enumerate(lengths):
            x = tokens[:n]
            outputs = -2 * torch.softmax(slope * x * x.T, -1) @ x
            assert moments.mean[i].item() == pytest.approx(outputs.mean().item(), abs=2e-6 * width + 1e-12)
            expected = outputs.var(correction=0).item()
            assert moments.cov[i].item() == pytest.approx(expected, abs=4e-6 * width**2 + 1e-12)


def test_a_subset_of_replicates_gives_the_same_rows():
    law = laws.Gaussian(1.0)
    heads = sweeps.MomentSweep(law, [[1.0]], [50, 300], scales=[0.5, 2.0])
    whole, part = heads.table(4, seed=3), heads.table([2], seed=3)
    expected = whole[whole.replicate == 2].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, expected, check_exact=False, rtol=1e-12)
    assert whole[whole.scale == 0.5].mean_error.nunique() == 8


def test_the_limit_of_gaussian_tokens_is_that_of_many_draws():
    law, A, V = random_case(3, seed=20)
    m, C = limits.gaussian_limit(law, A, V)
    image = law.tilted_mean(law.sample(400_000, runtime.stream(2)) @ torch.as_tensor(A).T) @ torch.as_tensor(V).T
    assert torch.allclose(image.mean(0), m, atol=5 * (C.trace().item() / 4e5) ** 0.5)
    assert torch.allclose(torch.cov(image.T), C, atol=0.02 * torch.linalg.matrix_norm(C).item())


def test_a_law_that_is_not_gaussian_takes_its_limit_from_the_caller():
    law = laws.Rademacher(1)
    limit = (torch.zeros(1), torch.tensor([[np.tanh(0.5) ** 2]]))
    table = sweeps.MomentSweep(law, [[0.5]], [100, 3000], limit=limit, tabulate=False).table(30)
    assert table[table.n == 3000].cov_error.mean() < 0.4 * table[table.n == 100].cov_error.mean()
    found = lambda A: (torch.zeros(1), torch.tanh(A) ** 2)  # noqa: E731
    scaled = sweeps.MomentSweep(law, [[1.0]], [100, 3000], scales=[0.5], limit=found).table(30)
    assert np.allclose(scaled.cov_error, table.cov_error, atol=1e-6)
    with pytest.raises(ValueError, match="limit.*Rademacher"):
        sweeps.MomentSweep(law, [[0.5]], [10])
    with pytest.raises(ValueError, match="limit: expected a function .* several scales"):
        sweeps.MomentSweep(law, [[0.5]], [10], scales=[1.0, 2.0], limit=limit)


def test_packed_matrices_keep_their_inner_products():
    a, b = (m + m.mT for m in torch.randn(2, 3, 4, 4, generator=runtime.stream(6), dtype=torch.float64))
    found = (sweeps.packed(a) * sweeps.packed(b)).sum(-1)
    assert sweeps.packed(a).shape == (3, 10) and torch.allclose(found, (a * b).sum((-2, -1)), rtol=1e-6)


def test_precision_is_a_choice():
    law = laws.Gaussian(eye(4))
    double = sweeps.MomentSweep(law, eye(4), [30, 200]).table(2)
    single = sweeps.MomentSweep(law, eye(4), [30, 200], dtype=torch.float32).table(2)
    assert not double.equals(single)
    assert np.allclose(double.mean_error, single.mean_error, atol=1e-5)


def test_small_horizons_have_slope_one_half():
    table = sweeps.MomentSweep(laws.Gaussian(1.0), [[0.1]], [100, 500, 2500]).table(150, seed=9)
    for error in ("mean_error", "cov_error"):
        slope = fits.fit_slope(table, error, level=0.999)  # one draw: nineteen in twenty would not do
        assert slope.low < 0.5 < slope.high and slope.stderr < 0.03


def test_power_law_form():
    A = forms.power_law_form(5, seed=2)
    assert torch.allclose(torch.linalg.svdvals(A), 1 / torch.arange(1.0, 6.0, dtype=torch.float64))
    assert geometry.horizon(A, eye(5)) == pytest.approx(1)
    assert torch.equal(A, forms.power_law_form(5, seed=2)) and not torch.equal(A, forms.power_law_form(5))


def curve(exponents, spread, replicates=30):
    """Errors whose logarithm falls by the given exponents between n = 10, 100, 1000 ..., times replicate noise."""
    rng = np.random.default_rng(0)
    means = 10.0 ** -np.concatenate([[0.0], np.cumsum(exponents)])
    n = 10 ** np.arange(1, len(means) + 1)
    return pd.DataFrame(
        [
            {"replicate": r, "n": size, "error": mean * noise}
            for r in range(replicates)
            for noise in [rng.lognormal(0, spread)]
            for size, mean in zip(n, means)
        ]
    )


def test_local_slopes_find_each_regime():
    slopes = fits.local_slopes(curve([0.5, 0.2, 0.1], 0.3), "error")
    # Noise that a replicate shares over all n cancels from every slope, and the bootstrap knows it.
    assert np.allclose(slopes[["exponent", "low", "high"]].T, [0.5, 0.2, 0.1])
    assert slopes["n_low"].tolist() == [10, 100, 1000] and slopes["n_high"].tolist() == [100, 1000, 10_000]
    assert np.allclose(slopes["n"], np.sqrt([1e3, 1e5, 1e7]))


def test_local_slopes_cover_the_truth():
    rng = np.random.default_rng(1)
    hits = []
    for trial in range(60):
        table = curve([0.3, 0.3], 0.0, replicates=40)
        table["error"] *= rng.exponential(size=len(table))
        slopes = fits.local_slopes(table, "error", level=0.9, resamples=200, seed=trial)
        hits += ((slopes["low"] < 0.3) & (slopes["high"] > 0.3)).tolist()
    assert 0.8 < np.mean(hits) < 0.97


def test_two_lengths_give_the_same_slope_both_ways():
    table = curve([0.4], 0.0)
    table["error"] *= np.random.default_rng(3).exponential(size=len(table))
    (local,) = fits.local_slopes(table, "error").itertuples()
    assert (local.exponent, local.low, local.high) == pytest.approx(fits.fit_slope(table, "error")[:3])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"A": eye(2)}, "A"),
        ({"A": [[float("nan")]]}, "A"),
        ({"V": eye(3)}, "V"),
        ({"scales": []}, "scales"),
        ({"scales": [1.0, 1.0]}, "scales"),
        ({"scales": [-1.0]}, "scales"),
        ({"lengths": [5, 5]}, "lengths"),
        ({"lengths": [0, 5]}, "lengths"),
        ({"replicates": 0}, "replicates"),
        ({"replicates": [-1]}, "replicates"),
        ({"replicates": [1, 1]}, "replicates"),
        ({"replicates": []}, "replicates"),
        ({"limit": lambda A: (torch.zeros(2), eye(1))}, "limit"),
        ({"law": laws.Uniform(1)}, "limit"),
        ({"device": "cuda:99"}, "device"),
    ],
)
def test_bad_input_is_named(change, named):
    good = {"law": laws.Gaussian(1.0), "A": [[1.0]], "V": None, "scales": [1.0], "lengths": [5, 10], "replicates": 1}
    with pytest.raises(ValueError, match=f"^{named}"):
        given = {**good, **change}
        replicates = given.pop("replicates")
        sweeps.MomentSweep(**given).table(replicates)


def test_slopes_refuse_what_they_cannot_fit():
    table = curve([0.4, 0.4], 0.1)
    for bad in (table[table.replicate == 0], table[table.n == 10], table.drop(index=4)):
        with pytest.raises(ValueError, match="^table"):
            fits.local_slopes(bad, "error")
