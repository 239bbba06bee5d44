"""Stacks of layers and heads side by side: limits, errors and their sources, against definitions and simulation."""

import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch

from tokcx_lib import records, runtime
from tokcx_lib.models import corpora, subsampled, windows
from tokcx_lib.models.heads import Head
from tokcx_lib.models.tokens import tokenize
from tokcx_lib.sampling import binned
from tokcx_lib.studies.depth import experiments, influence, joint, layerwise, slopes, stacks, tables
from tokcx_lib.studies.depth.stacks import Layer
from tokcx_lib.studies.registry import EXPERIMENTS


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=runtime.stream(seed), dtype=torch.float64)


def small_layer(dim=3, seed=0, gain=0.9, scale=0.4):
    A, V = scale * normal(2, dim, dim, seed=seed)
    return Layer(A, V, gain)


def plain_step(layer, x, keys=None):
    keys = x if keys is None else keys
    weights = torch.softmax(x @ layer.A.mT @ keys.mT, -1)
    return layer.gain * (x + weights @ keys @ layer.V.mT)


# ------------------------------------------------------------ Gaussian stacks


def test_the_limit_is_what_more_and_more_tokens_tend_to():
    cov = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    stack = stacks.gaussian_stack(cov, [small_layer(2, seed) for seed in (1, 2)])
    root = torch.linalg.cholesky(cov)
    errors = []
    for n in (250, 4000):
        squares = []
        for r in range(5):
            x = should = normal(n, 2, seed=10 + r) @ root.mT
            for layer, M in zip(stack.layers, stack.maps):
                x, should = stacks.step(layer, x), should @ M.mT
            squares.append((x - should).square().sum(-1).mean().item())
        errors.append(np.mean(squares) ** 0.5)
    assert errors[1] < 0.4 * errors[0]  # a quarter, if the limit is right
    x = normal(100_000, 2, seed=3) @ root.mT
    for M, cov in zip(stack.maps, stack.covs[1:]):
        x = x @ M.mT
        assert torch.allclose(torch.cov(x.mT), cov, atol=0.02)


def test_the_mean_has_a_map_of_its_own():
    layer = small_layer(2, 5)
    cov = torch.eye(2, dtype=torch.float64)
    M = stacks.gaussian_stack(cov, [layer]).maps[0]
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    tokens = normal(6000, 2, seed=4)
    tokens = tokens - tokens.mean(0)
    gap = stacks.step(layer, tokens + mean).mean(0) - stacks.step(layer, tokens).mean(0)
    assert torch.allclose(gap, (M + layer.gain * layer.V) @ mean, atol=0.03)


def test_steady_layers_keep_the_trace_and_drifting_ones_gain_load():
    steady, drifting = stacks.steady_stack(4, 5, 0.5, 0.5, 1), stacks.drifting_stack(4, 5, 0.5, 0.3, 1)
    assert np.allclose(steady.table()["trace"], 4) and steady.covs[-1].trace().item() == pytest.approx(4)
    assert (np.diff(drifting.table()["load"]) > 0).all() and drifting.table()["horizon"][0] == pytest.approx(0.5)
    for stack in (steady, drifting):
        assert len(stack.covs) == len(stack.layers) + 1 == 6


@pytest.mark.parametrize("bad", [{"cov": [[1.0, 2.0], [2.0, 1.0]]}, {"layers": []}, {"layers": [small_layer(3)]}])
def test_bad_stacks_are_refused(bad):
    good = {"cov": torch.eye(2, dtype=torch.float64), "layers": [small_layer(2)]}
    with pytest.raises(
        ValueError, match=next(iter(bad)) if "layers" not in bad or not bad["layers"] else "A: expected"
    ):
        stacks.gaussian_stack(**{**good, **bad})


