"""The question that a probe is asked: a model, a text and numbers, checked before any work.

There are two samples of keys. In context, a query reads those that it has in its window (`context.probe_in_context`);
pooled, those of all windows (`pooled.pooled_probe`). The number of windows asks for the one, that of tokens for the
other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from tokcx_lib.models import architectures
from tokcx_lib.models.heads import heads
from tokcx_lib.models.loading import TextModel, require_text_model
from tokcx_lib.models.tokens import first_ids, require_ids, require_known, require_tokens
from tokcx_lib.probe.context import discard_windows, probe_in_context
from tokcx_lib.probe.layers import existing_layers
from tokcx_lib.probe.plan import default_context, plan
from tokcx_lib.probe.pooled import MOST_SEED, pooled_probe
from tokcx_lib.probe.resuming import discard_checkpoint
from tokcx_lib.validation import as_count, as_list, as_positive, shown

WINDOWS = 4  # of a probe in context that does not say
MOST_CONTEXT = 2048  # tokens that a model sees at once in one that does not say, or as many as it can
LATE_QUERIES, POOLED_QUERIES = 32, 1024  # of each window; of all tokens
ERROR = 0.1  # that the budgets are for


@dataclass(frozen=True)
class Question:
    """What `question` makes: `settings` are the numbers of a probe in context, or of a pooled one."""

    model: TextModel
    ids: np.ndarray
    settings: dict
    in_context: bool

    @property
    def plan(self) -> dict:
        """All that the answer depends on (`plan.plan`)."""
        return plan(self.model, self.ids, self.settings)

    def answer(self, checkpoint: Path | None = None) -> pd.DataFrame | None:
        """The table, one row a head; None on ranks other than the first.

        With a folder for checkpoints, it goes on from what an unfinished probe with the same plan has left there.
        """
        if not self.in_context:
            return pooled_probe(self.model, self.ids, **self.settings, checkpoint=checkpoint)
        belongs = json.dumps(self.plan, sort_keys=True, indent=2).encode()
        return probe_in_context(self.model, self.ids, **self.settings, checkpoint=checkpoint, plan=belongs)


def question(
    model: TextModel,
    text: str | Iterable[str] | Sequence[int],
    *,
    windows: int | None = None,
    tokens: int | None = None,
    context: int | None = None,
    queries: int | None = None,
    error: float | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Question:
    """The question for these arguments, which `tokcx_lib.probe.probe` describes.

    Raises
    ------
    ValueError
        If a number is out of range, the text too short or mostly unknown to the model, a layer not there, both windows
        and tokens are given, or a pooled probe is asked of a model whose heads are not bilinear.
    """
    require_text_model(model)
    if tokens is not None and windows is not None:
        raise ValueError(f"windows, tokens: expected one of them, got {windows} and {tokens}")
    if tokens is not None and error is not None:
        raise ValueError(f"error: expected with windows, which have budgets, got {error} with tokens")
    if as_count("seed", seed, least=0) > MOST_SEED:
        raise ValueError(f"seed: expected an integer from 0 to {MOST_SEED}, got {seed}")
    layers = None if layers is None else [as_count("layers", layer, least=0) for layer in as_list("layers", layers)]
    if tokens is not None:
        tokens = as_count("tokens", tokens, least=2)
        settings = {"tokens": tokens, "context": default_context(model) if context is None else context}
        settings["queries"] = min(POOLED_QUERIES if queries is None else as_count("queries", queries), tokens)
        settings |= {"layers": existing_layers(layers, heads(model)), "seed": seed}
        return Question(model, _ids(model, text, tokens, ""), settings, in_context=False)
    before, after = architectures.special_tokens(model.model.config, model.tokenizer)
    special, most = len(before) + len(after), architectures.most_positions(model.model.config)
    context = min(MOST_CONTEXT, most) if context is None else as_count("context", context)
    if not special + 2 <= context <= most:
        raise ValueError(f"context: expected {special + 2} to {most} tokens, got {context}")
    windows = WINDOWS if windows is None else as_count("windows", windows)
    settings = {"context": context, "windows": windows}
    settings["queries"] = LATE_QUERIES if queries is None else as_count("queries", queries)
    settings["error"] = as_positive("error", ERROR if error is None else error)
    settings |= {"layers": _numbered(layers, model), "seed": seed}
    ids = _ids(model, text, windows * (context - special), f" ({windows} windows of {context})")
    return Question(model, ids, settings, in_context=True)


def discard(checkpoint: Path) -> None:
    """Remove what unfinished probes have left in a folder for checkpoints."""
    discard_windows(checkpoint)
    discard_checkpoint(checkpoint)


def _ids(model: TextModel, text, count: int, why: str) -> np.ndarray:
    """The first ids (count,) of a text, of its pieces, or of ids."""
    if isinstance(text, Sequence) and not isinstance(text, str) and not all(isinstance(part, str) for part in text):
        if not all(isinstance(part, Integral) for part in text):
            raise ValueError(f"text: expected a string, pieces of one, or token ids, got {shown(text)}")
        text = np.array(text)
    if isinstance(text, np.ndarray | Tensor):
        ids = np.asarray(text)
        require_ids(model, ids)
    else:
        ids = first_ids(model, text, count, why)
    require_tokens(len(ids), count, why)
    require_known(model, ids[:count])
    return ids[:count].astype(np.int64)


def _numbered(layers: list[int] | None, model: TextModel) -> list[int] | None:
    """Layers in order; ValueError if the model says that it has fewer."""
    count = getattr(model.model.config, "num_hidden_layers", None)
    if layers is None or count is None:
        return layers
    if unknown := [layer for layer in layers if layer >= count]:
        raise ValueError(f"layers: expected some of 0 to {count - 1}, got {', '.join(map(str, unknown[:8]))}")
    return sorted(set(layers))
