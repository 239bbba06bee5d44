"""The study of one model on one text: the geometry of every head.

Tokens are pooled over the windows that the model reads. The covariance stands where a bound would want the
sub-Gaussian matrix, so H, Psi and the loads describe these tokens; they are not constants of a theorem.

`probe` reads a text as a stream: one forward pass serves every layer and head, and what is kept does not grow with the
number of tokens. A mean and a covariance are merged block by block (`RunningMoments`), and so is the log-sum-exp of
each query. With a folder for checkpoints, a probe that is killed goes on from there with the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

import tokcx_lib
from tokcx_lib import records, runtime
from tokcx_lib.models import architectures
from tokcx_lib.models.heads import Head, head_geometry, heads
from tokcx_lib.models.loading import TextModel, require_text_model
from tokcx_lib.models.tokens import CONTEXT, RunningMoments, first_ids, layer_streams, require_known, require_tokens
from tokcx_lib.sampling.streaming import partial_attention
from tokcx_lib.theory import budgets, geometry, rates
from tokcx_lib.validation import as_count

MOST_SEED = 2**63 - 2  # the next one has a stream of its own
CHECKPOINT_SECONDS = 20.0  # of work between two checkpoints, or more where writing one takes long
DISTANCES = (64, 1024)  # between query and key, at which heads with rotary positions are described as well
_CHECKPOINT_FILES = ("plan.json", "state.npz")


def phase(load: float, tokens: float) -> str:
    """The phase of a query of some load over n tokens: "averaging", "extremal" or "frozen".

    They meet where the reduced load s / sqrt(2 log n) is 1/2 and 1, which is at the budgets of `budgets.token_budget`.

    Source: chapter 9.
    """
    reduced = load / math.sqrt(2 * math.log(tokens)) if tokens > 1 else math.inf
    return "averaging" if reduced < 0.5 else "extremal" if reduced < 1 else "frozen"


def predictions(coupling: float, load: float, tokens: int) -> dict[str, float | str]:
    """What the theory says of a head with some coupling and median load on `tokens` tokens.

    Three exponents of the error n^-beta (`rates.exponent`), two token budgets of the load (`budgets.token_budget`),
    the tokens to a relative error of 10% (`budgets.sample_complexity`; infinite beyond its range) and the `phase`.
    """
    psi = max(coupling, 1e-300)  # the exponents of a head that looks at nothing are their limits
    budget = budgets.token_budget(load)
    try:
        needed = budgets.sample_complexity(load, 0.1)
    except ValueError:
        needed = math.inf
    return {
        "exponent_reported": rates.exponent(psi, "reported"),
        "exponent_balance": rates.exponent(psi, "balance"),
        "exponent_sharp": rates.exponent(psi, "gaussian"),
        "tokens_unfrozen": budget.unfrozen,
        "tokens_clt": budget.clt,
        "tokens_10_percent": needed,
        "phase": phase(load, tokens),
    }


class _LayerState:
    """What is kept of one layer: its queries, the moments of its tokens, and log-sum-exps of queries over keys."""

    def __init__(self, layer_heads: list[Head], queries: int):
        self.heads = layer_heads
        self.W_K = torch.stack([head.W_K for head in layer_heads])  # (h, d_k, d)
        device, dim = self.W_K.device, self.W_K.shape[-1]
        self.asked = torch.zeros(queries, dim, device=device)
        self.moments = RunningMoments(dim, device)
        self.lse = torch.full((len(layer_heads), 2 * queries), -math.inf, dtype=torch.float64, device=device)
        self.effective: list[Tensor] = []  # medians over queries (h,), float64, for each length passed
        self._queries: Tensor | None = None

    def add_keys(self, x: Tensor, lengths: Sequence[int]) -> None:
        """Read tokens (b, d) as keys, noting the effective tokens where one of the lengths falls."""
        if self._queries is None:  # made once all queries are known
            q = torch.stack([head.project(self.asked)[0] for head in self.heads])
            self._queries = torch.cat([q, 2 * q], -2)
        start, stop = self.moments.count, self.moments.count + len(x)
        cuts = [start, *(n for n in lengths if start < n < stop), stop]
        for part, end in zip(x.split(np.diff(cuts).tolist()), cuts[1:]):
            keys = part @ self.W_K.to(part).mT
            lse = partial_attention(self._queries, keys, keys).lse
            # Thousands of blocks are merged: in float64, so that their rounding does not add up.
            self.lse = torch.logaddexp(self.lse, lse.double())
            if end in lengths:
                once, twice = self.lse.chunk(2, -1)
                self.effective.append(torch.exp(2 * once - twice).median(-1).values)
        self.moments.add(x)

    def arrays(self) -> dict[str, np.ndarray]:
        """For a checkpoint."""
        moments = {"mean": self.moments.mean, "scatter": self.moments.scatter}
        effective = torch.stack(self.effective) if self.effective else self.lse.new_zeros(0, len(self.heads))
        named = {"asked": self.asked, "lse": self.lse, "effective": effective, **moments}
        return {name: tensor.cpu().numpy() for name, tensor in named.items()} | {"count": np.array(self.moments.count)}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """From `arrays`, exactly."""
        found = {name: torch.as_tensor(array, device=self.asked.device) for name, array in arrays.items()}
        self.asked, self.lse, self.effective = found["asked"], found["lse"], list(found["effective"])
        self.moments.mean, self.moments.scatter = found["mean"], found["scatter"]
        self.moments.count = int(arrays["count"])

    def rows(self, lengths: Sequence[int]) -> Iterator[dict]:
        """A row of the table for each head, once all tokens have been read."""
        cov = self.moments.cov
        half = geometry.root(cov)  # the heads of a layer share it
        for index, head in enumerate(self.heads):
            most = min(lengths[-1], head.window or math.inf)
            row = {"layer": head.layer, "head": head.head, "causal": bool(getattr(head, "causal", False))}
            if head.window is not None:
                row["window"] = head.window
            row |= head_geometry(head, self.asked, cov, half)
            if getattr(head, "rotary", None) is not None:
                for distance in DISTANCES:
                    there = head_geometry(head.at(distance), self.asked, cov, half)
                    row |= {f"{name}_{distance}": there[name] for name in ("horizon", "load_median")}
            row |= predictions(row["coupling"], row["load_median"], most)
            measured = zip(lengths, self.effective)
            yield row | {f"effective_{n}": found[index].item() if n <= most else math.nan for n, found in measured}


class _Checkpoint:
    """States of layers in a folder, written whole every so often, and trusted only if they are of the same plan."""

    def __init__(self, folder: Path | None, plan: dict):
        self.folder = None if folder is None else Path(folder)
        self.plan = json.dumps(plan, sort_keys=True, indent=2).encode()
        self.cost, self.last = 0.0, time.monotonic()

    def load(self, states: dict[int, _LayerState]) -> int:
        """How many tokens an earlier run of this plan has read, with its states restored; 0 if there is none."""
        if self.folder is None:
            return 0
        plan, state = (self.folder / name for name in _CHECKPOINT_FILES)
        if plan.is_file() and state.is_file() and plan.read_bytes() == self.plan:
            try:
                with np.load(BytesIO(state.read_bytes()), allow_pickle=False) as stored:
                    if stored["plan"].item() == hashlib.sha256(self.plan).hexdigest():
                        arrays = {name: stored[name] for name in stored.files}  # all of them, checksums verified
                        for layer, each in states.items():
                            mark = f"{layer}_"
                            each.restore({k.removeprefix(mark): a for k, a in arrays.items() if k.startswith(mark)})
                        return int(arrays["read"])
            except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, zlib.error):
                tqdm.write(f"{state} is damaged: starting anew", file=sys.stderr)
        discard_checkpoint(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        records.write_whole(plan, self.plan)
        return 0

    def save(self, states: dict[int, _LayerState], read: int, now: bool = False) -> None:
        """Write the states, unless the last time is less than CHECKPOINT_SECONDS, or 20 times its cost, ago."""
        start = time.monotonic()
        if self.folder is None or not now and start - self.last < max(CHECKPOINT_SECONDS, 20 * self.cost):
            return
        arrays = {f"{layer}_{name}": a for layer, each in states.items() for name, a in each.arrays().items()}
        content = BytesIO()
        np.savez(content, plan=hashlib.sha256(self.plan).hexdigest(), read=np.array(read), **arrays)
        records.write_whole(self.folder / _CHECKPOINT_FILES[1], content.getvalue())
        self.last = time.monotonic()
        self.cost = self.last - start


def discard_checkpoint(folder: Path) -> None:
    """Remove a folder of checkpoints, with what `probe` wrote there."""
    for name in _CHECKPOINT_FILES:
        for path in (folder / name, folder / (name + ".tmp")):
            path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def probe(
    model: TextModel,
    text,
    layers: Sequence[int] | None = None,
    tokens: int = 100_000,
    queries: int = 1024,
    seed: int = 0,
    context: int | None = None,
    checkpoint: Path | None = None,
) -> pd.DataFrame:
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
        left when the probe is done, for its caller to remove (`discard_checkpoint`) once the table is safe.

    Returns
    -------
    DataFrame
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
    states = _layer_states(model, layers, queries)
    ids = np.asarray(first_ids(model, text, tokens) if isinstance(text, str) else text)[:tokens].astype(np.int64)
    require_tokens(len(ids), tokens)
    require_known(model, ids)
    # The ids that fill a window, special tokens apart.
    width = len(next(iter(layer_streams(model, ids[:context], [min(states)], context, 1)))[0])
    seen = {head.window for state in states.values() for head in state.heads if head.window is not None}
    lengths = sorted({n for n in (*seen, *(10**k for k in range(3, 12))) if n < tokens} | {tokens})

    asked = torch.randperm(tokens, generator=runtime.generator(seed + 1))[:queries].numpy()
    windows, places = _query_windows(asked, width)
    starts = windows * width
    first = np.concatenate([ids[start : start + width] for start in starts])
    whole = tokens // width
    order = torch.randperm(whole, generator=runtime.generator(seed)).numpy()
    rest = np.concatenate([ids[: whole * width].reshape(whole, width)[order].reshape(-1), ids[whole * width :]])

    saved = _Checkpoint(checkpoint, plan(model, ids, list(states), tokens, queries, seed, context))
    read = saved.load(states)
    with _bar("queries", len(first), read) as bar:
        for batch in _batches(model, first[read:], list(states), context):
            inside = np.flatnonzero((read <= places) & (places < read + len(batch[0])))
            for state, x in zip(states.values(), batch):
                state.asked[inside] = x[places[inside] - read].float()
            read += len(batch[0])
            bar.update(len(batch[0]))
            saved.save(states, read)
    with _bar("tokens", tokens, read - len(first)) as bar:
        for batch in _batches(model, rest[read - len(first) :], list(states), context):
            for state, x in zip(states.values(), batch):
                state.add_keys(x.float(), lengths)
            read += len(batch[0])
            bar.update(len(batch[0]))
            saved.save(states, read)
    saved.save(states, read, now=True)
    count = sum(len(state.heads) for state in states.values())
    with tqdm(total=count, unit=" heads", desc="heads", leave=False) as bar:
        rows = []
        for state in states.values():
            for row in state.rows(lengths):
                rows.append(row)
                bar.update()
    return pd.DataFrame(rows)


def _layer_states(model: TextModel, layers: Sequence[int] | None, queries: int) -> dict[int, _LayerState]:
    every = heads(model)
    layers = _existing(layers, every)
    return {layer: _LayerState([head for head in every if head.layer == layer], queries) for layer in layers}


def _existing(layers: Sequence[int] | None, every: Sequence[Head]) -> list[int]:
    """Layers in order, all if None; ValueError if one is not there."""
    chosen = list(range(every[-1].layer + 1)) if layers is None else sorted(set(layers))
    unknown = [layer for layer in chosen if not 0 <= layer <= every[-1].layer]
    if unknown or not chosen:
        shown = ", ".join(map(str, unknown[:8])) + (" …" if len(unknown) > 8 else "")
        raise ValueError(f"layers: expected some of 0 to {every[-1].layer}, got {shown or 'none'}")
    return chosen


def _query_windows(asked: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows that hold tokens at some positions, and where these are once only those windows are read."""
    windows, index = np.unique(asked // width, return_inverse=True)
    return windows, index * width + asked % width


def _batches(model: TextModel, ids: np.ndarray, layers: list[int], context: int) -> Iterator[list[Tensor]]:
    return layer_streams(model, ids, layers, context) if len(ids) else iter(())


def _bar(what: str, total: int, read: int) -> tqdm:
    return tqdm(total=total, initial=min(read, total), unit=" tokens", desc=what, unit_scale=True, leave=False)


def default_context(model: TextModel) -> int:
    """How many tokens a model sees at once in a probe that does not say: CONTEXT, or as many as it can."""
    return min(CONTEXT, architectures.most_positions(architectures.base_model(model).config))


def plan(
    model: TextModel, ids: np.ndarray, layers: Sequence[int] | None, tokens: int, queries: int, seed: int, context: int
) -> dict:
    """All that the numbers of a probe depend on; `ids` are those of its `tokens` tokens."""
    device = next(model.model.parameters()).device
    return {
        **model.provenance,
        "tokens_sha256": hashlib.sha256(np.asarray(ids).astype(np.int64).tobytes()).hexdigest(),
        "tokens": tokens,
        "layers": _existing(layers, heads(model)),
        "queries": min(queries, tokens),
        "seed": seed,
        "context": context,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokcx": tokcx_lib.__version__,
    }


def differing(there: dict, here: dict) -> list[str]:
    """What of a probe's question, as two plans have it, is not the same: of model, text, tokens, layers, and so on.

    The same question asked with another number of threads or another version of PyTorch is the same.
    """
    weights = (
        "model_sha256" if here["model_sha256"] else "model"
    )  # of the same weights the folder may have another name
    found = ["model"] if there.get(weights) != here[weights] else []
    found += [name for name in ("tokens", "layers", "queries", "seed", "context") if there.get(name) != here[name]]
    # Other models and other numbers of tokens have other ids on the same text.
    if there.get("tokens_sha256") != here["tokens_sha256"] and not {"model", "tokens"} & set(found):
        found.append("text")
    return found


def read_plan(file: Path) -> dict | None:
    """What a file written from a `plan` says; None if there is no such file, or it cannot be read."""
    try:
        found = json.loads(file.read_bytes()) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