def test_moved_keys_is_the_derivative(monkeypatch):
    layer, x, shifts, queries = small_layer(), normal(20, 3, seed=1), normal(20, 3, seed=2), normal(7, 3, seed=3)
    h = 1e-5
    ends = [plain_step(layer, queries, x + sign * h * shifts) for sign in (1, -1)]
    derivative = (ends[0] - ends[1]) / (2 * h)
    assert torch.allclose(stacks.moved_keys(layer, x, shifts, queries), derivative, atol=1e-8)
    monkeypatch.setattr(stacks, "ROWS", 40)  # two queries at a time
    assert torch.allclose(stacks.moved_keys(layer, x, shifts, queries), derivative, atol=1e-8)
    with pytest.raises(ValueError, match="shifts: expected shape"):
        stacks.moved_keys(layer, x, shifts[:5])


def test_errors_are_those_of_the_tokens_that_moved():
    stack = stacks.gaussian_stack(torch.eye(3, dtype=torch.float64), [small_layer(3, seed) for seed in (1, 2)])
    tokens = normal(40, 3, seed=9)
    table = stacks.stack_errors(stack, tokens, [15, 40], 15).set_index(["n", "layer"])
    for n in (15, 40):
        moved = should = tokens[:n]
        for number, (layer, M, cov) in enumerate(zip(stack.layers, stack.maps, stack.covs[1:]), 1):
            fresh = plain_step(layer, should) - should @ M.mT
            moved, should = plain_step(layer, moved), should @ M.mT
            row, unit = table.loc[n, number], cov.trace().sqrt()
            assert row.error == pytest.approx(((moved - should).square().sum(-1).mean().sqrt() / unit).item())
            assert row.mean_error == pytest.approx((moved.mean(0).norm() / unit).item())
            gap = torch.cov(moved.mT, correction=0) - cov
            assert row.cov_error == pytest.approx((gap.norm() / cov.norm()).item())
            if n == 15:
                assert row.fresh == pytest.approx((fresh.square().sum(-1).mean().sqrt() / unit).item())
            else:
                assert math.isnan(row.fresh) and math.isnan(row.linear)
    first = table.loc[15, 1]
    assert first.linear == pytest.approx(first.error) and first.remainder < 1e-12 and first.own == first["keys"] == 0


def test_what_first_order_leaves_out_is_of_second_order():
    stack = stacks.steady_stack(4, 4, 0.4, 0.5, 3)
    share = {}
    for n in (100, 1600):
        found = [stacks.stack_errors(stack, normal(n, 4, seed=r), [n], n).iloc[-1] for r in range(3)]
        share[n] = np.mean([row.remainder / row.error for row in found])
    assert share[1600] < 0.5 * share[100] and share[100] < 0.3  # errors fall to a quarter, so does their share


# ------------------------------------------------------------ the exponent


def test_effective_couplings_in_one_dimension():
    h = [1.5, 0.7, 0.5]
    found = stacks.effective_couplings(stacks.scalar_stack(h))
    psi = [x**2 for x in h]
    assert found == pytest.approx([psi[0], psi[0] * (1 + psi[1]), psi[0] * (1 + psi[1] * (1 + psi[2]))])
    late = stacks.effective_couplings(stacks.scalar_stack([0.1, 2.0]))
    assert late == pytest.approx([0.01, 4.0])  # the colder layer counts
    alike = stacks.effective_couplings(stacks.scalar_stack([0.8] * 4))
    assert alike == pytest.approx([sum(0.64**k for k in range(1, L + 1)) for L in range(1, 5)])


def test_a_pull_passes_a_weak_layer_by():
    between = stacks.effective_couplings(stacks.scalar_stack([1.0, 0.5, 1.0]))
    assert between == pytest.approx([1.0, 1.25, 2.0])
    strong = stacks.effective_couplings(stacks.scalar_stack([1.0, 0.9, 1.0]))
    assert strong[-1] == pytest.approx(1 + 0.81 * 2)


