"""The pooled law of a text: all keys of all windows that a model reads, as one law, and each head's geometry under it.

A query meets keys of every window, and every position: more keys than the model ever reads at once, but a law that
more text only makes better known. Absolute positions are part of the tokens, so the law mixes them in the shares that
they have in a window. Rotary ones belong to a pair, and a pool has none: all keys stand at one distance from the query.

The covariance stands where a bound would want the sub-Gaussian matrix, so H, Psi and the loads describe these tokens;
they are not constants of a theorem.

`pooled_probe` reads a text as a stream: one forward pass serves every layer and head, and what is kept
(`probe.layers`) does not grow with the number of tokens. With a folder for checkpoints, a probe that is killed goes on
from there with the same numbers (`probe.resuming`).

Under ``torchrun`` the windows are dealt out to the ranks. Each reads its own, and the first one merges what all have
found: the numbers are those of one process, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from tokcx_lib import runtime
from tokcx_lib.models.loading import TextModel, require_text_model
from tokcx_lib.models.tokens import first_ids, layer_streams, require_known, require_tokens
from tokcx_lib.probe.layers import LayerState, layer_states
from tokcx_lib.probe.plan import default_context, plan
from tokcx_lib.probe.resuming import Checkpoint
from tokcx_lib.sampling import distributed
from tokcx_lib.validation import as_count

MOST_SEED = 2**63 - 2  # the next one has a stream of its own


def pooled_probe(
    model: TextModel,
    text,
    layers: Sequence[int] | None = None,
    tokens: int = 100_000,
    queries: int = 1024,
    seed: int = 0,
    context: int | None = None,
    checkpoint: Path | None = None,
) -> pd.DataFrame | None:
    """Geometry of heads on a text: one row a head, from one pass over its tokens, which are never held together.

    The windows that the model reads are put in random order, whole (a last one that is shorter stays last), so the
    first N keys are those of a random set of windows of the text. The queries are tokens drawn without looking at any:
    their places come from the seed, and their windows are read first.

    Parameters
    ----------
    model : from `loading.load_model`; text : a string or token ids (n,).
    layers : default all.
    tokens : how many tokens of the text to use, from its beginning.
    queries : how many of them, drawn at random, stand for all queries.
    seed : 0 or more, below 2^63 - 1.
    context : tokens that the model sees at once; default 256, or as many as it can.
    checkpoint : folder for checkpoints, None for none. A probe of the same model, text and numbers goes on from what it
        finds there, and has the same result as one that was never interrupted; any other starts anew. The folder is
        left when the probe is done, for its caller to remove (`resuming.discard_checkpoint`) once the table is safe.

    Returns
    -------
    DataFrame, or None on ranks other than the first
        layer, head, causal; reach, horizon (two-sided), horizon_one_sided, coupling, coupling_one_sided,
        load_median, load_05 … load_95, value_spread and value_cov (see `head_geometry`); the columns of `predictions`
        for the coupling and the median load; and effective_N: the median over queries of 1/sum w^2 over N keys, for
        N = 1000, 10000, ... and all tokens. Heads with rotary positions are described at distance 0 between query and
        key, and have horizon_D and load_median_D beside that at the distances of DISTANCES. Causal heads are described
        as if their queries saw all keys: a query at position i has i of them. Where heads have sliding windows there is
        a column `window`, NaN for those without. A head never reads more keys than that: its phase is that of so many
        tokens, its effective_N is NaN for every larger N, and the size of the window is one of the N.

    Raises
    ------
    ValueError
        If the text is shorter than the tokens asked for or mostly unknown, a layer does not exist, or a number is out
        of range.
    """
    tokens, queries = as_count("tokens", tokens, least=2), min(as_count("queries", queries), tokens)
    require_text_model(model)
    if as_count("seed", seed, least=0) > MOST_SEED:
        raise ValueError(f"seed: expected an integer from 0 to {MOST_SEED}, got {seed}")
    context = default_context(model) if context is None else context
    states = layer_states(model, layers, queries)
    ids = np.asarray(first_ids(model, text, tokens) if isinstance(text, str) else text)[:tokens].astype(np.int64)
    require_tokens(len(ids), tokens)
    require_known(model, ids)

    # The ids that fill a window, special tokens apart.
    width = len(next(iter(layer_streams(model, ids[:context], [min(states)], context, 1)))[0])
    order = _order(ids, width, queries, seed)
    lengths = _lengths(tokens, states)

    numbers = {"tokens": tokens, "layers": list(states), "queries": queries, "seed": seed, "context": context}
    saved = Checkpoint(checkpoint, plan(model, ids, numbers))
    reader = _Reader(model, context, states, saved)
    mine = _share(len(order.queries), width)
    places = np.where(mine[order.places], np.cumsum(mine)[order.places] - 1, -1)  # among my ids, or nowhere
    asked = np.bincount(places[places >= 0], minlength=mine.sum())
    for start, batch in reader.batches("queries", order.queries[mine], asked):
        for state, x in zip(states.values(), batch):
            state.add_queries(x, start, places)
    for state in states.values():
        state.share_queries()
    mine = _share(len(order.keys), width)
    mine_of = np.cumsum(mine)[np.array(lengths) - 1].tolist()  # my keys among the first n, for each length n
    for _, batch in reader.batches("tokens", order.keys[mine], np.ones(mine.sum(), dtype=int)):
        for state, x in zip(states.values(), batch):
            state.add_keys(x.float(), mine_of)
    saved.save(states, reader.read, now=True)
    for state in states.values():
        state.gather(mine_of)
    return _table(states, lengths) if distributed.rank() == 0 else None


class _Order(NamedTuple):
    """What a probe reads: ids of the windows with queries, their places in these; then all ids, windows shuffled."""

    queries: np.ndarray
    places: np.ndarray
    keys: np.ndarray


def _order(ids: np.ndarray, width: int, queries: int, seed: int) -> _Order:
    """The order of the ids of a text, in windows of `width`; a last one that is shorter stays last."""
    asked = torch.randperm(len(ids), generator=runtime.generator(seed + 1))[:queries].numpy()
    windows, index = np.unique(asked // width, return_inverse=True)
    first = np.concatenate([ids[start : start + width] for start in windows * width])
    whole = len(ids) // width
    shuffled = torch.randperm(whole, generator=runtime.generator(seed)).numpy()
    keys = np.concatenate([ids[: whole * width].reshape(whole, width)[shuffled].reshape(-1), ids[whole * width :]])
    return _Order(first, index * width + asked % width, keys)


def _share(count: int, width: int) -> np.ndarray:
    """Which of so many tokens, (count,), this rank reads: every world()-th window, so that all advance alike."""
    return np.arange(count) // width % distributed.world() == distributed.rank()


def _lengths(tokens: int, states: dict[int, LayerState]) -> list[int]:
    """Numbers of keys at which the effective tokens are noted: powers of ten, sizes of windows, all tokens."""
    seen = {head.window for state in states.values() for head in state.heads if head.window is not None}
    return sorted({n for n in (*seen, *(10**k for k in range(3, 12))) if n < tokens} | {tokens})


class _Reader:
    """Reads some ids, then others, as one stream of which `read` tokens are done; starts where a checkpoint ended."""

    def __init__(self, model: TextModel, context: int, states: dict[int, LayerState], saved: Checkpoint):
        self.model, self.context, self.states, self.saved = model, context, states, saved
        self.read, self.before = saved.load(states), 0  # before: tokens of the ids that came earlier

    def batches(self, what: str, ids: np.ndarray, number: np.ndarray) -> Iterator[tuple[int, list[Tensor]]]:
        """Where a batch begins among these ids, and what each layer sees of it (b, d), for those that were not read.

        Once the caller has taken a batch in, it counts as read, and the states are saved now and then. The bar counts
        `what`, of which each id brings the given number: windows with queries are read twice, and no token counts so.
        """
        left = ids[max(self.read - self.before, 0) :]
        counted = np.concatenate([[0], np.cumsum(number)])
        start = len(ids) - len(left)
        shows = {"total": int(counted[-1]), "initial": int(counted[start]), "unit": f" {what}", "desc": what}
        with _bar(**shows, unit_scale=True) as bar:
            for batch in layer_streams(self.model, left, list(self.states), self.context) if len(left) else ():
                yield start, batch
                stop = start + len(batch[0])
                self.read = self.before + stop
                bar.update(int(counted[stop] - counted[start]))
                start = stop
                self.saved.save(self.states, self.read)
        self.before += len(ids)


def _bar(**options) -> tqdm:
    """A bar of progress, of the first rank alone."""
    return tqdm(leave=False, **options, **({} if distributed.rank() == 0 else {"disable": True}))


def _table(states: dict[int, LayerState], lengths: Sequence[int]) -> pd.DataFrame:
    rows = []
    count = sum(len(state.heads) for state in states.values())
    with _bar(total=count, unit=" heads", desc="heads") as bar:
        for state in states.values():
            for row in state.rows(lengths):
                rows.append(row)
                bar.update()
    return pd.DataFrame(rows)
