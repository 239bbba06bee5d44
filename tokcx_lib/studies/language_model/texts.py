"""Windows that fill a language model's context: each from one article of an encyclopedia, or one place of a text."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.models.corpora import open_corpus, wikipedia_articles
from tokcx_lib.models.loading import TextModel
from tokcx_lib.models.tokens import tokenize, window_ends
from tokcx_lib.models.windows import spread_passages
from tokcx_lib.validation import as_count

ARTICLES = "wikipedia"  # what the names of texts begin with whose articles are told apart
_CHARACTERS = 2  # least of a token, on average: shorter articles are not tokenised


def whole_windows(model: TextModel, corpus: str, context: int, count: int, seed: int) -> tuple[Tensor, dict[str, str]]:
    """Token ids of windows that fill a context, special tokens before the text included.

    Of an encyclopedia, the beginnings of articles that are long enough, in an order drawn by `seed`, each article once;
    of any other text, passages spread evenly over it.

    Parameters
    ----------
    model : whose tokenizer is used; corpus : a name or path, for `corpora.open_corpus`.
    context : tokens of a window; count : of windows.

    Returns
    -------
    ids : int64, (count, context)
    texts : the name of the text and its SHA-256, for the record

    Raises
    ------
    ValueError
        If the text is not there, or has too few articles of that length, or passages that would run into each other.
    """
    context, count = as_count("context", context), as_count("count", count)
    before, after = window_ends(model, context)
    width = context - len(before) - len(after)
    if not corpus.startswith(ARTICLES):
        ids, texts = spread_passages(model, corpus, width, count)
    else:
        found = open_corpus(corpus)
        ids, texts = _long_articles(model, found, width, count, seed), {found.name: found.sha256}
    ends = [torch.tensor(each, dtype=torch.int64).expand(count, -1) for each in (before, after)]
    return torch.cat([ends[0], ids, ends[1]], 1), texts


def _long_articles(model: TextModel, corpus, width: int, count: int, seed: int) -> Tensor:
    texts = ["\n".join([article.title, *article.paragraphs]) for article in wikipedia_articles(corpus)]
    chosen: list[Tensor] = []
    for place in torch.randperm(len(texts), generator=runtime.stream(seed)).tolist():
        if len(texts[place]) >= _CHARACTERS * width:
            ids = torch.as_tensor(tokenize(model, texts[place]))
            if len(ids) >= width:
                chosen.append(ids[:width])
        if len(chosen) == count:
            return torch.stack(chosen)
    raise ValueError(f"count: expected at most {len(chosen)}, as many articles have {width} tokens, got {count}")
