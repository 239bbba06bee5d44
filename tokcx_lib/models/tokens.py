"""Tokens of a text: its ids, what enters the attention of a layer, as a stream or together, and their moments.

The tokens of a layer are what its attention reads, special tokens left out: the hidden states that enter it, after the
layer's normalisation where that comes first (GPT-2, Llama, Mistral, Qwen2). The model reads a text in windows, one by
one, and a layer is read in passing: the forward pass ends where the last layer asked for begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tokcx_lib.models import architectures
from tokcx_lib.models.loading import TextModel, evaluating, require_text_model
from tokcx_lib.models.text_parts import without_cache
from tokcx_lib.models.tokenization import read_ids
from tokcx_lib.theory.limits import Moments
from tokcx_lib.validation import as_count

BATCH = {"cpu": 16, "cuda": 256}  # windows that a model reads at once: a GPU wants many
CONTEXT = 256  # tokens a model reads at once unless another number is asked for, its special tokens included
MOST_UNKNOWN = 0.1  # of a text's tokens: beyond it the numbers describe the one token that stands for all the rest


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


def first_ids(model: TextModel, text: str | Iterable[str], tokens: int | None = None, reason: str = "") -> np.ndarray:
    """Ids (n,) of the first `tokens` tokens of a text, or of all, int64; no more of it is read than that takes.

    Parameters
    ----------
    model : whose tokenizer is used; text : a string, or an iterable of the pieces of one.
    reason : what an error says after the number of tokens.

    Raises
    ------
    ValueError
        If the text is shorter than the tokens asked for, which are one or more, or the tokenizer cannot read it
        (`tokenization.read_ids`).
    """
    tokens = None if tokens is None else as_count("tokens", tokens)
    parts, count = [np.empty(0, dtype=np.int64)], 0
    for ids in read_ids(model.tokenizer, text):
        parts.append(ids)
        count += len(ids)
        if tokens is not None and count >= tokens:
            break
    require_tokens(count, tokens or 0, reason)
    return np.concatenate(parts)[:tokens]


def require_tokens(found: int, tokens: int, reason: str = "") -> None:
    """Raise ValueError if a text has fewer tokens than are asked for."""
    if found < tokens:
        raise ValueError(f"text: expected at least {tokens} tokens{reason}, got {found}")


def window_ends(model: TextModel, context: int) -> tuple[list[int], list[int]]:
    """Ids of the special tokens before and after the text in each window of `context` tokens, these included.

    Raises
    ------
    ValueError
        If the context exceeds the model's positions, or leaves no place for text.
    """
    config = architectures.base_model(model).config
    before, after = architectures.special_tokens(config, model.tokenizer)
    least, most = len(before) + len(after) + 1, architectures.most_positions(config)
    if not least <= as_count("context", context) <= most:
        raise ValueError(f"context: expected {least} to {most} tokens, got {context}")
    return before, after


def require_ids(model: TextModel, ids: np.ndarray) -> None:
    """Raise ValueError unless `ids` are token ids (n,), n >= 1, in the model's table."""
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"text: expected at least one token, got shape {ids.shape}")
    words = architectures.base_model(model).get_input_embeddings().num_embeddings
    if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= words:
        found = f"{ids.dtype} from {ids.min()} to {ids.max()}"
        raise ValueError(f"text: expected token ids from 0 to {words - 1}, got {found}")


class _Reached(Exception):
    """Raised in the forward pass once the last layer asked for has been read: what follows is not needed."""


