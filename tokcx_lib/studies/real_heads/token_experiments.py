"""Is the theory entitled to real tokens? Shape, tails and dependence of the tokens and logits of MiniLM (chapter 7).

Tokens are those of random windows of the English Wikipedia, in windows as the model reads them.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.models.heads import heads
from tokcx_lib.models.loading import EMBEDDED, load_model
from tokcx_lib.models.tokens import CONTEXT, collect_tokens, token_moments
from tokcx_lib.models.windows import WINDOW, wikipedia_windows
from tokcx_lib.studies.real_heads import tails
from tokcx_lib.studies.runs import Experiment, Part, Plan

DIRECTIONS = (1, 2, 3, 10, 30, 100, 300)  # principal directions, the leading one first


def _plan(config: dict, device, table: Callable[[int, Tensor, list], pd.DataFrame]) -> Plan:
    """A unit a layer: `table(layer, tokens, heads of the layer)` makes its rows."""
    model = load_model(EMBEDDED, device)
    ids, texts = wikipedia_windows(model, config["tokens"], config["seed"])
    every = heads(model)

    def work(layer: int) -> Part:
        (x,) = collect_tokens(model, ids, [layer])
        found = table(layer, x, [head for head in every if head.layer == layer])
        found.insert(0, "layer", layer)
        return Part(found)

    about = {"texts": texts, **model.provenance, "context": CONTEXT, "tokens": len(ids)}
    return Plan([(layer,) for layer in sorted({head.layer for head in every})], work, about)


def _queries(config: dict, layer: int, x: Tensor) -> Tensor:
    """Tokens of a layer drawn at random, without replacement."""
    return x[torch.randperm(len(x), generator=runtime.stream(config["seed"], layer))[: config["queries"]].to(x.device)]


def principal_directions(x: Tensor) -> Tensor:
    """Principal directions (d, d) of tokens (n, d), one a column, the leading one first.

    Each points so that its largest coordinate is positive.
    """
    _, cov = token_moments(x)
    vectors = torch.linalg.eigh(cov).eigenvectors.flip(1)
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


def typical_coordinate(x: Tensor) -> int:
    """The coordinate of tokens (n, d) whose excess kurtosis is the median of all."""
    kurtosis = torch.cat([tails.excess_kurtosis(block.mT) for block in x.split(64, 1)])
    return int(kurtosis.argsort()[len(kurtosis) // 2])


def real_tokens_geometry(config: dict, device) -> Plan:
    """The cloud of tokens that enters each layer: one row a layer, the columns of `tails.token_geometry`."""
    return _plan(config, device, lambda layer, x, _: pd.DataFrame([tails.token_geometry(x, WINDOW)]))


def real_tokens_tails(config: dict, device) -> Plan:
    """Tails of the tokens of each layer along directions: the columns of `tails.direction_tails`.

    `what` names the direction: principal directions, the typical coordinate, the coordinate of largest variance, a
    random direction, and, to compare with, as many independent standard normal numbers.
    """

    def table(layer: int, x: Tensor, _) -> pd.DataFrame:
        stream = runtime.stream(config["seed"], layer, 1)
        directions = principal_directions(x)
        samples = {f"principal {i}": x.double() @ directions[:, i - 1] for i in DIRECTIONS}
        samples["typical coordinate"] = x[:, typical_coordinate(x)]
        samples["widest coordinate"] = x[:, int(x.var(0).argmax())]
        samples["random direction"] = x.double() @ torch.randn(x.shape[1], generator=stream).to(directions)
        samples["normal sample"] = torch.randn(len(x), generator=stream, dtype=torch.float64)
        return pd.DataFrame([{"what": what, **tails.direction_tails(y, WINDOW)} for what, y in samples.items()])

    return _plan(config, device, table)


def real_tokens_qq(config: dict, device) -> Plan:
    """QQ-plots: normal and sample quantiles of the leading direction, the typical coordinate, and each head's logits.

    The logits of a head are those of one query over all tokens: the one of median load among `queries` drawn.
    """

    def table(layer: int, x: Tensor, every: list) -> pd.DataFrame:
        asked = _queries(config, layer, x)
        samples = {
            "principal 1": x.double() @ principal_directions(x)[:, 0],
            "typical coordinate": x[:, typical_coordinate(x)],
        }
        for head in every:
            q, k, _ = head.project(asked)[0], *head.project(x)[1:]
            loads = (q @ k.mT).std(1)
            median = loads.argsort()[len(loads) // 2]
            samples[f"head {head.head}"] = k.double() @ q[median].double()
        rows = []
        for what, sample in samples.items():
            normal, quantiles = tails.qq(sample, config["points"])
            rows.append(pd.DataFrame({"what": what, "normal": normal.numpy(), "sample": quantiles.numpy()}))
        return pd.concat(rows, ignore_index=True)

    return _plan(config, device, table)


def real_heads_tails(config: dict, device) -> Plan:
    """Tails of the logits of every head: one row a head, the columns of `tails.logit_tails`."""

    def table(layer: int, x: Tensor, every: list) -> pd.DataFrame:
        asked = _queries(config, layer, x)
        return pd.DataFrame([{"head": head.head, **tails.logit_tails(head, asked, x, WINDOW)} for head in every])

    return _plan(config, device, table)


_TOKENS = {"tokens": 200_000, "seed": 20_260_000}
_FEW = {"tokens": 20_000}

EXPERIMENTS = {
    "real_tokens_geometry": Experiment(real_tokens_geometry, ("layer",), _TOKENS, _FEW, tolerance=1e-3),
    "real_tokens_tails": Experiment(real_tokens_tails, ("layer",), _TOKENS, _FEW, tolerance=1e-3),
    "real_tokens_qq": Experiment(
        real_tokens_qq, ("layer",), {**_TOKENS, "queries": 101, "points": 41}, _FEW, tolerance=1e-3
    ),
    "real_heads_tails": Experiment(real_heads_tails, ("layer",), {**_TOKENS, "queries": 64}, _FEW, tolerance=1e-3),
}