def test_effective_couplings_of_directions_that_do_not_meet():
    one, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    A, B = (torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([0.9, 0.0], [0.0, 0.9]))
    same = stacks.gaussian_stack(one, [Layer(A, zero), Layer(A, zero)])
    apart = stacks.gaussian_stack(one, [Layer(A, zero), Layer(B, zero)])
    assert stacks.effective_couplings(same) == pytest.approx([0.81, 0.81 * 1.81])
    assert stacks.effective_couplings(apart) == pytest.approx([0.81, 0.81])
    stretched = stacks.gaussian_stack(4 * one, [Layer(A / 4, zero), Layer(A / 4, zero)])
    assert stacks.effective_couplings(stretched) == pytest.approx([0.81, 0.81 * 1.81])


def test_effective_couplings_are_those_of_the_pull_handed_on():
    # E exp(<B Y, y> - |BY|^2 / 2) over keys Y ~ N(B' z, I) of a query z, by simulation, against exp(y'Py / 2) at z = 0.
    stack = stacks.gaussian_stack(torch.eye(2, dtype=torch.float64), [small_layer(2, 7), small_layer(2, 8)])
    half = torch.eye(2, dtype=torch.float64)
    forms = []
    for layer, M in zip(stack.layers, stack.maps):
        forms.append(half.mT @ layer.A @ half)
        half = M @ half
    keys = normal(100_000, 2, seed=1) @ forms[1].mT + normal(100_000, 2, seed=2)  # of queries that are keys themselves
    y = torch.tensor([1.0, -0.5], dtype=torch.float64)
    pull = keys @ forms[0].mT
    found = torch.exp(pull @ y - pull.square().sum(-1) / 2).mean()
    G = forms[0] @ (torch.eye(2) + forms[1] @ forms[1].mT) @ forms[0].mT
    inverse = torch.linalg.inv(torch.eye(2) + G)
    exact = torch.exp(y @ (G @ inverse) @ y / 2) * torch.linalg.det(inverse).sqrt()
    assert found.item() == pytest.approx(exact.item(), rel=0.02)
    assert torch.linalg.matrix_norm(G, 2).item() <= stacks.effective_couplings(stack)[1] + 1e-12


def test_attention_over_counted_points():
    points, counts = normal(50, seed=1), torch.randint(0, 4, (50,), generator=runtime.stream(2)).double()
    tilts = torch.linspace(-3, 3, 400, dtype=torch.float64)
    keys = points.repeat_interleave(counts.long())
    plain = torch.softmax(tilts[:, None] * keys, -1) @ keys
    assert torch.allclose(binned.weighted_attention(tilts[:5], points, counts), plain[:5])
    assert torch.allclose(binned.weighted_attention(tilts, points, counts), plain, atol=1e-5)


def test_scalar_stacks_from_counts_are_those_of_the_tokens():
    stack = stacks.scalar_stack([1.2, 0.6], value=0.8)
    tokens, probes = normal(600, seed=3), [0.0, 1.0]
    whole = binned.BinnedTokens(tokens[:590], torch.ones(590, dtype=torch.float64), tokens[590:])
    at, rms, mean = stacks.scalar_errors(stack, [whole], probes)
    x, q, factor = tokens[:, None], torch.tensor(probes, dtype=torch.float64)[:, None], 1.0
    for i, (layer, M) in enumerate(zip(stack.layers, stack.maps)):
        x, q, factor = plain_step(layer, x), plain_step(layer, q, x), factor * M.item()
        gap = (x - factor * tokens[:, None])[:, 0]
        assert at[i, 0].tolist() == pytest.approx((q[:, 0] - factor * torch.tensor(probes)).tolist(), abs=1e-5)
        assert rms[i, 0].item() == pytest.approx(gap.square().mean().sqrt().item(), rel=1e-4)
        assert mean[i, 0].item() == pytest.approx(gap.mean().item(), abs=1e-5)
    assert stack.covs[-1].item() == pytest.approx(1)


# ------------------------------------------------------------ what one token does


def every_path(horizons):
    layers = range(1, len(horizons) + 1)
    return [influence.path(horizons, J) for size in layers for J in combinations(layers, size)]


