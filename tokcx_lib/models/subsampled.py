"""An encoder whose layers read only some of their keys, and what it makes of a text.

The model is run layer by layer, each layer with an additive mask of its own: of the keys of a context, n are drawn
without replacement, all heads and all queries of a layer read the same draw, and every layer and every context has a
draw of its own. Queries are never dropped, so each token keeps its hidden state (chapters 8 and 12).

Every key of a context has a random place in every layer, and n keys are the first n places. The draws of one stream
are therefore nested: a larger n adds keys to those of a smaller one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.models import architectures
from tokcx_lib.models.loading import TextModel
from tokcx_lib.models.tokens import CONTEXT, tokenize
from tokcx_lib.validation import as_count, as_flag, as_kind, as_mask, as_tensor, shown


class Contexts(NamedTuple):
    """Contexts that a model reads at once, padded at their ends: all of shape (b, width), on the model's device.

    `ids` of tokens, int64; `real`, bool: no padding; `special`, bool: put there by the model's format, not by the text.
    """

    ids: Tensor
    real: Tensor
    special: Tensor


class Encoded(NamedTuple):
    """What an encoder makes of contexts: float32, on the model's device.

    `states`: the embedding of the input, then the output of each layer, layers + 1 tensors of shape (b, width, d); of
    padding they hold nothing of use. `embedding`: one unit vector a context, (b, d).
    """

    states: list[Tensor]
    embedding: Tensor


def contexts(model: TextModel, texts: Sequence, context: int = CONTEXT) -> Contexts:
    """Texts, each as one context between the model's special tokens, padded to the longest.

    Parameters
    ----------
    texts : strings, or arrays of token ids without special tokens, each at least one token long.
    context : tokens of a context at most, special ones included; longer texts are cut.

    Raises
    ------
    ValueError
        If there is no text, or a text has no token; if the context exceeds the model's positions, or has no room for
        text; if the model is a decoder.
    """
    base = _encoder(model)
    before, after = architectures.special_tokens(base.config, model.tokenizer)
    least, most = len(before) + len(after) + 1, architectures.most_positions(base.config)
    if not least <= as_count("context", context) <= most:
        raise ValueError(f"context: expected {least} to {most} tokens, got {context}")
    rows = []
    for text in texts:
        text = tokenize(model, text) if isinstance(text, str) else np.asarray(text)
        if text.ndim != 1 or len(text) == 0:
            raise ValueError(f"texts: expected at least one token in each, got one of shape {text.shape}")
        rows.append([*before, *text[: context - least + 1].tolist(), *after])
    if not rows:
        raise ValueError("texts: expected at least one, got none")
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), model.tokenizer.pad_token_id or 0, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    place = torch.arange(ids.shape[1])
    real = place < lengths[:, None]
    special = real & ((place < len(before)) | (place >= lengths[:, None] - len(after)))
    return Contexts(*(part.to(base.device) for part in (ids, real, special)))


def draw_keys(
    batch: Contexts, keys: int | Tensor, seed: int | torch.Generator, layers: int, keep_special: bool = True
) -> Tensor:
    """Which keys each layer reads: bool (layers, b, width), drawn without replacement from each context.

    Parameters
    ----------
    keys : how many, one number or one for each context (b,); at least 1. Where a context has fewer, it reads them all.
    seed : a number, or a stream on the CPU: the draws are the same on every device.
    keep_special : special tokens are always read, and `keys` tokens of the text are drawn besides. If False, special
        tokens are drawn like all others.

    Raises
    ------
    ValueError
        If a number of keys is not an integer >= 1, or there is not one for each context.
    """
    as_kind("batch", batch, Contexts)
    layers, keep_special = as_count("layers", layers), as_flag("keep_special", keep_special)
    if isinstance(keys, int):
        keys = as_count("keys", keys, most=2**62)
    try:
        asked = torch.as_tensor(keys)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"keys: expected an integer, or one for each context, got {shown(keys)}") from error
    whole = asked.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    if not whole or asked.is_meta or asked.layout != torch.strided or asked.shape not in ((), batch.ids.shape[:1]):
        raise ValueError(f"keys: expected an integer, or one for each of {len(batch.ids)} contexts, got {shown(keys)}")
    if (asked < 1).any():
        raise ValueError(f"keys: expected at least 1, got {int(asked.min())}")
    always = batch.special.cpu() if keep_special else torch.zeros_like(batch.special.cpu())
    drawn = batch.real.cpu() & ~always
    places = torch.rand(layers, *batch.ids.shape, generator=runtime.generator(seed), dtype=torch.float64)
    order = places.masked_fill(~drawn, 2.0).argsort(-1).argsort(-1)  # the place of each key among those to draw from
    return ((order < asked.reshape(-1, 1)) & drawn | always).to(batch.ids.device)


def encode(
    model: TextModel,
    batch: Contexts,
    keys: int | Tensor | None = None,
    seed: int | torch.Generator | None = None,
    keep_special: bool = True,
    layers: Iterable[int] | None = None,
    weighted: bool = False,
) -> Encoded:
    """Hidden states and embeddings of contexts, with keys subsampled in the layers asked for.

    With `keys` None, or at least as many as there are, this is the model's own output, to rounding.

    Parameters
    ----------
    batch : from `contexts`.
    keys, seed, keep_special : as for `draw_keys`; with keys None, every layer reads every key.
    layers : which layers read a draw, counted from 0; the others read every key. Default: all. The draw of a layer does
        not depend on which others are subsampled.
    weighted : special tokens that are always read weigh as in the whole context: a key that was drawn, n of N, stands
        for N / n. Without it the tokens that are always read gain weight. Changes nothing if keep_special is False.

    Returns
    -------
    Encoded
        The embedding is that of sentence-transformers for this model: the mean of the last states over all tokens that
        are not padding, special ones included, scaled to length 1.

    Raises
    ------
    ValueError
        If a layer does not exist, the model is a decoder, or keys are as `draw_keys` refuses them.
    """
    base = _encoder(model)
    stack = base.get_submodule(architectures.architecture(base.config).layers)
    chosen = set(range(len(stack)) if layers is None else layers)
    if not chosen <= set(range(len(stack))):
        raise ValueError(f"layers: expected some of 0 to {len(stack) - 1}, got {sorted(chosen)}")
    read = batch.real.expand(len(stack), -1, -1)
    if keys is not None:
        subsampled = torch.tensor([layer in chosen for layer in range(len(stack))], device=read.device)
        drawn = draw_keys(batch, keys, seed, len(stack), keep_special)
        read = torch.where(subsampled[:, None, None], drawn, read)
    text = batch.real & ~batch.special
    with torch.inference_mode():
        x = base.embeddings(batch.ids)
        states = [x]
        for layer, seen in zip(stack, read):
            mask = additive_mask(seen)
            if weighted and keep_special:
                stands_for = text.sum(-1, keepdim=True) / (seen & text).sum(-1, keepdim=True)
                mask = mask + (text * stands_for.log())[:, None, None]
            x = layer(x, mask)
            states.append(x)
        return Encoded(states, pooled(x, batch.real))


def additive_mask(seen: Tensor) -> Tensor:
    """0 for keys that are read, bool (b, width), and -inf for others: (b, 1, 1, width), for all heads and queries."""
    seen = as_mask("seen", seen)
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)[:, None, None]


def pooled(states: Tensor, real: Tensor) -> Tensor:
    """Mean of states (b, width, d) over the tokens that are `real`, bool (b, width), scaled to length 1: (b, d)."""
    states, real = as_tensor("states", states), as_mask("real", real)
    if states.ndim != 3 or states.shape[:2] != real.shape or not real.any(-1).all():
        raise ValueError(
            "states, real: expected shapes (b, width, d) and (b, width) with a token in each context, got "
            f"{tuple(states.shape)} and {tuple(real.shape)}"
        )
    share = real.to(states) / real.sum(-1, keepdim=True)
    mean = torch.einsum("bwd,bw->bd", states, share)
    return torch.nn.functional.normalize(mean, dim=-1)


def _encoder(model: TextModel):
    base = architectures.base_model(model)
    if architectures.is_causal(base.config):
        raise ValueError(f"model: expected an encoder, got {base.config.model_type!r}, whose attention is causal")
    return base
