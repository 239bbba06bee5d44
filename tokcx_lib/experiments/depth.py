"""Attention layers on top of each other, on Gaussian tokens (chapter 12)."""

from __future__ import annotations

import math

import pandas as pd
import torch

from tokcx_lib import binned, depth, runtime
from tokcx_lib.laws import Gaussian
from tokcx_lib.runs import Experiment, Part, Plan


def stacks(config: dict) -> dict[str, depth.Stack]:
    """The two stacks of `depth_gaussian`: loads that stay where they are, and loads that grow with every layer."""
    size = config["dim"], config["depth"], config["horizon"]
    return {
        "steady": depth.steady_stack(*size, config["steady_value"], config["seed"]),
        "drifting": depth.drifting_stack(*size, config["drifting_value"], config["seed"]),
    }


def depth_gaussian(config: dict, device) -> Plan:
    """Errors of n Gaussian tokens on their way through `depth` layers: columns of `depth.stack_errors`, in float32.

    Both stacks read the same draws. What each layer reads in the limit is in the JSON.
    """
    chosen = stacks(config)
    law = Gaussian(torch.eye(config["dim"], dtype=torch.float64))

    def work(replicate: int) -> Part:
        stream = runtime.stream(config["seed"], replicate)
        tokens = law.sample(config["lengths"][-1], stream).to(device, torch.float32)
        tables = []
        for name, stack in chosen.items():
            table = depth.stack_errors(stack, tokens, config["lengths"], config["linear_most"])
            table.insert(0, "stack", name)
            table.insert(1, "replicate", replicate)
            tables.append(table)
        return Part(pd.concat(tables, ignore_index=True))

    described = {name: stack.table().to_dict("records") for name, stack in chosen.items()}
    return Plan([(r,) for r in range(config["replicates"])], work, {"layers": described})


def depth_scalar(config: dict, device) -> Plan:
    """Errors of a stack in one dimension over 10^4 to 10^10 tokens, from counts in bins (`depth.scalar_errors`).

    Columns probe_x: error of a query that starts at x and is none of the tokens; rms and mean: of the tokens.
    Tokens at different n are independent.
    """
    stack, blocks = depth.scalar_stack(config["horizons"]), math.ceil(config["replicates"] / config["block"])

    def work(n: int, block: int) -> Part:
        first = block * config["block"]
        numbers = range(first, min(first + config["block"], config["replicates"]))
        draws = [binned.draw(n, runtime.stream(config["seed"], n, r), config["bins"]) for r in numbers]
        probes, rms, mean = depth.scalar_errors(stack, draws, config["probes"])
        rows = [
            (n, block, layer, r, *probes[layer - 1, i].tolist(), rms[layer - 1, i].item(), mean[layer - 1, i].item())
            for layer in range(1, len(stack.layers) + 1)
            for i, r in enumerate(numbers)
        ]
        names = [f"probe_{x:g}" for x in config["probes"]]
        return Part(pd.DataFrame(rows, columns=["n", "block", "layer", "replicate", *names, "rms", "mean"]))

    units = [(n, block) for n in config["lengths"] for block in range(blocks)]
    return Plan(units, work, {"layers": stack.table().to_dict("records")})


EXPERIMENTS = {
    "depth_gaussian": Experiment(
        depth_gaussian,
        ("replicate",),
        full={
            "dim": 16,
            "depth": 8,
            "horizon": 0.5,
            "steady_value": 0.5,
            "drifting_value": 0.3,
            "lengths": [250, 500, 1000, 2000, 4000, 8000, 16_000],
            "linear_most": 2000,
            "replicates": 24,
            "seed": 12,
        },
        quick={"lengths": [250, 500, 1000], "linear_most": 500, "replicates": 6},
        tolerance=1e-3,
    ),
    "depth_scalar": Experiment(
        depth_scalar,
        ("n", "block"),
        full={
            "horizons": [1.5, 0.5, 0.5],
            "probes": [0.0, 0.5, 1.0],
            "lengths": [10**k for k in range(4, 11)],
            "replicates": 600,
            "block": 50,
            "bins": 5000,
            "seed": 20_261_300,
        },
        quick={"lengths": [10**4, 10**5, 10**6], "replicates": 100},
    ),
}
