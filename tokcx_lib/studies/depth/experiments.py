"""Attention layers on top of each other, heads side by side: Gaussian tokens and the embedded model (chapter 12)."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pandas as pd
import torch

from tokcx_lib import runtime
from tokcx_lib.models import subsampled
from tokcx_lib.models.heads import heads, output_maps
from tokcx_lib.models.loading import EMBEDDED, load_model
from tokcx_lib.models.tokens import CONTEXT, collect_tokens
from tokcx_lib.models.windows import WINDOW, wikipedia_windows
from tokcx_lib.sampling import binned
from tokcx_lib.studies.depth import joint, layerwise, stacks
from tokcx_lib.studies.runs import Experiment, Part, Plan
from tokcx_lib.theory.laws import Gaussian


def both_stacks(config: dict) -> dict[str, stacks.Stack]:
    """The two stacks of `depth_gaussian`: loads that stay where they are, and loads that grow with every layer."""
    size = config["dim"], config["depth"], config["horizon"]
    return {
        "steady": stacks.steady_stack(*size, config["steady_value"], config["seed"]),
        "drifting": stacks.drifting_stack(*size, config["drifting_value"], config["seed"]),
    }


def depth_gaussian(config: dict, device) -> Plan:
    """Errors of n Gaussian tokens on their way through `depth` layers: columns of `stacks.stack_errors`, in float32.

    Both stacks read the same draws. What each layer reads in the limit is in the JSON.
    """
    chosen = both_stacks(config)
    law = Gaussian(torch.eye(config["dim"], dtype=torch.float64))

    def work(replicate: int) -> Part:
        stream = runtime.stream(config["seed"], replicate)
        tokens = law.sample(config["lengths"][-1], stream).to(device, torch.float32)
        tables = []
        for name, stack in chosen.items():
            table = stacks.stack_errors(stack, tokens, config["lengths"], config["split_most"])
            table.insert(0, "stack", name)
            table.insert(1, "replicate", replicate)
            tables.append(table)
        return Part(pd.concat(tables, ignore_index=True))

    described = {name: stack.table().to_dict("records") for name, stack in chosen.items()}
    return Plan([(r,) for r in range(config["replicates"])], work, {"layers": described})


def depth_scalar(config: dict, device) -> Plan:
    """Errors of stacks in one dimension over 10^4 to 10^10 tokens, from counts in bins (`stacks.scalar_errors`).

    `stacks` gives the horizons of their layers. Columns probe_x: error of a query that starts at x and is none of the
    tokens; rms and mean: of the tokens. Stacks share tokens; tokens at different n are independent.
    """
    chosen = {name: stacks.scalar_stack(horizons) for name, horizons in config["stacks"].items()}
    blocks = math.ceil(config["replicates"] / config["block"])

    def work(n: int, block: int) -> Part:
        first = block * config["block"]
        numbers = range(first, min(first + config["block"], config["replicates"]))
        draws = [binned.draw(n, runtime.stream(config["seed"], n, r), config["bins"]) for r in numbers]
        rows = []
        for name, stack in chosen.items():
            probes, rms, mean = stacks.scalar_errors(stack, draws, config["probes"])
            for layer in range(len(stack.layers)):
                for i, r in enumerate(numbers):
                    found = *probes[layer, i].tolist(), rms[layer, i].item(), mean[layer, i].item()
                    rows.append((n, block, name, layer + 1, r, *found))
        names = [f"probe_{x:g}" for x in config["probes"]]
        return Part(pd.DataFrame(rows, columns=["n", "block", "stack", "layer", "replicate", *names, "rms", "mean"]))

    units = [(n, block) for n in config["lengths"] for block in range(blocks)]
    described = {name: stack.table().to_dict("records") for name, stack in chosen.items()}
    return Plan(units, work, {"layers": described})


CONTEXTS, POOL = 29_000, 30_000  # first windows, of a random order of the text, that the next two experiments read


def depth_model(config: dict, device) -> Plan:
    """Errors of the hidden states of the embedded model when every layer reads n keys of its context.

    Columns of `layerwise.layer_errors`; a replicate is a context of 256 tokens of Wikipedia, special ones among them,
    with a draw of its own. Units are blocks of `block` contexts; a larger n adds keys to a smaller one.
    """
    model = load_model(EMBEDDED, device)
    ids, texts = wikipedia_windows(model, config["replicates"] * WINDOW, config["seed"], CONTEXTS)
    windows = ids.reshape(-1, WINDOW)

    def work(block: int) -> Part:
        first = block * config["block"]
        batch = subsampled.contexts(model, list(windows[first : first + config["block"]].numpy()), CONTEXT)
        tables = []
        for n in config["lengths"]:
            stream = runtime.stream(config["seed"], block)
            tables.append(layerwise.layer_errors(model, batch, n, stream).assign(n=n))
        table = pd.concat(tables, ignore_index=True)
        table.insert(0, "block", block)
        table.insert(1, "replicate", first + table.pop("context"))
        return Part(table)

    meta = {"texts": texts, **model.provenance, "context": CONTEXT}
    return Plan([(block,) for block in range(math.ceil(len(windows) / config["block"]))], work, meta)


def depth_heads(config: dict, device) -> Plan:
    """Errors of the heads of each layer, over keys that they share, after the output projection.

    The law is that of a pool of `pool` tokens of Wikipedia; `queries` of them ask. Columns: total, root mean square
    over queries of the norm of the summed errors, in units of the spread of the layer's output; head_h, the same of
    head h alone; quadrature, the root of the sum of their squares. In the JSON, for each layer: correlation
    (lengths, h, h), `joint.correlation` over the replicates; first_order (h, h), `joint.first_order_gram` at the first
    `first_order_queries` of the queries, and the spread.
    """
    model = load_model(EMBEDDED, device)
    ids, texts = wikipedia_windows(model, config["pool"], config["seed"], POOL)
    every, maps = heads(model), output_maps(model)
    layers = sorted({head.layer for head in every})

    @lru_cache(maxsize=1)
    def tokens() -> list[torch.Tensor]:
        return collect_tokens(model, ids[: config["pool"]], layers)

    def work(layer: int) -> Part:
        pool = tokens()[layer]
        chosen, outputs = zip(*((head, W) for head, W in zip(every, maps) if head.layer == layer))
        order = torch.randperm(len(pool), generator=runtime.stream(config["seed"], layer))
        queries = pool[order[: config["queries"]].to(pool.device)]
        limits = joint.pool_limits(chosen, outputs, queries, pool)
        draws = config["lengths"], config["replicates"], config["seed"]
        grams = joint.gram_errors(chosen, outputs, queries, pool, limits, *draws)
        squares = grams.diagonal(dim1=-2, dim2=-1)
        rows = []
        for replicate in range(config["replicates"]):
            for i, n in enumerate(config["lengths"]):
                size = (squares[replicate, i].sqrt() / limits.spread).tolist()
                total = grams[replicate, i].sum().sqrt().item() / limits.spread
                quadrature = squares[replicate, i].sum().sqrt().item() / limits.spread
                rows.append((layer, replicate, n, total, quadrature, *size))
        columns = ["layer", "replicate", "n", "total", "quadrature", *(f"head_{head.head}" for head in chosen)]
        first = joint.first_order_gram(chosen, outputs, queries[: config["first_order_queries"]], pool)
        kept = {"correlation": joint.correlation(grams), "first_order": first.cpu() / limits.spread**2}
        arrays = {name: value.numpy() for name, value in kept.items()}
        return Part(pd.DataFrame(rows, columns=columns), {**arrays, "spread": np.array(limits.spread)})

    def summary(arrays) -> dict:
        return {"layers": {str(layer): _rounded(kept) for layer, kept in zip(layers, arrays, strict=True)}}

    meta = {"texts": texts, **model.provenance, "context": CONTEXT}
    return Plan([(layer,) for layer in layers], work, meta, summary=summary)


def _rounded(arrays: dict[str, np.ndarray]) -> dict:
    """Arrays as lists of numbers of four digits, for a record's JSON."""
    digits = np.vectorize(lambda x: float(f"{x:.4g}"), otypes=[float])
    return {name: digits(value).tolist() for name, value in arrays.items()}


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
            "split_most": 4000,
            "replicates": 20,
            "seed": 12,
        },
        quick={"lengths": [250, 500, 1000], "split_most": 500, "replicates": 6},
        tolerance=1e-3,
    ),
    "depth_scalar": Experiment(
        depth_scalar,
        ("n", "block"),
        full={
            "stacks": {"cold first": [1.5, 0.5, 0.5], "alike": [0.9, 0.9, 0.9, 0.9]},
            "probes": [0.0, 0.5, 1.0],
            "lengths": [10**k for k in (4, 6, 8, 10)],
            "replicates": 120,
            "block": 20,
            "bins": 2500,
            "seed": 20_261_300,
        },
        quick={"lengths": [10**4, 10**5, 10**6], "replicates": 40},
    ),
    "depth_model": Experiment(
        depth_model,
        ("block",),
        full={"lengths": [8, 16, 32, 64, 128], "replicates": 24, "block": 4, "seed": 20_261_500},
        quick={"lengths": [16, 64], "replicates": 4, "block": 2},
        tolerance=1e-3,
    ),
    "depth_heads": Experiment(
        depth_heads,
        ("layer",),
        full={
            "pool": 40_000,
            "queries": 32,
            "first_order_queries": 4,
            "lengths": [250, 500, 1000, 2000, 4000, 8000, 15_000, 30_000],
            "replicates": 20,
            "seed": 20_261_400,
        },
        quick={"pool": 10_160, "queries": 32, "first_order_queries": 4, "lengths": [250, 500, 1000], "replicates": 5},
        tolerance=1e-3,
    ),
}
