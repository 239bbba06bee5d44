"""Scalings of logits: what they multiply by, where they are critical, and what they do to given logits."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import optimize, special, stats

from tokcx_lib import records
from tokcx_lib.sampling import binned
from tokcx_lib.studies import scaling as room
from tokcx_lib.studies.scaling import experiments, figures, scaled, tables
from tokcx_lib.theory import budgets, laws, scaling, softmax_law

N = np.array([2.0, 100.0, 512.0, 513.0, 8192.0, 1e6, 1e30])


def test_the_room_has_a_docstring_and_no_more():
    assert room.__doc__ and not [name for name in vars(room) if name in scaling.SCHEMES]


def test_factors_are_those_that_are_deployed():
    anchor = 8192
    by_hand = {
        "none": lambda n: 1.0,
        "root": lambda n: math.sqrt(math.log(n) / math.log(anchor)),
        "log": lambda n: math.log(n, anchor),
        "qwen": lambda n: math.log(n, anchor) if n > anchor else 1.0,
        "yarn": lambda n: (0.1 * math.log(n / anchor) + 1.0) ** 2 if n > anchor else 1.0,
        "llama4": lambda n: math.log1p(math.floor(n / anchor)) * 0.1 + 1.0,
        "square": lambda n: math.log(n, anchor) ** 2,
    }
    assert set(by_hand) == set(scaling.SCHEMES)
    for scheme, expected in by_hand.items():
        assert np.allclose(scaling.factor(scheme, N, anchor), [expected(n) for n in N], rtol=1e-12), scheme
        assert scaling.factor(scheme, anchor - 1e-9, anchor) == pytest.approx(1.0)


def test_yarn_is_that_of_transformers_on_queries_and_keys():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "factor": 16.0, "rope_theta": 1e4, "original_max_position_embeddings": 512}
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=8192, rope_parameters=rope)
    _, times = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    assert times**2 == pytest.approx(float(scaling.factor("yarn", 8192, 512)))


def test_llama4_is_that_of_transformers():
    from transformers import Llama4TextConfig

    config = Llama4TextConfig()
    position = torch.arange(8000, 100_000, 997)  # as in modeling_llama4, from its configuration
    theirs = torch.log1p(torch.floor((position + 1.0) / config.floor_scale)) * config.attn_scale + 1.0
    ours = scaling.factor("llama4", position + 1, config.floor_scale)
    assert np.allclose(theirs.numpy(), ours, rtol=1e-6)


def test_the_root_keeps_the_reduced_load_and_the_logarithm_freezes_where_it_is_said():
    n, load, anchor = N[2:], 2.0, 512
    kept = scaling.reduced_load(scaling.factor("root", n, anchor) * load, n)
    assert np.allclose(kept, load / math.sqrt(2 * math.log(anchor)))
    freezes = scaling.freezing_length(load, anchor)
    for planted, equal in ((freezes, True), (freezes**0.5, False), (freezes**1.1, False)):
        sigma = scaling.reduced_load(scaling.factor("log", planted, anchor) * load, planted)
        assert (abs(sigma - 1) < 1e-9) == equal
    sigma = load / math.sqrt(2 * math.log(anchor))
    assert freezes == pytest.approx(anchor ** (1 / sigma**2))
    assert budgets.token_budget(load).unfrozen == pytest.approx(anchor ** (sigma**2))


def test_critical_scalings_are_the_three_that_are_known():
    n = np.array([1e3, 1e6, 1e12])
    assert np.allclose(scaling.critical_scaling(n, 2), np.sqrt(2 * np.log(n)))
    assert np.allclose(scaling.critical_scaling(n, -1), np.log(n) ** 2)
    for power in (1e5, -1e5):  # log n, up to a constant factor
        growth = scaling.critical_scaling(n, power)
        assert np.allclose(growth / growth[0], np.log(n) / np.log(n[0]), rtol=1e-4)


@pytest.mark.parametrize("power", [1.5, 2.0, 4.0, -1.0, -3.0])
def test_the_critical_factor_is_the_slope_of_the_tail_at_the_maximum(power):
    n = 1e6
    at = (abs(power) * math.log(n)) ** (1 / power)  # I(at) = log n
    tail = lambda x: x**power / abs(power)  # noqa: E731
    assert tail(at) == pytest.approx(math.log(n))
    slope = abs(tail(at * (1 + 1e-6)) - tail(at * (1 - 1e-6))) / (2e-6 * at)
    assert slope == pytest.approx(float(scaling.critical_scaling(n, power)), rel=1e-6)


@pytest.mark.parametrize("power", [1.5, 2.0, 4.0, -1.0, -3.0])
def test_the_exponent_is_continuous_falls_and_ends_at_the_critical_factor(power):
    kappa = np.linspace(0, 1.2, 2401)
    found = scaling.effective_exponent(kappa, power)
    assert found[0] == pytest.approx(1)
    assert np.abs(np.diff(found)).max() < 0.08  # steep at 0 where q < 1
    assert (np.diff(found) <= 1e-12).all() and np.allclose(found[kappa >= 1], 0)
    # By Laplace's principle, on a grid of levels: the largest of count x weight where keys are expected.
    x = np.linspace(1e-4, 6, 400_001)
    tail, log_n = x**power / abs(power), 1.0
    sign = 1 if power > 0 else -1
    scale = float(scaling.critical_scaling(math.e, power))  # log n = 1: everything is homogeneous
    there = tail <= log_n
    for k in (0.2, 0.4, 0.7, 0.9):
        sums = [(log_n - tail + m * k * scale * sign * x)[there].max() for m in (1, 2)]
        assert scaling.effective_exponent(k, power) == pytest.approx(2 * sums[0] - sums[1], abs=2e-3)


def test_the_exponent_for_normal_logits_is_that_of_chapter_9():
    sigma = np.linspace(0, 1.5, 31)
    theirs = 2 * budgets.query_exponent(sigma, "typical")
    assert np.allclose(scaling.effective_exponent(sigma), theirs)
    assert not np.allclose(scaling.effective_exponent(1.1 * sigma), theirs)


def test_the_sphere_is_critical_at_its_power_of_n():
    law = laws.UniformSphere(5, 1.0)
    n = np.geomspace(1e2, 1e4, 3)
    at, below = (softmax_law.softmax_moments(n, scaling.sphere_scaling(n, 5) ** power, law).participation
                 for power in (1.0, 0.8))  # fmt: skip
    assert at[-1] == pytest.approx(at[-2], rel=0.03) and at[-1] > 0.2
    assert (np.diff(np.log(below)) < -0.4).all()  # with the exponent shifted, it thaws
    growth = np.diff(np.log(scaling.sphere_scaling([1e100, 1e102], 5))) / math.log(100)
    assert growth == pytest.approx(2 / 4)
    assert np.diff(np.log(scaling.sphere_scaling([1e200, 1e202], 9))) / math.log(100) == pytest.approx(2 / 8)


def test_the_sphere_is_normal_in_many_dimensions():
    for n in (100.0, 1e6):
        x = stats.norm.isf(1 / n)
        hazard = stats.norm.pdf(x) * n
        assert scaling.sphere_scaling(n, 100_000) / math.sqrt(100_000) == pytest.approx(hazard, rel=1e-3)
        assert scaling.sphere_scaling(n, 8) / math.sqrt(8) > 1.2 * hazard


def test_the_sphere_is_the_slope_of_its_tail():
    for dim, n in ((2, 50.0), (3, 1e3), (6, 40.0), (64, 1e6)):
        k = (dim - 1) / 2
        tail = lambda x: -np.log(special.betainc(k, 0.5, 1 - x**2) / 2)  # noqa: B023, E731
        x = optimize.brentq(lambda x: tail(x) - math.log(n), 1e-9, 1 - 1e-4, xtol=1e-15)
        slope = (tail(x + 1e-7) - tail(x - 1e-7)) / 2e-7
        assert slope == pytest.approx(float(scaling.sphere_scaling(n, dim)), rel=1e-4)


def test_shares_are_at_least_the_bound_and_the_bound_is_attained():
    generator = np.random.default_rng(0)
    for spread in (0.5, 2.0, 6.0):
        bound = float(scaling.share_bound(spread))
        assert bound == pytest.approx(1 / math.cosh(spread / 2) ** 2)
        for n in (2, 10, 1000):
            logits = spread * generator.beta(0.1, 0.3, (200, n))
            weights = np.exp(logits)
            share = weights.sum(1) ** 2 / (n * (weights**2).sum(1))
            assert (share >= bound - 1e-12).all()
            assert (weights.max(1) / weights.sum(1) <= scaling.largest_weight(n, spread) + 1e-12).all()
        top = 1 / (1 + math.exp(spread))
        attained = (top * math.exp(spread) + 1 - top) ** 2 / (top * math.exp(2 * spread) + 1 - top)
        assert attained == pytest.approx(bound)


def test_scaled_attention_is_softmax():
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits[:, 0, 40:] = -math.inf
    values = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    factors = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    found = scaled.scaled_attention(logits, values, factors)
    weights = torch.softmax(factors[:, None] * logits, -1)
    assert torch.allclose(found.participation, weights.square().sum(-1))
    assert torch.allclose(found.output, weights @ values) and torch.allclose(found.first, weights[..., 0])
    rest = weights[..., 1:] / weights[..., 1:].sum(-1, keepdim=True)
    assert torch.allclose(found.rest, rest.square().sum(-1))
    even = scaled.scaled_attention(logits, values, 0.0).participation
    assert torch.allclose(even[0], torch.tensor([1 / 40, 1 / 50, 1 / 50], dtype=torch.float64))
    load = scaled.logit_spread(logits)
    assert load[0, 0] == pytest.approx(logits[0, 0, 1:40].std(correction=0).item())
    assert load[1, 2] == pytest.approx(logits[1, 2, 1:].std(correction=0).item())


def test_binned_tokens_have_the_participation_of_the_exact_law():
    for n, load in ((1000, 1.0), (10_000, 2.0), (10**6, 3.0), (10**6, 6.0), (10**6, 10.0)):
        drawn = [binned.draw(n, seed) for seed in range(40)]
        means = [scaled.mean_participation(tokens, load) for tokens in drawn]
        exact = float(softmax_law.softmax_moments(n + 1, load).participation)
        error = np.std(means) / math.sqrt(len(means))
        assert abs(np.mean(means) - exact) < 4 * error + 1e-3 * exact and error < 0.2 * exact
        # Off by more than its error where the load is, by a tenth.
        assert n > 1e5 or abs(np.mean(means) / softmax_law.softmax_moments(n, 1.1 * load).participation - 1) > 0.05
    plain = [scaled.binned_participation(tokens, 0.8) for tokens in drawn]
    assert np.mean(plain) == pytest.approx(float(softmax_law.softmax_moments(10**6, 0.8).participation), rel=0.01)
    one = binned.draw(1000, 3)
    y = torch.cat([one.points.repeat_interleave(one.counts.long()), one.outer])
    by_hand = torch.softmax(1.7 * y, 0).square().sum().item()
    assert scaled.binned_participation(one, 1.7) == pytest.approx(by_hand)


def test_the_law_beside_real_heads_is_the_exact_one():
    loads = torch.tensor([[0.3, 2.0, 7.7], [1.1, 4.0, 30.0]])
    found = experiments._law(np.array([100, 200, 300]), loads).numpy()
    exact = softmax_law.softmax_moments(np.array([99.0, 199.0, 299.0]), loads.numpy()).participation
    assert np.allclose(found, exact, rtol=2e-3)


def test_a_unit_of_the_record_runs_on_minilm(monkeypatch):
    monkeypatch.setattr(experiments, "WIKIPEDIA", "scipy-docs")
    experiment = experiments.EXPERIMENTS["scaling_heads"]
    config = experiment.config("quick") | {"queries": 3, "pieces": {"minilm": 1, "smollm2": 0}}
    config["lengths"] = {name: [64, 256] for name in config["lengths"]}
    plan = experiment.plan(config, torch.device("cpu"))
    assert plan.units == [(0, 0)] and "scipy-docs" in plan.meta["texts"]
    table = plan.work(0, 0).table
    assert len(table) == 72 * 2 * len(experiments.SCHEMES)
    at_anchor = table[(table["n"] == 256) & table["scheme"].isin(["none", "root", "log", "square"])]
    assert np.allclose(at_anchor["factor"], 1) and np.allclose(at_anchor["moved"], 0, atol=1e-5)
    for _, rows in at_anchor.groupby(["layer", "head"]):
        assert np.ptp(rows["participation"]) < 1e-6
    below = table[table["n"] == 64].set_index(["layer", "head", "scheme"])["participation"].unstack()
    assert (below["square"] <= below["log"] + 1e-9).all() and (below["log"] <= below["none"] + 1e-9).all()
    assert ((table["error"] > 0) & (table["participation"] >= 1 / table["n"] - 1e-9)).all()


@pytest.fixture(scope="module")
def record():
    return records.load("scaling_heads")


def test_the_record_is_of_its_configuration(record):
    table, config = record.table, record.meta["config"]
    assert config == experiments.EXPERIMENTS["scaling_heads"].config("full")
    assert [each["model"] for each in record.meta["models"]] == list(tables.MODELS)
    for number, (name, heads) in enumerate(zip(tables.MODELS, (72, 270))):
        rows = table[table["model"] == number]
        assert sorted(rows["n"].unique()) == config["lengths"][name]
        assert len(rows) == heads * len(config["lengths"][name]) * len(experiments.SCHEMES) * config["pieces"][name]
        assert rows["error"].isna().all() == (name == "smollm2")
    assert (table["participation"] * table["n"] > 0.99).all() and (table["participation"] <= 1).all()
    pool = table[table["model"] == 0]
    known = [scaling.factor(s, n, config["anchor"]) for s, n in zip(pool["scheme"], pool["n"])]
    assert np.allclose(pool["factor"], known, rtol=1e-5)


def test_a_larger_factor_leaves_fewer_tokens_in_every_head(record):
    for name in tables.MODELS:
        heads = tables.heads_of(record.table, name)
        ordered = heads.sort_values("factor").groupby(["n", "layer", "head"])["participation"]
        assert ordered.apply(lambda x: (np.diff(x) > -1e-6).all()).all()


def test_the_price_of_averaging_is_the_participation(record):
    heads = tables.heads_of(record.table, "minilm")
    price = heads["error"] / heads["participation"] ** 0.5
    assert 1 < price.median() < 2 and heads[["error", "participation"]].corr("spearman").iloc[0, 1] > 0.8
    wrong = heads["error"] / heads["participation"]  # without the root it is no constant
    assert np.log(wrong).std() > 1.5 * np.log(price).std()


def test_tables_of_heads_on_a_table_by_hand():
    rows = [
        {"model": 0, "piece": piece, "layer": 0, "head": 0, "n": n, "scheme": "none", "factor": 1.0, "load": 2.0,
         "effective": effective, "participation": p, "rest": p, "law": 0.01, "first": 0.0, "moved": 0.0, "error": error}
        for piece, n, effective, p, error in (
            (0, 100, 4.0, 0.2, 0.3), (1, 100, 9.0, 0.4, 0.4), (0, 1000, 40.0, 0.1, 0.0), (1, 1000, 90.0, 0.1, 0.0))
    ]  # fmt: skip
    heads = tables.heads_of(pd.DataFrame(rows), "minilm")
    first = heads.iloc[0]
    assert first["effective"] == pytest.approx(6) and first["share"] == pytest.approx(0.06)
    assert first["participation"] == pytest.approx(0.3) and first["error"] == pytest.approx(math.sqrt(0.125))
    assert first["reduced"] == pytest.approx(2 / math.sqrt(2 * math.log(100)))
    assert tables.growth(heads, 100, 1000)["none"].item() == pytest.approx(math.log10(3))
    assert tables.growth(heads, 100, 1000)["law_none"].item() == pytest.approx(0)
    assert tables.medians(heads, "effective").loc[1000, "none"] == pytest.approx(60)
    assert tables.states(heads).loc[100, "none"].tolist() == [0.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="^model: expected one of minilm, smollm2"):
        tables.heads_of(pd.DataFrame(rows), "gpt")


def test_figures_draw():
    fig, axes = plt.subplots(1, 2)
    figures.phase_paths(axes[0], 2.0, 512)
    figures.reduced_paths(axes[1], 2.0, 512)
    figures.label_paths(axes[1], 2.0, 512)
    assert len(axes[0].lines) == len(figures.LOOKS) + 1
    for scheme, line in zip(figures.LOOKS, axes[1].lines):
        n = line.get_xdata()
        assert np.allclose(line.get_ydata(), scaling.reduced_load(2.0 * scaling.factor(scheme, n, 512), n))
    assert set(figures.LOOKS) == set(experiments.SCHEMES)
    plt.close(fig)
