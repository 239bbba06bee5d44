"""Heads of the embedded model on the English Wikipedia (chapter 7)."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from tokcx_lib import runtime
from tokcx_lib.models.heads import head_geometry, heads
from tokcx_lib.models.loading import EMBEDDED, load_model
from tokcx_lib.models.tokens import CONTEXT, RunningMoments, collect_tokens, layer_streams, token_moments
from tokcx_lib.models.windows import WINDOW, random_windows, wikipedia_windows
from tokcx_lib.probe.pooled import pooled_probe
from tokcx_lib.sampling.streaming import effective_tokens, prefix_states
from tokcx_lib.studies.real_heads import convergence
from tokcx_lib.studies.runs import Experiment, Part, Plan
from tokcx_lib.theory import geometry
from tokcx_lib.theory.laws import Gaussian

LENGTHS = [250, 500, 1000, 2000, 4000, 8000, 15_000, 30_000]
LONG = [*LENGTHS, 60_000, 100_000]  # for a GPU, or for patience

# First windows of a random order of the text that experiments read: no two of these stretches share a window.
POOL, QUERIES, STREAM, FRESH = 0, 1_000, 2_000, 20_000


def _about(model, texts: dict) -> dict:
    """What a record says of the model and the texts that its numbers come from."""
    return {"texts": texts, **model.provenance, "context": CONTEXT}


def _cached_tokens(model, ids):
    """A function from a layer to the tokens that enter it; units go layer by layer, and one layer is held at a time."""

    @lru_cache(maxsize=1)
    def tokens(layer: int) -> torch.Tensor:
        return collect_tokens(model, ids, [layer])[0]

    return tokens


def _by_name(arrays, units) -> dict:
    """The numbers that units kept as arrays, to six digits, by the unit's name."""
    rounded = [
        {key: np.array([f"{x:.6g}" for x in value.flat], float).reshape(value.shape) for key, value in kept.items()}
        for kept in arrays
    ]
    names = [".".join(map(str, unit)) for unit in units]
    return {
        name: {key: value.tolist() for key, value in kept.items()} for name, kept in zip(names, rounded, strict=True)
    }


def real_heads_moments(config: dict, device) -> Plan:
    """Errors of the moments of self-attention for every head, and of its map.

    The law is that of a pool of `pool` tokens, random windows of the text; its limit is self-attention over the whole
    pool, and tokens are drawn from it one by one. Column map_error: the map at `queries` tokens of the pool, over the
    same draws; what the exact law of Gaussian keys predicts for it is in the JSON (twin_map_error, one number a
    length).
    """
    model = load_model(EMBEDDED, device)
    ids, texts = wikipedia_windows(model, config["pool"], config["seed"], POOL)
    tokens = _cached_tokens(model, ids[: config["pool"]])
    chosen = {(head.layer, head.head): head for head in heads(model)}

    @lru_cache(maxsize=1)
    def law(layer: int) -> Gaussian:
        mean, cov = token_moments(tokens(layer))
        return Gaussian(cov, mean)

    def work(layer: int, number: int) -> Part:
        head, pool = chosen[layer, number], tokens(layer)
        half, limit = convergence.pool_moments(head, pool)
        draws = (config["lengths"], config["replicates"], config["seed"])
        table = convergence.moment_errors(head, pool, limit, *draws)
        queries = pool[torch.randperm(len(pool), generator=runtime.stream(config["seed"], layer))[: config["queries"]]]
        maps = convergence.drawn_map_errors(head, queries, pool, *draws)
        table = table.assign(map_error=maps["map_error"])
        table.insert(0, "layer", layer)
        table.insert(1, "head", number)
        twin_limit = convergence.twin_limit(head, law(layer))
        mean_floor, cov_floor = half.errors(limit)
        twin_mean_gap, twin_cov_gap = limit.errors(twin_limit)
        kept = {
            "mean_floor": mean_floor,
            "cov_floor": cov_floor,
            "cov_norm": torch.linalg.matrix_norm(limit.cov),
            "output_spread": limit.cov.trace().sqrt(),
            "twin_cov_norm": torch.linalg.matrix_norm(twin_limit.cov),
            "twin_mean_gap": twin_mean_gap,
            "twin_cov_gap": twin_cov_gap,
        }
        arrays = {key: np.array(value.item()) for key, value in kept.items()}
        square = convergence.twin_map_error(head, queries, law(layer), config["lengths"])
        return Part(table, {**arrays, "twin_map_error": np.sqrt(square)})

    units = list(chosen)
    return Plan(units, work, _about(model, texts), summary=_named_summary("heads", units))


