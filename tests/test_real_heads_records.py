"""The records of the study of real heads hold what chapter 7 says of them, and its experiments run, unit by unit."""

import re

import numpy as np
import pandas as pd
import pytest
import torch

from tokcx_lib import records
from tokcx_lib.models import corpora, windows
from tokcx_lib.models.tokens import tokenize
from tokcx_lib.models.windows import WINDOW, random_windows, wikipedia_windows
from tokcx_lib.studies.real_heads import experiments
from tokcx_lib.studies.registry import EXPERIMENTS

HEADS = [(layer, head) for layer in range(6) for head in range(12)]
TEXTS = ("english", "german", "python", "book")


def heads_of(table):
    return sorted(set(zip(table["layer"], table["head"])))


def test_the_study_holds_every_head_length_and_replicate():
    table, meta = records.load("real_heads_moments")
    counts = table.groupby(["layer", "head"])[["n", "replicate"]].nunique()
    assert heads_of(table) == HEADS and (counts["n"] >= 8).all() and (counts["replicate"] >= 20).all()
    assert len(table) == (counts["n"] * counts["replicate"]).sum() and table["n"].max() >= 30_000
    assert (table[["mean_error", "cov_error", "map_error"]] > 0).all(axis=None)
    assert meta["config"]["pool"] >= 200_000 and len(meta["heads"]) == 72
    for kept in meta["heads"].values():
        assert 0 < kept["mean_floor"] and 0 < kept["cov_floor"] and len(kept["twin_map_error"]) == table["n"].nunique()


def test_the_maps_are_those_of_4096_queries_over_a_million_tokens():
    table, meta = records.load("real_heads_maps")
    assert heads_of(table) == HEADS and table["replicate"].nunique() >= 20 and table["n"].nunique() >= 8
    assert meta["config"]["queries"] == 4096 and meta["stream"] >= 1_000_000


def test_tails_of_six_layers_and_all_heads():
    for name in ("real_tokens_geometry", "real_tokens_tails", "real_tokens_qq"):
        assert sorted(records.load(name).table["layer"].unique()) == list(range(6))
    assert heads_of(records.load("real_heads_tails").table) == HEADS


def test_four_texts_by_all_heads():
    found = [records.load(f"real_heads_{name}") for name in TEXTS]
    assert all(heads_of(record.table) == HEADS and len(record.table) == 72 for record in found)
    assert len({tuple(record.meta["texts"].values()) for record in found}) == 4


def test_horizons_hold_on_other_samples_of_two_million_tokens():
    study = records.load("real_heads_english").table.set_index(["layer", "head"])["horizon"]
    table, meta = records.load("real_heads_fresh")
    assert meta["config"]["tokens"] * meta["config"]["parts"] >= 2_000_000
    for _, part in table.groupby("part"):
        change = part.set_index(["layer", "head"])["horizon"] / study - 1
        assert (change.abs() < 0.1).sum() >= 65


def test_variants_and_sinks_of_all_heads():
    table, meta = records.load("real_heads_variants")
    assert heads_of(table) == HEADS and set(table["variant"]) == set(meta["variants"])
    assert (table.groupby(["layer", "head", "variant"]).size() == 20 * table["n"].nunique()).all()
    sinks = records.load("real_heads_sinks").table
    masses = sinks.filter(like="window_")
    assert heads_of(sinks) == HEADS and ((masses >= 0) & (masses <= 1)).all(axis=None)


# ------------------------------------------------------------ the experiments


@pytest.fixture
def small_text(minilm, monkeypatch):
    """The fixed text of the book in place of Wikipedia, which not every machine has."""
    ids = torch.as_tensor(tokenize(minilm, corpora.open_corpus("scipy-docs").text)[:40_000].astype(np.int32))
    monkeypatch.setattr(windows, "all_ids", lambda model, name: (ids, {"text": "sha"}))
    for name, value in {"QUERIES": 20, "STREAM": 40}.items():
        monkeypatch.setattr(experiments, name, value)
    return ids


