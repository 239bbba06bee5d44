"""Heads of the embedded model on WikiText-2 (chapter 7)."""

from __future__ import annotations

import numpy as np
import torch

from tokcx_lib import probe
from tokcx_lib.corpora import open_corpus
from tokcx_lib.heads import EMBEDDED, heads, load_model, tokenize
from tokcx_lib.runs import Experiment, Part, Plan

CONTEXT = 256  # tokens the model reads at once, two of them special


def _wikitext(model):
    """Token ids of the two held-out splits of WikiText-2, and what to say of them in a record."""
    corpora = [open_corpus(name) for name in ("wikitext2-test", "wikitext2-valid")]
    ids = torch.cat([torch.as_tensor(tokenize(model, corpus.text)) for corpus in corpora])
    return ids, {corpus.name: corpus.sha256 for corpus in corpora}


def _model_meta(model) -> dict:
    return {"model": model.name, "model_sha256": model.sha256, "context": CONTEXT}


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
}
