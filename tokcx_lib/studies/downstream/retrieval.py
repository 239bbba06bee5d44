"""What a reader of embeddings notices when the encoder reads fewer keys: retrieval of the right article (chapter 8).

Some pieces of every article are held out as queries; the article itself is the mean of the embeddings of other pieces
of it, all keys read. A query is embedded with all keys and with some, and looked up among the articles.

How far may an embedding move before another article comes first? `critical_distances` answers exactly, on the sphere
where embeddings live; `flip_rate` turns it into a forecast for errors of a given size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokcx_lib.models import architectures, subsampled
from tokcx_lib.models.heads import heads
from tokcx_lib.models.loading import TextModel
from tokcx_lib.models.tokens import tokenize
from tokcx_lib.validation import (
    as_count,
    as_mask,
    as_matrix,
    as_number,
    as_tensor,
    as_tokens,
    as_vectors,
    as_wide,
    shown,
)


class Collection(NamedTuple):
    """Articles cut into queries and the pieces that stand for them.

    `titles`, one an article; `queries`, token ids (articles, held, width) int64, no special tokens; `others`, for each
    article, the arrays of token ids that represent it. No query is among them.
    """

    titles: list[str]
    queries: Tensor
    others: list[list[np.ndarray]]

    @property
    def owner(self) -> Tensor:
        """The article of each query, (articles * held,), in the order of `queries`."""
        return torch.arange(len(self.titles)).repeat_interleave(self.queries.shape[1])


def paragraphs(model: TextModel, article) -> list[np.ndarray]:
    """Token ids of each paragraph of a `corpora.Article`."""
    return [tokenize(model, paragraph) for paragraph in article.paragraphs]


def passages(model: TextModel, article, width: int) -> list[np.ndarray]:
    """Token ids of an article's text, its paragraphs joined, in consecutive pieces of `width`; the rest is dropped."""
    ids = tokenize(model, " ".join(article.paragraphs))
    whole = len(ids) // as_count("width", width) * width
    return list(ids[:whole].reshape(-1, width))


def collect(articles, cut, count: int, width: int, held: int, others: int, generator, least: int = 0) -> Collection:
    """A collection of `count` articles, in a random order, from those that have enough pieces.

    Parameters
    ----------
    articles : sequence of `corpora.Article`; cut : function from an article to its pieces, arrays of token ids.
    width : tokens of a query: the first ones of a piece that has as many or more.
    held : queries an article; others : pieces that represent it, each of at least `least` tokens and read to `width`.
    generator : torch.Generator, which orders articles and picks their pieces.

    Raises
    ------
    ValueError
        If fewer than `count` articles have enough pieces.
    """
    titles, queries, rest = [], [], []
    for a in torch.randperm(len(articles), generator=generator).tolist():
        pieces = cut(articles[a])
        order = [pieces[i] for i in torch.randperm(len(pieces), generator=generator).tolist()]
        long = [i for i, piece in enumerate(order) if len(piece) >= width][:held]
        left = [piece for i, piece in enumerate(order) if i not in long and len(piece) >= max(least, 1)][:others]
        if len(long) == held and len(left) == others:
            titles.append(articles[a].title)
            queries.append(np.stack([order[i][:width] for i in long]))
            rest.append([piece[:width] for piece in left])
        if len(titles) == count:
            return Collection(titles, torch.as_tensor(np.stack(queries)), rest)
    raise ValueError(f"count: expected at most {len(titles)} articles with {held} + {others} pieces, got {count}")


