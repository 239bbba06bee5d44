"""Causal, serial and rotary self-attention over Gaussian tokens, replicate by replicate (chapter 13)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch

from tokcx_lib import runtime
from tokcx_lib.sampling import binned, prefixes
from tokcx_lib.studies.runs import Experiment, Part, Plan
from tokcx_lib.theory import causal, rotary
from tokcx_lib.theory.laws import Gaussian, SerialGaussian


def _blocks(config: dict) -> list[tuple[int, int]]:
    """Units (n, block) of replicates of one length; `replicates` may be a number, or one for each length."""
    return [(n, block) for n in config["lengths"] for block in range(math.ceil(_count(config, n) / config["block"]))]


def _count(config: dict, n: int) -> int:
    return config.get("fewer", {}).get(str(n), config["replicates"])


def _replicates(config: dict, n: int, block: int) -> range:
    first = block * config["block"]
    return range(first, min(first + config["block"], _count(config, n)))


def scalar_row(tokens: torch.Tensor, horizon: float) -> tuple[float, ...]:
    """What one sequence (n, 1) of whitened tokens gives at one horizon H > 0, V = 1.

    Returns
    -------
    queries, H times the mean of the tokens; causal and whole, the means of the outputs of causal self-attention (query
    i over the i - 1 keys before it; the first reads nothing, 0) and of full self-attention; causal_linear and
    whole_linear, the same to first order.
    """
    n, form = len(tokens), torch.tensor([[horizon]], dtype=torch.float64)
    found = prefixes.scalar_outputs(tokens, horizon)
    pulls = causal.key_influence(tokens, form)
    own = horizon * tokens.mean().item()
    linear = causal.first_order(tokens, form).item()
    return own, found.before.sum().item() / n, found.whole.mean().item(), linear, own + pulls.mean().item()


_COLUMNS = ["queries", "causal", "whole", "causal_linear", "whole_linear"]


def causal_means(config: dict, device) -> Plan:
    """Means of causal and of full scalar self-attention over the same standard normal tokens.

    Columns: of `scalar_row`. Tokens at different n are independent; horizons share them.
    """
    law = Gaussian(1.0)

    def work(n: int, block: int) -> Part:
        rows = []
        for r in _replicates(config, n, block):
            tokens = law.sample(n, runtime.stream(config["seed"], n, r))
            rows += [(n, block, H, r, *scalar_row(tokens, H)) for H in config["horizons"]]
        return Part(pd.DataFrame(rows, columns=["n", "block", "horizon", "replicate", *_COLUMNS]))

    fewer = "".join(
        f", {count} at n = {n}" for n, count in config.get("fewer", {}).items() if int(n) in config["lengths"]
    )
    return Plan(_blocks(config), work, {"replicates": f"{config['replicates']}{fewer}"} if fewer else {})


def first_order_pulls(config: dict, device) -> Plan:
    """Means of the pulls of up to 10^12 tokens, each counted log(n/j) times (causal) and once (whole), from bins.

    The weights log(n/j) of the tokens of a bin are exponential variables, so that their sum is a gamma variable: as n
    draws with replacement from the n weights, at these n, where the difference does not show.
    """

    def work(n: int, block: int) -> Part:
        rows, pulls = [], {}
        for r in _replicates(config, n, block):
            stream = runtime.stream(config["seed"], n, r)
            tokens = binned.draw(n, stream, config["bins"])
            rng = np.random.default_rng(torch.randint(2**62, (1,), generator=stream).item())
            weights = rng.standard_gamma(tokens.counts.numpy()), rng.standard_exponential(len(tokens.outer))
            for H in config["horizons"]:
                if H not in pulls:
                    pulls[H] = causal.key_influence(tokens.points[:, None], [[H]])[:, 0].numpy()
                outer = causal.key_influence(tokens.outer[:, None], [[H]])[:, 0].numpy()
                masked = weights[0] @ pulls[H] + weights[1] @ outer
                rows.append((n, block, H, r, masked / n, (tokens.counts.numpy() @ pulls[H] + outer.sum()) / n))
        return Part(pd.DataFrame(rows, columns=["n", "block", "horizon", "replicate", "causal", "whole"]))

    return Plan(_blocks(config), work)


def serial_means(config: dict, device) -> Plan:
    """The same over a stationary Gaussian sequence, for several correlations of neighbours, from the same steps."""
    every = {r: SerialGaussian(1.0, r) for r in config["correlations"]}

    def work(n: int, block: int) -> Part:
        rows = []
        for number in _replicates(config, n, block):
            for r, law in every.items():
                tokens = law.sample(n, runtime.stream(config["seed"], n, number))
                rows.append((n, block, r, number, *scalar_row(tokens, config["horizon"])))
        return Part(pd.DataFrame(rows, columns=["n", "block", "correlation", "replicate", *_COLUMNS]))

    return Plan(_blocks(config), work)


def rotary_means(config: dict, device) -> Plan:
    """Output of one rotary query over n standard normal keys at the distances 1 … n, values equal to keys.

    The query has the same length in every plane, `load` in all. Columns: along_m, across_m, the two coordinates of the
    output in plane m, along the distance average there and across it. Loads share their keys.
    """
    theta = config["angles"]
    planes = range(len(theta))
    law = Gaussian(torch.eye(2 * len(theta)))

    def work(n: int, block: int) -> Part:
        unit = torch.tensor([1.0, 0.0] * len(theta), dtype=torch.float64) / len(theta) ** 0.5
        tilts = rotary.turned(unit, theta, torch.arange(1, n + 1))
        axes = tilts.mean(0).reshape(-1, 2)
        axes = axes / axes.norm(dim=1, keepdim=True)
        rows = []
        for r in _replicates(config, n, block):
            keys = law.sample(n, runtime.stream(config["seed"], n, r))
            logits = (keys * tilts).sum(1)
            for load in config["loads"]:
                out = (torch.softmax(load * logits, 0) @ keys).reshape(-1, 2)
                along = (out * axes).sum(1)
                across = out[:, 1] * axes[:, 0] - out[:, 0] * axes[:, 1]
                rows.append((n, block, load, r, *along.tolist(), *across.tolist()))
        names = [f"along_{m}" for m in planes] + [f"across_{m}" for m in planes]
        return Part(pd.DataFrame(rows, columns=["n", "block", "load", "replicate", *names]))

    return Plan(_blocks(config), work)


EXPERIMENTS = {
    "causal_means": Experiment(
        causal_means,
        ("n", "block"),
        full={
            "horizons": [0.3, 0.5],
            "lengths": [250, 1000, 4000],
            "replicates": 5000,
            "block": 250,
            "seed": 20_261_300,
        },
        quick={"lengths": [250, 1000], "replicates": 200, "block": 50},
    ),
    "causal_stable": Experiment(
        causal_means,
        ("n", "block"),
        full={
            "horizons": [1.1, 1.2, 1.5],
            "lengths": [1000, 4000],
            "replicates": 6000,
            "fewer": {"4000": 4000},
            "block": 200,
            "seed": 20_261_310,
        },
        quick={"lengths": [300, 1000], "replicates": 100, "block": 50},
    ),
    "causal_first_order": Experiment(
        first_order_pulls,
        ("n", "block"),
        full={
            "horizons": [1.1, 1.2, 1.5],
            "lengths": [10**6, 10**9, 10**12],
            "replicates": 5000,
            "block": 500,
            "bins": 10_000,
            "seed": 20_261_340,
        },
        quick={"lengths": [10**6], "replicates": 100, "block": 50},
    ),
    "serial_means": Experiment(
        serial_means,
        ("n", "block"),
        full={
            "horizon": 0.5,
            "correlations": [-0.5, 0.5, 0.8],
            "lengths": [4000],
            "replicates": 5000,
            "block": 250,
            "seed": 20_261_320,
        },
        quick={"lengths": [1000], "replicates": 100, "block": 50},
    ),
    "rotary_means": Experiment(
        rotary_means,
        ("n", "block"),
        full={
            "angles": [1.0, 0.1, 0.01, 0.001],
            "loads": [1.0, 2.0],
            "lengths": [10, 100, 1000, 10_000, 100_000],
            "replicates": 2000,
            "block": 250,
            "seed": 20_261_330,
        },
        quick={"lengths": [10, 100, 1000], "replicates": 200, "block": 100},
    ),
}
