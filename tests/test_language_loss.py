"""Attention over some of the keys inside a model: other models' windows, the probe's orders, planted faults."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

from tokcx_lib import records, runtime
from tokcx_lib.probe import policies
from tokcx_lib.studies.language_model import answering, loss, loss_experiments, loss_tables
from tokcx_lib.studies.language_model.answering import token_losses
from tokcx_lib.studies.registry import EXPERIMENTS

SIZES = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(intermediate_size=32, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.4)
IDS = torch.randint(3, 99, (41,), generator=runtime.stream(1))


def tiny(kind="Llama", **settings):
    """A small model of random weights, as `token_losses` takes it; with one seed, all kinds have the same weights."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**SIZES | settings)).eval()
    return SimpleNamespace(model=model, name=kind)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=runtime.stream(seed))


def test_losses_are_those_of_the_model_with_its_head():
    model = tiny()
    whole = transformers.LlamaForCausalLM(model.model.config)
    whole.model = model.model
    whole.tie_weights()
    with torch.no_grad():
        expected = whole(IDS[None], labels=IDS[None]).loss.item()
    assert token_losses(model, IDS).mean().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("order", loss.ORDERS)
def test_with_all_keys_the_loss_is_the_models_own(order, monkeypatch):
    model, before = tiny(), None
    own = token_losses(model, IDS)
    for rows in (128, 16):
        monkeypatch.setattr(loss, "ROWS", rows)
        assert torch.allclose(token_losses(model, IDS, loss.reading(order, 40)), own, atol=1e-5)
        fewer = token_losses(model, IDS, loss.reading(order, 7))
        assert torch.allclose(fewer[:7], own[:7], atol=1e-5) and (fewer[7:] - own[7:]).abs().mean() > 0.01
        if order in ("latest", "first_latest", "heaviest"):  # the draws are of a block of rows
            assert before is None or torch.allclose(fewer, before, atol=1e-5)
            before = fewer
    assert model.model.config._attn_implementation != answering.NAME


def follows(first, read=None, keys=40):
    """Losses of what follows a prompt, with keys that were read before it, in orders that draw nothing."""
    model = tiny()
    read = answering.read_before(model, IDS[:first]) if read is None else read
    orders = ("latest", "first_latest", "heaviest")
    return [token_losses(model, IDS, answering.after(read, loss.reading(order, keys)), first) for order in orders]


def test_what_follows_a_prompt_is_read_after_it():
    own = token_losses(tiny(), IDS)
    assert torch.allclose(token_losses(tiny(), IDS, first=30), own[30:], atol=1e-5)
    assert all(torch.allclose(lost, own[30:], atol=1e-5) for lost in follows(30))
    # In one layer the keys of a prompt do not depend on how it was read: what follows is what reads so from the start.
    model = tiny(num_hidden_layers=1)
    for order in ("latest", "first_latest", "heaviest"):
        read = answering.after(answering.read_before(model, IDS[:30]), loss.reading(order, 7))
        whole = token_losses(model, IDS, loss.reading(order, 7))
        assert torch.allclose(token_losses(model, IDS, read, 30), whole[30:], atol=1e-5)
        assert (whole[30:] - token_losses(model, IDS)[30:]).abs().max() > 0.01
    # Planted: another prompt, and one that is a token short.
    other = answering.read_before(tiny(), IDS[:30].flip(0))
    assert not torch.allclose(follows(30, other)[0], own[30:], atol=1e-2)
    assert not torch.allclose(follows(30, answering.read_before(tiny(), IDS[:29]))[0], own[30:], atol=1e-2)


def windows_agree(keys):
    """Whether the latest keys give the losses of a model with a sliding window of 7."""
    slid = token_losses(tiny("Mistral", sliding_window=7), IDS)
    return torch.allclose(
        token_losses(tiny("Mistral", sliding_window=None), IDS, loss.reading("latest", keys)), slid, atol=1e-5
    )


def test_the_latest_keys_are_a_sliding_window():
    assert windows_agree(7) and not windows_agree(6) and not windows_agree(8)


