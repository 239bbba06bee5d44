"""The model of text in a model of transformers: what reads token ids, whatever else is built around it.

Most models are that as they stand, or under a task head. Of an encoder with a decoder it is the encoder; of a model of
text and pictures, or of sound, it is the language model or the text tower inside it.
"""

from __future__ import annotations

import inspect

from torch import nn

IDS = "input_ids"  # the input of a model of text
NAMES = ("language_model", "text_model")  # of a model of text inside another


def kind_of(config) -> str:
    """The name of a kind of models, such as ``bert``."""
    return getattr(config, "model_type", type(config).__name__)


def require_text(config) -> None:
    """Refuse a configuration of a model that reads no text: one of pictures, sound or numbers, or of no known kind.

    Nothing is built for that. A model with a model of text inside passes.

    Raises
    ------
    ValueError
        It names the kind, and what that reads.
    """
    from transformers import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        raise _refusal(config, "AutoModel of transformers builds none of this kind")
    built = MODEL_MAPPING[type(config)]
    reads = (built[0] if isinstance(built, tuple) else built).main_input_name
    if reads != IDS and not any(hasattr(config, name) for name in ("text_config", "text_encoder")):
        raise _refusal(config, f"it reads {_listed(reads)}")


def text_part(model) -> nn.Module:
    """The model of text in a model of transformers, with or without a task head: a part of it, and no copy.

    Raises
    ------
    ValueError
        If there is none. It names the kind, and what that reads.
    """
    from transformers import PreTrainedModel

    part, found = None, model
    while found is not part:
        part = found
        found = part.base_model
        found = next((getattr(found, name) for name in NAMES if hasattr(found, name)), found)
        # The configuration of an encoder saved alone says that it has no decoder; AutoModel builds one.
        if found.config.is_encoder_decoder or hasattr(found, "encoder") and hasattr(found, "decoder"):
            found = found.get_encoder()
        if hasattr(found, "lm_head") and hasattr(found, "model"):  # the language model of a Llama 4 is no base model
            found = found.model
        if not isinstance(found, PreTrainedModel):
            raise _refusal(model.config, f"its {type(found).__name__} is no model of its own")
    if found.main_input_name != IDS:
        raise _refusal(model.config, f"it reads {_listed(found.main_input_name)}")
    if not hasattr(_embeddings(found), "num_embeddings"):
        raise _refusal(model.config, "it has no table of tokens")
    return found


def without_cache(model) -> dict[str, bool]:
    """Options of a forward pass that keep no keys and values for a continuation that never comes."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _embeddings(model) -> nn.Module | None:
    """The table of a model's tokens; None if it has none."""
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # as models of pictures say it
        return None


def _listed(inputs: str | list[str]) -> str:
    return inputs if isinstance(inputs, str) else " and ".join(inputs)


def _refusal(config, reason: str) -> ValueError:
    return ValueError(f"model: expected a model of text, got {kind_of(config)!r} ({reason})")
