"""Real heads whose logits are multiplied by a factor that grows with the number of keys (chapter 15).

Two models, in the two ways in which a query can meet more keys. MiniLM sees 512 positions at most, and attends to all
of them at once: its queries read a *pool* of keys from many windows, as in chapter 7, and can so be followed to more
keys than it was made for. SmolLM2 reads thousands of tokens in order: its queries read their own *past*, with all that
comes with it, such as a first position that takes much of the weight. In both, the factor is put on the logits that the
model makes without it: what one head would do, and not what a model would do all of whose heads are scaled.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pandas as pd
import torch

from tokcx_lib import runtime
from tokcx_lib.models import architectures
from tokcx_lib.models.capture import Attention, capture
from tokcx_lib.models.loading import EMBEDDED, LANGUAGE, evaluating, load_model
from tokcx_lib.models.text_parts import without_cache
from tokcx_lib.models.windows import WIKIPEDIA, WINDOW, spread_passages
from tokcx_lib.probe.queries import queries_with
from tokcx_lib.studies.runs import Experiment, Part, Plan
from tokcx_lib.studies.scaling.scaled import logit_spread, scaled_attention
from tokcx_lib.theory import scaling, softmax_law

MODELS = (EMBEDDED, LANGUAGE)  # by the number of a unit: MiniLM over a pool, SmolLM2 in context
SCHEMES = ("none", "root", "llama4", "yarn", "log", "square")  # "qwen" is "log" from the anchor on
BATCH = 16  # windows of MiniLM run at once
LOADS = np.geomspace(0.005, 300, 500)  # of a table of the exact law, between which it is interpolated


def scaling_heads(config: dict, device) -> Plan:
    """Effective tokens of every head at several numbers of keys, under every scaling: one row per head, n and scheme.

    A unit is a model and a piece of text. Columns: factor, what logits are multiplied by (its mean over queries); load,
    the median over queries of the standard deviation of their logits, without the factor and the first position;
    effective, the median of 1 / sum w^2; participation, the mean of sum w^2; rest, the same over all keys but the
    first, and law, what the exact law of Gaussian logits has in its place for as many keys and the same loads, scaled;
    first, the mean weight of the first position; moved, the root mean square distance between the output with
    and without the factor; and, for pools, error, the root mean square difference of the outputs over two independent
    lists of n keys, over sqrt(2). The last two are in units of the spread of the values.
    """
    units = [(m, piece) for m, name in enumerate(MODELS) for piece in range(config["pieces"][name])]
    loaded = lru_cache(lambda name: load_model(name, device))
    texts: dict[str, str] = {}

    @lru_cache
    def passages(name: str, tokens: int, count: int) -> torch.Tensor:
        ids, found = spread_passages(loaded(name), WIKIPEDIA, tokens, count)
        texts.update(found)
        return ids

    def work(number: int, piece: int) -> Part:
        name = MODELS[number]
        with torch.inference_mode():
            rows = (_pooled if number == 0 else _in_context)(loaded(name), passages, name, piece, config)
        table = pd.DataFrame(rows)
        table.insert(0, "model", number)
        table.insert(1, "piece", piece)
        return Part(table)

    passages(EMBEDDED, WINDOW, _windows(config) * config["pieces"][EMBEDDED])  # names the text
    meta = {
        "texts": texts,
        "models": [loaded(MODELS[m]).provenance for m in sorted({unit[0] for unit in units})],
        "pieces": config["pieces"],
    }
    return Plan(units, work, meta)


# ---- MiniLM: a pool of keys ----


def _windows(config: dict) -> int:
    """Windows of a unit: two lists of keys, and one window for every query."""
    return 2 * _list_windows(config) + config["queries"]


def _list_windows(config: dict) -> int:
    return -(-config["lengths"][EMBEDDED][-1] // WINDOW)


def _pooled(model, passages, name: str, piece: int, config: dict) -> list[dict]:
    ids = passages(name, WINDOW, _windows(config) * config["pieces"][name])
    mine = ids[torch.randperm(len(ids), generator=runtime.stream(config["seed"]))]
    mine = mine[piece * _windows(config) : (piece + 1) * _windows(config)]
    asked, rest = mine[: config["queries"]], mine[config["queries"] :]
    places = torch.randint(WINDOW, (len(asked),), generator=runtime.stream(config["seed"], piece))
    queries = [layer["q"][torch.arange(len(asked)), :, places] for layer in _captured(model, asked, "q")]
    found = []
    for half in rest.split(_list_windows(config)):
        layers = _captured(model, half, "kv")
        found.append([_list_notes(q, _flat(x["k"]), _flat(x["v"]), config) for q, x in zip(queries, layers)])
    rows = []
    for layer, (one, two) in enumerate(zip(*found)):
        for n in config["lengths"][name]:
            for scheme in SCHEMES:
                a, b = one[n, scheme], two[n, scheme]
                spread = torch.cat([a["spread"], b["spread"]], 1).mean(1)
                gap = (a["output"] - b["output"]).square().sum(-1).mean(-1) / 2
                both = {key: torch.cat([a[key], b[key]], -1) for key in a if key not in ("output", "spread")}
                rows += _rows(layer, n, scheme, both, spread, (gap / spread).sqrt())
    return rows


def _captured(model, windows: torch.Tensor, parts: str) -> list[dict[str, torch.Tensor]]:
    """Queries, keys or values (q, k, v) of all text tokens, (windows, heads, WINDOW, d) for each layer."""
    before, after = architectures.special_tokens(model.model.config, model.tokenizer)
    ends = [torch.tensor(end, dtype=torch.int64)[None] for end in (before, after)]
    inside = slice(len(before), len(before) + WINDOW)
    layers: dict[int, list[dict[str, torch.Tensor]]] = {}

    def read(attention: Attention) -> None:
        found = {part: getattr(attention, part)[:, :, inside].clone() for part in parts}
        layers.setdefault(attention.layer, []).append(found)

    for block in windows.split(BATCH):
        ids = torch.cat([ends[0].expand(len(block), -1), block, ends[1].expand(len(block), -1)], 1)
        with evaluating(model.model), capture(model.model, read):
            model.model(ids.to(model.model.device), **without_cache(model.model))
    return [{part: torch.cat([each[part] for each in layers[i]]) for part in parts} for i in sorted(layers)]


def _flat(x: torch.Tensor) -> torch.Tensor:
    """(heads, windows x WINDOW, d)."""
    return x.transpose(0, 1).flatten(1, 2)


def _list_notes(q, k, v, config: dict) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
    """Of queries (r, heads, d) over the first n of a list of keys (heads, m, d): notes by n and scheme."""
    logits = q.transpose(0, 1) @ k.mT
    found = {}
    for n in config["lengths"][EMBEDDED]:
        some, values = logits[..., :n], v[:, :n]
        spread = (values - values.mean(1, keepdim=True)).square().sum(-1).mean(1, keepdim=True)
        found |= {(n, scheme): notes for scheme, notes in _notes(some, values, np.full(1, n), spread, config)}
    return found


# ---- SmolLM2: the past of a query ----


def _in_context(model, passages, name: str, piece: int, config: dict) -> list[dict]:
    before, after = architectures.special_tokens(model.model.config, model.tokenizer)
    size = config["lengths"][name][-1]
    text = passages(name, size - len(before) - len(after), config["pieces"][name])[piece]
    ids = torch.tensor([[*before, *text.tolist(), *after]], device=model.model.device)
    inside = range(len(before), size - len(after))
    rows: list[dict] = []

    def read(attention: Attention) -> None:
        group = attention.q.shape[1] // attention.k.shape[1]
        for n in config["lengths"][name]:
            early = attention.beginning(n)
            at = queries_with(n, inside, config["queries"])
            logits = early.logits(at)[0]
            values = early.v[0].repeat_interleave(group, 0)
            spread = (values - values.mean(1, keepdim=True)).square().sum(-1).mean(1)
            for scheme, notes in _notes(logits, values, at.numpy() + 1, spread[:, None], config):
                rows.extend(_rows(attention.layer, n, scheme, notes, spread))

    with evaluating(model.model), capture(model.model, read):
        model.model(ids, **without_cache(model.model))
    return rows


# ---- both ----


def _notes(logits, values, counts: np.ndarray, spread, config: dict):
    """Scheme by scheme, what is noted of queries with so many keys: tensors (heads, r), and output (heads, r, d)."""
    load, plain = logit_spread(logits), scaled_attention(logits, values, torch.tensor(1.0))
    for scheme in SCHEMES:
        factors = torch.as_tensor(scaling.factor(scheme, counts, config["anchor"]))
        factors = factors.expand(logits.shape[-2]).to(logits)
        made = plain if scheme == "none" else scaled_attention(logits, values, factors)
        yield (
            scheme,
            {
                "factor": factors.expand_as(load),
                "load": load,
                "participation": made.participation,
                "rest": made.rest,
                "law": _law(counts, factors * load),
                "first": made.first,
                "moved": (made.output - plain.output).square().sum(-1) / spread,
                "output": made.output,
                "spread": spread,
            },
        )


def _law(counts: np.ndarray, loads: torch.Tensor) -> torch.Tensor:
    """Participation of Gaussian logits of some loads (heads, r), the first of so many keys, (r,) or (1,), left out."""
    table = _law_table(tuple(counts.tolist()))
    at = np.log(np.clip(loads.double().numpy(), LOADS[0], LOADS[-1]))
    columns = np.arange(at.shape[1]) % len(table)
    found = [np.interp(at[:, i], np.log(LOADS), table[column]) for i, column in enumerate(columns)]
    return torch.as_tensor(np.exp(np.stack(found, 1)))


@lru_cache(maxsize=64)
def _law_table(counts: tuple[int, ...]) -> np.ndarray:
    """Logarithms of participations, (counts, LOADS)."""
    return np.log(softmax_law.softmax_moments(np.array(counts)[:, None] - 1.0, LOADS).participation)


def _rows(layer: int, n: int, scheme: str, notes: dict, spread, error=None) -> list[dict]:
    """The rows of all heads of a layer."""
    return [
        {
            "layer": layer,
            "head": head,
            "n": n,
            "scheme": scheme,
            "factor": notes["factor"][head].mean().item(),
            "load": notes["load"][head].median().item(),
            "effective": (1 / notes["participation"][head]).median().item(),
            "participation": notes["participation"][head].mean().item(),
            "rest": notes["rest"][head].mean().item(),
            "law": notes["law"][head].mean().item(),
            "first": notes["first"][head].mean().item(),
            "moved": notes["moved"][head].mean().sqrt().item(),
            "error": np.nan if error is None else error[head].item(),
        }
        for head in range(len(spread))
    ]


EXPERIMENTS = {
    "scaling_heads": Experiment(
        scaling_heads,
        ("model", "piece"),
        {
            "pieces": {EMBEDDED: 2, LANGUAGE: 2},
            "lengths": {EMBEDDED: [64, 256, 1024, 4096, 16_384], LANGUAGE: [64, 256, 1024, 4096]},
            "queries": 24,
            "anchor": 256,
            "seed": 20_261_500,
        },
        {
            "pieces": {EMBEDDED: 1, LANGUAGE: 1},
            "lengths": {EMBEDDED: [64, 256], LANGUAGE: [64, 256]},
            "queries": 8,
        },
        tolerance=2e-3,
    ),
}