SMALL = {
    "real_heads_moments": {"pool": 1000, "queries": 20, "lengths": [50, 100], "replicates": 2},
    "real_heads_variants": {"windows": 4, "alphas": [0.1, 1.0], "lengths": [254, 508], "replicates": 2},
    "real_heads_maps": {"queries": 20, "query_windows": 2, "lengths": [100, 254], "segments": 3},
    "real_heads_sinks": {"windows": 4, "queries": 10},
    "real_heads_english": {"tokens": 1000, "queries": 20},
}


@pytest.mark.parametrize("name", SMALL)
def test_a_unit_can_be_run_alone(name, small_text):
    experiment = EXPERIMENTS[name]
    plan = experiment.plan({**experiment.config("quick"), **SMALL[name]}, torch.device("cpu"))
    unit = plan.units[min(2, len(plan.units) - 1)]
    once, again = (plan.work(*unit) for _ in range(2))
    pd.testing.assert_frame_equal(once.table, again.table)
    assert (once.table[list(experiment.keys)] == list(unit)).all(axis=None)
    assert plan.meta["texts"] == {"text": "sha"}
    stored = records.load(name).table  # else `tokcx verify` refuses it; columns with a number follow the configuration
    assert not [column for column in once.table if column not in stored and not re.search(r"_\d+$", column)]
    if plan.summary:
        described = plan.summary([once.arrays] * len(plan.units))
        assert len(next(iter(described.values()))) == len(plan.units)


def test_stretches_of_a_text_share_no_window(minilm, small_text):
    one, _ = random_windows(minilm, "text", 10 * WINDOW, 5)
    other, _ = random_windows(minilm, "text", 10 * WINDOW, 5, skip=10)
    both, _ = random_windows(minilm, "text", 20 * WINDOW, 5)
    assert torch.equal(torch.cat([one, other]), both)
    windows = small_text[: len(small_text) // WINDOW * WINDOW].reshape(-1, WINDOW)
    rows = {tuple(row) for row in windows.tolist()}
    assert all(tuple(row) in rows for row in both.reshape(-1, WINDOW).tolist())


def test_attention_of_the_sinks_is_the_models_own(minilm, small_text):
    """Masses on special tokens and on the neighbours, from the probabilities the model returns."""
    experiment = EXPERIMENTS["real_heads_sinks"]
    config = {**experiment.config("quick"), **SMALL["real_heads_sinks"]}
    table = experiment.plan(config, torch.device("cpu")).work(1).table.set_index("head")
    ids, _ = wikipedia_windows(minilm, config["windows"] * WINDOW, config["seed"], experiments.POOL)
    ends = torch.full((config["windows"], 1), 101), torch.full((config["windows"], 1), 102)
    minilm.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = minilm.model(
            torch.cat([ends[0], ids.reshape(-1, WINDOW), ends[1]], 1), output_attentions=True
        ).attentions[1][:, :, 1:-1]
    minilm.model.set_attn_implementation("sdpa")
    for head in range(12):
        own = weights[:, head]
        assert table.window_cls[head] == pytest.approx(own[..., 0].mean().item(), abs=1e-5)
        assert table.window_sep[head] == pytest.approx(own[..., -1].mean().item(), abs=1e-5)
        assert table.window_previous[head] == pytest.approx(own.diagonal(0, 1, 2).mean().item(), abs=1e-5)
        assert table.window_next[head] == pytest.approx(own.diagonal(2, 1, 2).mean().item(), abs=1e-5)


def test_punctuation_is_told_from_words(minilm):
    marks = experiments.is_punctuation(minilm)
    ids = tokenize(minilm, "words, words; and $ 7 . ##")
    tokens = minilm.tokenizer.convert_ids_to_tokens(ids.tolist())
    assert [t for t, m in zip(tokens, marks[ids]) if m] == [t for t in tokens if not t.strip("#").isalnum()]
    assert not marks[[101, 102]].any()