def outputs_agree(order, counts, seed=(3,)):
    """Whether outputs of one layer are those over the first keys of an order of `probe.policies`."""
    q, k, v = normal(4, 40, 8), normal(2, 40, 8, seed=1), normal(2, 40, 8, seed=2)
    found = loss.reading(order, [counts], seed)(0, q, k, v)
    logits = q @ k.repeat_interleave(2, 0).mT
    distance = torch.arange(40)[:, None] - torch.arange(40)
    logits = logits.masked_fill(distance < 0, -math.inf)
    draws = torch.rand(40, 40, generator=runtime.stream(*seed, 0, 0), dtype=torch.float64)
    ranks = policies.shared_ranks((distance >= 0)[None], distance.float(), draws)
    rank = policies.heaviest_ranks(logits) if order == "heaviest" else ranks[order]
    read = (rank < torch.tensor(counts)[:, None, None]) & (distance >= 0)
    expected = torch.softmax(logits.masked_fill(~read, -math.inf), -1) @ v.repeat_interleave(2, 0)
    return torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("order", policies.POLICIES)
def test_orders_are_those_of_the_probe(order):
    for counts in ([7] * 4, [3, 40, 1, 12], [1] * 4):
        assert outputs_agree(order, counts)


FAULTS = {
    "latest": ("read = distance < many\n", "read = distance <= many\n"),
    "first_latest": ("distance < many - 1", "distance < many"),
    "drawn": ("draws.masked_fill(distance < 0, 2.0)", "draws"),
    "heaviest": ("nth_largest(logits, counts)", "nth_largest(logits, [n + 1 for n in counts])"),
}


@pytest.mark.parametrize("order", FAULTS)
def test_a_planted_fault_is_seen(order, monkeypatch):
    right, wrong = FAULTS[order]
    source = open(loss.__file__).read()
    assert source.count(right) == 1
    exec(compile(source.replace(right, wrong), loss.__file__, "exec"), faulty := {"__name__": "faulty"})
    monkeypatch.setattr(loss, "reading", faulty["reading"])
    assert not outputs_agree(order, [7] * 4)


def averaged(count=4000):
    """Mean over draws of a late query's output over 8 anchored keys of 40 with equal weights, and over all."""
    q, v = torch.zeros(1, 1, 8), normal(1, 40, 3, seed=2)
    found = [loss._some_rows("anchored", q, torch.zeros(1, 40, 8), v, [8], (i,))[0, 0] for i in range(count)]
    return torch.stack(found).mean(0), v[0].mean(0)


def test_drawn_keys_beside_kept_ones_stand_for_those_that_are_not_drawn(monkeypatch):
    mean, whole = averaged()
    assert torch.allclose(mean, whole, atol=0.03)  # four standard errors
    monkeypatch.setattr(loss, "_stands_for", lambda distance, places, counts: torch.zeros(1))
    mean, whole = averaged(1000)  # planted: a kept key weighs as much as a drawn one
    assert not torch.allclose(mean, whole, atol=0.06)


def test_the_drawn_keys_are_as_many_as_asked_for_and_any():
    distance = torch.arange(40)[None].flip(-1)
    draws = torch.rand(3001, 1, 40, dtype=torch.float64, generator=runtime.stream(8))
    read = torch.stack([loss.first_keys("drawn", distance, each, [8])[0, 0] for each in draws[1:]])
    assert (read.sum(-1) == 8).all() and (read.double().mean(0) - 0.2).abs().max() < 0.04
    anchored = loss.first_keys("anchored", distance, draws[0], [8])[0, 0]
    assert anchored.sum() == 8 and anchored[0] and anchored[-1]


def test_what_cannot_be_answered_is_refused():
    with pytest.raises(ValueError, match="^order: expected one of drawn, latest, .* got 'newest'"):
        loss.reading("newest", 3)
    with pytest.raises(ValueError, match="^keys: expected an integer >= 3, got 2"):
        loss.reading("anchored", 2)
    with pytest.raises(ValueError, match="^keys: expected an integer >= 1, got 0"):
        loss.reading("latest", [[1, 0]])
    with pytest.raises(ValueError, match="^model: expected plain causal attention over one window, got "):
        token_losses(tiny("Mistral", sliding_window=7), IDS, loss.reading("latest", 3))
    with pytest.raises(ValueError, match="^model: expected one table for what goes in and out"):
        token_losses(tiny(tie_word_embeddings=False), IDS)
    with pytest.raises(ValueError, match="^ids: expected 2 or more, got 1"):
        token_losses(tiny(), IDS[:1])
    with pytest.raises(ValueError, match="^ids: expected integers from 0 to 98, got 3 to 99"):
        token_losses(tiny(), torch.tensor([3, 99]))


