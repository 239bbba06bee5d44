"""A language model whose heads read some of their keys: its loss on long texts, and what the errors foretell."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tokcx_lib import records, runtime
from tokcx_lib.models.capture import Attention, capture
from tokcx_lib.models.loading import LANGUAGE, TextModel, evaluating, load_model
from tokcx_lib.models.text_parts import without_cache
from tokcx_lib.probe.policies import POLICIES, keys_needed, lengths_up_to
from tokcx_lib.probe.queries import notes
from tokcx_lib.studies.language_model.answering import after, read_before, token_losses
from tokcx_lib.studies.language_model.loss import ORDERS, reading
from tokcx_lib.studies.language_model.texts import whole_windows
from tokcx_lib.studies.runs import Experiment, Part, Plan

ALL = "all"  # the order of a model that reads every key
FORECAST = "language_model_forecast"


@lru_cache(maxsize=1)
def _model(device: torch.device) -> TextModel:
    return load_model(LANGUAGE, device)


def opened(device: torch.device, config: dict) -> tuple[TextModel, Tensor, dict]:
    """The model, as many windows as replicates, and what a record says of them.

    Windows (replicates, context + 1) have one token more than is read: the last one is predicted.
    """
    model = _model(device)
    sizes = config["context"] + 1, config["replicates"]
    ids, texts = whole_windows(model, config["corpus"], *sizes, config["seed"])
    return model, ids, {"texts": texts, **model.provenance}


def _by_position(losses: dict[str, Tensor], edges: list[int], whole: Tensor | None) -> pd.DataFrame:
    """Rows of mean losses (order) between positions of the token that is read last; with `whole`, of the same tokens
    read with all keys, how much more they cost."""
    rows = []
    for order, lost in losses.items():
        for first, stop in zip(edges, edges[1:]):
            part = lost[first:stop]
            row = {"order": order, "first": first, "tokens": len(part), "loss": part.mean().item()}
            row["standard_error"] = (part.std() / len(part) ** 0.5).item()
            if whole is not None:
                more = part - whole[first:stop]
                row |= {"excess": more.mean().item(), "excess_error": (more.std() / len(part) ** 0.5).item()}
            rows.append(row)
    return pd.DataFrame(rows)


def language_model_loss(config: dict, device) -> Plan:
    """Loss of the next token when every head reads `keys` keys of its past, in four orders; nats.

    A replicate is an article, the first `context` tokens of it; rows are means over the tokens from position `first`
    on, up to the next edge, and standard_error is over these tokens as if they were independent. With keys = context
    every key is read. In the table, excess is what a token costs more than then, with the error of that difference.
    """
    model, ids, meta = opened(device, config)

    def work(replicate: int, keys: int) -> Part:
        if keys == config["context"]:
            losses = {ALL: token_losses(model, ids[replicate])}
        else:
            seed = config["seed"], replicate
            losses = {order: token_losses(model, ids[replicate], reading(order, keys, seed)) for order in POLICIES}
        table = _by_position(losses, config["edges"], None)
        table.insert(0, "replicate", replicate)
        table.insert(1, "keys", keys)
        return Part(table, {order: lost.numpy() for order, lost in losses.items()})

    def finish(table: pd.DataFrame, arrays: list[dict[str, np.ndarray]]) -> pd.DataFrame:
        every = dict(zip(units, arrays, strict=True))
        parts = []
        for replicate, keys in units:
            losses = {order: torch.as_tensor(lost) for order, lost in every[replicate, keys].items()}
            whole = torch.as_tensor(every[replicate, config["context"]][ALL])
            parts.append(_by_position(losses, config["edges"], whole)[["excess", "excess_error"]])
        return pd.concat([table, pd.concat(parts, ignore_index=True)], axis=1)

    units = [(r, keys) for r in range(config["replicates"]) for keys in (*config["keys"], config["context"])]
    return Plan(units, work, meta, finish)


def language_model_forecast(config: dict, device) -> Plan:
    """What the heads lose when they read some of their keys, in the windows of `language_model_loss`: a row a head.

    From `queries` queries, evenly spread over the last half of the window, as `probe.queries` notes them: error_n, root
    mean square error over n keys in units of the spread of the values; keys, the number from which on it is at most
    `error`. Every head reads what it reads in the whole model, so errors do not come on top of each other.
    """
    model, ids, meta = opened(device, config)
    context, lengths = config["context"], lengths_up_to(config["context"])
    rows = torch.linspace(context // 2, context - 1, config["queries"]).round().long()

    def work(replicate: int) -> Part:
        draws = torch.rand(len(rows), context, generator=runtime.stream(config["seed"], replicate)).to(device)
        found = []

        def read(attention: Attention) -> None:
            noted = notes(attention, rows.to(device), draws, lengths)
            for order in POLICIES:
                for head, squares in enumerate(noted[f"squares_{order}"]):
                    errors = {f"error_{n}": squares[lengths.index(n)] ** 0.5 for n in config["keys"]}
                    # A late query has fewer keys than the window: what is beyond them makes no error.
                    needed = keys_needed(lengths, squares, config["error"])
                    found.append((replicate, attention.layer, head, order, needed, *errors.values()))

        with evaluating(model.model), torch.inference_mode(), runtime.one_thread(), capture(model.model, read):
            model.model(ids[replicate, None, :-1].to(device), **without_cache(model.model))
        names = [f"error_{n}" for n in config["keys"]]
        return Part(pd.DataFrame(found, columns=["replicate", "layer", "head", "order", "budget", *names]))

    return Plan([(r,) for r in range(config["replicates"])], work, meta)


def head_budgets(table: pd.DataFrame, replicates: list[int], least: int = 1) -> dict[str, list[list[int]]]:
    """Keys that each head needs in each order, (layers, heads): the median over some windows of a forecast."""
    some = table[table["replicate"].isin(replicates)]
    middle = np.ceil(some.groupby(["order", "layer", "head"])["budget"].median()).clip(lower=least).astype(int)
    return {order: middle[order].unstack("head").values.tolist() for order in POLICIES}


def language_model_answers(config: dict, device) -> Plan:
    """Loss of what follows a prompt, when the heads read the whole prompt as it is, and then some of their keys.

    The articles of `language_model_loss`; the first `prompt` tokens are read with all keys, and what follows, up to
    `context`, with `keys` keys of the whole past in each head, in five orders (`loss.ORDERS`). With keys = 0 every head
    reads its own number, which the forecast from the other half of the articles gives it. Columns as there;
    mean_keys, what heads read on average, and excess, what a token costs more than with all keys.
    """
    forecast = records.load(FORECAST)
    count = forecast.meta["config"]["replicates"]
    halves = [list(range(count // 2)), list(range(count // 2, count))]
    budgets = [head_budgets(forecast.table, half) for half in halves]
    model, ids, meta = opened(device, config)
    first = config["prompt"]

    def work(replicate: int) -> Part:
        others = budgets[replicate < count // 2]
        read = read_before(model, ids[replicate, :first])
        whole = token_losses(model, ids[replicate], after(read, reading("latest", config["context"])), first)
        tables = [_by_position({ALL: whole}, [0, len(whole)], whole).assign(keys=config["context"])]
        for keys in (*config["keys"], 0):
            lost, means = {}, {}
            for order in ORDERS if keys else POLICIES:
                means[order] = keys or float(np.mean(others[order]))
                some = reading(order, keys or others[order], (config["seed"], replicate))
                lost[order] = token_losses(model, ids[replicate], after(read, some), first)
            table = _by_position(lost, [0, len(whole)], whole)
            tables.append(table.assign(keys=keys, mean_keys=table["order"].map(means)))
        table = pd.concat(tables, ignore_index=True)
        table["first"] += first
        table["mean_keys"] = table["mean_keys"].fillna(config["context"])
        table.insert(0, "replicate", replicate)
        return Part(table)

    return Plan([(r,) for r in range(config["replicates"])], work, {**meta, "forecast_sha256": forecast.meta["sha256"]})


_SHARED = {"corpus": "wikipedia-en", "context": 2048, "seed": 20_261_614}
_EDGES = {"edges": [64, 128, 256, 512, 1024, 2048]}
EXPERIMENTS = {
    "language_model_loss": Experiment(
        language_model_loss,
        ("replicate", "keys"),
        full={**_SHARED, **_EDGES, "keys": [16, 64, 256, 1024], "replicates": 8},
        quick={"corpus": "scipy-docs", "context": 256, "edges": [64, 128, 256], "keys": [16, 64], "replicates": 2},
        tolerance=1e-3,
    ),
    "language_model_forecast": Experiment(
        language_model_forecast,
        ("replicate",),
        full={**_SHARED, "keys": [16, 64, 256, 1024], "queries": 16, "error": 0.1, "replicates": 8},
        quick={"corpus": "scipy-docs", "context": 256, "keys": [16, 64], "queries": 8, "replicates": 2},
        tolerance=1e-3,
    ),
    "language_model_answers": Experiment(
        language_model_answers,
        ("replicate",),
        full={**_SHARED, "prompt": 1792, "keys": [16, 64, 256, 1024], "replicates": 8},
        quick={"corpus": "scipy-docs", "context": 256, "prompt": 192, "keys": [16, 64], "replicates": 1},
        tolerance=1e-3,
    ),
}
