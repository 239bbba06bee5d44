"""Records of chapter 6 against a plain implementation: numpy, the whole matrix of logits, its own draws."""

import numpy as np
import pytest
from scipy.special import ive

from tokcx_lib import records
from tokcx_lib.sampling import fits
from tokcx_lib.sampling.forms import power_law_form, random_head

REPLICATES = 16


def attention(logits, values):
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights @ values / weights.sum(1, keepdims=True)


def unit(z):
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def errors(draw, A, V, limit, lengths, rng):
    """Errors (replicates, lengths, 2) of mean and covariance; every n is computed from nothing."""
    found = np.empty((REPLICATES, len(lengths), 2))
    for replicate in found:
        tokens = draw(rng, lengths[-1])
        for row, n in zip(replicate, lengths):
            x = tokens[:n]
            output = attention(x @ A.T @ x.T, x @ V.T)
            row[:] = np.linalg.norm(output.mean(0)), np.linalg.norm(np.cov(output.T, bias=True) - limit)
    return found


def slope(lengths, sample):
    """Exponent and its standard error, by resampling replicates."""
    rng = np.random.default_rng(0)
    draws = [np.arange(len(sample)), *rng.integers(len(sample), size=(400, len(sample)))]
    fitted = [-np.polyfit(np.log(lengths), np.log(sample[d].mean(0)), 1)[0] for d in draws]
    return fitted[0], np.std(fitted[1:])


def agree(rows, lengths, sample, column):
    """Mean errors, length by length, and slopes: plain against record."""
    rows = rows[rows.n.isin(lengths)]
    stored = rows.groupby("n")[column]
    noise = np.hypot(stored.std() / stored.count() ** 0.5, sample.std(0, ddof=1) / len(sample) ** 0.5)
    assert (np.abs(stored.mean() - sample.mean(0)) < 4.5 * noise).all()
    fit = fits.fit_slope(rows, column)
    plain, error = slope(lengths, sample)
    assert abs(fit.exponent - plain) < 4 * np.hypot(error, fit.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 3, 8])
def test_the_sphere(which):
    table, meta = records.load("sphere_horizon")
    scale = meta["config"]["scales"][which]
    lengths = [n for n in meta["config"]["lengths"] if n <= 2500]
    A, V = (matrix.numpy() for matrix in random_head(50, meta["config"]["seed"]))
    A = scale * A
    rng = np.random.default_rng(which)
    tilts = unit(rng.normal(size=(200_000, 50))) @ A.T
    r = np.linalg.norm(tilts, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        output = ive(25, r) / ive(24, r) / r * tilts @ V.T
    limit = output.T @ output / len(output)
    sample = errors(lambda rng, n: unit(rng.normal(size=(n, 50))), A, V, limit, lengths, rng)
    rows = table[table.scale == scale]
    for column, found in zip(("mean_error", "cov_error"), np.moveaxis(sample, 2, 0)):
        agree(rows, lengths, found, column)


@pytest.mark.parametrize("horizon", [1.0, 4.0])
def test_signs_and_cube(horizon):
    table, meta = records.load("bounded_laws")
    lengths = [n for n in meta["config"]["lengths"] if n <= 1400]
    A = horizon * power_law_form(8).numpy()
    rng = np.random.default_rng(int(horizon))
    side = np.sqrt(3)
    draws = {
        "signs": (lambda rng, n: rng.choice([-1.0, 1.0], size=(n, 8)), np.tanh),
        "cube": (lambda rng, n: rng.uniform(-side, side, size=(n, 8)), lambda t: side / np.tanh(side * t) - 1 / t),
    }
    for law, (draw, image) in draws.items():
        output = image(draw(rng, 300_000) @ A.T)
        limit = output.T @ output / len(output)
        sample = errors(draw, A, np.eye(8), limit, lengths, rng)
        rows = table[(table.law == law) & (table.horizon == horizon)]
        for column, found in zip(("mean_error", "cov_error"), np.moveaxis(sample, 2, 0)):
            agree(rows, lengths, found, column)


@pytest.mark.parametrize("name", ["sphere_horizon", "bounded_laws"])
def test_slopes_are_known_to_two_hundredths(name):
    table, meta = records.load(name)
    by = ["scale"] if name == "sphere_horizon" else ["law", "horizon"]
    for _, rows in table.groupby(by):
        for column in ("mean_error", "cov_error"):
            assert fits.fit_slope(rows, column).stderr <= 0.02
    described = meta.get("heads") or meta["limits"]
    assert all(part["limit_error"] <= 1e-4 for part in described)