def real_heads_maps(config: dict, device) -> Plan:
    """Errors of the map at fixed queries over a stream of tokens, for every head, layer by layer.

    The stream is `segments` times as many random windows as hold the longest length; the queries are tokens of other
    windows. Column map_error: root mean square over queries of the distance between the output over the first n tokens
    of a segment and over all other segments. In the JSON, for every head: the noise floor, and the error that the exact
    law of Gaussian tokens predicts at each length (`convergence.twin_map_error`).
    """
    model = load_model(EMBEDDED, device)
    lengths, seed = config["lengths"], config["seed"]
    width = -(-lengths[-1] // WINDOW) * WINDOW  # whole windows that hold a segment
    asked, texts = wikipedia_windows(model, config["query_windows"] * WINDOW, seed, QUERIES)
    ids, _ = wikipedia_windows(model, width * config["segments"], seed, STREAM)
    pieces = ids.split(width)
    every = heads(model)

    def work(layer: int) -> Part:
        chosen = [head for head in every if head.layer == layer]
        queries = collect_tokens(model, asked, [layer])[0]
        queries = queries[torch.randperm(len(queries), generator=runtime.stream(seed, layer))[: config["queries"]]]
        moments = RunningMoments(queries.shape[1], queries.device)

        def blocks(piece):
            for (x,) in layer_streams(model, piece, [layer]):
                moments.add(x)
                yield x

        segments = [
            convergence.segment_states(chosen, queries, blocks(piece), lengths)
            for piece in tqdm(pieces, desc=f"layer {layer}", leave=False)
        ]
        errors, floor = convergence.map_errors(segments)
        law = Gaussian(moments.cov, moments.mean)
        reach = geometry.reach(moments.cov)
        kept = {"floor": floor.sqrt().tolist(), "predicted": [], "value_spread": [], "horizon": [], "load_median": []}
        for head in chosen:
            kept["predicted"].append(np.sqrt(convergence.twin_map_error(head, queries, law, lengths)).tolist())
            found = head_geometry(head, queries, moments.cov, reach)
            for name in ("value_spread", "horizon", "load_median"):
                kept[name].append(found[name])
        rows = [
            {"layer": layer, "head": head.head, "replicate": segment, "n": n, "map_error": error.sqrt().item()}
            for h, head in enumerate(chosen)
            for segment, part in enumerate(errors[..., h])
            for n, error in zip(lengths, part)
        ]
        return Part(pd.DataFrame(rows), {name: np.array(value) for name, value in kept.items()})

    units = sorted({(head.layer,) for head in every})
    meta = {**_about(model, texts), "replicates": config["segments"], "stream": len(ids)}
    return Plan(units, work, meta, summary=_named_summary("layers", units))


def real_heads_variants(config: dict, device) -> Plan:
    """Errors of the moments of every head when one thing is changed, each against its own limit.

    The base draws tokens one by one from a pool of `windows` windows (variant "alpha 1"). "alpha a": logits multiplied
    by a. "windows": whole windows drawn at a time, as tokens come in a text. "special": with the [CLS] and [SEP] of
    each window in the pool. "words": without tokens of punctuation. "twin": Gaussian tokens of the pool's mean and
    covariance.
    In the JSON, for every head and variant: the size of what is estimated.
    """
    model = load_model(EMBEDDED, device)
    ids, texts = wikipedia_windows(model, config["windows"] * WINDOW, config["seed"], POOL)
    words = ~is_punctuation(model)[ids]
    chosen = {(head.layer, head.head): head for head in heads(model)}
    draws = (config["lengths"], config["replicates"], config["seed"])

    @lru_cache(maxsize=1)
    def pools(layer: int) -> tuple[dict, Gaussian]:
        whole = torch.cat([x for (x,) in layer_streams(model, ids, [layer], special=True)])
        base = whole.reshape(-1, CONTEXT, whole.shape[1])[:, 1:-1].reshape(-1, whole.shape[1])
        mean, cov = token_moments(base)
        return {"base": base, "special": whole, "words": base[words]}, Gaussian(cov, mean)

    def work(layer: int, number: int) -> Part:
        head = chosen[layer, number]
        pool, law = pools(layer)
        cases = {f"alpha {alpha:g}": ("base", {"alpha": alpha}) for alpha in config["alphas"]}
        cases |= {"windows": ("base", {"window": WINDOW}), "special": ("special", {}), "words": ("words", {})}
        limits, tables = {}, {}
        for name, (tokens, options) in cases.items():
            alpha = options.get("alpha", 1.0)
            limits[name] = convergence.pool_moments(head, pool[tokens], alpha)[1]
            tables[name] = convergence.moment_errors(head, pool[tokens], limits[name], *draws, **options)
        limits["twin"] = convergence.twin_limit(head, law)
        tables["twin"] = convergence.twin_errors(head, law, *draws, device=device)
        table = pd.concat([table.assign(variant=name) for name, table in tables.items()], ignore_index=True)
        table = table.assign(layer=layer, head=number)[["layer", "head", "variant", *table.columns[:-1]]]
        sizes = [(torch.linalg.matrix_norm(m.cov).item(), m.cov.trace().sqrt().item()) for m in limits.values()]
        cov_norm, output_spread = np.array(sizes).T
        return Part(table, {"cov_norm": cov_norm, "output_spread": output_spread})

    units = list(chosen)
    variants = [*(f"alpha {alpha:g}" for alpha in config["alphas"]), "windows", "special", "words", "twin"]
    meta = {**_about(model, texts), "variants": variants}
    return Plan(units, work, meta, summary=_named_summary("heads", units))


def is_punctuation(model) -> torch.Tensor:
    """Whether each entry of a model's vocabulary consists of punctuation and symbols only, bool (entries,)."""
    marks = torch.zeros(model.tokenizer.vocab_size, dtype=torch.bool)
    for token, number in model.tokenizer.get_vocab().items():
        text = token.removeprefix("##")
        marks[number] = all(unicodedata.category(c)[0] in "PS" for c in text) and len(text) > 0
    return marks


def real_heads_sinks(config: dict, device) -> Plan:
    """Where every head's attention goes: mass on kinds of keys, in the model's own windows and over pooled tokens.

    Columns window_*: the model's own attention in windows of 256, mean over queries that are tokens of the text, of the
    mass on [CLS], on [SEP], on punctuation, on the first four tokens of the text, on the query's own position, on the
    one before it and the one after it. Columns pooled_*: `queries` tokens over all tokens of all windows, special ones
    among them. share_*: the share of such keys, which a head that looks at nothing gives them. effective, and
    effective_without: median over those queries of the effective number of pooled tokens, with special tokens and
    without.
    """
    model = load_model(EMBEDDED, device)
    ids, texts = wikipedia_windows(model, config["windows"] * WINDOW, config["seed"], POOL)
    every = heads(model)
    marks = is_punctuation(model)[ids].reshape(-1, WINDOW)
    kinds = torch.zeros(4, len(marks), CONTEXT)  # [CLS], [SEP], punctuation, first tokens of the text
    kinds[0, :, 0] = kinds[1, :, -1] = 1
    kinds[2, :, 1:-1] = marks.float()
    kinds[3, :, 1:5] = 1
    names = ("cls", "sep", "punctuation", "first")

    def work(layer: int) -> Part:
        whole = torch.cat([x for (x,) in layer_streams(model, ids, [layer], special=True)])
        inside = torch.zeros(CONTEXT, dtype=torch.bool, device=whole.device)
        inside[1:-1] = True
        flat, text = kinds.to(whole.device).reshape(4, -1).mT, inside.repeat(len(marks))
        asked = torch.randperm(len(marks) * WINDOW, generator=runtime.stream(config["seed"], layer))[
            : config["queries"]
        ]
        order = torch.randperm(len(whole), generator=runtime.stream(config["seed"], layer, 1)).to(whole.device)
        rows = []
        for head in (head for head in every if head.layer == layer):
            q, k, _ = head.project(whole)
            row = {"layer": layer, "head": head.head}
            weights = [
                torch.softmax(a @ b.mT, -1)[:, 1:-1]
                for a, b in zip(*(z.reshape(-1, CONTEXT, z.shape[1]).split(64) for z in (q, k)))
            ]
            weights = torch.cat(weights)  # windows, queries that are text, keys
            masses = torch.einsum("wqk,cwk->c", weights, kinds.to(weights)) / weights[..., 0].numel()
            row |= {f"window_{name}": mass.item() for name, mass in zip(names, masses)}
            for name, offset in (("own", 1), ("previous", 0), ("next", 2)):
                row[f"window_{name}"] = weights.diagonal(offset, 1, 2).mean().item()
            some = q[text][asked.to(q.device)]
            (state,) = prefix_states(some, k, flat.to(k), [len(k)])
            row |= {f"pooled_{name}": mass.item() for name, mass in zip(names, state.output.mean(0))}
            row |= {f"share_{name}": share.item() for name, share in zip(names, flat.mean(0))}
            plain = order[text[order]]
            row["effective"] = effective_tokens(some, k[order], [len(order)]).median().item()
            row["effective_without"] = effective_tokens(some, k[plain], [len(plain)]).median().item()
            rows.append(row)
        return Part(pd.DataFrame(rows))

    return Plan(sorted({(head.layer,) for head in every}), work, _about(model, texts))


def real_heads_on(config: dict, device) -> Plan:
    """Geometry of every head on a text: the columns of `pooled_probe`, for each of several disjoint parts of it.

    Without the budget of the mean square error, the third power of that to thaw, which the records do not have.
    """
    model = load_model(EMBEDDED, device)
    tokens, parts = config["tokens"], config["parts"]
    ids, texts = random_windows(model, config["corpus"], parts * tokens, config["seed"], config["skip"])

    def work(part: int) -> Part:
        here = ids[part * tokens : (part + 1) * tokens]
        table = pooled_probe(model, here, tokens=tokens, queries=config["queries"], seed=config["seed"] + part)
        table = table.drop(columns="tokens_mean_square")
        table.insert(0, "part", part)
        return Part(table)

    return Plan([(part,) for part in range(parts)], work, _about(model, texts))


def _on(corpus: str, tokens: int, **options) -> Experiment:
    full = {"corpus": corpus, "tokens": tokens, "parts": 1, "queries": 2048, "seed": 20_261_000, "skip": 0, **options}
    return Experiment(real_heads_on, ("part",), full, {"tokens": 20_000, "queries": 256}, tolerance=1e-3)


def _named_summary(key: str, units):
    return lambda arrays: {key: _by_name(arrays, units)}


EXPERIMENTS = {
    "real_heads_moments": Experiment(
        real_heads_moments,
        ("layer", "head"),
        full={"pool": 200_000, "queries": 2048, "lengths": LENGTHS, "replicates": 20, "seed": 20_261_000},
        quick={"pool": 10_160, "queries": 256, "lengths": [250, 500, 1000, 2000], "replicates": 5},
        tolerance=1e-3,
    ),
    "real_heads_variants": Experiment(
        real_heads_variants,
        ("layer", "head"),
        full={
            "windows": 80,
            "alphas": [0.01, 0.1, 0.3, 1.0, 3.0, 10.0],
            "lengths": [WINDOW, 2 * WINDOW, 4 * WINDOW, 8 * WINDOW, 16 * WINDOW],
            "replicates": 20,
            "seed": 20_261_000,
        },
        quick={"windows": 10, "lengths": [WINDOW, 2 * WINDOW], "replicates": 4},
        tolerance=1e-3,
    ),
    "real_heads_sinks": Experiment(
        real_heads_sinks,
        ("layer",),
        full={"windows": 400, "queries": 1024, "seed": 20_261_000},
        quick={"windows": 40, "queries": 128},
        tolerance=1e-3,
    ),
    "real_heads_english": _on("wikipedia-en", 200_000),
    "real_heads_german": _on("wikipedia-de", 200_000),
    "real_heads_python": _on("python-stdlib", 200_000),
    "real_heads_book": _on("book", 50_000),
    "real_heads_fresh": _on("wikipedia-en", 500_000, parts=4, queries=64, skip=FRESH),
    "real_heads_maps": Experiment(
        real_heads_maps,
        ("layer",),
        full={
            "queries": 4096,
            "query_windows": 256,
            "lengths": LENGTHS,
            "segments": 34,
            "seed": 20_261_000,
        },
        quick={"queries": 512, "query_windows": 32, "lengths": [250, 500, 1000, 2000], "segments": 4},
        tolerance=1e-3,
    ),
    # 20 million tokens.
    "real_heads_maps_long": Experiment(
        real_heads_maps,
        ("layer",),
        full={
            "queries": 4096,
            "query_windows": 256,
            "lengths": [*LONG, 200_000, 400_000, 588_000],
            "segments": 34,
            "seed": 20_261_000,
        },
        quick={"queries": 64, "query_windows": 4, "lengths": [250, 1000], "segments": 2},
        tolerance=1e-3,
    ),
    "real_heads_moments_long": Experiment(
        real_heads_moments,
        ("layer", "head"),
        full={"pool": 1_000_000, "queries": 2048, "lengths": LONG, "replicates": 20, "seed": 20_261_000},
        quick={"pool": 2_032, "queries": 64, "lengths": [100, 300], "replicates": 2},
        tolerance=1e-3,
    ),
}
