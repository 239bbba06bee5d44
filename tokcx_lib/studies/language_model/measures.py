"""What late queries of one layer lose when they read some of their keys, and what theory says of it: one window.

Four policies are measured against attention over all keys (`probe.queries.notes`). The law of drawn keys knows no first
position, where many heads put weight that they do not use; so beside the four stands `rest`, keys drawn at random from
all but the first, against attention over all but the first. That is what the law, the Gaussian twin and the twin with
the measured skewness predict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.models.capture import Attention, capture
from tokcx_lib.models.loading import TextModel, evaluating
from tokcx_lib.models.text_parts import without_cache
from tokcx_lib.probe.policies import POLICIES, lengths_up_to
from tokcx_lib.probe.predictions import drawn_errors
from tokcx_lib.probe.queries import late_queries, notes, queries_with
from tokcx_lib.studies.language_model.twins import gaussian_twin, skewed
from tokcx_lib.validation import as_count

FIRST_SHOWN = 64
DIGITS = 4  # of the numbers in a table
TINY = 1e-30


def shown_lengths(context: int) -> list[int]:
    """Powers of 2 from 64 to the context, at which predictions stand beside measurements."""
    context = as_count("context", context, least=FIRST_SHOWN)
    return [2**k for k in range(round(math.log2(FIRST_SHOWN)), context.bit_length()) if 2**k <= context]


def window_table(model: TextModel, ids: Tensor, queries: int, keys: Sequence[int]) -> pd.DataFrame:
    """What the heads of a model do with the keys that the queries of one window have: a row for each head and n.

    Parameters
    ----------
    model : causal, from `load_model`; ids : (context,), special tokens included, 128 or more.
    queries : late queries, evenly spread over the last eighth of the window; keys : integers that name the draws.

    Returns
    -------
    DataFrame
        layer, head, n. At powers of the root of 2: drawn, latest, first_latest, heaviest, root mean square errors over
        queries, in units of the spread of the values, of outputs over n keys against those over all. At powers of 2
        from 64 also rest, of n keys drawn from all but the first, against all but the first; weights, the same of
        values that do not go with the logits; law and law_weights, what drawn Gaussian keys of the same loads lose
        (`predictions.drawn_errors`); twin and twin_skewed, measured of Gaussian keys and values (`twins`). Of queries
        that have n keys, or a fourth fewer (at the context: the late ones), medians of load, skew, effective and
        effective_rest, without the first position, and the mean of share_first; of n drawn keys of the late queries
        past_load and past_effective, of the n latest near_load. At the context also along and share_near.

    Raises
    ------
    ValueError
        If the window is too short, or the model has sinks of its own or a sliding window.
    """
    as_count("queries", queries)
    context = as_count("ids", len(ids), least=2 * FIRST_SHOWN)
    draws = torch.rand(queries, context, generator=runtime.stream(*keys)).to(ids.device)
    tables: list[pd.DataFrame] = []

    def read(attention: Attention) -> None:
        with runtime.one_thread():
            tables.append(_layer(attention, draws, keys))

    with evaluating(model.model), torch.inference_mode(), capture(model.model, read):
        model.model(ids[None], **without_cache(model.model))
    return pd.concat(tables, ignore_index=True)


def _layer(attention: Attention, draws: Tensor, keys: Sequence[int]) -> pd.DataFrame:
    if attention.sinks is not None or attention.window is not None or not attention.causal:
        raise ValueError(f"model: expected causal attention over the whole past, got another in {attention.name}")
    size = attention.k.shape[2]
    lengths, shown = lengths_up_to(size), shown_lengths(size)
    rows = late_queries(range(size), True, len(draws)).to(draws.device)
    draws = draws[: len(rows)]
    four = notes(attention, rows, draws, lengths)
    frame = {policy: np.sqrt(four[f"squares_{policy}"]) for policy in POLICIES}  # (heads, lengths)
    late = _late(attention, rows, draws, [n for n in shown if n < size], four, keys)
    by_n = [queries_with_keys(attention, n, len(draws)) for n in shown if n < size]
    by_n.append(_past(attention.logits(rows)[0], attention.seen(rows)[0]))
    found = {name: np.stack([each[name] for each in by_n], 1) for name in by_n[0]}
    whole = {"along": np.median(four["along"], 1), "share_near": four["share_near"].mean(1)}
    heads, columns = len(four["load"]), {name: array for name, array in frame.items()}
    for name, array in {**late, **found, **{name: each[:, None] for name, each in whole.items()}}.items():
        places = [lengths.index(n) for n in shown][-array.shape[1] :]  # all of them, or the last
        places = [lengths.index(n) for n in shown][: array.shape[1]] if name in late else places
        columns[name] = np.full((heads, len(lengths)), np.nan)
        columns[name][:, places] = array
    table = pd.DataFrame({name: _rounded(array).ravel() for name, array in columns.items()})
    table.insert(0, "layer", attention.layer)
    table.insert(1, "head", np.repeat(np.arange(heads), len(lengths)))
    table.insert(2, "n", np.tile(lengths, heads))
    return table


def _rounded(array: np.ndarray) -> np.ndarray:
    """To four digits, of numbers below 1 four decimals: more would be noise in the record."""
    scale = np.where(np.abs(array) < 1, 0, np.floor(np.log10(np.abs(np.nan_to_num(array, nan=1.0)) + TINY)))
    factor = 10.0 ** (DIGITS - scale)
    return np.round(array * factor) / factor


def queries_with_keys(attention: Attention, n: int, count: int) -> dict[str, np.ndarray]:
    """Of queries that have about n keys: load, skew, effective, effective_rest, share_first, (heads,) each."""
    rows = queries_with(n, range(attention.k.shape[2]), count).to(attention.q.device)
    early = attention.beginning(n)
    return _past(early.logits(rows)[0], early.seen(rows)[0])


def _past(logits: Tensor, seen: Tensor) -> dict[str, np.ndarray]:
    """Medians over queries of what logits (h, r, m) say, and the mean share of the first position."""
    rest = _without_first(seen)
    load, skew = _shape(logits, rest)
    found = {"load": load, "skew": skew}
    weights = torch.softmax(logits, -1)
    found["effective"] = 1 / weights.square().sum(-1)
    found["effective_rest"] = 1 / torch.softmax(logits.masked_fill(~rest, -math.inf), -1).square().sum(-1)
    medians = {name: each.double().quantile(0.5, dim=-1).cpu().numpy() for name, each in found.items()}
    return medians | {"share_first": weights[..., 0].double().mean(-1).cpu().numpy()}


def _shape(logits: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation and skewness over the keys that are seen: (h, r) each."""
    count = seen.sum(-1).clamp(min=1)
    mean = torch.where(seen, logits, 0).sum(-1) / count
    deviations = torch.where(seen, logits - mean[..., None], 0)
    variance = deviations.square().sum(-1) / count
    skew = deviations.pow(3).sum(-1) / count / variance.clamp(min=TINY) ** 1.5
    return variance.sqrt(), skew


