"""A tiny run of each part gives the schema. What the times are is for the record to say, not for a test."""

import subprocess
import sys

import pandas as pd
import pytest
import torch

from tokcx_lib import cli, records
from tokcx_lib.bench import suite
from tokcx_lib.sampling import forms
from tokcx_lib.sampling.streaming import self_attention_moments
from tokcx_lib.theory.attention import attention_map

COLUMNS = ["part", "variant", "setting", "size", "quantity", "value", "low", "high", "unit"]
UNITS = {"s", "ratio", "GFLOP/s", "MB", "tokens"}


@pytest.mark.slow
def test_every_part_runs_and_makes_a_record(tmp_path, capsys):
    assert cli.main(["bench", "--profile", "quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    table, meta = records.load("benchmarks", tmp_path)
    assert list(table.columns) == COLUMNS and set(table["part"]) == set(suite.PARTS) and set(table["unit"]) <= UNITS
    assert (table["value"] > 0).where(table["unit"] != "tokens", True).all()
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    assert not table.duplicated(["part", "variant", "setting", "size", "quantity"]).any()
    assert meta["profile"] == "quick" and meta["rounds"] == 2 and meta["processor"] and "benchmarks.csv" in printed
    ranks = table[(table["part"] == "ranks") & (table["quantity"] == "relative difference")]
    assert ranks["value"].item() < 1e-5
    rounding = table[table["part"] == "precision"].set_index(["variant", "size", "quantity"])["value"]
    for quantity in ("change of mean_error", "change of cov_error"):
        assert rounding["float32", 100, quantity] < 1e-4 < rounding["bfloat16", 100, quantity]


def test_peak_memory_is_that_of_the_process_not_of_its_parent():
    ballast = torch.ones(150_000_000)  # 600 MB
    code = "from tokcx_lib.bench.suite import peak_memory; print(peak_memory())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    # Both have imported the same (with the CUDA build of PyTorch that alone is 700 MB); only this one has the ballast.
    assert 50e6 < child < suite.peak_memory() - ballast.nbytes / 2


def test_a_part_measured_again_replaces_its_rows_only(tmp_path):
    suite.run(only=["rate", "moments"], path=tmp_path)
    before = records.load("benchmarks", tmp_path)
    suite.run(only=["moments"], path=tmp_path)
    after = records.load("benchmarks", tmp_path)
    kept = [record.table[record.table["part"] == "rate"].reset_index(drop=True) for record in (before, after)]
    pd.testing.assert_frame_equal(*kept)
    assert list(after.table["part"].unique()) == ["moments", "rate"] and list(after.meta["renewed"]) == ["moments"]
    records.save("benchmarks", after.table, {**after.meta, "threads": 99}, tmp_path)
    with pytest.raises(ValueError, match="only: the record there is of another threads"):
        suite.run(only=["moments"], path=tmp_path)


@pytest.mark.parametrize("name", ["moments", "attention", "rate", "precision"])
def test_parts_that_need_no_other_process(name, tmp_path):
    table = records.load("benchmarks", suite.run(only=[name], path=tmp_path).parent).table
    assert set(table["part"]) == {name} and (table["value"] > 0).all()


def test_a_precision_is_safe_as_long_as_it_changes_the_errors_little(monkeypatch):
    sizes = {**suite.QUICK, "precision": {**suite.QUICK["precision"], "lengths": [20, 50, 200]}}
    rows, _ = suite.precision(sizes, torch.device("cpu"))
    table = pd.DataFrame(rows).set_index(["variant", "quantity", "size"])["value"]
    worst = [max(table["bfloat16", f"change of {e}_error", n] for e in ("mean", "cov")) for n in (20, 50, 200)]
    assert table["float32", "safe up to", 200] == 200
    for bound, safe in ((worst[0] / 2, 0), (max(worst[:2]), 50 if worst[2] > max(worst[:2]) else 200)):
        monkeypatch.setattr(suite, "SAFE", bound)
        rows, _ = suite.precision(sizes, torch.device("cpu"))
        table = pd.DataFrame(rows)
        found = table[(table["variant"] == "bfloat16") & (table["quantity"] == "safe up to")]
        assert found["value"].tolist() == [safe]


def test_the_variants_compute_the_same():
    x = suite._tokens(60, 5, torch.device("cpu"), torch.float64)
    A, V = forms.random_head(5, 1)
    ours = self_attention_moments(x, 3 * A, V, [10, 60])
    for attend in (suite._plain_attention, suite._fused_attention):
        each = suite._each_length(attend, x, 3 * A, V, [10, 60])
        assert torch.allclose(ours.mean, each.mean, atol=1e-14) and torch.allclose(ours.cov, each.cov, atol=1e-14)
        assert torch.allclose(attend(x[:7] @ A.mT, x, x), attention_map(x, x[:7], A), atol=1e-14)
    keops, note = suite._keops_attention()
    assert keops is not None or "requirements/bench.txt" in note


def test_times_are_those_of_the_rounds_after_the_first():
    calls = []
    seconds = suite._race({"a": lambda: calls.append("a"), "ours": lambda: calls.append("b")}, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * 4 and [len(values) for values in seconds.values()] == [3, 3]
    (row,) = suite._ratios({"ours": [1.0, 2.0, 4.0], "slow": [3.0, 4.0, 40.0]}, 7)
    assert (row["variant"], row["size"], row["value"], row["low"], row["high"]) == ("slow", 7, 3.0, 2.0, 10.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"only": ["moments", "speed"]}, "only: expected some of moments, .*got 'speed'"),
        ({"profile": "huge"}, "profile: expected one of full, quick, got 'huge'"),
        ({"device": "abacus"}, "device: 'abacus' is not available"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        suite.run(**arguments)
