"""A model in context: how much of its past each head needs, from late queries that read the keys they really have.

Any model that hands over queries, keys and values (`models.capture`) can be probed, whatever its positions,
normalisations, masks and windows. The text is cut into windows that fill the context, and each is read once; windows
stand for independent pieces of the text, and intervals are over them. `probe.queries` says what is noted of a layer,
`probe.policies` how the errors of a query that reads some of its keys are found.

With a folder for checkpoints, a probe that is killed goes on from its last whole window with the same numbers. Under
torchrun the windows are dealt out to the ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from tokcx_lib import checkpoints, records, runtime
from tokcx_lib.models import architectures
from tokcx_lib.models.capture import Attention, capture
from tokcx_lib.models.loading import TextModel, evaluating
from tokcx_lib.models.text_parts import without_cache
from tokcx_lib.probe.policies import POLICIES, jackknife, keys_needed, lengths_up_to, whole
from tokcx_lib.probe.predictions import drawn_errors
from tokcx_lib.probe.queries import layer_notes
from tokcx_lib.sampling import distributed
from tokcx_lib.theory import budgets

SHOWN = tuple(4**k for k in range(3, 16))  # 64, 256, 1024 …: numbers of keys that have columns of their own
PLAN = "plan.json"


def probe_in_context(
    model: TextModel,
    ids: np.ndarray,
    context: int,
    windows: int,
    queries: int,
    error: float,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    plan: bytes = b"",
) -> pd.DataFrame | None:
    """What the heads of a model do with the keys that their queries have: one row a head.

    Parameters
    ----------
    model : from `loading.load_model`; ids : token ids (n,), at least windows x context, special tokens apart.
    context : tokens that the model sees at once, its special tokens included; windows : how many of them to read.
    queries : late queries of each window, evenly spread over its last eighth (over all of it in an encoder).
    error : root mean square error, in units of the spread of the values, that the budgets are for.
    layers : default all; seed : of the keys that are drawn.
    checkpoint : folder for the windows that are done, None for none; plan : what they belong to.

    Returns
    -------
    DataFrame, or None on ranks other than the first
        layer, head, group (whose keys it reads); window, if any layer has a sliding one; then of the late queries keys
        (the median number that they see), load, load_05, load_95, load_with_first, reduced, phase, effective and
        share_first, share_near, share_own; load_N and effective_N of queries with N = 64, 256, 1024, … keys, if they
        look back alone (NaN where a sliding window has fewer); error_POLICY_N and, where N is less than the keys,
        law_N, the error of keys drawn at random if they and their values were Gaussian, as many and with the same
        loads; keys_POLICY, with keys_POLICY_low and keys_POLICY_high.
        `attrs` has seconds_model and seconds_statistics, which do not add up over ranks; and left_out, with each
        window left out in turn the budgets of each head, by policy: what intervals of sums over heads are made of.

    Raises
    ------
    ValueError
        If a layer does not exist, or the model computes its attention itself or has NaN or infinity in it.
    """
    before, after = architectures.special_tokens(model.model.config, model.tokenizer)
    width = context - len(before) - len(after)
    blocks = ids[: windows * width].reshape(windows, width)
    inside = range(len(before), len(before) + width)
    store = _Store(checkpoint, plan)
    mine = {window: store.load(window) for window in distributed.shard(range(windows))}
    left = [window for window, found in mine.items() if found is None]
    count = getattr(model.model.config, "num_hidden_layers", 1) if layers is None else len(layers)
    with tqdm(total=len(left) * count, unit=" layers", desc="probe", leave=False) as bar:
        for window in left:
            row = [*before, *blocks[window].tolist(), *after]
            mine[window] = _read(model.model, row, inside, queries, layers, (seed, window), bar)
            store.save(window, mine[window])
    every = {window: found for part in distributed.gather_objects(mine) for window, found in part.items()}
    return _table([every[window] for window in range(windows)], error) if distributed.rank() == 0 else None


def _read(model, ids, text: range, queries: int, layers, keys, bar) -> dict[str, np.ndarray]:
    """What is noted of all layers in one window, whose text is at some places: arrays by name, "LAYER NOTE"."""
    device, lengths = next(model.parameters()).device, lengths_up_to(len(ids))
    draws = torch.rand(queries, len(ids), generator=runtime.stream(*keys)).to(device)
    noted: dict[int, list[dict[str, np.ndarray]]] = {}  # some models have two attentions in a layer
    spent = 0.0

    def read(attention: Attention) -> None:
        nonlocal spent
        if layers is not None and attention.layer > max(layers):
            raise _Reached
        if layers is None or attention.layer in layers:
            began = time.monotonic()
            with runtime.one_thread():
                noted.setdefault(attention.layer, []).append(layer_notes(attention, text, draws, lengths, SHOWN))
            spent += time.monotonic() - began
            bar.update()

    began = time.monotonic()
    with evaluating(model), torch.inference_mode(), capture(model, read):
        try:
            model(torch.tensor([ids], device=device), **without_cache(model))
        except _Reached:
            pass
    if layers is not None and (missing := sorted(set(layers) - set(noted))):
        raise ValueError(f"layers: expected layers with softmax attention, got {', '.join(map(str, missing))}")
    seconds = np.array([time.monotonic() - began - spent, spent])
    found = {
        f"{layer} {note}": np.concatenate([each[note] for each in calls])
        for layer, calls in noted.items()
        for note in calls[0]
    }
    return found | {"seconds": seconds, "lengths": np.array(lengths)}


class _Reached(Exception):
    """Raised in the forward pass once the last layer asked for has been read: what follows is not needed."""


class _Store:
    """A folder for the windows of a plan that are done; without a folder, nothing is found and nothing kept."""

    def __init__(self, folder: Path | None, plan: bytes):
        self.folder, self.plan = folder, plan
        if folder is not None and distributed.rank() == 0:
            if not (folder / PLAN).is_file() or (folder / PLAN).read_bytes() != plan:
                discard_windows(folder)
                folder.mkdir(parents=True, exist_ok=True)
                records.write_whole(folder / PLAN, plan)
        distributed.barrier()

    def load(self, window: int) -> dict[str, np.ndarray] | None:
        """A window that is done; None if it is not, or its file is damaged: it is then read again."""
        if self.folder is None:
            return None
        try:
            return checkpoints.unpack(checkpoints.read(self._path(window), self.plan)[0])
        except (OSError, ValueError):
            return None

    def save(self, window: int, found: dict[str, np.ndarray]) -> None:
        if self.folder is not None:
            checkpoints.write(self._path(window), checkpoints.pack(found), self.plan, note=f"window {window}")

    def _path(self, window: int) -> Path:
        return self.folder / f"window_{window:05}.npz"


def discard_windows(folder: Path) -> None:
    """Remove a folder of checkpoints, with what `probe_in_context` wrote there."""
    for path in [*folder.glob("window_*.npz*"), folder / PLAN, folder / f"{PLAN}.tmp"]:
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


# ---- the table ----


def _table(windows: list[dict[str, np.ndarray]], error: float) -> pd.DataFrame:
    lengths = windows[0]["lengths"].tolist()
    by_layer: dict[int, dict[str, np.ndarray]] = {}
    for name in (name for name in windows[0] if " " in name):
        layer, note = name.split()
        by_layer.setdefault(int(layer), {})[note] = np.stack([window[name] for window in windows])
    table = pd.DataFrame([row for layer in sorted(by_layer) for row in _rows(layer, by_layer[layer], lengths, error)])
    if "window" in table and table["window"].isna().all():
        table = table.drop(columns="window")
    table.attrs = {
        f"seconds_{part}": float(sum(window["seconds"][i] for window in windows))
        for i, part in enumerate(("model", "statistics"))
    }
    table.attrs["left_out"] = [table.pop(name).tolist() for name in list(table) if name.startswith("left_out_")]
    return table


def _rows(layer: int, found: dict[str, np.ndarray], lengths: list[int], error: float) -> Iterator[dict]:
    """The rows of a layer, from what was noted of it: arrays (windows, heads, queries or lengths)."""
    for head in range(found["group"].shape[1]):
        yield _row(layer, head, {note: array[:, head] for note, array in found.items()}, lengths, error)


def _row(layer: int, head: int, noted: dict[str, np.ndarray], lengths: list[int], error: float) -> dict:
    """The row of a head, from arrays (windows, queries or lengths)."""
    # The upper one of two medians, so that budgets end at a whole number.
    keys, load, window = np.quantile(noted["keys"], 0.5, method="higher"), np.median(noted["load"]), noted["window"][0]
    row = {"layer": layer, "head": head, "group": int(noted["group"][0]), "window": window, "keys": keys}
    row |= {"load": load, "load_05": np.quantile(noted["load"], 0.05), "load_95": np.quantile(noted["load"], 0.95)}
    row |= {"load_with_first": np.median(noted["load_with_first"])}
    row |= {"reduced": load / math.sqrt(2 * math.log(keys)), "phase": budgets.phase(load, keys)}
    row |= {"effective": np.median(noted["effective"])}
    row |= {f"share_{where}": noted[f"share_{where}"].mean() for where in ("first", "near", "own")}
    shown = [n for n in SHOWN if n < lengths[-1]]
    for n in shown:
        if f"load_{n}" in noted:
            for note in ("load", "effective"):  # in a sliding window no query has more keys than that
                row[f"{note}_{n}"] = math.nan if n > window else np.median(noted[f"{note}_{n}"])
    for policy in POLICIES:
        squares = noted[f"squares_{policy}"].mean(0)
        row |= {f"error_{policy}_{n}": math.sqrt(squares[lengths.index(n)]) for n in shown}
    comparable = [n for n in shown if n < keys]
    law = drawn_errors(comparable, keys, noted["load"], noted["along"]) if comparable else ()
    row |= dict.fromkeys((f"law_{n}" for n in shown), math.nan) | {f"law_{n}": e for n, e in zip(comparable, law)}
    fewer = [n for n in lengths if n < keys]  # a sliding window, or a late position, ends the past before the context
    budgets_of = {}
    for policy in POLICIES:
        squares = np.pad(noted[f"squares_{policy}"][:, : len(fewer)], ((0, 0), (0, 1)))
        budgets_of[policy] = lambda kept, squares=squares: keys_needed([*fewer, keys], squares[kept].mean(0), error)
        needed = jackknife(budgets_of[policy], np.arange(len(squares)))
        for suffix, number in zip(("", "_low", "_high"), needed):
            row[f"keys_{policy}{suffix}"] = np.clip(whole(number), 1.0, keys)
    every = np.arange(len(noted["keys"]))
    for left_out in every if len(every) > 1 else ():
        row[f"left_out_{left_out}"] = [find(np.delete(every, left_out)) for find in budgets_of.values()]
    return row
