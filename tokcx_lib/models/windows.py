"""Token ids drawn from a text, such as Wikipedia: random windows of it, or passages spread evenly over it.

Windows stand for independent pieces of a text: each fills the context of the model once, and two experiments that take
different stretches of one random order share none. Passages keep the order of the text, for what depends on it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.models.corpora import open_corpus
from tokcx_lib.models.loading import TextModel
from tokcx_lib.models.token_files import find_ids
from tokcx_lib.models.tokens import CONTEXT, tokenize
from tokcx_lib.validation import as_count

WINDOW = CONTEXT - 2  # tokens of text in one window: two of a context are special
WIKIPEDIA = "wikipedia-en"
LINES = 20_000  # lines tokenised at once, which bounds the memory of the tokeniser


def random_windows(
    model: TextModel, corpus: str, tokens: int, seed: int, skip: int = 0
) -> tuple[Tensor, dict[str, str]]:
    """Token ids of whole windows of a text, the windows in random order.

    The text is cut into windows of 254 ids, and the windows are permuted by `seed`; the last, short one is left out. A
    prefix is then a random set of windows, and two stretches of one permutation share no token. A text is tokenised
    once in a process: the 21.7 million ids of the English Wikipedia in about half a minute on 2 CPU cores. Where a file
    has its ids (`token_files`), that stands for it.

    Parameters
    ----------
    model : whose tokenizer is used; corpus : a name or path, for `corpora.open_corpus`.
    tokens : how many ids, rounded up to whole windows.
    skip : windows of the permutation to leave out first, such as those of a reference.

    Returns
    -------
    ids : int64, (windows * 254,)
    texts : the name of the text and its SHA-256, for the record

    Raises
    ------
    ValueError
        If the text is not there, or has fewer windows than asked for.
    """
    ids, texts = all_ids(model, corpus)
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    count, skip = -(-as_count("tokens", tokens) // WINDOW), as_count("skip", skip, least=0)
    if skip + count > len(windows):
        raise ValueError(
            f"tokens: expected at most {(len(windows) - skip) * WINDOW} after {skip} windows, got {tokens}"
        )
    order = torch.randperm(len(windows), generator=runtime.stream(seed))[skip : skip + count]
    return windows[order].reshape(-1).long(), texts


def wikipedia_windows(model: TextModel, tokens: int, seed: int, skip: int = 0) -> tuple[Tensor, dict[str, str]]:
    """`random_windows` of the English Wikipedia."""
    return random_windows(model, WIKIPEDIA, tokens, seed, skip)


@lru_cache(maxsize=1)
def all_ids(model: TextModel, name: str) -> tuple[Tensor, dict[str, str]]:
    """Token ids of a whole text, int32 (n,), and its name and SHA-256; from a file of ids, where there is one."""
    if (kept := find_ids(name, model)) is not None:
        return torch.as_tensor(kept[0].astype(np.int32)), kept[1]
    corpus = open_corpus(name)
    lines = corpus.text.splitlines(keepends=True)
    parts = [tokenize(model, "".join(lines[i : i + LINES])).astype(np.int32) for i in range(0, len(lines), LINES)]
    return torch.as_tensor(np.concatenate(parts)), {corpus.name: corpus.sha256}


def spread_passages(model: TextModel, corpus: str, tokens: int, count: int) -> tuple[Tensor, dict[str, str]]:
    """Token ids of `count` passages of a text in its own order, spread evenly over its lines: int64, (count, tokens).

    Only the passages are tokenised. No two share a line.

    Raises
    ------
    ValueError
        If a passage would run into the next one.
    """
    found = open_corpus(corpus)
    lines = found.text.splitlines(keepends=True)
    starts = [len(lines) * i // as_count("count", count) for i in range(count + 1)]
    return torch.stack([_passage(model, lines[a:b], tokens) for a, b in zip(starts, starts[1:])]), {
        found.name: found.sha256
    }


def _passage(model: TextModel, lines: list[str], tokens: int) -> Tensor:
    """The first ids of some lines."""
    parts, size = [], 0
    for i in range(0, len(lines), 100):
        parts.append(tokenize(model, "".join(lines[i : i + 100])))
        size += len(parts[-1])
        if size >= tokens:
            return torch.as_tensor(np.concatenate(parts)[:tokens])
    raise ValueError(f"tokens: expected at most {size}, what {len(lines)} lines of this text have, got {tokens}")