def test_the_influence_is_the_derivative_by_one_token():
    """psi_l by Gauss-Hermite quadrature of its recursion, and psi_1 against one token among very many."""
    horizons, value = [0.9, 1.3, 0.6], 0.7
    nodes, weights = np.polynomial.hermite_e.hermegauss(48)
    weights = weights / weights.sum()
    y = np.array([-1.5, 0.4, 2.0])

    def plain(layer, x):  # (queries,) -> (queries, tokens)
        if layer == 0:
            return np.zeros((len(x), len(y)))
        h = horizons[layer - 1]
        share, x = value / (1 + value * h), np.asarray(x)[:, None]
        key = h * x + nodes
        inner = plain(layer - 1, key.ravel()).reshape(*key.shape, len(y))
        keys = np.einsum("k,xky->xy", weights, inner * (1 + (key - h * x) * h * x)[:, :, None])
        return plain(layer - 1, x[:, 0]) + share * (keys + np.exp(h * x * y - (h * x) ** 2 / 2) * (y - h * x))

    for layer, psi in enumerate(influence.influences(horizons, value), 1):
        for x in (0.0, 0.8):
            assert psi.at(x, y).numpy() == pytest.approx(plain(layer, [x])[0], rel=1e-8)
        assert psi.over_queries().at(0.0, y).numpy() == pytest.approx(weights @ plain(layer, nodes), rel=1e-5)


def test_the_pulls_are_those_of_the_sets_of_layers():
    """Part (a) of the proposition: every alpha is that of a set of layers, and every set has one."""
    horizons = [0.9, 0.5, 1.2, 0.7]
    for layers, psi in enumerate(influence.influences(horizons), 1):
        couplings = [path.coupling for path in every_path(horizons[:layers])]
        expected = sorted({round(c / (1 + c), 9) for c in couplings})
        assert psi.over_queries().alphas == pytest.approx(expected)
        assert psi.alphas[0] == 0 and len(psi.alphas) == 2 ** (layers - 1)
        assert max(psi.over_queries().alphas) == pytest.approx(
            1 - 1 / (1 + stacks.effective_couplings(stacks.scalar_stack(horizons[:layers]))[-1])
        )


def test_no_two_pulls_cancel():
    stream = np.random.default_rng(2)
    for _ in range(50):
        for psi in influence.influences(np.exp(stream.uniform(-1, 1, 4)).tolist()):
            assert psi.over_queries().log_size(1000)[1] == 1 and psi.log_size(1000)[1] == 1


def largest_position(paths):
    return max(max(np.divide(p.positions, [1.0, *p.positions[:-1]])) for p in paths)


def test_the_strongest_pull_is_met_where_tokens_are():
    """Each place on the strongest path is closer to zero than the one before; on other paths it need not be."""
    stream = np.random.default_rng(1)
    chosen = [np.exp(stream.uniform(-3, 1.5, stream.integers(1, 9))).tolist() for _ in range(20_000)]
    assert largest_position(influence.strongest_path(h) for h in chosen) < 1
    for h in chosen[:200]:
        best, paths = influence.strongest_path(h), every_path(h)
        assert best.coupling == pytest.approx(max(path.coupling for path in paths))
        assert best.coupling == pytest.approx(stacks.effective_couplings(stacks.scalar_stack(h))[-1])
        of_layers = [h[j - 1] for j in best.layers]
        ratios = np.divide(best.positions, [1.0, *best.positions[:-1]])
        assert (ratios <= np.minimum(of_layers, np.divide(1, of_layers)) + 1e-12).all()
    assert largest_position(influence.path(h, range(1, len(h) + 1)) for h in chosen) > 1  # the whole chain, planted


@pytest.fixture(scope="module")
def scalar():
    return records.load("depth_scalar")


def compared(record):
    config = record.meta["config"]
    return slopes.exponents(slopes.with_first_order(record.table, config), config["stacks"])