def _late(attention: Attention, rows, draws, shown: list[int], four, keys) -> dict[str, np.ndarray]:
    """The rest of late queries, measured, predicted and of twins: (heads, shown) each."""
    logits, seen = attention.logits(rows)[0], attention.seen(rows)[0]
    rest = _without_first(seen)
    order = torch.where(rest[0], draws, math.inf).argsort(dim=-1, stable=True)
    counts = rest[0].sum(-1)
    groups = attention.k.shape[1]
    per_group = len(logits) // groups
    total = float(counts.double().quantile(0.5))
    found: list[dict[str, np.ndarray]] = []
    for group in range(groups):
        mine = slice(group * per_group, (group + 1) * per_group)
        values = attention.v[0, group].float()
        q = attention.q[0, mine][:, rows].float()
        load, skew = _shape(logits[mine], rest)
        twin = gaussian_twin(
            attention.k[0, group, 1:].float(), values[1:], runtime.stream(*keys, attention.layer, group)
        )
        others = _twin_logits(q, twin, load, skew)
        first = values[:1]  # its place is kept, and never read
        twin_values = torch.cat([first, twin.values])
        here = {"rest": drawn_rest(logits[mine], values, order, counts, shown)}
        here["weights"] = weights_lost(logits[mine], order, counts, shown)
        for name, each in zip(("twin", "twin_skewed"), others):
            each = torch.cat([torch.zeros_like(each[..., :1]), each], -1)
            here[name] = drawn_rest(each, twin_values, order, counts, shown)
        loads, alongs = four["load"][mine], four["along"][mine]
        here["law"] = np.stack([drawn_errors(shown, total, s, a) for s, a in zip(loads, alongs)])
        here["law_weights"] = np.stack([drawn_errors(shown, total, s, 0 * s) for s in loads])
        here |= _subsets(logits[mine], order, rows, shown)
        found.append(here)
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}


