"""Random windows of a text, such as the English Wikipedia, which several experiments draw from."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.corpora import open_corpus
from tokcx_lib.heads import TextModel, tokenize
from tokcx_lib.validation import as_count

CONTEXT = 256  # tokens the model reads at once, two of them special
WINDOW = CONTEXT - 2  # tokens of text in one window
WIKIPEDIA = "wikipedia-en"
LINES = 20_000  # lines tokenised at once, which bounds the memory of the tokeniser


def random_windows(
    model: TextModel, corpus: str, tokens: int, seed: int, skip: int = 0
) -> tuple[Tensor, dict[str, str]]:
    """Token ids of whole windows of a text, the windows in random order.

    The text is cut into windows of 254 ids, and the windows are permuted by `seed`; the last, short one is left out. A
    prefix is then a random set of windows, and two stretches of one permutation share no token. A text is tokenised
    once in a process: the 21.7 million ids of the English Wikipedia in about half a minute on 2 CPU cores.

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
    ids, texts = _ids(model, corpus)
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    count, skip = -(-as_count("tokens", tokens) // WINDOW), as_count("skip", skip, least=0)
    if skip + count > len(windows):
        raise ValueError(f"tokens: expected at most {(len(windows) - skip) * WINDOW} after {skip} windows, got {tokens}")
    order = torch.randperm(len(windows), generator=runtime.stream(seed))[skip : skip + count]
    return windows[order].reshape(-1).long(), texts


def wikipedia_windows(model: TextModel, tokens: int, seed: int, skip: int = 0) -> tuple[Tensor, dict[str, str]]:
    """`random_windows` of the English Wikipedia."""
    return random_windows(model, WIKIPEDIA, tokens, seed, skip)


def passages(model: TextModel, corpus: str, tokens: int, count: int) -> tuple[Tensor, dict[str, str]]:
    """Token ids of `count` passages of a text in its own order, spread evenly over it: int64, (count, tokens).

    Raises
    ------
    ValueError
        If the text is shorter than all passages together.
    """
    ids, texts = _ids(model, corpus)
    stride = len(ids) // as_count("count", count)
    if as_count("tokens", tokens) > stride:
        raise ValueError(f"tokens: expected at most {stride} for {count} passages of this text, got {tokens}")
    return torch.stack([ids[i * stride : i * stride + tokens] for i in range(count)]).long(), texts


@lru_cache(maxsize=1)
def _ids(model: TextModel, name: str) -> tuple[Tensor, dict[str, str]]:
    corpus = open_corpus(name)
    lines = corpus.text.splitlines(keepends=True)
    parts = [tokenize(model, "".join(lines[i : i + LINES])).astype(np.int32) for i in range(0, len(lines), LINES)]
    return torch.as_tensor(np.concatenate(parts)), {corpus.name: corpus.sha256}
