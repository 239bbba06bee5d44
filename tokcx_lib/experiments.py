"""The named, configured runs behind the records: what ``tokcx run NAME`` runs.

An experiment is a function of a device that returns a tidy table and the meta data of its record.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from tqdm import tqdm

from tokcx_lib import probe, sweeps
from tokcx_lib.corpora import open_corpus
from tokcx_lib.heads import EMBEDDED, heads, load_model, tokenize
from tokcx_lib.laws import Gaussian

CONTEXT = 256  # tokens the model reads at once, two of them special
LENGTHS = [250, 500, 1000, 2000, 4000, 8000, 15_000, 30_000]
REPLICATES = 40
REFERENCE = 200_000
SEED = 20_260_000


def _wikitext(model):
    """Token ids of the two held-out splits of WikiText-2, and what to say of them in a record."""
    corpora = [open_corpus(name) for name in ("wikitext2-test", "wikitext2-valid")]
    ids = torch.cat([torch.as_tensor(tokenize(model, corpus.text)) for corpus in corpora])
    return ids, {corpus.name: corpus.sha256 for corpus in corpora}


def _model_meta(model) -> dict:
    return {"model": model.name, "model_sha256": model.sha256, "context": CONTEXT}


def real_heads_geometry(device) -> tuple[pd.DataFrame, dict]:
    """Geometry of every head of the embedded model on 200,000 tokens of WikiText-2."""
    model = load_model(EMBEDDED, device)
    ids, texts = _wikitext(model)
    config = {"tokens": 200_000, "queries": 2048, "seed": SEED}
    return probe.probe(model, ids, **config), {"config": config, "texts": texts, **_model_meta(model)}


def real_heads_layer0(device) -> tuple[pd.DataFrame, dict]:
    """Error curves of the 12 heads of layer 0 on WikiText-2.

    Windows of the text go by turns to the reference and to the pool. The reference is self-attention over 200,000
    tokens; replicates are drawn from the pool, which shares no token with it. Self-attention over the whole pool is
    the limit of what the replicates estimate, so its distance from the reference is the noise floor.
    """
    model = load_model(EMBEDDED, device)
    ids, texts = _wikitext(model)
    (x,) = probe.collect_tokens(model, ids, [0])
    odd = (torch.arange(len(x), device=x.device) // (CONTEXT - 2)) % 2 == 1
    reference, pool = x[~odd][:REFERENCE], x[odd]
    tables, described = [], {}
    for head in tqdm([h for h in heads(model) if h.layer == 0], unit=" heads"):
        limits = {"reference": probe.self_attention(head, reference), "pool": probe.self_attention(head, pool)}
        tables.append(probe.moment_errors(head, pool, limits, LENGTHS, REPLICATES, SEED))
        r, p = limits["reference"], limits["pool"]
        described[str(head.head)] = {
            "mean_scale": r.cov.trace().sqrt().item(),  # standard deviation of the outputs
            "cov_scale": torch.linalg.matrix_norm(r.cov).item(),
            "mean_floor": torch.linalg.vector_norm(p.mean - r.mean).item(),
            "cov_floor": torch.linalg.matrix_norm(p.cov - r.cov).item(),
        }
    config = {"lengths": LENGTHS, "reference": len(reference), "pool": len(pool), "seed": SEED}
    meta = {"config": config, "replicates": REPLICATES, "texts": texts, "heads": described, **_model_meta(model)}
    return pd.concat(tables, ignore_index=True), meta


def gaussian_moments(device) -> tuple[pd.DataFrame, dict]:
    """Errors of the moments of self-attention of standard normal tokens, V = I, over horizons, in d = 1 and d = 8.

    d = 1: A = H, in float64. d = 8: A is H times `power_law_form(8)`, in float32, with fewer tokens and replicates.
    All horizons of a replicate see the same tokens.
    """
    horizons = [0.01, 0.03, 0.1, 0.2, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0]
    runs = {
        1: {"lengths": [100, 300, 1000, 3000, 10_000, 30_000, 100_000], "replicates": 400},
        8: {"lengths": [100, 300, 1000, 3000, 10_000, 30_000], "replicates": 24},
    }
    tables = []
    for dim, run in runs.items():
        law = Gaussian(torch.eye(dim, dtype=torch.float64))
        form = law.cov if dim == 1 else sweeps.power_law_form(dim)
        precision = torch.float64 if dim == 1 else torch.float32
        table = sweeps.horizon_sweep(
            law, form, None, horizons, **run, seed=SEED + dim, dtype=precision, device=device
        ).rename(columns={"scale": "horizon"})
        table.insert(0, "dim", dim)
        tables.append(table)
    described = {str(dim): run for dim, run in runs.items()}
    config = {"horizons": horizons, "runs": described, "seed": SEED}
    return pd.concat(tables, ignore_index=True), {"config": config, "replicates": "400 (d = 1) and 24 (d = 8)"}


EXPERIMENTS: dict[str, Callable[[torch.device], tuple[pd.DataFrame, dict]]] = {
    "gaussian_moments": gaussian_moments,
    "real_heads_geometry": real_heads_geometry,
    "real_heads_layer0": real_heads_layer0,
}
