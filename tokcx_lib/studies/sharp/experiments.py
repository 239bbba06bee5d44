"""The sharp exponent: scalar self-attention over up to 10^12 tokens, one token beyond the others, and d = 2 and 8.

Chapter 10.
"""

from __future__ import annotations

import math

import pandas as pd
import torch

from tokcx_lib import runtime
from tokcx_lib.sampling import binned, forms, sweeps
from tokcx_lib.studies.runs import Experiment, Part, Plan
from tokcx_lib.theory.laws import Gaussian


def _blocks(config: dict) -> list[tuple[int, int]]:
    """Units (n, block): a block of replicates of one length goes through one matrix product."""
    blocks = math.ceil(config["replicates"] / config["block"])
    return [(n, block) for n in config["lengths"] for block in range(blocks)]


def _replicates(config: dict, block: int) -> range:
    first = block * config["block"]
    return range(first, min(first + config["block"], config["replicates"]))


def sharp_rate(config: dict, device) -> Plan:
    """Mean and variance of scalar self-attention over n standard normal tokens, A = H, V = 1, from binned counts.

    Columns: mean; variance_gap, variance - H^2; linear and linear_square, the means of the influence functions of the
    mean and of the second moment over the same tokens. Tokens at different n are independent; horizons share them.
    """

    def work(n: int, block: int) -> Part:
        numbers = _replicates(config, block)
        draws = [binned.draw(n, runtime.stream(config["seed"], n, r), config["bins"]) for r in numbers]
        rows = []
        for H, found in zip(config["horizons"], binned.self_attention(draws, config["horizons"])):
            for r, tokens, mean, cov in zip(numbers, draws, found.mean.tolist(), found.cov.tolist()):
                rows.append((n, block, H, r, mean, cov - H**2, *binned.influence_means(tokens, H)))
        names = ["n", "block", "horizon", "replicate", "mean", "variance_gap", "linear", "linear_square"]
        return Part(pd.DataFrame(rows, columns=names))

    return Plan(_blocks(config), work)


def sharp_verdicts(config: dict, device) -> Plan:
    """Mean of scalar self-attention over n standard normal tokens, many times: what a test of the limit law is fed.

    Tokens at different n are independent; horizons share them.
    """

    def work(n: int, block: int) -> Part:
        numbers = _replicates(config, block)
        draws = [binned.draw(n, runtime.stream(config["seed"], n, r), config["bins"]) for r in numbers]
        rows = []
        for H, found in zip(config["horizons"], binned.self_attention(draws, config["horizons"])):
            rows += [(n, block, H, r, mean) for r, mean in zip(numbers, found.mean.tolist())]
        return Part(pd.DataFrame(rows, columns=["n", "block", "horizon", "replicate", "mean"]))

    return Plan(_blocks(config), work)


def sharp_lift(config: dict, device) -> Plan:
    """Scalar self-attention given that one token lies beyond L = sqrt(2 log n), and all others within (-L, L).

    Columns: mean, the mean of the transformed tokens; lift, what that one token added to it.
    """

    def work(n: int, block: int) -> Part:
        numbers = _replicates(config, block)
        level = math.sqrt(2 * math.log(n))
        rest, whole = [], []
        for r in numbers:
            stream = runtime.stream(config["seed"], n, r)
            rest.append(binned.draw(n - 1, stream, config["bins"], limit=level))
            whole.append(rest[-1].add(binned.beyond(level, stream)))
        rows = []
        without, with_it = (binned.self_attention(draws, config["horizons"]) for draws in (rest, whole))
        for H, a, b in zip(config["horizons"], without, with_it):
            for r, before, after in zip(numbers, a.mean.tolist(), b.mean.tolist()):
                rows.append((n, block, H, r, after, after - before))
        return Part(pd.DataFrame(rows, columns=["n", "block", "horizon", "replicate", "mean", "lift"]))

    return Plan(_blocks(config), work)


def sharp_dimensions(config: dict, device) -> Plan:
    """Errors of the moments of self-attention of standard normal tokens in several dimensions, in float32.

    A is H times `forms.power_law_form(dim)`, V = I. All horizons of a replicate see the same tokens.
    """
    runs = {int(dim): number for dim, number in config["runs"].items()}
    options = {"scales": config["horizons"], "dtype": torch.float32, "device": device}
    heads = {}
    for dim in runs:
        law = Gaussian(torch.eye(dim, dtype=torch.float64))
        heads[dim] = sweeps.MomentSweep(law, forms.power_law_form(dim), config["lengths"], **options)

    def work(dim: int, replicate: int) -> Part:
        found = heads[dim].table([replicate], config["seed"] + dim).rename(columns={"scale": "horizon"})
        found.insert(0, "dim", dim)
        return Part(found)

    replicates = " and ".join(f"{number} (d = {dim})" for dim, number in runs.items())
    return Plan([(dim, r) for dim, number in runs.items() for r in range(number)], work, {"replicates": replicates})


EXPERIMENTS = {
    "sharp_rate": Experiment(
        sharp_rate,
        ("n", "block"),
        full={
            "horizons": [0.5, 1.5, 2.0, 3.0],
            "lengths": [10**k for k in range(4, 13)],
            "replicates": 1000,
            "block": 50,
            "bins": 10_000,
            "seed": 20_261_000,
        },
        quick={"lengths": [10**4, 10**6, 10**8], "replicates": 50},
    ),
    "sharp_verdicts": Experiment(
        sharp_verdicts,
        ("n", "block"),
        full={
            "horizons": [0.5, 0.8, 1.2, 1.5, 2.0],
            "lengths": [10**6],
            "replicates": 5000,
            "block": 50,
            "bins": 1000,
            "seed": 20_261_300,
        },
        quick={"replicates": 200},
    ),
    "sharp_lift": Experiment(
        sharp_lift,
        ("n", "block"),
        full={
            "horizons": [1.5, 2.0, 3.0],
            "lengths": [10**k for k in range(3, 13)],
            "replicates": 400,
            "block": 50,
            "bins": 10_000,
            "seed": 20_261_100,
        },
        quick={"lengths": [10**3, 10**6], "replicates": 50},
    ),
    "sharp_dimensions": Experiment(
        sharp_dimensions,
        ("dim", "replicate"),
        full={
            "horizons": [1.5, 2.0, 3.0],
            "lengths": [1000, 2000, 4000, 8000, 16_000],
            "runs": {2: 60, 8: 40},
            "seed": 20_261_200,
        },
        quick={"lengths": [500, 1000, 2000], "runs": {2: 5, 8: 5}},
    ),
}
