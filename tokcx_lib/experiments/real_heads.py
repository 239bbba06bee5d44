"""Heads of the embedded model on the English Wikipedia (chapter 7)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from tokcx_lib import convergence, geometry, probe, runtime
from tokcx_lib.corpora import open_corpus
from tokcx_lib.heads import EMBEDDED, heads, layer_streams, load_model, tokenize
from tokcx_lib.laws import Gaussian
from tokcx_lib.runs import Experiment, Part, Plan

CONTEXT = 256  # tokens the model reads at once, two of them special
WIDTH = CONTEXT - 2  # tokens of the text in a window
CHUNK = 20_000  # lines tokenised at once
LENGTHS = [250, 500, 1000, 2000, 4000, 8000, 15_000, 30_000]

# Windows of the text, in random order, and what each experiment reads: no two of these share a window.
POOL, QUERIES, STREAM = 0, 1_000, 2_000


@lru_cache(maxsize=1)
def _wikipedia(model) -> tuple[np.ndarray, dict]:
    """All whole windows (count, WIDTH) of the English Wikipedia text, uint16, and its checksum by name."""
    corpus = open_corpus("wikipedia-en")
    lines = corpus.text.splitlines(keepends=True)
    chunks = ["".join(lines[i : i + CHUNK]) for i in range(0, len(lines), CHUNK)]
    ids = [tokenize(model, chunk).astype(np.uint16) for chunk in tqdm(chunks, desc="tokenise", leave=False)]
    ids = np.concatenate(ids)
    return ids[: len(ids) // WIDTH * WIDTH].reshape(-1, WIDTH), {corpus.name: corpus.sha256}


def wikipedia_windows(model, first: int, count: int, seed: int) -> tuple[np.ndarray, dict]:
    """Windows number first, first + 1, ... of the English Wikipedia, in an order drawn from the seed.

    A window is WIDTH neighbouring tokens. Order them at random, and the first few are a sample of the whole text.

    Returns
    -------
    (ids, texts)
        ids (count * WIDTH,), int64; texts: name and checksum, for the record
    """
    windows, texts = _wikipedia(model)
    order = torch.randperm(len(windows), generator=runtime.stream(seed)).numpy()
    return windows[order[first : first + count]].astype(np.int64).reshape(-1), texts


def _model_meta(model) -> dict:
    return {"model": model.name, "model_sha256": model.sha256, "context": CONTEXT}


def _cached_tokens(model, ids):
    """A function from a layer to the tokens that enter it; units go layer by layer, and one layer is held at a time."""

    @lru_cache(maxsize=1)
    def tokens(layer: int) -> torch.Tensor:
        return probe.collect_tokens(model, ids, [layer])[0]

    return tokens


def _by_name(arrays, units) -> dict:
    """The numbers that units kept as arrays, to six digits, by the unit's name."""
    rounded = [{key: np.array([f"{x:.6g}" for x in value.flat], float).reshape(value.shape) for key, value in kept.items()} for kept in arrays]
    names = [".".join(map(str, unit)) for unit in units]
    return {name: {key: value.tolist() for key, value in kept.items()} for name, kept in zip(names, rounded, strict=True)}


