"""What the attention of most models reads: queries, keys and values of every layer, as the model itself makes them.

A head needs no bilinear form: it is a law of triples (query, key, value), and nearly every model of transformers hands
over exactly that, at one place, its *attention interface*. `capture` puts a function of ours there, which notes what
comes and lets the model's own attention answer: queries carry the model's scale, normalisations and rotary positions,
whatever the architecture; grouped keys stay grouped.

What an architecture adds to softmax(q.k) v comes along: a mask (causal, or a sliding window), a position bias, a cap on
the logits, sinks in the denominator. `Attention.outputs` puts it together again, and its tests hold it against the
model. A model that does not use the interface makes no call, and is refused.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NAME = "tokcx_capture"  # of our attention among those of transformers
CROSS = re.compile(r"cross|encoder_attn|EncDecAttention", re.IGNORECASE)  # modules that read an encoder's states


@dataclass(frozen=True)
class Attention:
    """What the attention of one layer read, and what it answered, for one batch.

    Parameters
    ----------
    layer : number of the layer, or of the call where the module has none; name : of its module in the model.
    q : (b, heads, n, d), scaled, so that logits are q.k; k : (b, groups, m, d); v : (b, groups, m, d_v). Query head h
        reads the keys of group h // (heads / groups).
    bias : (b or 1, heads or 1, n, m) or None: what is added to the logits, -inf (or the lowest number of the precision)
        where a key is not seen.
    cap : logits l become cap tanh(l / cap), before the bias; sinks : (heads,), logits of a key without value.
    window : keys that a query sees at most, its own and those before it, where the layer says so.
    output : (b, n, heads, d_v), the model's own.
    """

    layer: int
    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    cap: float | None
    sinks: Tensor | None
    window: int | None
    output: Tensor

    def logits(self) -> Tensor:
        """(b, heads, n, m), with cap and bias: all that softmax sees, sinks apart."""
        groups = self.k.shape[1]
        q = self.q.unflatten(1, (groups, -1))
        logits = (q @ self.k[:, :, None].mT).flatten(1, 2)
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits if self.bias is None else logits + self.bias

    def outputs(self) -> Tensor:
        """Softmax of the logits applied to the values: (b, n, heads, d_v), which is the model's own output."""
        logits = self.logits()
        if self.sinks is not None:
            sink = self.sinks.to(logits)[None, :, None, None].expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sink], -1)
        weights = torch.softmax(logits, -1)[..., : self.k.shape[2]].unflatten(1, (self.v.shape[1], -1))
        return (weights @ self.v[:, :, None]).flatten(1, 2).transpose(1, 2)


@contextmanager
def capture(model: nn.Module, read: Callable[[Attention], None]) -> Iterator[None]:
    """Call `read` with the `Attention` of every layer, as they run, while the model runs inside the block.

    Attention of an encoder over itself or of a decoder over its past; that of a decoder over an encoder's states is
    left out, by the names of its modules. The model answers as before, to rounding; its settings are those from before
    when the block ends.

    Parameters
    ----------
    model : a transformers model, with or without a task head.

    Raises
    ------
    ValueError
        If the block ends without a call: the model computes its attention itself.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    names = {module: name for name, module in model.named_modules()}
    calls = 0

    def attend(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **options):
        nonlocal calls
        own = _own_attention(module, options)
        output, weights = own(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options)
        name = names.get(module, type(module).__name__)
        if not CROSS.search(name):
            layer = module.layer_idx if isinstance(getattr(module, "layer_idx", None), int) else calls
            bias = _bias(module, query, key, attention_mask, options)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            sinks, window = options.get("s_aux"), options.get("sliding_window")
            read(Attention(layer, name, scale * query, key, value, bias, options.get("softcap"), sinks, window, output))
            calls += 1
        return output, weights

    AttentionInterface.register(NAME, attend)
    # Under the same name: without a mask of its own a decoder would lose its causality.
    AttentionMaskInterface.register(NAME, eager_mask)
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
        expected = "one that uses the attention interface of transformers"
        raise ValueError(f"model: expected {expected}, got {type(model).__name__}, which computes its attention itself")


def _own_attention(module: nn.Module, options: dict) -> Callable:
    """The attention that a model has without us: fused, or its own where a fused one knows no cap and no sinks."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if options.get("softcap") is None and options.get("s_aux") is None:
        return sdpa_attention_forward
    return sys.modules[type(module).__module__].eager_attention_forward


def _bias(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict) -> Tensor | None:
    """What a layer adds to its logits: its mask, the causal one where that is left to the kernel, its position bias."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and causal and query.shape[2] > 1:
        unseen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
        mask = torch.zeros(unseen.shape, dtype=query.dtype, device=query.device).masked_fill(unseen, -math.inf)[
            None, None
        ]
    elif mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, -math.inf)
    position = options.get("position_bias")
    return position if mask is None else mask if position is None else mask + position
