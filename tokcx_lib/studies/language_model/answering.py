"""A language model whose attention is answered by a function of ours, and what it predicts then.

`models.capture` notes what the attention of a model reads and lets the model answer. Here a function is put in the
same place, the attention interface of transformers, and its answer goes on to the next layer: what every later token
sees has passed through it, as it would in a model that reads fewer keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tokcx_lib.models.loading import TextModel, evaluating
from tokcx_lib.models.text_parts import without_cache
from tokcx_lib.validation import as_count, as_indices

NAME = "tokcx_answer"  # of our attention among those of transformers
ROWS = 256  # states turned into logits of words at once: 49,152 words each
Answer = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Read = list[tuple[Tensor, Tensor]]


@contextmanager
def answering(model: nn.Module, answer: Answer) -> Iterator[None]:
    """Let `answer` compute the attention of every layer, while the model runs on one window inside the block.

    Parameters
    ----------
    model : a transformers model of plain causal attention: no caps, sinks, position biases or sliding windows.
    answer : of the number of a layer, queries (heads, n, d), scaled, so that logits are q.k, keys (groups, n, d) and
        values (groups, n, d_v); to the outputs (heads, n, d_v). Query head h reads group h // (heads / groups).

    Raises
    ------
    ValueError
        If the attention is another, the batch has several windows, or the block ends without a call.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    calls = 0

    def attend(module, query, key, value, attention_mask=None, scaling=None, **options):
        nonlocal calls
        added = [name for name in ("softcap", "s_aux", "position_bias", "sliding_window") if options.get(name)]
        if attention_mask is not None or added or len(query) != 1:
            found = ", ".join(added) or f"{len(query)} windows, {'no ' if attention_mask is None else 'a '}mask"
            raise ValueError(f"model: expected plain causal attention over one window, got {found}")
        calls += 1
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return answer(module.layer_idx, scale * query[0], key[0], value[0]).transpose(0, 1)[None], None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # which makes none where attention is causal and no more
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
    if calls == 0:
        raise ValueError(f"model: expected one that uses the attention interface, got {type(model).__name__}")


def token_losses(model: TextModel, ids: Tensor, answer: Answer | None = None, first: int = 0) -> Tensor:
    """Nats that each next token costs: float64 (n - first,), of the tokens first + 1 to n, from those before them.

    Parameters
    ----------
    model : whose input and output tables are one; ids : (n + 1,), of which the last one is predicted and not read.
    answer : what computes the attention (`answering`), None for the model itself.
    first : position of the first token that is read here. With `answer` those before it have been read (`after`), and
        cost no time; without, they are read, and only what follows is returned.
    """
    config, base = model.model.config, model.model
    if not getattr(config, "tie_word_embeddings", False):
        raise ValueError(f"model: expected one table for what goes in and out, got two in {model.name!r}")
    table = base.get_input_embeddings()
    ids = as_indices("ids", ids, most=table.num_embeddings - 1).to(table.weight.device)
    if len(ids) < 2:
        raise ValueError(f"ids: expected 2 or more, got {len(ids)}")
    first = as_count("first", first, least=0, most=len(ids) - 2)
    with evaluating(base), torch.inference_mode():
        if answer is None:
            states = base(ids[None, :-1], **without_cache(base))[0][0, first:]
        else:
            places = torch.arange(first, len(ids) - 1, device=ids.device)[None]
            with answering(base, answer):
                states = base(ids[None, first:-1], position_ids=places, **without_cache(base))[0][0]
        lost = [
            nn.functional.cross_entropy((part @ table.weight.mT).float(), told, reduction="none")
            for part, told in zip(states.split(ROWS), ids[first + 1 :].split(ROWS))
        ]
    return torch.cat(lost).double().cpu()


def read_before(model: TextModel, ids: Tensor) -> Read:
    """Keys (groups, n, d) and values of each layer for ids (n,) that the model itself reads: a cache after a prompt."""
    found: Read = []

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found.append((k, v))
        attend = nn.functional.scaled_dot_product_attention
        return attend(q[None], k[None], v[None], is_causal=True, scale=1.0, enable_gqa=True)[0]

    with evaluating(model.model), torch.inference_mode(), answering(model.model, keep):
        model.model(ids[None].to(model.model.device), **without_cache(model.model))
    return found


def after(read: Read, answer: Answer) -> Answer:
    """Attention of the tokens that follow on those that were read (`read_before`): their keys come before their own."""

    def whole(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        early = read[layer]
        return answer(layer, q, torch.cat([early[0], k], 1), torch.cat([early[1], v], 1))

    return whole