@pytest.fixture
def opened(monkeypatch):
    """The experiments on a tiny model and tokens without meaning."""
    model = tiny()
    ids = torch.randint(3, 99, (3, 41), generator=runtime.stream(5))
    monkeypatch.setattr(loss_experiments, "opened", lambda *rest: (model, ids, {}))


SMALL = {"context": 40, "keys": [8, 16], "replicates": 2}
EDGES = {"edges": [8, 20, 40]}


def planned(name, **more):
    experiment = EXPERIMENTS[name]
    return experiment, experiment.plan({**experiment.config("quick"), **SMALL, **more}, torch.device("cpu"))


def alone(experiment, plan, unit):
    once, again = (plan.work(*unit) for _ in range(2))
    pd.testing.assert_frame_equal(once.table, again.table)
    assert (once.table[list(experiment.keys)] == list(unit)).all(axis=None)
    return once


def test_units_of_the_loss_and_what_a_token_costs_more(opened):
    experiment, plan = planned("language_model_loss", **EDGES)
    assert plan.units == [(r, n) for r in (0, 1) for n in (8, 16, 40)]
    parts = [alone(experiment, plan, unit) for unit in plan.units]
    table = plan.finish(pd.concat([part.table for part in parts], ignore_index=True), [part.arrays for part in parts])
    whole = table[table["order"] == loss_experiments.ALL].set_index(["replicate", "first"])["loss"]
    more = table["loss"].to_numpy() - whole.loc[list(zip(table["replicate"], table["first"]))].to_numpy()
    assert np.allclose(table["excess"], more, atol=1e-6)
    assert (table[table["keys"] == 40]["excess_error"] == 0).all() and (table["tokens"].isin([12, 20])).all()
    assert (table[table["keys"] == 8]["excess_error"] > 0).all()


def test_units_of_the_forecast_and_of_heads_that_read_their_own_numbers(opened, monkeypatch):
    experiment, plan = planned("language_model_forecast", replicates=3)
    forecast = pd.concat([alone(experiment, plan, unit).table for unit in plan.units], ignore_index=True)
    assert len(forecast) == 3 * 2 * 4 * 4 and (forecast["error_16"] <= forecast["error_8"] * 1.5).mean() > 0.9
    budgets = loss_experiments.head_budgets(forecast, [1, 2])
    assert np.array(budgets["latest"]).shape == (2, 4)
    some = forecast.query("replicate > 0 and layer == 1 and head == 2 and order == 'latest'")["budget"]
    assert budgets["latest"][1][2] == math.ceil(some.median())
    # Told by heads alone, in an order that the model has in every layer but its first, whose input is unchanged.
    meta = {"config": {"replicates": 3}, "sha256": "0"}
    monkeypatch.setattr(records, "load", lambda name: SimpleNamespace(table=forecast, meta=meta))
    experiment, plan = planned("language_model_answers", prompt=30)
    table = alone(experiment, plan, plan.units[1]).table
    assert len(table) == 1 + 2 * 5 + 4 and (table["tokens"] == 10).all() and (table["first"] == 30).all()
    # Of three articles in the forecast the first is one half; what is read here is one of the other.
    budgets = loss_experiments.head_budgets(forecast, [0])
    means = table[table["keys"] == 0].set_index("order")["mean_keys"]
    assert means["heaviest"] == pytest.approx(np.mean(budgets["heaviest"]))
    assert (table[table["order"] == loss_experiments.ALL]["excess"] == 0).all()


# ---------------------------------------------------------------- tables


def table_of(excess, replicates=4):
    """A table of losses: excess (order, keys) -> nats, the same in each article but for a known spread."""
    rows = [
        {
            "replicate": r,
            "order": order,
            "keys": keys,
            "first": first,
            "tokens": tokens,
            "excess": nats + 0.1 * (r - 1.5),
        }
        for (order, keys), nats in excess.items()
        for r in range(replicates)
        for first, tokens in ((512, 512), (1024, 512), (1536, 512))
    ]
    return pd.DataFrame(rows)