def _twin_logits(q: Tensor, twin, load: Tensor, skew: Tensor) -> tuple[Tensor, Tensor]:
    """Of the Gaussian twin, and with the measured load and skewness: (h, r, m - 1)."""
    logits = q @ twin.keys.mT
    deviation = ((q @ twin.cov) * q).sum(-1).clamp(min=TINY).sqrt()
    z = (logits - (q @ twin.mean)[..., None]) / deviation[..., None]
    return load[..., None] * z, load[..., None] * skewed(z, skew[..., None])


def drawn_rest(logits: Tensor, values: Tensor, order: Tensor, counts: Tensor, shown: Sequence[int]) -> np.ndarray:
    """Root mean square error of outputs over the first n keys of an order, against all keys of that order.

    Parameters
    ----------
    logits : (h, r, m); values : (m, d); order : (r, m), places of keys, of which the first counts (r,) are there.

    Returns
    -------
    array (h, len(shown)), in units of the spread of the values over these keys
    """
    values = values - values.mean(0)
    there = torch.arange(order.shape[1], device=order.device) < counts[:, None]
    logits = logits.gather(-1, order.expand_as(logits)).masked_fill(~there, -math.inf)
    sums = [_over_keys(there.to(values)[None] / counts[:, None], each, order) for each in (values, values.square())]
    spread = (sums[1] - sums[0].square()).sum(-1)
    full = _over_keys(torch.softmax(logits, -1), values, order)
    found = []
    for n in shown:
        some = _over_keys(torch.softmax(logits[..., :n], -1), values, order[:, :n])
        found.append(((some - full).square().sum(-1) / spread.clamp(min=TINY)).mean(-1).sqrt())
    return torch.stack(found, 1).double().cpu().numpy()


def _over_keys(weights: Tensor, values: Tensor, order: Tensor) -> Tensor:
    """Sums over keys of weights (h, r, n) times the values (m, d) at the places (r, n): (h, r, d)."""
    if 16 * order.shape[1] < len(values):
        return (weights.transpose(0, 1) @ values[order]).transpose(0, 1)
    spread = weights.new_zeros(*weights.shape[:-1], len(values))  # less memory than the values of every query
    return spread.scatter_(-1, order.expand_as(weights), weights) @ values


def weights_lost(logits: Tensor, order: Tensor, counts: Tensor, shown: Sequence[int]) -> np.ndarray:
    """Root of the mean of sum_j (w_j - W_j)^2 over queries: `drawn_rest` of values that do not go with the logits."""
    there = torch.arange(order.shape[1], device=order.device) < counts[:, None]
    logits = logits.gather(-1, order.expand_as(logits)).masked_fill(~there, -math.inf)
    whole = torch.softmax(logits.double(), -1)
    mass, kept = whole.cumsum(-1), whole.square().cumsum(-1)
    found = []
    for n in shown:
        m, k = mass[..., n - 1].clamp(min=TINY), kept[..., n - 1]
        found.append((k / m.square() - 2 * k / m + kept[..., -1]).clamp(min=0).mean(-1).sqrt())
    return torch.stack(found, 1).cpu().numpy()


def _subsets(logits: Tensor, drawn: Tensor, rows: Tensor, shown: Sequence[int]) -> dict[str, np.ndarray]:
    """Medians over late queries: load and effective number of n drawn keys of their past, load of the n latest."""
    latest = (rows[:, None] - torch.arange(shown[-1], device=rows.device)).clamp(min=1)
    orders = {name: logits.gather(-1, order.expand(len(logits), -1, -1)) for name, order in
              (("drawn", drawn[:, : shown[-1]]), ("latest", latest))}  # fmt: skip
    found: dict[str, list[Tensor]] = {"past_load": [], "past_effective": [], "near_load": []}
    for n in shown:
        found["past_load"].append(orders["drawn"][..., :n].std(-1, correction=0))
        found["past_effective"].append(1 / torch.softmax(orders["drawn"][..., :n], -1).square().sum(-1))
        found["near_load"].append(orders["latest"][..., :n].std(-1, correction=0))
    medians = {name: [each.double().quantile(0.5, dim=-1) for each in arrays] for name, arrays in found.items()}
    return {name: torch.stack(arrays, 1).cpu().numpy() for name, arrays in medians.items()}


def _without_first(seen: Tensor) -> Tensor:
    return seen.index_fill(-1, torch.zeros(1, dtype=torch.int64, device=seen.device), False)
