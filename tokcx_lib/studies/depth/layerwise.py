"""An encoder whose layers read some of their keys: the error of its hidden states, layer by layer, and its sources.

A layer errs for two reasons. It reads a draw of its keys, and what it reads is already off. Both are measured alone:
*fresh* is the error of the layer on exact states, with its draw; *inherited* the error on the states that the layers
before have left, with all keys. Draws are those of `subsampled`. Chapter 12.
"""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from tokcx_lib.models import architectures
from tokcx_lib.models.loading import TextModel
from tokcx_lib.models.subsampled import Contexts, additive_mask, draw_keys, encode


def layer_errors(model: TextModel, batch: Contexts, keys: int, seed: int | torch.Generator) -> pd.DataFrame:
    """Errors of the hidden states of each context after each layer, when every layer reads `keys` tokens of the text.

    Parameters
    ----------
    batch : from `subsampled.contexts`; keys, seed : as for `subsampled.draw_keys`. Special tokens are always read.

    Returns
    -------
    DataFrame
        context (its number in the batch), layer (from 1), and root mean squares over the real tokens of a context, of
        the norm of: error; fresh; inherited; before, the error that came in (0 at layer 1); spread, the distance
        of the exact states from their mean, for scale. `fresh` and `inherited` may point alike or not: cross is
        their mean inner product.

    Raises
    ------
    ValueError
        If the model is a decoder, or there is no such number of keys.
    """
    exact = encode(model, batch).states
    base = architectures.base_model(model)
    layers = base.get_submodule(architectures.architecture(base.config).layers)
    drawn = draw_keys(batch, keys, seed, len(layers))
    every = additive_mask(batch.real)
    rows = []
    with torch.inference_mode():
        x = exact[0]
        for number, (layer, seen) in enumerate(zip(layers, drawn), 1):
            before, should = x - exact[number - 1], exact[number]
            fresh = layer(exact[number - 1], additive_mask(seen)) - should
            inherited = layer(x, every) - should
            x = layer(x, additive_mask(seen))
            centre = _mean(should, batch.real)[:, None]
            sizes = [
                _mean(e.square().sum(-1, keepdim=True), batch.real)[:, 0].sqrt()
                for e in (x - should, fresh, inherited, before, should - centre)
            ]
            cross = _mean((fresh * inherited).sum(-1, keepdim=True), batch.real)[:, 0]
            for context, row in enumerate(torch.stack([*sizes, cross], 1).tolist()):
                rows.append((context, number, *row))
    columns = ["context", "layer", "error", "fresh", "inherited", "before", "spread", "cross"]
    return pd.DataFrame(rows, columns=columns).sort_values(["context", "layer"], ignore_index=True)


def _mean(values: Tensor, real: Tensor) -> Tensor:
    """Mean of (b, width, k) over the real tokens: (b, k)."""
    return (values * real[..., None]).sum(1) / real.sum(-1, keepdim=True)
