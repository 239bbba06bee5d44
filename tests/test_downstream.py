"""Retrieval with fewer keys: distances to a flip against brute force, splits without leaks, units that run alone."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from tokcx_lib import runtime
from tokcx_lib.models import corpora, subsampled
from tokcx_lib.models.corpora import Article, Corpus
from tokcx_lib.models.tokens import tokenize
from tokcx_lib.studies.downstream import experiments as experiment
from tokcx_lib.studies.downstream import retrieval
from tokcx_lib.studies.registry import EXPERIMENTS


def units(*shape, seed=0):
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=runtime.generator(seed), dtype=torch.float64), dim=-1
    )


# ---------------------------------------------------------------------------------------------------- distances


def test_critical_distances_are_the_nearest_points_that_tie():
    u, index = units(5, 6), units(9, 6, seed=1)
    critical = retrieval.critical_distances(u, index, 100)
    assert critical.shape == (5, 8) and (critical.diff(dim=1) >= 0).all()
    for i in range(5):
        first = int((index @ u[i]).argmax())
        expected = []
        for b in (b for b in range(9) if b != first):
            g = (index[first] - index[b]) / (index[first] - index[b]).norm()
            foot = u[i] - (u[i] @ g) * g  # on the plane where both are equally near, then back on the sphere
            expected.append((foot / foot.norm() - u[i]).norm().item())
            assert (foot @ (index[first] - index[b])).abs() < 1e-12
        assert np.allclose(sorted(expected), critical[i], atol=1e-12)


def test_no_move_below_the_critical_distance_flips_and_some_just_above_do():
    u, index = units(4, 3), units(7, 3, seed=2)
    critical = retrieval.critical_distances(u, index, 1)[:, 0]
    first = retrieval.nearest(u, index)
    for factor, flips in ((0.999, False), (1.02, True)):
        tangent = units(4, 20_000, 3, seed=3)
        tangent = tangent - (tangent @ u[..., None]) * u[:, None]
        tangent = tangent / tangent.norm(dim=-1, keepdim=True)
        half = torch.asin(factor * critical / 2)[:, None, None]  # chord c is the angle 2 asin(c / 2)
        moved = torch.cos(2 * half) * u[:, None] + torch.sin(2 * half) * tangent
        assert torch.allclose((moved - u[:, None]).norm(dim=-1), factor * critical[:, None].expand(4, 20_000))
        found = retrieval.nearest(moved, index) != first[:, None]
        assert found.any(-1).tolist() == [flips] * 4


def test_flip_rate_is_that_of_drawn_errors():
    critical, error = torch.tensor([[0.3, 0.5], [0.1, 2.0]]), torch.tensor([0.8, 0.4])
    draws = torch.randn(200_000, 2, 2, generator=runtime.generator(4))
    expected = (draws * (0.5 * error)[:, None] > critical).any(-1).float().mean(0)
    assert torch.allclose(retrieval.flip_rate(critical, error, 0.5), expected, atol=0.005)
    assert retrieval.flip_rate(critical, torch.zeros(2), 0.5).tolist() == [0, 0]


def test_bad_input_is_named():
    for call, name in (
        (lambda: retrieval.flip_rate([1.0], -1.0, 0.5), "error"),
        (lambda: retrieval.flip_rate([1.0], 1.0, 0.0), "share"),
        (lambda: retrieval.critical_distances(units(2, 3), units(1, 3)), "index"),
        (lambda: retrieval.critical_distances(units(2, 4), units(5, 3)), "embeddings"),
        (lambda: retrieval.collect([], list, 1, 4, 1, 1, runtime.stream(1)), "count"),
        (lambda: corpora.wikipedia_articles(Corpus("x", "", lambda: ["no heading"])), "corpus"),
        (lambda: retrieval.draw_errors(*[None] * 6, seeds=[1]), "seeds"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call()


# ---------------------------------------------------------------------------------------------------- articles


def test_articles_of_both_texts():
    found = corpora.wikipedia_articles(Corpus("x", "", lambda: [" = One = \n\nA b.\n c \n\n = Two = \n\nD.\n"]))
    assert found == [Article("One", ["A b.", "c"]), Article("Two", ["D."])]
    docs = corpora.scipy_articles()
    lines = [line for article in docs for line in article.paragraphs]
    assert len(lines) == len(set(lines)) and "\n".join(lines) + "\n" == corpora.open_corpus("scipy-docs").text


def test_queries_and_what_represents_an_article_are_apart():
    sizes = [[5, 9, 3, 12], [4, 4, 4, 4], [10, 2, 8, 9, 7], [8, 8, 1, 3]]
    articles = [SimpleNamespace(title=str(a), pieces=[np.arange(n) + 100 * a + 1000 * i for i, n in enumerate(size)])
                for a, size in enumerate(sizes)]  # fmt: skip
    found = retrieval.collect(articles, lambda a: a.pieces, 2, 8, 2, 2, runtime.stream(1), least=2)
    # Article 1 has no piece of 8 tokens, and article 3 only one of at least 2 besides its two queries.
    assert sorted(found.titles) == ["0", "2"]
    for title, queries, others in zip(found.titles, found.queries, found.others):
        whole = articles[int(title)].pieces
        used = [q.tolist() for q in queries] + [o.tolist() for o in others]
        cut = [piece[:8].tolist() for piece in whole]
        assert all(piece in cut for piece in used) and len({tuple(piece) for piece in used}) == 4
        assert all(len(piece) == 8 for piece in used[:2])
    with pytest.raises(ValueError, match="^count: expected at most 2 articles"):
        retrieval.collect(articles, lambda a: a.pieces, 3, 8, 2, 2, runtime.stream(1), least=2)


def test_a_collection_of_the_docstrings(minilm):
    articles = corpora.scipy_articles()
    cut = lambda article: retrieval.passages(minilm, article, 32)  # noqa: E731
    found = retrieval.collect(articles, cut, 10, 32, 2, 2, runtime.stream(2))
    assert found.queries.shape == (10, 2, 32) and found.owner.tolist() == [a for a in range(10) for _ in range(2)]
    named = {article.title: article for article in articles}
    for title, queries, others in zip(found.titles, found.queries, found.others):
        whole = tokenize(minilm, " ".join(named[title].paragraphs))
        starts = []
        for piece in [*queries.numpy(), *others]:
            starts += [i for i in range(0, len(whole), 32) if np.array_equal(whole[i : i + 32], piece)]
        assert len(starts) == 4 == len(set(starts))
    index = retrieval.article_embeddings(minilm, found, batch=3)
    for others, mean in zip(found.others, index, strict=True):
        alone = torch.cat([subsampled.encode(minilm, subsampled.contexts(minilm, [p])).embedding for p in others]).mean(
            0
        )
        assert torch.allclose(mean, alone / alone.norm(), atol=1e-5)


# ---------------------------------------------------------------------------------------------------- errors


def test_what_the_heads_look_at_is_the_models_own_attention(minilm):
    batch = subsampled.contexts(minilm, ["Attention reads keys, all of them or a few.", "A shorter text."])
    seen = retrieval.context_attention(minilm, batch)
    minilm.model.set_attn_implementation("eager")
    with torch.no_grad():
        own = minilm.model(batch.ids, attention_mask=batch.real.long(), output_attentions=True).attentions
    minilm.model.set_attn_implementation("sdpa")
    for c, layer, head in itertools.product(range(2), (0, 3), (2, 7)):
        inside = (batch.real & ~batch.special)[c]
        weights = own[layer][c, head].double()
        text = weights[inside][:, inside]
        rest = 1 - text.sum(-1)
        share = text / text.sum(-1, keepdim=True)
        effective = 1 / (share**2).sum(-1) / int(inside.sum())
        load = text.log().std(-1, correction=0)  # logits are log-weights up to a shift
        for mine, values in zip(seen, (load, effective, rest)):
            assert mine[c, layer, head].item() == pytest.approx(values.median().item(), abs=2e-4)


def test_errors_of_draws_add_up(minilm):
    texts = ["Softmax attention over a few keys differs from attention over all of them.",
             "A retrieval system compares a paragraph with every article and returns the nearest one."]  # fmt: skip
    batch = subsampled.contexts(minilm, texts)
    whole = subsampled.encode(minilm, batch)
    index = torch.cat([whole.embedding, units(5, 384, seed=5).float()])
    found = retrieval.draw_errors(minilm, batch, whole, torch.tensor([0, 2]), index, 4, [1, 2, 3])
    runs = [subsampled.encode(minilm, batch, 4, seed) for seed in (1, 2, 3)]
    errors = torch.stack([run.embedding - whole.embedding for run in runs])
    assert torch.allclose(found.square, (errors**2).sum(-1).mean(0), atol=1e-6)
    pairs = [(errors[a] * errors[b]).sum(-1) for a, b in itertools.combinations(range(3), 2)]
    assert torch.allclose(found.common, torch.stack(pairs).mean(0), atol=1e-6)
    near = [[int((index @ e).argmax()) for e in run.embedding] for run in runs]
    assert torch.allclose(found.agree, torch.tensor([[a == 0, b == 1] for a, b in near]).float().mean(0))
    assert torch.allclose(found.right, torch.tensor([[a == 0, b == 2] for a, b in near]).float().mean(0))
    assert (found.safe <= found.agree).all()
    tokens = batch.real[0] & ~batch.special[0]
    true = whole.states[3][0, tokens]
    spread = ((true - true.mean(0)) ** 2).sum()
    expected = sum(((run.states[3][0, tokens] - true) ** 2).sum() / spread for run in runs) / 3
    assert found.states[0, 2].item() == pytest.approx(expected.item(), rel=1e-4)
    every = retrieval.draw_errors(minilm, batch, whole, torch.tensor([0, 1]), index, 200, [1, 2])
    assert every.square.max() < 1e-9 and every.agree.min() == 1 and every.states.max() < 1e-9


# ---------------------------------------------------------------------------------------------------- experiments

SMALL = {"articles": 4, "block": 2, "lengths": {"24": [4, 16], "12": [4]}, "width": 24, "least": 8, "others": 2,
         "replicates": 2, "competitors": 2}  # fmt: skip


@pytest.mark.parametrize("name", ["downstream_retrieval", "downstream_queries"])
def test_a_unit_can_be_run_alone(name, monkeypatch):
    text = "".join(
        f" = {a.title} = \n\n" + "\n\n".join(a.paragraphs) + "\n\n" for a in corpora.scipy_articles()
        if sum(len(p.split()) > 25 for p in a.paragraphs) > 3
    )  # fmt: skip
    monkeypatch.setattr(experiment, "open_corpus", lambda name: Corpus(name, "", lambda: [text], "sha"))
    run = EXPERIMENTS[name]
    config = {**run.config("quick"), **SMALL}
    plan = run.plan(config, torch.device("cpu"))
    assert plan.units == [(0,), (1,)] and plan.meta["texts"] == {"wikipedia-en": "sha"}
    table = plan.work(1).table
    pd.testing.assert_frame_equal(table, run.plan(config, torch.device("cpu")).work(1).table)
    assert (table["block"] == 1).all() and sorted(table["article"].unique()) == [2, 3]
    if name == "downstream_retrieval":
        assert len(table) == 4 * 3 and (table["safe"] <= table["agree"]).all()
        means = table[table["width"] == 24].groupby("n")["error"].mean()
        assert means[4] > means[16] > 0
    else:
        assert len(table) == 4 * 2 and (table["critical_1"] <= table["critical_2"]).all()
        assert np.allclose(table["load"], table.filter(regex=r"load_\d").mean(axis=1))
        assert math.isfinite(table.to_numpy(float).sum())
