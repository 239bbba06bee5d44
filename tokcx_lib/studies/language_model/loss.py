"""What the loss of a language model notices when every head reads only some keys of its past.

The orders are those of `probe.policies`, so that what the probe forecasts and what the loss says are about one thing:
a query reads the first n keys of an order, with softmax over those alone. Its own position is a key like any other. A
query that does not draw it loses little by that, since its token goes past the attention in the residual stream; and
keeping it would make another order than the probe's.

`anchored`, one order more, says what keeping is worth: the first position, where many heads put weight that they do not
use, and the query's own are always read; the rest is drawn, and each drawn key stands for as many as were not, which
adds the logarithm of that number to its logit. Without that the keys that are kept would weigh too much.

Either every query of every layer reads so, and the loss of a late token has passed through all of it; or those after a
prompt, which the model has read as it is (`answering.after`), as with a cache that is thinned out for the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.probe import policies
from tokcx_lib.studies.language_model.answering import Answer
from tokcx_lib.validation import as_choice, as_count, as_list

ANCHORED, KEPT = "anchored", 2  # the keys that it always reads
ORDERS = (*policies.POLICIES, ANCHORED)
ROWS = 128  # queries at once: logits of 9 heads over 2,048 keys are then 9 MB


def first_keys(order: str, distance: Tensor, draws: Tensor, counts: Sequence[int]) -> Tensor:
    """Which keys are read in an order that does not look at logits: bool (heads or 1, r, m).

    Parameters
    ----------
    order : one of ORDERS but "heaviest"; distance : (r, m), from query to key, negative where it is not seen.
    draws : (r, m), random numbers in [0, 1); counts : (heads,), how many keys each head reads; of a query that sees
        fewer, all.
    """
    counts = counts[:1] if len(set(counts)) == 1 else counts
    many = torch.tensor(counts, device=distance.device)[:, None, None]
    first = torch.zeros(1, dtype=torch.int64, device=distance.device)
    if order == "latest":
        read = distance < many
    elif order == "first_latest":
        read = (distance < many - 1).index_fill(-1, first, True)
    else:
        early = draws.masked_fill(distance < 0, 2.0)
        if order == ANCHORED:
            early = early.masked_fill(distance == 0, -1.0).index_fill(-1, first, -1.0)
        read = -early >= nth_largest(-early.expand(len(counts), *early.shape), counts)
    return read & (distance >= 0)


def nth_largest(numbers: Tensor, counts: Sequence[int]) -> Tensor:
    """(heads, r, 1): of each row of each head the n-th largest number, n that of the head; the least if n is larger."""
    ranks = [max(numbers.shape[-1] - n, 0) for n in counts]
    if len(set(ranks)) > 1:
        return torch.cat([nth_largest(each[None], [n]) for each, n in zip(numbers, counts)])
    if numbers.device.type == "cpu":  # numpy selects several times as fast
        found = np.partition(numbers.numpy(), ranks[0], axis=-1)[..., ranks[0], None]
        return torch.from_numpy(np.ascontiguousarray(found))
    return numbers.kthvalue(ranks[0] + 1, dim=-1, keepdim=True).values


def reading(order: str, keys: int | Sequence[Sequence[int]], seed: Sequence[int] = (0,)) -> Answer:
    """Attention over some keys alone, for `answering.answering`.

    Parameters
    ----------
    order : one of ORDERS.
    keys : how many keys every head reads, or (layers, heads), each its own number; 3 or more with `anchored`.
    seed : of the draws, integers. Each layer and query draws anew, the heads of a layer share it; a larger number of
        keys adds to a smaller one.

    Raises
    ------
    ValueError
        If the order is unknown or a number of keys is not positive.
    """
    as_choice("order", order, ORDERS)
    least = KEPT + 1 if order == ANCHORED else 1
    if isinstance(keys, Sequence):
        own = [[as_count("keys", n, least) for n in as_list("keys", row)] for row in keys]
    else:
        own = as_count("keys", keys, least)

    def answer(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        counts = [own] * len(q) if isinstance(own, int) else own[layer]
        early = k.shape[1] - q.shape[1]  # keys before the first query's own
        parts = []
        for start in range(0, q.shape[1], ROWS):
            rows = q[:, start : start + ROWS]
            stop = early + start + rows.shape[1]
            parts.append(_some_rows(order, rows, k[:, :stop], v[:, :stop], counts, (*seed, layer, start)))
        return torch.cat(parts, 1)

    return answer


def _some_rows(order: str, q: Tensor, k: Tensor, v: Tensor, counts: Sequence[int], seed: Sequence[int]) -> Tensor:
    """Outputs (heads, r, d_v) of the last queries of a window, over some of its keys."""
    places = torch.arange(k.shape[1], device=q.device)
    distance = places[len(places) - q.shape[1] :, None] - places
    if order == "heaviest":
        logits = _logits(q, k).masked_fill_(distance < 0, -math.inf)
        if min(counts) < len(places):
            logits.masked_fill_(logits < nth_largest(logits, counts), -math.inf)
    else:
        draws = distance
        if min(counts) < len(places) and order in ("drawn", ANCHORED):
            draws = torch.rand(distance.shape, generator=runtime.stream(*seed), dtype=torch.float64).to(q.device)
        read = first_keys(order, distance, draws, counts) if min(counts) < len(places) else (distance >= 0)[None]
        some = read.flatten(0, 1).any(0).nonzero()[:, 0]  # keys that no query reads cost no time
        k, v, read, distance = k[:, some], v[:, some], read[..., some], distance[:, some]
        logits = _logits(q, k)
        if order == ANCHORED:
            logits += _stands_for(distance, some, counts).to(logits.dtype)
        logits.masked_fill_(~read, -math.inf)
    weights = torch.softmax(logits, -1).unflatten(0, (len(k), -1))
    return (weights @ v[:, None]).flatten(0, 1)


def _logits(q: Tensor, k: Tensor) -> Tensor:
    return (q.unflatten(0, (len(k), -1)) @ k[:, None].mT).flatten(0, 1)


def _stands_for(distance: Tensor, places: Tensor, counts: Sequence[int]) -> Tensor:
    """Logarithms of how many keys each one stands for, (heads, r, m): 1 of those that are always read."""
    seen = (distance + places)[:, :1] + 1
    many = torch.tensor(counts, device=places.device)[:, None, None]
    share = ((seen - KEPT) / (many - KEPT)).clamp(min=1).log()
    return torch.where((distance == 0) | (places == 0), 0.0, share)