def real_heads_moments(config: dict, device) -> Plan:
    """Errors of the moments of self-attention for every head, and of its map.

    The law is that of a pool of `pool` tokens, random windows of the text; its limit is self-attention over the whole
    pool, and tokens are drawn from it one by one. Column map_error: the map at `queries` tokens of the pool, over the same
    draws; what the exact law of Gaussian keys predicts for it is in the JSON (twin_map_error, one number a length).
    """
    model = load_model(EMBEDDED, device)
    count = -(-config["pool"] // WIDTH)
    ids, texts = wikipedia_windows(model, POOL, count, config["seed"])
    tokens = _cached_tokens(model, ids[: config["pool"]])
    chosen = {(head.layer, head.head): head for head in heads(model)}

    @lru_cache(maxsize=1)
    def law(layer: int) -> Gaussian:
        mean, cov = probe.token_moments(tokens(layer))
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
        kept = {
            "mean_floor": torch.linalg.vector_norm(half.mean - limit.mean),
            "cov_floor": torch.linalg.matrix_norm(half.cov - limit.cov),
            "cov_norm": torch.linalg.matrix_norm(limit.cov),
            "output_spread": limit.cov.trace().sqrt(),
            "twin_cov_norm": torch.linalg.matrix_norm(twin_limit.cov),
            "twin_mean_gap": torch.linalg.vector_norm(limit.mean.cpu() - twin_limit.mean.cpu()),
            "twin_cov_gap": torch.linalg.matrix_norm(limit.cov.cpu() - twin_limit.cov.cpu()),
        }
        arrays = {key: np.array(value.item()) for key, value in kept.items()}
        square = convergence.twin_map_error(head, queries, law(layer), config["lengths"])
        return Part(table, {**arrays, "twin_map_error": np.sqrt(square)})

    units = list(chosen)
    return Plan(units, work, {"texts": texts, **_model_meta(model)}, summary=_named_summary("heads", units))


def real_heads_maps(config: dict, device) -> Plan:
    """Errors of the map at fixed queries over a stream of tokens, for every head, layer by layer.

    The stream is `segments` times as many random windows as hold the longest length; the queries are tokens of other
    windows. Column map_error: root mean square over queries of the distance between the output over the first n tokens
    of a segment and over all other segments. In the JSON, for every head: the noise floor, and the error that the exact
    law of Gaussian tokens predicts at each length (`convergence.twin_map_error`).
    """
    model = load_model(EMBEDDED, device)
    lengths, seed = config["lengths"], config["seed"]
    width = -(-lengths[-1] // WIDTH)  # windows of a segment
    asked, texts = wikipedia_windows(model, QUERIES, config["query_windows"], seed)
    ids, _ = wikipedia_windows(model, STREAM, width * config["segments"], seed)
    pieces = np.split(ids, config["segments"])
    every = heads(model)

    def work(layer: int) -> Part:
        chosen = [head for head in every if head.layer == layer]
        queries = probe.collect_tokens(model, asked, [layer])[0]
        queries = queries[torch.randperm(len(queries), generator=runtime.stream(seed, layer))[: config["queries"]]]
        moments = probe.RunningMoments(queries.shape[1], queries.device)

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
        half = geometry.root(moments.cov)
        kept = {"floor": floor.sqrt().tolist(), "predicted": [], "value_spread": [], "horizon": [], "load_median": []}
        for head in chosen:
            kept["predicted"].append(np.sqrt(convergence.twin_map_error(head, queries, law, lengths)).tolist())
            found = probe.head_geometry(head, queries, moments.cov, half)
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
    meta = {"texts": texts, "replicates": config["segments"], "stream": len(ids), **_model_meta(model)}
    return Plan(units, work, meta, summary=_named_summary("layers", units))


def _named_summary(key: str, units):
    return lambda arrays: {key: _by_name(arrays, units)}


def _wikitext(model):
    """Token ids of the two held-out splits of WikiText-2, and what to say of them in a record."""
    corpora = [open_corpus(name) for name in ("wikitext2-test", "wikitext2-valid")]
    ids = torch.cat([torch.as_tensor(tokenize(model, corpus.text)) for corpus in corpora])
    return ids, {corpus.name: corpus.sha256 for corpus in corpora}


def real_heads_geometry(config: dict, device) -> Plan:
    """Geometry of every head of the embedded model."""
    model = load_model(EMBEDDED, device)
    ids, texts = _wikitext(model)

    def work(layer: int) -> Part:
        return Part(probe.probe(model, ids, [layer], **config))

    layers = sorted({head.layer for head in heads(model)})
    return Plan([(layer,) for layer in layers], work, {"texts": texts, **_model_meta(model)})


def real_heads_layer0(config: dict, device) -> Plan:
    """Error curves of the 12 heads of layer 0.

    Windows of the text go by turns to the reference and to the pool. The reference is self-attention over `reference`
    tokens; replicates are drawn from the pool, which shares no token with it. Self-attention over the whole pool is the
    limit of what the replicates estimate, so its distance from the reference is the noise floor.
    """
    model = load_model(EMBEDDED, device)
    ids, texts = _wikitext(model)
    (x,) = probe.collect_tokens(model, ids, [0])
    odd = (torch.arange(len(x), device=x.device) // (CONTEXT - 2)) % 2 == 1
    reference, pool = x[~odd][: config["reference"]], x[odd][: config["pool"]]
    chosen = {head.head: head for head in heads(model) if head.layer == 0}

    def work(number: int) -> Part:
        head = chosen[number]
        limits = {"reference": probe.self_attention(head, reference), "pool": probe.self_attention(head, pool)}
        table = probe.moment_errors(head, pool, limits, config["lengths"], config["replicates"], config["seed"])
        r, p = limits["reference"], limits["pool"]
        scales = {
            "mean_scale": r.cov.trace().sqrt(),  # standard deviation of the outputs
            "cov_scale": torch.linalg.matrix_norm(r.cov),
            "mean_floor": torch.linalg.vector_norm(p.mean - r.mean),
            "cov_floor": torch.linalg.matrix_norm(p.cov - r.cov),
        }
        return Part(table, {name: np.asarray(value.item()) for name, value in scales.items()})

    def summary(arrays) -> dict:
        numbers = [{name: value.item() for name, value in each.items()} for each in arrays]
        return {"heads": dict(zip(map(str, chosen), numbers))}

    return Plan([(number,) for number in chosen], work, {"texts": texts, **_model_meta(model)}, summary=summary)


EXPERIMENTS = {
    "real_heads_geometry": Experiment(
        real_heads_geometry,
        ("layer",),
        full={"tokens": 200_000, "queries": 2048, "seed": 20_260_000},
        quick={"tokens": 20_000},
    ),
    "real_heads_layer0": Experiment(
        real_heads_layer0,
        ("head",),
        full={
            "lengths": [250, 500, 1000, 2000, 4000, 8000, 15_000, 30_000],
            "replicates": 40,
            "reference": 200_000,
            "pool": 255_802,
            "seed": 20_260_000,
        },
        quick={"lengths": [250, 500, 1000, 2000], "replicates": 10, "reference": 20_000, "pool": 20_000},
    ),
    "real_heads_moments": Experiment(
        real_heads_moments,
        ("layer", "head"),
        full={"pool": 200_000, "queries": 2048, "lengths": LENGTHS, "replicates": 20, "seed": 20_261_000},
        quick={"pool": 10_160, "queries": 256, "lengths": [250, 500, 1000, 2000], "replicates": 5},
        tolerance=1e-3,
    ),
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
}
