"""Files of a model: what they must be, what must have come out of them, and the one line that all faults end in.

`reading` is the one boundary around the libraries that read a model: whatever they raise, on broken files or on
configurations that no model has, becomes a ValueError in one line. What they let pass in silence, weights that are
missing and drawn at random instead, `require_weights` looks for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from torch import nn

from tokcx_lib.validation import FLOATS

GGUF = ".gguf"  # one file with configuration, weights and tokenizer: no code and no pickle
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = "config.json"
UNREAD = ("pooler.",)  # weights that come after all attention: a checkpoint may leave them out
PRECISIONS = ("F64", "F32", "F16", "BF16")  # of weights as safetensors names them; others need scales beside them
LONGEST = 240  # characters of a reason


def refusal(expected: str, name, reason: str) -> ValueError:
    """The error that every fault of a model ends in."""
    return ValueError(f"model: expected {expected}, got {str(name)!r} ({reason})")


@contextmanager
def reading(expected: str, name) -> Iterator[None]:
    """Turn whatever is raised inside into a `refusal`, and keep warnings, log lines and progress bars to itself.

    That includes what is no `Exception`, such as the panics of a tokenizer. Only the wish to stop passes.
    """
    silenced = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _without_bars():
                yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise refusal(expected, name, _reason(error)) from error
    finally:
        logging.disable(silenced)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the progress bars of transformers, which in a notebook ask for widgets."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):  # the reader of GGUF files has bars that nothing turns off
            yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _reason(error: BaseException) -> str:
    """Kind and first line of an exception, and the next line where that ends with a colon, in printable characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if not line.endswith(":")), 0)
    said = "".join(c if c.isprintable() else "?" for c in f"{type(error).__name__}: {' '.join(lines[: first + 1])}")
    return said if len(said) <= LONGEST else said[: LONGEST - 1] + "…"


def require_files(folder: Path) -> None:
    """Refuse a folder without a configuration, or with a file that is none: a pipe would be waited for without end."""
    with reading("a folder that can be read", folder):
        found = list(folder.iterdir())
    for path in found:
        folder_of_its_own = path.is_dir() and path.suffix not in (".json", ".safetensors", GGUF)
        if path.exists() and not path.is_file() and not folder_of_its_own:
            raise refusal("regular files", folder, f"{path.name} is no regular file")
    if not (folder / CONFIG).is_file():
        raise refusal("a folder of a model", folder, f"it has no {CONFIG}")


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights: the whole, or the shards that its index names, in order of name.

    Raises
    ------
    ValueError
        If there are none, a shard is missing, or the index cannot be read or names anything but safetensors files in
        this folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise refusal("safetensors weights", folder, f"it has no {WEIGHTS} or {INDEX}")
    with reading(f"a {INDEX} with a weight_map from weights to files", folder):
        shards = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()), key=str)
    for shard in shards or [""]:
        if not (isinstance(shard, str) and Path(shard).name == shard and shard.endswith(".safetensors")):
            raise refusal(f"a {INDEX} that names safetensors files beside it", folder, f"it names {shard!r}")
        if not (folder / shard).is_file():
            raise refusal("all shards of the weights", folder, f"it has no {shard}")
    return [folder / shard for shard in shards]


def checksum(files: list[Path]) -> str:
    """The sha256 of some files, read one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def require_weights(model, part, info: dict, plain: list[Path], name) -> None:
    """Refuse a model of whose text part the weights are not all those of its checkpoint, finite numbers, and all used.

    `info` is what transformers tells of loading it: weights that the checkpoint lacks, has in another shape, or has no
    place for. The last are refused where they stand in a numbered layer; elsewhere they belong to a task head. In the
    `plain` files, which are those of a model that is not quantised, weights in integers or in eight bits are refused
    too: they mean something only with scales.
    """
    path = next(f"{path}." if path else "" for path, module in model.named_modules() if module is part)
    inside = {id(tensor) for tensor in part.state_dict(keep_vars=True).values()}
    every = model.state_dict(keep_vars=True)
    outside = {key for key, tensor in every.items() if id(tensor) not in inside}  # a decoder, a model of pictures
    needed = {key for key in info["missing_keys"] - outside if not key.removeprefix(path).startswith(UNREAD)}
    if missing := sorted(needed):
        raise refusal("every weight in the checkpoint", name, f"missing: {_listed(missing)}")
    if mismatched := sorted(entry for entry in info["mismatched_keys"] if entry[0] not in outside):
        shapes = [f"{key} has {tuple(found)} and not {tuple(wanted)}" for key, found, wanted in mismatched]
        raise refusal("weights of the shapes that config.json asks for", name, _listed(shapes))
    prefix = f"{model.base_model_prefix}."
    if left := _left_over(part, path, info["unexpected_keys"], prefix):
        raise refusal("weights that config.json has a place for", name, f"left over: {_listed(left)}")
    parameters = {key for key, _ in model.named_parameters()} - outside
    for key, dtype in _stored_types(plain):
        if key.removeprefix(prefix) in parameters and dtype not in PRECISIONS:
            raise refusal(f"weights in {', '.join(PRECISIONS)}", name, f"{key} is in {dtype}")
    require_finite_weights(part, name)


def require_finite_weights(model, name) -> None:
    """Refuse a model with a weight that is no number. Those in integers or in eight bits are not looked at."""
    for key, weight in model.named_parameters():
        # The sum is finite unless an entry is not, or it overflows; looking at every entry takes many times longer.
        if weight.dtype in FLOATS and not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
            raise refusal("finite weights", name, f"NaN or infinity in {key}")


def _stored_types(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Names and types of the tensors in some files."""
    from safetensors import safe_open

    for path in files:
        with safe_open(path, "pt") as stored:
            yield from ((key, stored.get_slice(key).get_dtype()) for key in stored.keys())


def _left_over(part, path: str, unexpected: set[str], prefix: str) -> list[str]:
    """Weights without a place in a numbered layer of the text part at `path`, masks of old versions apart."""
    lists = [path + name for name, module in part.named_modules() if isinstance(module, nn.ModuleList)]
    masks = {path + name for name, _ in part.named_buffers()}
    inside = re.compile(rf"({'|'.join(map(re.escape, lists))})\.\d+\.(.*\.)?(weight|bias)")
    keys = {key: key.removeprefix(prefix) for key in unexpected}
    return sorted(key for key, own in keys.items() if own not in masks and lists and inside.fullmatch(own))


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
