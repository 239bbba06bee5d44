"""Sparse attention: the error of every scheme against the keys that a query reads (chapter 11)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.models.heads import heads
from tokcx_lib.models.loading import EMBEDDED, load_model
from tokcx_lib.models.tokens import collect_tokens, token_moments
from tokcx_lib.models.windows import WINDOW, spread_passages
from tokcx_lib.studies.runs import Experiment, Part, Plan
from tokcx_lib.studies.sparse.schemes import (
    KEEPING,
    SCHEMES,
    full,
    kept_mass,
    output_error,
    shared_keys,
    value_spread,
)
from tokcx_lib.studies.sparse.schemes import (
    window_random as window_and_random,
)
from tokcx_lib.theory import geometry
from tokcx_lib.theory.laws import Gaussian, SerialGaussian

BUDGETS = [32, 64, 128, 256, 512, 1024]


def turning_head(dim: int, own: float = 0.0) -> Tensor:
    """An orthogonal matrix R (dim, dim), dim even, with <R x, x> = own / sqrt(dim) |x|^2 for every x.

    With queries s R x / |x| the load is s over whitened keys, and the query's own token, where |x|^2 = dim, has a logit
    `own` standard deviations above the mean.
    """
    turn = torch.kron(torch.eye(dim // 2), torch.tensor([[0.0, -1.0], [1.0, 0.0]])).double()
    cos = own / math.sqrt(dim)
    return cos * torch.eye(dim, dtype=torch.float64) + math.sqrt(1 - cos**2) * turn


def turned_queries(x: Tensor, loads, own: float = 0.0) -> Tensor:
    """Queries (loads, m, d) of tokens x (m, d): s R x / |x| with the `turning_head` R."""
    q = torch.nn.functional.normalize(x.double() @ turning_head(x.shape[1], own).mT, dim=1)
    return (torch.tensor(loads, dtype=torch.float64)[:, None, None] * q).to(x)


def scheme_rows(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, budgets, unit: float, keys: tuple) -> list[list]:
    """Errors of all schemes at all budgets: for each head of q (h, m, d), rows (scheme, budget, error, mass).

    Error: root mean square over queries of the distance to full attention, in units of `unit`. Mass: mean share of the
    attention on the kept keys; NaN for schemes that do not keep keys. `keys` name the random stream.
    """
    whole, rows = full(q, k, v), [[] for _ in q]
    for number, (name, scheme) in enumerate(SCHEMES.items()):
        for budget in budgets:
            state = scheme(q, k, v, positions, budget, runtime.stream(*keys, number, budget))
            errors = output_error(state, whole, unit)
            mass = kept_mass(state, whole).mean(-1) if name in KEEPING else torch.full_like(errors, math.nan)
            for row, error, kept in zip(rows, errors.tolist(), mass.tolist()):
                row.append((name, budget, error, kept))
    return rows


def _sequence(config: dict, replicate: int, device) -> tuple[Tensor, Tensor]:
    """Tokens (n, d) of a sequence, and the places of its queries."""
    eye = torch.eye(config["dim"], dtype=torch.float64)
    law = SerialGaussian(eye, config["correlation"]) if config["correlation"] else Gaussian(eye)
    y = law.sample(config["n"], runtime.stream(config["seed"], replicate)).to(device, torch.float32)
    order = torch.randperm(config["n"], generator=runtime.stream(config["seed"], replicate, 1))
    return y, order[: config["queries"]]


def sparse_gaussian(config: dict, device) -> Plan:
    """Gaussian tokens N(0, I), independent or an autoregression; values are the tokens, errors in units of sqrt(d).

    A query is a token of the sequence, turned and set to a load: `turned_queries`. `own` says how many standard
    deviations above the mean its own token scores; one head for each. Scheme "full", budget n: the distance of full
    attention to its limit at infinitely many tokens.
    """
    unit = math.sqrt(config["dim"])

    def work(replicate: int) -> Part:
        y, positions = _sequence(config, replicate, device)
        heads_here = [(own, load) for own in config["own"] for load in config["loads"]]
        q = torch.cat([turned_queries(y[positions], config["loads"], own) for own in config["own"]])
        found = scheme_rows(q, y, y, positions, config["budgets"], unit, (config["seed"], replicate, 2))
        whole, tables = full(q, y, y), []
        limit = output_error(whole, whole._replace(output=q), unit).tolist()
        for (own, load), rows, error in zip(heads_here, found, limit):
            table = pd.DataFrame([*rows, ("full", len(y), error, 1.0)], columns=["scheme", "budget", "error", "mass"])
            tables.append(table.assign(own=own, load=load))
        table = pd.concat(tables, ignore_index=True).assign(replicate=replicate)
        return Part(table[["own", "load", "replicate", "scheme", "budget", "error", "mass"]])

    return Plan([(r,) for r in range(config["replicates"])], work)


def _heads_of(model, cases) -> list:
    """(head, factor of its logits) of each case [layer, head, factor]."""
    chosen = {(head.layer, head.head): head for head in heads(model)}
    return [(chosen[layer, number], factor) for layer, number, factor in cases]


def sparse_heads(config: dict, device) -> Plan:
    """Heads of the embedded model on running text; cases [layer, head, factor of the logits].

    A replicate is a passage of the text: its tokens in order, `windows` contexts of 254 that the model reads one by
    one, as one sequence of keys. Errors in units of the spread of the passage's values. Scheme "full": half the
    distance between the outputs over the two halves of the passage. Scheme "mean", budget 0: the mean value for every
    query. In the JSON, for every case: median and 5% and 95% quantiles of the load over the tokens of the passages.
    """
    model = load_model(EMBEDDED, device)
    n = config["windows"] * WINDOW
    ids, texts = spread_passages(model, config["corpus"], n, config["replicates"])
    cases = _heads_of(model, config["cases"])
    layers = sorted({head.layer for head, _ in cases})

    def work(replicate: int) -> Part:
        tokens = dict(zip(layers, collect_tokens(model, ids[replicate], layers)))
        covs = {layer: token_moments(x)[1] for layer, x in tokens.items()}
        order = torch.randperm(n, generator=runtime.stream(config["seed"], replicate))
        positions = order[: config["queries"]]
        tables, loads = [], []
        for number, (head, factor) in enumerate(cases):
            x = tokens[head.layer]
            q, k, v = head.project(x)
            asked, unit = factor * q[positions][None], value_spread(v)
            keys = (config["seed"], replicate, number)
            (rows,) = scheme_rows(asked, k, v, positions, config["budgets"], unit, keys)
            half = output_error(full(asked, k[: n // 2], v[: n // 2]), full(asked, k[n // 2 :], v[n // 2 :]), 2 * unit)
            whole = full(asked, k, v)
            blind = output_error(whole, whole._replace(output=v.mean(0)), unit)
            rows += [("full", n, half.item(), 1.0), ("mean", 0, blind.item(), 0.0)]
            table = pd.DataFrame(rows, columns=["scheme", "budget", "error", "mass"])
            tables.append(table.assign(layer=head.layer, head=head.head, factor=factor))
            some = x[order[:2048]].double()
            load = factor * geometry.load(some, head.A, covs[head.layer], head.shift)
            loads.append(load.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist())
        table = pd.concat(tables, ignore_index=True).assign(replicate=replicate)
        columns = ["layer", "head", "factor", "replicate", "scheme", "budget", "error", "mass"]
        return Part(table[columns], {"loads": np.array(loads)})

    def summary(arrays) -> dict:
        mean = np.mean([each["loads"] for each in arrays], 0)
        names = ("load_05", "load_median", "load_95")
        return {"cases": [dict(zip(names, (float(f"{x:.6g}") for x in row))) for row in mean]}

    meta = {"texts": texts, **model.provenance, "n": n}
    return Plan([(r,) for r in range(config["replicates"])], work, meta, summary=summary)


def sparse_window(config: dict, device) -> Plan:
    """Windows with 50 random keys, as Bohbot et al. (2026) measure them, on heads of the embedded model.

    Sequences are the first n tokens of a passage, one token in `every` is a query, and the window reaches `half_widths`
    tokens to each side at the longest n, in proportion at others. Errors against full attention over the same n tokens:
    of the mean of the outputs, of their covariance (Frobenius norm), and `mse`, the mean square distance of the
    outputs; in units of the spread of the values, squared for the last two. Beside it, at the middle half-width: the
    same keys with random ones weighted; as many random keys drawn by each query; as many random keys that all queries
    share.
    """
    model = load_model(EMBEDDED, device)
    lengths, middle = config["lengths"], config["half_widths"][len(config["half_widths"]) // 2]
    ids, texts = spread_passages(model, config["corpus"], lengths[-1], config["replicates"])
    cases = _heads_of(model, config["cases"])
    layers = sorted({head.layer for head, _ in cases})

    def work(replicate: int) -> Part:
        tokens = dict(zip(layers, collect_tokens(model, ids[replicate], layers)))
        rows = []
        for number, (head, factor) in enumerate(cases):
            for n in lengths:
                q, k, v = head.project(tokens[head.layer][:n])
                positions = torch.arange(0, n, config["every"])
                q, unit = (factor * q[positions])[None], value_spread(v)
                whole = full(q, k, v).output[0]
                exact = token_moments(whole)
                for half in config["half_widths"]:
                    reach = round(half * n / lengths[-1])
                    budget = min(2 * reach + 1 + config["random"], n)
                    names = ["window + random"]
                    if half == middle:
                        names += ["window + weighted", "random", "shared"]
                    for name in names:
                        stream = runtime.stream(config["seed"], replicate, number, n, half, names.index(name))
                        o = _window_output(name, q, k, v, positions, budget, stream, config["random"])
                        square = (o - whole).double().square().sum(1).mean().item()
                        mean_error, cov_error = (error.item() for error in token_moments(o).errors(exact))
                        row = (head.layer, head.head, replicate, name, n, reach, budget)
                        rows.append((*row, mean_error / unit, cov_error / unit**2, square / unit**2))
        columns = ["layer", "head", "replicate", "scheme", "n", "half_width", "keys", "mean_error", "cov_error", "mse"]
        return Part(pd.DataFrame(rows, columns=columns))

    meta = {"texts": texts, **model.provenance}
    return Plan([(r,) for r in range(config["replicates"])], work, meta)


def _window_output(name: str, q, k, v, positions, budget: int, stream, extra: int) -> Tensor:
    if name.startswith("window"):
        weighted = name == "window + weighted"
        return window_and_random(q, k, v, positions, budget, stream, extra, weighted).output[0]
    return {**SCHEMES, "shared": shared_keys}[name](q, k, v, positions, budget, stream).output[0]


LOADS = [0.5, 1.0, 2.0, 4.0, 8.0]
GAUSSIAN = {"dim": 32, "n": 16_384, "loads": LOADS, "budgets": BUDGETS, "queries": 128, "replicates": 20}
QUICK = {"n": 2048, "queries": 32, "budgets": [32, 128, 512], "replicates": 3}

EXPERIMENTS = {
    "sparse_gaussian": Experiment(
        sparse_gaussian,
        ("replicate",),
        full={**GAUSSIAN, "own": [0.0], "correlation": 0.0, "seed": 20_270_000},
        quick=QUICK,
        tolerance=1e-3,
    ),
    "sparse_serial": Experiment(
        sparse_gaussian,
        ("replicate",),
        full={**GAUSSIAN, "own": [0.0, 4.0], "correlation": 0.9, "seed": 20_270_100},
        quick=QUICK,
        tolerance=1e-3,
    ),
    "sparse_heads": Experiment(
        sparse_heads,
        ("replicate",),
        full={
            "corpus": "wikipedia-en",
            "windows": 65,
            "cases": [[0, 11, 1.0], [2, 6, 1.0], [4, 10, 1.0], [1, 9, 1.0], [0, 2, 0.5], [0, 2, 1.0]],
            "budgets": BUDGETS,
            "queries": 128,
            "replicates": 20,
            "seed": 20_270_200,
        },
        quick={"corpus": "scipy-docs", "windows": 8, "queries": 32, "budgets": [32, 128, 512], "replicates": 3},
        tolerance=1e-3,
    ),
    "sparse_window": Experiment(
        sparse_window,
        ("replicate",),
        full={
            "corpus": "wikipedia-en",
            "cases": [[0, 11, 1.0], [4, 10, 1.0], [1, 9, 1.0]],
            "lengths": [512, 1024, 2048, 4096],
            "half_widths": [500, 750, 1000, 1250, 1500],
            "random": 50,
            "every": 4,
            "replicates": 20,
            "seed": 20_270_300,
        },
        quick={"corpus": "scipy-docs", "lengths": [256, 512], "half_widths": [62, 125, 188], "replicates": 3},
        tolerance=1e-3,
    ),
}
