"""Random windows of the English Wikipedia, which several experiments draw from."""

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


def wikipedia_windows(model: TextModel, tokens: int, seed: int, skip: int = 0) -> tuple[Tensor, dict[str, str]]:
    """Token ids of whole windows of the English Wikipedia, the windows in random order.

    The text is cut into windows of 254 ids, and the windows are permuted by `seed`; the last, short one is left out. A
    prefix is then a random set of windows, and two stretches of one permutation share no token. The text is tokenised
    once in a process: 21.7 million ids in about half a minute on 2 CPU cores.

    Parameters
    ----------
    model : whose tokenizer is used.
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
    ids, sha256 = _wikipedia_ids(model)
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    count, skip = -(-as_count("tokens", tokens) // WINDOW), as_count("skip", skip, least=0)
    if skip + count > len(windows):
        raise ValueError(f"tokens: expected at most {(len(windows) - skip) * WINDOW} after {skip} windows, got {tokens}")
    order = torch.randperm(len(windows), generator=runtime.stream(seed))[skip : skip + count]
    return windows[order].reshape(-1).long(), {WIKIPEDIA: sha256}


@lru_cache(maxsize=1)
def _wikipedia_ids(model: TextModel) -> tuple[Tensor, str]:
    corpus = open_corpus(WIKIPEDIA)
    lines = corpus.text.splitlines(keepends=True)
    parts = [tokenize(model, "".join(lines[i : i + LINES])).astype(np.int32) for i in range(0, len(lines), LINES)]
    return torch.as_tensor(np.concatenate(parts)), corpus.sha256