def layer_streams(
    model: TextModel,
    text,
    layers: Sequence[int],
    context: int = CONTEXT,
    batch: int | None = None,
    special: bool = False,
) -> Iterator[list[Tensor]]:
    """Tokens that enter the attention of several layers, in one forward pass, batch by batch.

    Parameters
    ----------
    text : a string, or token ids (n,) from `tokenize`.
    layers : which layers, counted from 0.
    context : tokens the model sees at once, its special tokens included; the last window may be shorter.
    batch : windows run at once; default: 16, or 256 on a GPU.
    special : whether to keep the special tokens of each window, in their places.

    Yields
    ------
    list of Tensor (b, d), one for each layer, in the model's precision and on its device; special tokens left out,
    unless asked for

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
    ends = window_ends(model, context)
    ids = np.asarray(tokenize(model, text) if isinstance(text, str) else text)
    require_ids(model, ids)
    if isinstance(text, str):
        require_known(model, ids)
    ids = torch.as_tensor(ids.astype(np.int64))
    batch = BATCH.get(base.device.type, BATCH["cpu"]) if batch is None else batch
    return _run_layers(base, modules, _windows(ids, context - sum(map(len, ends)), batch), list(layers), ends, special)


def token_stream(
    model: TextModel, text, layer: int, context: int = CONTEXT, batch: int | None = None
) -> Iterator[Tensor]:
    """Tokens (b, d) that enter the attention of one layer, batch by batch; see `layer_streams`."""
    return (tokens for (tokens,) in layer_streams(model, text, [layer], context, batch))


def _windows(ids: Tensor, width: int, batch: int) -> list[Tensor]:
    """Windows (b, width) of ids (n,), up to `batch` at once, and what remains in a last one (1, fewer)."""
    whole = len(ids) // width
    windows = list(ids[: whole * width].reshape(whole, width).split(batch)) if whole else []
    if len(ids) % width:
        windows.append(ids[whole * width :][None])
    return windows


def _run_layers(model, modules, windows, layers, ends, special) -> Iterator[list[Tensor]]:
    """What enters the layers, window by window; `ends` are the special tokens before and after each."""
    before, after = (torch.tensor(end, dtype=torch.int64)[None] for end in ends)
    options = without_cache(model)
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
            with evaluating(model), torch.inference_mode():
                model(inputs, **options)
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        # Special tokens give context to the model; they are not drawn from the law of tokens, so they are left out.
        inside = slice(None) if special else slice(before.shape[1], before.shape[1] + block.shape[1])
        yield [read[i][:, inside].reshape(-1, read[i].shape[-1]).clone() for i in layers]


def collect_tokens(model: TextModel, text, layers: Sequence[int], tokens: int | None = None) -> list[Tensor]:
    """The first `tokens` tokens (n, d) that enter each of several layers, float32; all of the text's if None.

    Raises
    ------
    ValueError
        If the text is shorter than the tokens asked for or mostly unknown, or a layer does not exist.
    """
    ids = first_ids(model, text, tokens) if isinstance(text, str) else text
    require_known(model, ids)
    require_tokens(len(ids), tokens or 0)
    parts: list[list[Tensor]] = [[] for _ in layers]
    count = 0
    with tqdm(total=tokens, unit=" tokens", desc="model", leave=False) as bar:
        for batch in layer_streams(model, ids, layers):
            for part, x in zip(parts, batch):
                part.append(x)
            count += len(batch[0])
            bar.update(len(batch[0]))
            if tokens is not None and count >= tokens:
                break
    return [torch.cat(part)[:tokens] for part in parts]


def token_moments(x: Tensor) -> Moments:
    """Mean (d,) and centred covariance (d, d), divisor n, of tokens (n, d), in float64."""
    mean = x.mean(0, dtype=torch.float64)
    cov = sum((part := block.double() - mean).mT @ part for block in x.split(65_536)) / len(x)
    return Moments(mean, (cov + cov.mT) / 2)


class RunningMoments:
    """Mean and centred covariance of tokens that come block by block, in float64.

    Two disjoint sets of tokens merge by their numbers, means and scatter matrices, the sums of (y - mean)(y - mean)';
    each block is centred by its own mean, so no digits are lost where the mean is far from zero.

    Source: Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance".
    """

    def __init__(self, dim: int, device=None):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Take in tokens (b, d), b >= 1."""
        x = x.double()
        mean = x.mean(0)
        centred = x - mean
        self.merge(len(x), mean, centred.mT @ centred)

    def merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Take in `count` >= 1 other tokens, by their mean (d,) and scatter matrix (d, d)."""
        gap, total = mean - self.mean, self.count + count
        self.scatter += scatter + torch.outer(gap, gap) * (self.count * count / total)
        self.mean += gap * (count / total)
        self.count = total

    @property
    def cov(self) -> Tensor:
        """Centred covariance (d, d), divisor n."""
        return (self.scatter + self.scatter.mT) / (2 * self.count)
