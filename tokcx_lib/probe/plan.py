"""The plan of a probe: all that its numbers depend on; two probes with the same plan ask the same question."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

import tokcx_lib
from tokcx_lib.models import architectures
from tokcx_lib.models.loading import TextModel
from tokcx_lib.models.tokens import CONTEXT


def default_context(model: TextModel) -> int:
    """How many tokens a model sees at once in a probe that does not say: CONTEXT, or as many as it can."""
    return min(CONTEXT, architectures.most_positions(architectures.base_model(model).config))


def plan(model: TextModel, ids: np.ndarray, settings: dict) -> dict:
    """All that the answer of a probe depends on: `ids` of the tokens that it reads, `settings` its numbers."""
    device = next(model.model.parameters()).device
    return {
        **model.provenance,
        "tokens_sha256": hashlib.sha256(np.asarray(ids).astype(np.int64).tobytes()).hexdigest(),
        **settings,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokcx": tokcx_lib.__version__,
    }


def differing(there: dict, here: dict) -> list[str]:
    """What of a probe's question, as two plans have it, is not the same: of model, text, tokens, layers, and so on.

    The same question asked with another number of threads or another version of PyTorch is the same.
    """
    # Of the same weights the folder may have another name.
    weights = "model_sha256" if here["model_sha256"] else "model"
    found = ["model"] if there.get(weights) != here[weights] else []
    if "windows" in there and "tokens" in here or "tokens" in there and "windows" in here:
        return [*found, "sample of keys"]
    names = ("tokens", "windows", "layers", "queries", "seed", "context", "error", "model_dtype")
    found += [name for name in names if there.get(name) != here.get(name)]
    # Other models and other numbers of tokens have other ids on the same text.
    if there.get("tokens_sha256") != here["tokens_sha256"] and not {"model", "tokens", "windows", "context"} & set(
        found
    ):
        found.append("text")
    return found


def read_plan(file: Path) -> dict | None:
    """What a file written from a `plan` says; None if there is no such file, or it cannot be read."""
    try:
        found = json.loads(file.read_bytes()) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
