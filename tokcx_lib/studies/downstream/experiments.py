"""Retrieval of Wikipedia articles by paragraphs whose keys are subsampled in every layer (chapter 8)."""

from __future__ import annotations

from functools import lru_cache

import pandas as pd
import torch

from tokcx_lib import runtime
from tokcx_lib.models import subsampled
from tokcx_lib.models.corpora import open_corpus, wikipedia_articles
from tokcx_lib.models.loading import EMBEDDED, load_model
from tokcx_lib.models.windows import WIKIPEDIA
from tokcx_lib.studies.downstream import retrieval
from tokcx_lib.studies.runs import Experiment, Part, Plan


def _open(config: dict, device):
    """Model, collection and index, and what to say of them in a record."""
    model = load_model(EMBEDDED, device)
    corpus = open_corpus(WIKIPEDIA)
    collection = _collection(model, corpus, config)
    meta = {"texts": {corpus.name: corpus.sha256}, **model.provenance}
    return model, collection, lru_cache(lambda: retrieval.article_embeddings(model, collection)), meta


def _collection(model, corpus, config: dict) -> retrieval.Collection:
    return retrieval.collect(
        wikipedia_articles(corpus),
        lambda article: retrieval.paragraphs(model, article),
        config["articles"],
        config["width"],
        config["held"],
        config["others"],
        runtime.stream(config["seed"]),
        least=config["least"],
    )


def _cases(config: dict, model, collection: retrieval.Collection, block: int):
    """The queries of a block at each width: columns that name them, contexts, what all keys make of them, lengths."""
    size, held = config["block"], collection.queries.shape[1]
    chosen = collection.queries[block * size : (block + 1) * size]
    article = (block * size + torch.arange(len(chosen))).repeat_interleave(held)
    query = torch.arange(held).repeat(len(chosen))
    for width, lengths in config["lengths"].items():
        named = {"block": block, "width": int(width), "article": article, "query": query}
        batch = subsampled.contexts(model, list(chosen.flatten(0, 1)[:, : int(width)].numpy()))
        yield named, batch, subsampled.encode(model, batch), lengths


def _blocks(config: dict) -> list[tuple[int]]:
    return [(block,) for block in range(-(-config["articles"] // config["block"]))]


def downstream_retrieval(config: dict, device) -> Plan:
    """Errors of embeddings and of hidden states, and what they do to retrieval: one row per query, width and n.

    `articles` articles, each with `held` paragraphs as queries, of which the first `width` tokens are read, and with
    `others` other paragraphs of at least `least` tokens that represent it. Numbers are means over `replicates` draws of
    keys; every draw serves all n, a larger n adding to the keys of a smaller one. Columns: error, root mean square
    length of the error of the embedding; common, mean product of the errors of two draws; along, root mean square of
    the error along the direction that tells the nearest article from the second; agree, right and safe as in
    `retrieval.Draws`; state_l, relative error of the hidden states that leave layer l, counted from 1.
    """
    model, collection, index, meta = _open(config, device)

    def work(block: int) -> Part:
        rows = []
        for named, batch, whole, lengths in _cases(config, model, collection, block):
            for n in lengths:
                seeds = [runtime.stream(config["seed"], named["width"], block, r) for r in range(config["replicates"])]
                found = retrieval.draw_errors(model, batch, whole, named["article"], index(), n, seeds)
                columns = {
                    **named,
                    "n": n,
                    "error": found.square.sqrt().cpu(),
                    "common": found.common.cpu(),
                    "along": found.along.sqrt().cpu(),
                    "agree": found.agree.cpu(),
                    "right": found.right.cpu(),
                    "safe": found.safe.cpu(),
                }
                columns |= {f"state_{i}": x.sqrt().cpu() for i, x in enumerate(found.states.mT, 1)}
                rows.append(pd.DataFrame(columns))
        return Part(pd.concat(rows, ignore_index=True))

    return Plan(_blocks(config), work, meta)


def downstream_queries(config: dict, device) -> Plan:
    """The queries of `downstream_retrieval` with all keys: one row per query and width.

    Columns: load, mean over all heads of the median load in the query's own context, and load_l of layer l (from 1)
    alone; effective and special, the same mean of the effective share of the keys and of the attention to special
    tokens; right, 1 if the nearest article is the query's own; score, the cosine with its own article; critical_k, how
    far the embedding must move before the k-th closest competitor comes first (`retrieval.critical_distances`).
    """
    model, collection, index, meta = _open(config, device)

    def work(block: int) -> Part:
        rows = []
        for named, batch, whole, _ in _cases(config, model, collection, block):
            article = named["article"]
            seen = [x.cpu() for x in retrieval.context_attention(model, batch, whole)]
            own = (whole.embedding * index()[article.to(index().device)]).sum(-1).cpu()
            right = (retrieval.nearest(whole.embedding, index()).cpu() == article).long()
            columns = dict(named)
            columns |= {name: x.mean((1, 2)) for name, x in zip(("load", "effective", "special"), seen)}
            columns |= {"right": right, "score": own}
            columns |= {f"load_{i}": x for i, x in enumerate(seen[0].mean(2).mT, 1)}
            critical = retrieval.critical_distances(whole.embedding, index(), config["competitors"]).cpu()
            columns |= {f"critical_{k}": x for k, x in enumerate(critical.mT, 1)}
            rows.append(pd.DataFrame(columns))
        return Part(pd.concat(rows, ignore_index=True))

    return Plan(_blocks(config), work, meta)


_FULL = {
    "articles": 500,
    "held": 2,
    "others": 4,
    "width": 128,
    "least": 64,
    "block": 10,
    "lengths": {128: [4, 8, 16, 32, 48, 64, 96, 112], 64: [8, 16, 32, 48]},
    "seed": 20_261_800,
}
_QUICK = {"articles": 20, "lengths": {128: [8, 32, 96], 64: [8, 32]}}

EXPERIMENTS = {
    "downstream_retrieval": Experiment(
        downstream_retrieval, ("block",), {**_FULL, "replicates": 5}, {**_QUICK, "replicates": 2}, tolerance=1e-3
    ),
    "downstream_queries": Experiment(
        downstream_queries, ("block",), {**_FULL, "competitors": 8}, _QUICK, tolerance=1e-3
    ),
}
