"""What chapter 13 reads off its records: within their errors of the theory, and too far from wrong constants."""

import math

import numpy as np
import pytest

from tokcx_lib import records
from tokcx_lib.studies.causal_rotary import tables
from tokcx_lib.studies.causal_rotary.experiments import EXPERIMENTS
from tokcx_lib.theory import causal, rates, serial


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_records_are_those_of_the_full_runs(name):
    record = records.load(name)
    full = EXPERIMENTS[name].config("full")
    assert {key: record.meta["config"][key] for key in full} == full
    assert record.table.notna().all().all()


def test_causal_variance_within_two_errors_and_a_lost_two_is_seen():
    found = tables.causal_variances(records.load("causal_means").table)
    rows = found[(found["n"] == 4000) & (found["mask"] == "causal")].set_index("horizon")
    assert list(rows.index) == [0.3, 0.5]
    for H, row in rows.iterrows():
        assert row["error"] <= 0.03 * row["limit"]
        assert abs(row["measured"] - row["limit"]) < 2 * row["error"]
        # Planted: the pull once, three times, or the cross term doubled with it.
        pull = serial.pull_covariance(H, 1.0).item()
        for wrong in (row["limit"] - pull, row["limit"] + pull, row["limit"] + 2 * H):
            assert abs(row["measured"] - wrong) > 5 * row["error"]
        assert rates.influence_covariance([[H]]).item() == pytest.approx(row["limit"] - pull)
    # The control variate agrees with the plain mean and is far more precise.
    gap = (found["measured"] - found["controlled"]).abs() / np.hypot(found["error"], found["controlled_error"])
    assert (gap < 3.5).all() and (found["controlled_error"] < 0.25 * found["error"]).all()


def test_control_variate_is_what_it_says():
    table = records.load("causal_means").table
    n = table["n"].max()
    part = table[(table["n"] == n) & (table["horizon"] == 0.5)]
    exact = tables._first_order_variance(0.5, n, True)
    found, error = tables._mean(n * part["causal_linear"] ** 2)
    assert abs(found - exact) < 3.5 * error
    weights = causal.reading_weights(n)
    pull = serial.pull_covariance(0.5, 1.0).item()
    assert exact == pytest.approx(0.25 + weights.mean().item() + weights.square().mean().item() * pull)


def test_stable_factor_of_the_first_order_and_a_lost_root_is_seen():
    found = tables.scale_ratios(records.load("causal_stable").table, records.load("causal_first_order").table)
    for H, part in found.groupby("horizon"):
        alpha, best = 1 + 1 / H**2, part.loc[part["n"].idxmax()]
        assert best["n"] == 10**12 and best["limit"] == pytest.approx(math.gamma(1 + alpha) ** (1 / alpha))
        assert best["first_order"] == pytest.approx(best["limit"], rel=0.05)
        if H < 1.3:
            assert abs(best["first_order"] / math.gamma(1 + alpha) - 1) > 0.1
        assert abs(best["first_order"] - 1) > 5 * best["first_order_error"]  # no factor at all
    # The approach is that of the largest term; attention is wider under the mask, and not yet by the whole factor.
    assert ((found["first_order"] / found["level"] - 1).abs() < 3.5 * found["first_order_error"] + 0.02).all()
    live = found.dropna()
    assert ((live["attention"] - 1) > 3 * live["error"]).all()


def test_rotary_outputs_follow_the_exact_law():
    record = records.load("rotary_means")
    angles = record.meta["config"]["angles"]
    found = tables.rotary_lengths(record.table, angles)
    gap = (found["measured"] - found["exact"]) / found["error"]
    assert (gap.abs() < 3).all() and (gap.abs() < 2).mean() >= 0.8
    # Planted: no participation, and twice as much.
    few = found[found["n"] == 10]
    for wrong in (few["many"], 2 * few["exact"] - few["many"]):
        assert ((few["measured"] - wrong).abs() > 5 * few["error"]).all()
    # Across the distance average nothing is left.
    for (_, _), part in record.table.groupby(["load", "n"]):
        across = part[[f"across_{m}" for m in range(len(angles))]]
        assert (across.mean().abs() < 4 * across.sem()).all()


def test_planes_die_out_by_dirichlets_factor():
    record = records.load("rotary_means")
    angles = record.meta["config"]["angles"]
    found = tables.plane_lengths(record.table, angles)
    slow = found[(found["plane"] == 3) & (found["n"] == 10_000)]
    x = 10_000 * angles[3] / 2
    right, wrong = abs(math.sin(x)) / x, abs(math.sin(2 * x)) / (2 * x)
    assert ((slow["measured"].abs() - right).abs() < 3.5 * slow["error"] + 0.002).all()
    assert ((slow["measured"].abs() - wrong).abs() > 5 * slow["error"]).all()


def test_serial_variances():
    record = records.load("serial_means")
    H = record.meta["config"]["horizon"]
    found = tables.serial_variances(record.table, H)
    gap = (found["measured"] - found["limit"]) / found["error"]
    assert (gap.abs() < 3).all() and (gap.abs() < 2).mean() >= 0.6
    # Planted: neighbours on one side only, and none at all.
    for _, row in found.iterrows():
        once = serial.long_run_variance(H, 0.0, row["mask"] == "causal")
        for wrong in (once, (once + row["limit"]) / 2):
            assert abs(row["measured"] - wrong) > 4 * row["error"]