def article_embeddings(model: TextModel, collection: Collection, batch: int = 64) -> Tensor:
    """What represents the articles: the mean unit embedding of their other pieces, scaled to length 1, (a, d)."""
    pieces = [piece for group in collection.others for piece in group]
    # Pieces of like length go together, so that little is padded.
    order = np.argsort([len(piece) for piece in pieces], kind="stable")
    found = []
    for some in np.array_split(order, -(-len(order) // batch)):
        found.append(subsampled.encode(model, subsampled.contexts(model, [pieces[i] for i in some])).embedding)
    units = torch.cat(found)[torch.as_tensor(np.argsort(order))]
    mean = units.reshape(len(collection.titles), -1, units.shape[1]).mean(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def nearest(embeddings: Tensor, index: Tensor) -> Tensor:
    """The article with the largest cosine, for unit vectors (..., d) and an index of unit vectors (articles, d)."""
    index = as_tokens("index", index)
    return (as_vectors("embeddings", embeddings, index.shape[1]).to(index) @ index.mT).argmax(-1)


def critical_distances(embeddings: Tensor, index: Tensor, count: int = 8) -> Tensor:
    """How far a unit vector must move, at least, before another article comes first: one distance a competitor.

    The nearest article a and a competitor b are equally near on a plane through the origin. A unit vector u lies
    m = <u, a - b> / |a - b| above it, and the nearest point of the sphere on it at the distance sqrt(2 - 2 sqrt(1 -
    m^2)), which is more than m.

    Parameters
    ----------
    embeddings : unit vectors (q, d); index : unit vectors (articles, d), at least two.
    count : how many competitors, those with the smallest distances; fewer if there are not as many.

    Returns
    -------
    Tensor (q, count)
        In increasing order. A vector that moves by less than the first of them keeps its nearest article.
    """
    index = as_wide("index", as_tokens("index", index))
    embeddings = as_matrix("embeddings", embeddings, index.shape[1]).to(index)
    count = as_count("count", count)
    if len(index) < 2:
        raise ValueError(f"index: expected at least two articles, got {len(index)}")
    scores = embeddings @ index.mT
    first = scores.argmax(-1, keepdim=True)
    apart = torch.cdist(index[first[:, 0]], index)
    height = (scores.gather(1, first) - scores) / apart.clamp_min(1e-12)
    height.scatter_(1, first, torch.inf)
    height = height.topk(min(count, len(index) - 1), largest=False).values.clamp(max=1.0)
    return (2 - 2 * (1 - height**2).clamp_min(0).sqrt()).sqrt()


def flip_rate(critical, error, share: float):
    """Forecast of how often the nearest article changes, from critical distances (..., competitors) and errors (...).

    The error along each direction that decides is taken as normal, with standard deviation `share` times its length,
    and competitors as independent: 1 - prod(1 - P(N > critical / (share error))).

    Raises
    ------
    ValueError
        If an error is negative, or the share is not between 0 and 1.
    """
    critical, error = as_tensor("critical", critical), as_tensor("error", error)
    if (error < 0).any():
        raise ValueError(f"error: expected numbers >= 0, got {error.min().item():.3g}")
    if critical.ndim != error.ndim + 1 or critical.shape[:-1] != error.shape:
        shapes = f"(*{tuple(error.shape)}, competitors), got {tuple(critical.shape)}"
        raise ValueError(f"critical: expected distances for each error, shape {shapes}")
    if not 0 < as_number("share", share) <= 1:
        raise ValueError(f"share: expected a number above 0 and at most 1, got {share}")
    ratio = critical / (share * error)[..., None]  # infinite where there is no error
    return 1 - torch.special.ndtr(ratio).prod(-1)


class ContextAttention(NamedTuple):
    """How the heads look at the text of each context, all (b, layers, heads), medians over the queries of the text.

    `load`: standard deviation of a query's logits over the keys of the text (`geometry.load` for the law that these
    keys are); `effective`: effective number of these keys, among themselves, as a share of them; `special`: attention
    to special tokens.
    """

    load: Tensor
    effective: Tensor
    special: Tensor


def context_attention(
    model: TextModel, batch: subsampled.Contexts, whole: subsampled.Encoded | None = None
) -> ContextAttention:
    """Load, effective share of the keys, and attention to special tokens, of every head in each context.

    Parameters
    ----------
    whole : `encode` of the same contexts with all keys, if it is there already.
    """
    whole = subsampled.encode(model, batch) if whole is None else whole
    every = heads(model)
    layers = len(architectures.attention_modules(architectures.base_model(model)))
    text = batch.real & ~batch.special
    count = text.sum(-1, keepdim=True)
    found = []
    for head in every:
        q, k, _ = head.project(whole.states[head.layer])
        logits = q @ k.mT
        inside = logits.masked_fill(~text[:, None], 0.0)
        mean = inside.sum(-1) / count
        spread = ((inside - mean[..., None]) ** 2 * text[:, None]).sum(-1) / count
        weights = logits.masked_fill(~batch.real[:, None], -torch.inf).softmax(-1)
        kept = (weights * text[:, None]).sum(-1)
        effective = kept**2 / ((weights * text[:, None]) ** 2).sum(-1) / count
        each = torch.stack([spread.sqrt(), effective, 1 - kept]).masked_fill(~text, torch.nan)
        found.append(each.nanmedian(-1).values)
    return ContextAttention(*torch.stack(found, -1).unflatten(-1, (layers, -1)))


def state_errors(states: Sequence[Tensor], whole: Sequence[Tensor], text: Tensor) -> Tensor:
    """Squared relative errors of hidden states, (b, layers): of each layer's output, over the tokens of the text.

    Mean over tokens of |state - whole|^2, divided by the mean of |whole - its mean over the context's tokens|^2.

    Parameters
    ----------
    states, whole : as `Encoded.states`, with some keys and with all; text : bool (b, width), which tokens count.
    """
    text, lists = as_mask("text", text), {"states": states, "whole": whole}
    for name, part in lists.items():
        if not isinstance(part, (list, tuple)) or len(part) < 2:
            raise ValueError(f"{name}: expected tensors (b, width, d), of input and layers, got {shown(part)}")
        lists[name] = [as_tensor(name, x, ndim=3) for x in part]
        if any(x.shape[:2] != text.shape for x in lists[name]):
            raise ValueError(f"{name}: expected shapes (b, width, d) with text (b, width), got {tuple(part[0].shape)}")
    states, whole = lists.values()
    if [x.shape for x in states] != [x.shape for x in whole]:
        raise ValueError(f"states: expected {len(whole)} layers of the shapes in whole, got {len(states)}")
    share = text.to(whole[0]) / text.sum(-1, keepdim=True)
    errors = []
    for mine, true in zip(states[1:], whole[1:]):
        centre = torch.einsum("bwd,bw->bd", true, share)[:, None]
        off, spread = ((mine - true) ** 2).sum(-1), ((true - centre) ** 2).sum(-1)
        errors.append((off * share).sum(-1) / (spread * share).sum(-1))
    return torch.stack(errors, -1)


class Draws(NamedTuple):
    """Embeddings over several draws of keys, and their fate; all (queries,), except `states` (queries, layers).

    `square`: mean of the squared error; `common`: mean product of the errors of two different draws, that is, the
    square of what all draws share; `along`: mean square of the error along the direction from the nearest article's
    closest competitor; `agree`, `right`, `safe`: shares of the draws whose nearest article is that of all keys, is the
    query's own, and whose error is below the critical distance; `states`: mean of `state_errors`.
    """

    square: Tensor
    common: Tensor
    along: Tensor
    agree: Tensor
    right: Tensor
    safe: Tensor
    states: Tensor


def draw_errors(
    model: TextModel, batch: subsampled.Contexts, whole: subsampled.Encoded, owner: Tensor, index: Tensor,
    keys: int, seeds: Sequence, **options,
) -> Draws:  # fmt: skip
    """Embed queries once for each seed with `keys` keys in every layer, and compare with all keys.

    Parameters
    ----------
    batch, whole : the queries, and `encode` of them with all keys; owner : article of each, (q,); index : (articles,
        d).
    seeds : one for each draw, at least two, as `draw_keys` takes them; options : of `encode`.

    Raises
    ------
    ValueError
        If there are fewer than two seeds.
    """
    if len(seeds) < 2:
        raise ValueError(f"seeds: expected two draws or more, got {len(seeds)}")
    text = batch.real & ~batch.special
    scores = whole.embedding @ index.mT
    two = scores.topk(2).indices
    gap = index[two[:, 0]] - index[two[:, 1]]
    gap = gap / gap.norm(dim=-1, keepdim=True)
    critical = critical_distances(whole.embedding, index, 1)[:, 0]
    errors, found, states = [], [], []
    for seed in seeds:
        some = subsampled.encode(model, batch, keys, seed, **options)
        errors.append(some.embedding - whole.embedding)
        found.append(nearest(some.embedding, index))
        states.append(state_errors(some.states, whole.states, text))
    error, found = torch.stack(errors), torch.stack(found)
    count, lengths = len(seeds), error.norm(dim=-1)
    square = (lengths**2).mean(0)
    together = (error.sum(0) ** 2).sum(-1)
    return Draws(
        square=square,
        common=(together - count * square) / (count * (count - 1)),
        along=((error * gap).sum(-1) ** 2).mean(0),
        agree=(found == two[:, 0]).float().mean(0),
        right=(found == owner.to(found.device)).float().mean(0),
        safe=(lengths < critical).float().mean(0),
        states=torch.stack(states).mean(0),
    )
