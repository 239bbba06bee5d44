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
from dataclasses import dataclass, replace

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
    mask : (b or 1, heads or 1, n, m) or None: which keys a query sees, True for those, or what is added to its logits,
        -inf (or the lowest number of the precision) for those that it does not see.
    causal : whether a query sees no later key; without a mask, it sees all others.
    position : (b or 1, heads or 1, n, m) or None: what positions add to the logits.
    cap : logits l become cap tanh(l / cap), before anything is added; sinks : (heads,), logits of a key without value.
    window : keys that a query sees at most, its own and those before it, where the layer says so.
    output : (b, n, heads, d_v), the model's own.
    """

    layer: int
    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    position: Tensor | None
    cap: float | None
    sinks: Tensor | None
    window: int | None
    output: Tensor

    def beginning(self, n: int) -> Attention:
        """What the first n tokens read, where no query sees a later key."""
        mask, position = (None if each is None else each[..., :n, :n] for each in (self.mask, self.position))
        q, k, v = (each[:, :, :n] for each in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, mask=mask, position=position, output=self.output[:, :n])

    def seen(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Which keys queries see: bool, (b or 1, heads or 1, r, m); of all queries, or those of some rows."""
        if self.mask is None:
            queries = torch.arange(self.q.shape[2], device=self.q.device)[rows]
            keys = torch.arange(self.k.shape[2], device=self.q.device)
            return (keys <= queries[:, None] if self.causal else keys >= queries[:, None].mul(0))[None, None]
        mask = self.mask[..., rows, :]
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2

    def logits(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """(b, heads, r, m), all that softmax sees, sinks apart: capped, with what is added, -inf for keys not seen.

        Of all queries, or those of some rows. At least in float32: half precision is for weights, not for exponents.
        """
        q, k = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (self.q[:, :, rows], self.k))
        logits = (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT).flatten(1, 2)
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        if self.position is not None:
            logits = logits + self.position[..., rows, :]
        if self.mask is not None and self.mask.dtype != torch.bool:
            logits = logits + self.mask[..., rows, :]
        return logits.masked_fill(~self.seen(rows), -math.inf)

    def outputs(self) -> Tensor:
        """Softmax of the logits applied to the values: (b, n, heads, d_v), which is the model's own output."""
        logits = self.logits()
        if self.sinks is not None:
            sink = self.sinks.to(logits)[None, :, None, None].expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sink], -1)
        weights = torch.softmax(logits, -1)[..., : self.k.shape[2]].unflatten(1, (self.v.shape[1], -1))
        return (weights @ self.v[:, :, None].to(weights)).flatten(1, 2).transpose(1, 2)


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
        If the model computes its attention itself: at once where it says so, else if the block ends without a call.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if not any(getattr(model, flag, True) for flag in ("_supports_attention_backend", "_supports_sdpa")):
        raise _refusal(model)
    names = {module: name for name, module in model.named_modules()}
    calls = 0

    def attend(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **options):
        nonlocal calls
        own = _own_attention(module, options)
        output, weights = own(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options)
        name = names.get(module, type(module).__name__)
        if not CROSS.search(name):
            layer = module.layer_idx if isinstance(getattr(module, "layer_idx", None), int) else calls
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            causal = _causal(module, query, attention_mask, options)
            position, cap = options.get("position_bias"), options.get("softcap")
            sinks, window = options.get("s_aux"), options.get("sliding_window")
            read(
                Attention(
                    layer, name, scale * query, key, value, attention_mask, causal, position, cap, sinks, window, output
                )
            )
            calls += 1
        return output, weights

    AttentionInterface.register(NAME, attend)
    # Under the same name: without a mask of its own a decoder would lose its causality. This one makes none where
    # attention is causal and no more than that, which saves n x n numbers.
    AttentionMaskInterface.register(NAME, sdpa_mask)
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
        raise _refusal(model)


def _refusal(model: nn.Module) -> ValueError:
    expected = "one that uses the attention interface of transformers"
    return ValueError(f"model: expected {expected}, got {type(model).__name__}, which computes its attention itself")


def _own_attention(module: nn.Module, options: dict) -> Callable:
    """The attention that a model has without us: fused, or its own where a fused one knows no cap and no sinks."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if options.get("softcap") is None and options.get("s_aux") is None:
        return sdpa_attention_forward
    eager = sys.modules[type(module).__module__].eager_attention_forward

    def attend(module, query, key, value, mask, **given):
        return eager(module, query, key, value, _added(module, query, key, mask, options), **given)

    return attend


def _causal(module: nn.Module, query: Tensor, mask: Tensor | None, options: dict) -> bool:
    """Whether a query sees no later key: as the mask says, or as is left to the kernel."""
    if query.shape[2] == 1:
        return False  # a single query is the last one
    if mask is not None:
        later = mask[..., 0, 1]
        return not bool((later if mask.dtype == torch.bool else later > torch.finfo(mask.dtype).min / 2).any())
    causal = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _added(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict) -> Tensor | None:
    """What an eager function adds to its logits for a mask, or for the causality that is left to a kernel."""
    if mask is None and _causal(module, query, None, options):
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None or mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, lowest)
