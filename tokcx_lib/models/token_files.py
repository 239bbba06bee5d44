"""Token ids of a text in a file: for a machine that has the model, and neither the text nor the time to tokenise it.

A file ``TEXT.MODEL.ids.npz`` in the folder ``TOKCX_DATA`` stands for the text with that name, read by the model with
that name. It holds the ids in 16 bits each, and says which weights they are for and which text they were made from.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from tokcx_lib import checkpoints, records
from tokcx_lib.models.loading import TextModel


def path_of(folder: Path, text: str, model: str) -> Path:
    """Where the ids of a text lie."""
    return folder / f"{text}.{model}.ids.npz"


def write_ids(folder: Path, text: str, model: TextModel, ids: np.ndarray, texts: dict[str, str]) -> Path:
    """Write ids (n,) of a text as a model's tokenizer has them; `texts` are names and SHA-256 of what was tokenised.

    Raises
    ------
    ValueError
        If an id does not fit into 16 bits.
    """
    ids = np.asarray(ids)
    if ids.ndim != 1 or len(ids) == 0 or ids.min() < 0 or ids.max() > np.iinfo(np.uint16).max:
        raise ValueError(f"ids: expected numbers (n,) from 0 to {np.iinfo(np.uint16).max}, got shape {ids.shape}")
    about = {"model_sha256": model.sha256, "texts": texts, "sha256": _digest(ids)}
    folder.mkdir(parents=True, exist_ok=True)
    packed = checkpoints.pack({"ids": ids.astype(np.uint16), "about": np.array(json.dumps(about))})
    records.write_whole(target := path_of(folder, text, model.name), packed)
    return target


def find_ids(text: str, model: TextModel) -> tuple[np.ndarray, dict[str, str]] | None:
    """The ids (n,) of a text, int64, and `texts`, what they were made from; None where there is no such file.

    Raises
    ------
    ValueError
        If the file is damaged, or its ids are those of other weights.
    """
    folder = os.environ.get("TOKCX_DATA")
    path = path_of(Path(folder), text, model.name) if folder else None
    if path is None or not path.is_file():
        return None
    try:
        found = checkpoints.unpack(path.read_bytes())
        ids, about = found["ids"].astype(np.int64), json.loads(str(found["about"]))
        sha256, weights, texts = about["sha256"], about["model_sha256"], dict(about["texts"])
    except Exception as error:  # numpy, zip and json each raise kinds of their own
        raise ValueError(f"ids: expected token ids in {path}, got what cannot be read ({error})") from error
    if sha256 != _digest(ids):
        raise ValueError(f"ids: expected token ids of sha256 {sha256} in {path}, got others")
    if weights != model.sha256:
        raise ValueError(
            f"ids: expected token ids for {model.name!r} of sha256 {model.sha256}, got {path} for {weights}"
        )
    return ids, texts


def _digest(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype(np.int64).tobytes()).hexdigest()