def test_the_measured_slopes_are_those_of_first_order(scalar):
    found = compared(scalar)
    assert slopes.disagreements(found) == []
    wrong = slopes.disagreements(found, "summed")
    deep = found[(found["theory"] - found["summed"]).abs() > 1e-9]
    assert len(wrong) == len(deep) == 8 and all("far out" in line for line in wrong)
    mean = found[found["error"] == "mean"].set_index(["stack", "layer"])
    assert (mean["near"] < mean["theory"] - 0.01).loc["alike"].iloc[1:].all()  # slow: psi is not yet its tail


def test_wrong_influences_are_found_out(scalar, monkeypatch):
    moved, scattered = influence._moved, influence._scattered

    def colder(q, pull, h):
        (alpha, beta, gamma), rest = scattered(q, pull, h)
        return (0.9 * alpha, beta, gamma), rest

    planted = {
        "weights": ("_moved", lambda q, h: moved(q, h)[:1]),
        "shares": ("_moved", lambda q, h: moved(q, h)[1:]),
        "half": ("_moved", lambda q, h: [(k, {power: c / 2 for power, c in p.items()}) for k, p in moved(q, h)]),
        "exponent": ("_scattered", colder),
    }
    for name, replacement in planted.values():
        with monkeypatch.context() as patch:
            patch.setattr(influence, name, replacement)
            assert len(slopes.disagreements(compared(scalar))) > 5


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: influence.path([0.5, 0.5], [2, 1]), "layers"),
        (lambda: influence.path([0.5, 0.5], [0]), "layers"),
        (lambda: influence.influences([0.5] * 13), "horizons"),
        (lambda: influence.first_order({"stacks": {}}), "config"),
        (lambda: influence.influences([0.5])[0].exponent(3, 2), "high"),
    ],
)
def test_bad_paths_are_refused(call, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        call()


# ------------------------------------------------------------ heads side by side


def layer_of_heads(count=3, dim=6, size=2, scale=0.6):
    made, maps = [], []
    for h in range(count):
        W = [normal(size, dim, seed=20 * h + i).float() for i in range(3)]
        made.append(Head(0, h, *W, normal(size, seed=20 * h + 4).float(), scale * size**-0.5))
        maps.append(normal(dim, size, seed=20 * h + 5).float())
    return made, maps


def plain_sum(made, maps, queries, keys):
    """Output of each head after W_O, (h, m, d), float64."""
    x, y = queries.double(), keys.double()
    return torch.stack(
        [torch.softmax((x @ h.A.mT + h.shift) @ y.mT, -1) @ (y @ h.V.mT) @ W.double().mT for h, W in zip(made, maps)]
    )


def test_gram_of_the_errors_of_heads():
    made, maps = layer_of_heads()
    pool = normal(50, 6, seed=1).float() / 2
    queries = pool[:5]
    limits = joint.pool_limits(made, maps, queries, pool)
    whole = plain_sum(made, maps, queries, pool)
    total = whole.sum(0)
    assert limits.spread == pytest.approx((total - total.mean(0)).square().sum(-1).mean().sqrt().item(), rel=1e-4)
    grams = joint.gram_errors(made, maps, queries, pool, limits, [8, 30], 2, seed=4)
    assert grams.shape == (2, 2, 3, 3)
    for r in range(2):
        drawn = torch.randint(50, (30,), generator=runtime.stream(4, 0, r))
        for i, n in enumerate((8, 30)):
            e = plain_sum(made, maps, queries, pool[drawn[:n]]) - whole
            assert torch.allclose(grams[r, i], torch.einsum("hmd,gmd->hg", e, e) / 5, atol=1e-4)
            assert grams[r, i].sum().item() == pytest.approx(e.sum(0).square().sum(-1).mean().item(), rel=1e-3)
    assert torch.allclose(joint.correlation(grams).diagonal(dim1=-2, dim2=-1), torch.ones(2, 3, dtype=torch.float64))


def test_first_order_gram_is_met_by_large_samples():
    made, maps = layer_of_heads(scale=0.3)
    pool = normal(300, 6, seed=1).float() / 2
    queries = pool[:4]
    limits = joint.pool_limits(made, maps, queries, pool)
    grams = 1000 * joint.gram_errors(made, maps, queries, pool, limits, [1000], 200, seed=1)[:, 0]
    stderr = grams.std(0) / 200**0.5
    first = joint.first_order_gram(made, maps, queries, pool)
    assert ((grams.mean(0) - first).abs() < 4.5 * stderr + 0.06 * first.diagonal().mean()).all()
    assert (first.diagonal() > 0).all() and torch.allclose(first, first.mT)


def test_first_order_of_two_heads_on_gaussian_tokens():
    made, maps = layer_of_heads(2, dim=2, scale=0.5)
    pool, query = normal(50_000, 2, seed=6).float(), torch.tensor([[0.6, -0.4]])
    found = joint.first_order_gram(made, maps, query, pool)
    (t, u), (P, Q) = [(h.A @ query[0].double() + h.shift) for h in made], [W.double() @ h.V for h, W in zip(made, maps)]
    S = torch.exp(t @ u) * (torch.eye(2) + torch.outer(u, t))
    assert found[0, 1].item() == pytest.approx(torch.trace(P @ S @ Q.mT).item(), rel=0.1, abs=0.1)


# ------------------------------------------------------------ the embedded model


def test_layer_errors_are_those_of_the_encoder(minilm):
    batch = subsampled.contexts(
        minilm, ["Attention averages values over keys, and this is a text about it.", "Short text."]
    )
    table = layerwise.layer_errors(minilm, batch, 3, 5).set_index(["context", "layer"])
    exact = subsampled.encode(minilm, batch).states
    off = subsampled.encode(minilm, batch, 3, 5).states
    for layer in range(1, 7):
        alone = subsampled.encode(minilm, batch, 3, 5, layers=[layer - 1]).states
        before = subsampled.encode(minilm, batch, 3, 5, layers=range(layer - 1)).states
        for c in range(2):
            real = batch.real[c]
            sizes = [
                (a[layer][c, real] - exact[layer][c, real]).square().sum(-1).mean().sqrt().item()
                for a in (off, alone, before)
            ]
            assert table.loc[c, layer][["error", "fresh", "inherited"]].tolist() == pytest.approx(
                sizes, rel=1e-3, abs=1e-4
            )
    assert (table.xs(1, level="layer")["inherited"] < 1e-4).all() and (table["before"].iloc[0] == 0)
    none = layerwise.layer_errors(minilm, batch, 500, 5)
    assert (none[["error", "fresh", "inherited"]] < 1e-3).all(axis=None)


# ------------------------------------------------------------ experiments and records


def test_layers_of_a_model_are_summed_in_squares():
    rows = [(8, 1, 3.0, 3.0, 0.0, 0.0, 10.0, 0.0), (8, 1, 4.0, 4.0, 0.0, 0.0, 10.0, 0.0)]
    rows += [(8, 2, 6.0, 3.0, 4.0, 2.0, 10.0, 6.0), (8, 2, 8.0, 3.0, 4.0, 2.0, 10.0, 0.0)]
    columns = ["n", "layer", "error", "fresh", "inherited", "before", "spread", "cross"]
    found = tables.model_layers(pd.DataFrame(rows, columns=columns))
    first, second = found.loc[8, 1], found.loc[8, 2]
    assert first.error == pytest.approx(12.5**0.5) and math.isnan(first.passed) and first.alike == 0
    assert (second.passed, second.alike, second.together) == pytest.approx((2, 3 / 12, 50 / 25))


def test_exponents_allow_for_draws_without_replacement():
    stream = np.random.default_rng(0)
    rows = [
        (n, 1, r, stream.uniform(0.9, 1.1) * (1 - n / 254) ** 0.5 * n**-0.3) for n in (8, 32, 128) for r in range(20)
    ]
    table = pd.DataFrame(rows, columns=["n", "layer", "replicate", "error"])
    assert tables.model_exponents(table, 254)["exponent"].item() == pytest.approx(0.3, abs=0.03)


def test_heads_of_the_record():
    record = records.load("depth_heads")
    found, pairs = tables.head_layers(record), tables.head_pairs(record, 1000)
    last = record.table[(record.table["n"] == 30_000) & (record.table["layer"] == 2)]
    assert found.loc[2, "total"] == pytest.approx(last["total"].mean())
    assert found.loc[2, "agreed"] == pytest.approx(last.filter(like="head_").sum(axis=1).mean())
    assert (found["worst"] < found["total"]).all() and (found["total"] < found["agreed"]).all()
    assert len(pairs) == 6 * 66
    at = record.meta["config"]["lengths"].index(1000)
    one = pairs[(pairs["layer"] == 3) & (pairs["head"] == 2) & (pairs["other"] == 7)].iloc[0]
    assert one["measured"] == record.meta["layers"]["3"]["correlation"][at][7][2]
    assert pairs["measured"].corr(pairs["expected"]) > 0.9
    shuffled = pairs["expected"].sample(frac=1, random_state=0).to_numpy()  # planted: the pairs mixed up
    assert abs(np.corrcoef(pairs["measured"], shuffled)[0, 1]) < 0.3
    with pytest.raises(ValueError, match="n: expected one of"):
        tables.head_pairs(record, 3)


@pytest.fixture
def small_text(minilm, monkeypatch):
    ids = torch.as_tensor(tokenize(minilm, corpora.open_corpus("scipy-docs").text)[:20_000].astype(np.int32))
    monkeypatch.setattr(windows, "all_ids", lambda model, name: (ids, {"text": "sha"}))
    monkeypatch.setattr(experiments, "CONTEXTS", 10)
    monkeypatch.setattr(experiments, "POOL", 20)


SMALL = {
    "depth_gaussian": {"lengths": [50, 100], "split_most": 50, "replicates": 3},
    "depth_scalar": {"lengths": [1000, 2000], "replicates": 4, "block": 2, "bins": 500},
    "depth_model": {"lengths": [8, 64], "replicates": 2, "block": 1},
    "depth_heads": {"pool": 600, "queries": 4, "first_order_queries": 1, "lengths": [50, 100], "replicates": 2},
}


@pytest.mark.parametrize("name", SMALL)
def test_a_unit_can_be_run_alone(name, small_text):
    experiment = EXPERIMENTS[name]
    plan = experiment.plan({**experiment.config("quick"), **SMALL[name]}, torch.device("cpu"))
    unit = plan.units[1]
    once, again = (plan.work(*unit) for _ in range(2))
    pd.testing.assert_frame_equal(once.table, again.table)
    assert (once.table[list(experiment.keys)] == list(unit)).all(axis=None)
    if plan.summary:
        assert len(plan.summary([once.arrays] * len(plan.units))["layers"]) == len(plan.units)


def test_the_records_hold_what_the_chapter_says():
    wide, scalar = records.load("depth_gaussian"), records.load("depth_scalar")
    counts = wide.table.groupby("stack")[["n", "replicate", "layer"]].nunique()
    assert (counts["replicate"] >= 20).all() and (counts["layer"] == 8).all() and wide.table["n"].max() >= 16_000
    assert scalar.table["n"].max() >= 10**10 and set(scalar.table["stack"]) == set(scalar.meta["config"]["stacks"])
    side, model = records.load("depth_heads"), records.load("depth_model")
    assert side.table.groupby("layer")["replicate"].nunique().tolist() == [20] * 6 and side.table["n"].max() == 30_000
    total, quadrature = side.table["total"], side.table["quadrature"]
    singles = side.table.filter(like="head_")
    assert np.allclose((singles**2).sum(axis=1) ** 0.5, quadrature, rtol=1e-4) and (total < singles.sum(axis=1)).all()
    assert sorted(model.table["layer"].unique()) == [1, 2, 3, 4, 5, 6]
    first = model.table[model.table["layer"] == 1]
    assert (first["inherited"] < 1e-3).all() and np.allclose(first["error"], first["fresh"], rtol=1e-4)
