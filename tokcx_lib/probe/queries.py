"""What a probe in context notes of a layer: how the queries of one window attend to the keys that they really have.

The sample of a query is its own past (in an encoder, its whole window). Of it the probe notes the load, which is the
standard deviation of the query's logits and so sqrt(q' Cov(k) q); how many keys share the attention; where the weight
lies; and what the output loses when only some of the keys are read. The first position is left out of the load: many
heads of language models use it as a sink, and its logit is not one of a law. A sliding window is the past of its layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokcx_lib.models.capture import Attention
from tokcx_lib.probe.policies import errors, heaviest_ranks, shared_ranks

NEAR = 64  # positions that count as near a query, its own included
LATE = 8  # late queries are those of the last 1/LATE of a window
TINY = 1e-30  # in place of a variance of 0
ROUNDING = 1e-6  # of the largest value: a spread below that is rounding, and values that are all the same make no error


def late_queries(text: range, causal: bool, count: int) -> Tensor:
    """Positions of up to `count` queries of a window, evenly spread: over its last eighth if they look back alone.

    `text` are the positions of the window that hold text: those of special tokens are keys, and no queries.
    """
    first = text.stop - max(len(text) // LATE, 1) if causal else text.start
    return _spread(range(first, text.stop), count)


def queries_with(keys: int, text: range, count: int) -> Tensor:
    """Positions of up to `count` queries that have about so many keys: from 3/4 of them to all, themselves included."""
    return _spread(range(max(3 * keys // 4, text.start), min(keys, text.stop)), count)


def _spread(places: range, count: int) -> Tensor:
    """Up to `count` of some places, evenly spread, with the last of them."""
    count = min(count, len(places))
    return torch.tensor([places[len(places) * (i + 1) // count - 1] for i in range(count)], dtype=torch.int64)


def layer_notes(
    attention: Attention, text: range, draws: Tensor, lengths: Sequence[int], shown: Sequence[int]
) -> dict[str, np.ndarray]:
    """All that is noted of a layer in one window: float64 arrays, the first axis of which is the heads.

    `notes` of late queries, as many as `draws` has rows; `load_N` and `effective_N` of queries with N keys, for each N
    in `shown` below the size of the window, if a query sees no later key; group, whose keys a head reads; and window,
    the most keys that a query sees in a sliding one, on both sides where it looks both ways, NaN where it sees all.

    Raises
    ------
    ValueError
        If the model has NaN or infinity here, as half precision may.
    """
    heads, groups, size = attention.q.shape[1], attention.k.shape[1], attention.k.shape[2]
    rows = late_queries(text, attention.causal, len(draws)).to(draws.device)
    found = notes(attention, rows, draws[: len(rows)], lengths)
    found["group"] = np.arange(heads) // (heads // groups)
    for n in (n for n in shown if n < size and attention.causal):
        some = queries_with(n, text, len(draws)).to(draws.device)
        early = attention.beginning(n)  # later keys are none of theirs
        found |= {f"{note}_{n}": array for note, array in load_and_effective(early, some).items()}
    if not all(np.isfinite(array).all() for array in found.values()):
        raise ValueError(f"model: expected finite queries, keys and values, got NaN or infinity in {attention.name}")
    window = attention.window or math.nan
    return found | {"window": np.full(heads, window if attention.causal else 2 * window - 1)}


def notes(attention: Attention, rows: Tensor, draws: Tensor, lengths: Sequence[int]) -> dict[str, np.ndarray]:
    """What late queries of one window say of each head.

    Parameters
    ----------
    attention : of a batch of one window of m keys; rows : (r,), positions of the queries.
    draws : (r, m), random numbers in [0, 1) that order the keys of the policy "drawn".
    lengths : numbers of keys at which the errors are measured.

    Returns
    -------
    dict of float64 arrays
        keys, load, load_with_first, along (the share of the spread of the values that lies along the logits),
        effective, share_first, share_near, share_own: (heads, r). squares_POLICY: (heads, len(lengths)), mean squares
        over the queries of the error, in units of the spread of the values.
    """
    logits, seen = attention.logits(rows)[0], attention.seen(rows)[0]
    distance = (torch.arange(logits.shape[-1], device=rows.device) - rows[:, None]).abs().to(torch.float32)
    rank = shared_ranks(seen, distance, draws)
    groups = attention.k.shape[1]
    per_group = logits.shape[0] // groups
    found = []
    for group in range(groups):
        mine = slice(group * per_group, (group + 1) * per_group)
        own = {policy: each if each.shape[0] == 1 else each[mine] for policy, each in {"seen": seen, **rank}.items()}
        values = attention.v[0, group].to(logits.dtype)
        sinks = None if attention.sinks is None else attention.sinks[mine]
        found.append(_group_notes(logits[mine], own.pop("seen"), values, sinks, distance, own, lengths))
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}


def load_and_effective(attention: Attention, rows: Tensor) -> dict[str, np.ndarray]:
    """Loads, the first position left out, and effective keys of some queries of one window: (heads, r), float64."""
    logits, seen = attention.logits(rows)[0], attention.seen(rows)[0]
    weights = torch.softmax(_with_sink(logits, attention.sinks), -1)[..., : logits.shape[-1]]
    return {
        "load": _numpy(_deviations(logits, _without_first(seen)).square().sum(-1).div(_count(seen)).sqrt()),
        "effective": _numpy(_effective(weights)),
    }


def _group_notes(logits, seen, values, sinks, distance, rank, lengths) -> dict[str, np.ndarray]:
    """`notes` of the heads of one group, which share their keys: logits (h, r, m), values (m, d)."""
    all_logits = _with_sink(logits, sinks)
    all_weights = torch.softmax(all_logits, -1)
    weights = all_weights[..., : logits.shape[-1]]
    rest, count = _without_first(seen), _count(seen)
    deviations = _deviations(logits, rest)
    variance = deviations.square().sum(-1) / count
    centre = values.mean(0)
    least = (ROUNDING * values.abs().max()).square().clamp(min=TINY)
    values = values - centre  # changes no error, and keeps the digits of the spread
    sums = rest.to(values.dtype) @ torch.cat([values, values.square().sum(-1, keepdim=True)], -1)
    spread = sums[..., -1] / count - (sums[..., :-1] / count[..., None]).square().sum(-1)
    together = (deviations @ values / count[..., None]).square().sum(-1)
    found = {
        "keys": seen.sum(-1).expand(logits.shape[:-1]),
        "load": variance.sqrt(),
        "load_with_first": (_deviations(logits, seen).square().sum(-1) / seen.sum(-1)).sqrt(),
        "along": (together / (variance * spread).clamp(min=TINY)).clamp(max=1),
        "effective": _effective(weights),
        "share_first": weights[..., 0],
        "share_near": (weights * (distance < NEAR)).sum(-1),
        "share_own": (weights * (distance == 0)).sum(-1),
    }
    if sinks is not None:  # a key without value, which is always read
        values = torch.cat([values, -centre[None]])
    full = all_weights @ values
    for policy, each in {**rank, "heaviest": heaviest_ranks(logits)}.items():
        order = each if sinks is None else torch.cat([each, torch.full_like(each[..., :1], -1)], -1)
        squares = errors(all_logits, values, full, order, lengths) / spread.clamp(min=least)
        found[f"squares_{policy}"] = squares.mean(-1).mT
    return {name: _numpy(tensor) for name, tensor in found.items()}


def _with_sink(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Logits (h, r, m), and as one key more the sink of each head, where there is one."""
    if sinks is None:
        return logits
    return torch.cat([logits, sinks.to(logits)[:, None, None].expand(*logits.shape[:-1], 1)], -1)


def _without_first(seen: Tensor) -> Tensor:
    return seen.index_fill(-1, torch.zeros(1, dtype=torch.int64, device=seen.device), False)


def _count(seen: Tensor) -> Tensor:
    """How many keys are seen, the first position left out."""
    return _without_first(seen).sum(-1).clamp(min=1)


def _deviations(logits: Tensor, seen: Tensor) -> Tensor:
    """Logits minus their mean over the keys that are seen, 0 elsewhere."""
    mean = torch.where(seen, logits, 0).sum(-1) / seen.sum(-1).clamp(min=1)
    return torch.where(seen, logits - mean[..., None], 0)


def _effective(weights: Tensor) -> Tensor:
    """1 / sum w^2 of weights that sum to 1 once a sink has taken none."""
    return weights.sum(-1).square() / weights.square().sum(-1)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()