def test_costs_are_means_over_articles():
    found = loss_tables.costs(table_of({("latest", 16): 2.0, ("latest", 64): 1.0}))
    assert found["excess"].to_dict() == pytest.approx({("latest", 16): 2.0, ("latest", 64): 1.0})
    spread = 0.1 * np.std(np.arange(4), ddof=1)
    assert found["half"].iloc[0] == pytest.approx(spread / 2 * 3.1824, rel=1e-4)  # Student, 3 degrees of freedom
    assert found["factor"].iloc[1] == pytest.approx(math.e) and (found["articles"] == 4).all()
    assert math.isnan(loss_tables.costs(table_of({("latest", 16): 2.0}, 1))["half"].iloc[0])
    with pytest.raises(ValueError, match="^first: expected at most 1536, got 2048"):
        loss_tables.costs(table_of({("latest", 16): 2.0}), 2048)


def test_enough_keys_are_read_between_those_measured():
    curve = pd.Series([4.0, 1.0, 0.25], index=[16, 64, 256])
    assert loss_tables.enough(curve, 0.5) == pytest.approx(128) and loss_tables.enough(curve, 5.0) == 16
    assert math.isnan(loss_tables.enough(curve, 0.1))


def test_forecasts_and_how_far_they_agree():
    heads = [(0, 0.05), (1, 0.2), (2, 0.4)]
    rows = [
        {
            "replicate": r,
            "layer": 0,
            "head": h,
            "order": order,
            "budget": 10 * (h + 1),
            "error_16": e * f,
            "error_64": e,
        }
        for order, f in (("latest", 2.0), ("heaviest", 1.5))
        for h, e in heads
        for r in (0, 1)
    ]
    forecast = pd.DataFrame(rows)
    found = loss_tables.forecasts(forecast)
    assert found.loc[("latest", 64), "median"] == pytest.approx(0.2)
    assert found.loc[("latest", 16), "rms"] == pytest.approx(2 * math.sqrt((0.05**2 + 0.2**2 + 0.4**2) / 3))
    assert found.loc[("heaviest", 64), "within"] == pytest.approx(1 / 3)
    assert loss_tables.budgets(forecast).loc["latest"].to_dict() == {
        "half": 20,
        "nine_tenths": 30,
        "every": 30,
        "mean": 20,
    }
    told = {key: 3 * value**2 for key, value in found["rms"].items()}
    together = loss_tables.foretold(table_of(told), forecast)
    assert loss_tables.agreement(together) == pytest.approx({"rank": 1, "exponent": 2, "scatter": 1}, abs=1e-6)
    other = loss_tables.foretold(table_of({key: 1 / value for key, value in told.items()}), forecast)
    assert loss_tables.agreement(other)["rank"] == pytest.approx(-1)


# ---------------------------------------------------------------- records


def test_the_forecast_is_of_all_heads_and_falls_with_the_keys():
    table, meta = records.load("language_model_forecast")
    assert len(table) == meta["config"]["replicates"] * 270 * 4 and table["budget"].between(1, 2048).all()
    found = loss_tables.forecasts(table)
    for order in policies.POLICIES:
        assert (found.loc[order].sort_index()["rms"].diff().dropna() < 0).all()


def test_the_loss_after_a_prompt_falls_with_the_keys_and_follows_the_forecast():
    forecast, answers = records.load("language_model_forecast"), records.load("language_model_answers")
    assert answers.meta["forecast_sha256"] == forecast.meta["sha256"]
    found = loss_tables.costs(answers.table)
    assert found.loc[(loss_experiments.ALL, 2048), "excess"] == 0
    for order in loss.ORDERS:
        assert (found.loc[order].drop(index=0, errors="ignore").sort_index()["excess"].diff().dropna() < 0).all()
    together = loss_tables.foretold(answers.table, forecast.table)
    assert len(together) == 16 and loss_tables.agreement(together)["rank"] > 0.9
    shuffled = together.assign(rms=together["rms"].sample(frac=1, random_state=0).to_numpy())
    assert abs(loss_tables.agreement(shuffled)["rank"]) < 0.6  # planted: errors of other orders


def test_the_loss_of_whole_windows_falls_with_the_keys():
    table, meta = records.load("language_model_loss")
    found = loss_tables.costs(table)
    assert found.loc[(loss_experiments.ALL, 2048), "excess"] == 0 and meta["config"]["keys"] == [16, 64, 256, 1024]
    for order in policies.POLICIES:
        assert (found.loc[order].sort_index()["excess"].diff().dropna() < 0).all()
    early = loss_tables.by_position(table, 1024)
    assert early.drop(columns=1024).abs().max(axis=None) < 1e-4  # whose whole past is read
    several = loss_tables.by_position(table, 16)
    assert (several > 0).all(axis=None)
