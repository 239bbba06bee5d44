"""The state of a layer in a probe: what is kept of the tokens read so far, and the rows of the table in the end.

It does not grow with the number of tokens: a mean and a covariance are merged block by block (`RunningMoments`), and so
is the log-sum-exp of each query. In the same way merge the states of several ranks, each of which reads other tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from tokcx_lib.models.heads import Head, head_geometry, heads
from tokcx_lib.models.loading import TextModel
from tokcx_lib.models.tokens import RunningMoments
from tokcx_lib.probe.predictions import predictions
from tokcx_lib.sampling import distributed
from tokcx_lib.sampling.streaming import partial_attention
from tokcx_lib.theory import geometry

DISTANCES = (64, 1024)  # between query and key, at which heads with rotary positions are described as well


class LayerState:
    """What is kept of one layer: its queries, the moments of its tokens, and log-sum-exps of queries over keys.

    First `add_queries` for all tokens among which queries are, then `share_queries`, `add_keys` for all keys, `gather`.
    """

    def __init__(self, layer_heads: list[Head], queries: int):
        self.heads = layer_heads
        self.W_K = torch.stack([head.W_K for head in layer_heads])  # (h, d_k, d)
        device, dim = self.W_K.device, self.W_K.shape[-1]
        self.asked = torch.zeros(queries, dim, device=device)  # those that this rank has read; zeros elsewhere
        self.moments = RunningMoments(dim, device)
        self.lse = torch.full((len(layer_heads), 2 * queries), -math.inf, dtype=torch.float64, device=device)
        self.passed: list[Tensor] = []  # `lse` at each length passed

    def add_queries(self, x: Tensor, start: int, places: np.ndarray) -> None:
        """Keep those of tokens (b, d), the first of them at `start`, that stand at the places of the queries."""
        inside = np.flatnonzero((start <= places) & (places < start + len(x)))
        self.asked[inside] = x[places[inside] - start].float()

    def share_queries(self) -> None:
        """Give every rank the queries of all, before it reads keys."""
        self.queries = distributed.total(self.asked)
        q = torch.stack([head.project(self.queries)[0] for head in self.heads])
        self._twice = torch.cat([q, 2 * q], -2)

    def add_keys(self, x: Tensor, lengths: Sequence[int]) -> None:
        """Read tokens (b, d) as keys, noting the log-sum-exps where one of the lengths falls; several may be alike."""
        start, stop = self.moments.count, self.moments.count + len(x)
        cuts = [start, *sorted({n for n in lengths if start < n < stop}), stop]
        for part, end in zip(x.split(np.diff(cuts).tolist()), cuts[1:]):
            keys = part @ self.W_K.to(part).mT
            lse = partial_attention(self._twice, keys, keys).lse
            # Thousands of blocks are merged: in float64, so that their rounding does not add up.
            self.lse = torch.logaddexp(self.lse, lse.double())
            self.passed += [self.lse] * lengths.count(end)
        self.moments.add(x)

    def gather(self, lengths: Sequence[int]) -> None:
        """Take in what all ranks have read, of which this one had so many keys at each length: on the first rank."""
        none = torch.full_like(self.lse, -math.inf)
        lse = distributed.gather(torch.stack([none] * lengths.count(0) + self.passed))
        count = distributed.gather(torch.tensor(self.moments.count, device=none.device))
        mean, scatter = distributed.gather(self.moments.mean), distributed.gather(self.moments.scatter)
        if lse:
            self.passed = list(reduce(torch.logaddexp, lse))
        for number, *moments in list(zip(count, mean, scatter))[1:]:
            if number > 0:
                self.moments.merge(number.item(), *moments)

    def arrays(self) -> dict[str, np.ndarray]:
        """For a checkpoint."""
        moments = {"mean": self.moments.mean, "scatter": self.moments.scatter}
        passed = torch.stack(self.passed) if self.passed else self.lse.new_zeros(0, *self.lse.shape)
        named = {"asked": self.asked, "lse": self.lse, "passed": passed, **moments}
        return {name: tensor.cpu().numpy() for name, tensor in named.items()} | {"count": np.array(self.moments.count)}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """From `arrays`, exactly."""
        found = {name: torch.as_tensor(array, device=self.asked.device) for name, array in arrays.items()}
        self.asked, self.lse, self.passed = found["asked"], found["lse"], list(found["passed"])
        self.moments.mean, self.moments.scatter = found["mean"], found["scatter"]
        self.moments.count = int(arrays["count"])

    def rows(self, lengths: Sequence[int]) -> Iterator[dict]:
        """A row of the table for each head, once all tokens have been read and gathered."""
        cov = self.moments.cov
        reach = geometry.reach(cov)  # the heads of a layer share it
        once, twice = torch.stack(self.passed).chunk(2, -1)
        effective = torch.exp(2 * once - twice).median(-1).values  # (lengths, h)
        for index, head in enumerate(self.heads):
            most = min(lengths[-1], head.window or math.inf)
            row = {"layer": head.layer, "head": head.head, "causal": bool(getattr(head, "causal", False))}
            if head.window is not None:
                row["window"] = head.window
            row |= head_geometry(head, self.queries, cov, reach)
            if getattr(head, "rotary", None) is not None:
                for distance in DISTANCES:
                    there = head_geometry(head.at(distance), self.queries, cov, reach)
                    row |= {f"{name}_{distance}": there[name] for name in ("horizon", "load_median")}
            row |= predictions(row["coupling"], row["load_median"], most)
            measured = zip(lengths, effective)
            yield row | {f"effective_{n}": found[index].item() if n <= most else math.nan for n, found in measured}


def layer_states(model: TextModel, layers: Sequence[int] | None, queries: int) -> dict[int, LayerState]:
    """A state for each layer, all layers if None; ValueError if one is not there."""
    every = heads(model)
    return {
        layer: LayerState([head for head in every if head.layer == layer], queries)
        for layer in existing_layers(layers, every)
    }


def existing_layers(layers: Sequence[int] | None, every: Sequence[Head]) -> list[int]:
    """Layers in order, all if None; ValueError if one is not there."""
    chosen = list(range(every[-1].layer + 1)) if layers is None else sorted(set(layers))
    unknown = [layer for layer in chosen if not 0 <= layer <= every[-1].layer]
    if unknown or not chosen:
        shown = ", ".join(map(str, unknown[:8])) + (" …" if len(unknown) > 8 else "")
        raise ValueError(f"layers: expected some of 0 to {every[-1].layer}, got {shown or 'none'}")
    return chosen
