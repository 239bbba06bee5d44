"""Where models with bilinear heads keep their attention, and what bounds and surrounds the text of any model.

An `Architecture` says what a family has in common: where its attention modules are and what their linear maps are
called, whether attention is causal, and whether positions are rotary. What is one model's own (the number of heads,
scales, frequencies, sliding windows) is read from that model.

The logits of a supported head are a bilinear form of two tokens, up to rotary positions. That leaves out models that
normalise queries and keys or cap the logits. A sliding window (Mistral, Qwen2) changes which keys a query sees and not
its logits (`windows`).

Sizes, positions and special tokens (`require_sizes`, `most_positions`, `special_tokens`) are asked of every model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from tokcx_lib.validation import MOST


@dataclass(frozen=True)
class Architecture:
    """One family: the path to its list of layers, that from a layer to its attention, and the names of the maps.

    `maps` names the linear maps of queries, keys and values, or the one that holds all three (GPT-2); `output` is the
    path from a layer to the linear map that adds up the outputs of all heads.
    """

    layers: str
    attention: str
    maps: tuple[str, ...]
    output: str
    causal: bool = False
    rotary: bool = False


BERT = Architecture("encoder.layer", "attention.self", ("query", "key", "value"), "attention.output.dense")
LLAMA = Architecture(
    "layers", "self_attn", ("q_proj", "k_proj", "v_proj"), "self_attn.o_proj", causal=True, rotary=True
)
ARCHITECTURES = {
    "bert": BERT,
    "roberta": BERT,
    "distilbert": Architecture("transformer.layer", "attention", ("q_lin", "k_lin", "v_lin"), "attention.out_lin"),
    "gpt2": Architecture("h", "attn", ("c_attn",), "attn.c_proj", causal=True),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
}
SUPPORTED = tuple(ARCHITECTURES)

# Common families whose logits are no bilinear form, so that the message can say why they are left out.
NORMALISED = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2", "olmo3", "olmoe")


def architecture(config) -> Architecture:
    """The architecture of a model with this configuration.

    Raises
    ------
    ValueError
        If it is not supported; the message names those that are, and the reason where there is one to give.
    """
    kind = getattr(config, "model_type", type(config).__name__)
    reason = _refusal(kind, config)
    if kind not in ARCHITECTURES or reason:
        because = f" ({reason})" if reason else ""
        raise ValueError(f"model: expected one of {', '.join(SUPPORTED)}, got {kind!r}{because}")
    return ARCHITECTURES[kind]


def _refusal(kind: str, config) -> str | None:
    """Why a model cannot be read as bilinear self-attention over one sequence, or None."""
    if kind in NORMALISED:
        return "it normalises queries and keys, so that its logits are not bilinear in the tokens"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it caps its logits, which are then not bilinear in the tokens"
    if getattr(config, "add_cross_attention", False):
        return "its cross-attention reads keys from another sequence"
    if hasattr(config, "relative_attention_num_buckets"):
        return "its relative positions add terms to the logits"
    if (positions := getattr(config, "position_embedding_type", None) or "absolute") != "absolute":
        return f"its {positions} positions add terms to the logits"
    quantised = getattr(config, "quantization_config", None)
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    if quantised is not None and method != "gguf":  # weights of a GGUF file are plain once they are read
        return "its weights are quantised, and no plain matrices"
    if kind in ARCHITECTURES and ARCHITECTURES[kind].causal and not getattr(config, "is_causal", True):
        return "with attention that is not causal"
    return None


# Sizes in a configuration, and the most of each that a model may have: no model in use comes near, and building one of
# more would take all memory before its weights are found not to fit.
SIZES = {
    "num_hidden_layers": 1000,
    **dict.fromkeys(("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings"), 2**24),
}
OPTIONAL_SIZES = ("intermediate_size", "num_key_value_heads", "head_dim", "sliding_window")
# As kinds without bilinear heads name them besides.
OTHER_SIZES = {
    **dict.fromkeys(("num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"), 1000),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 2**16),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "n_positions"), 2**24),
}


def require_sizes(config) -> None:
    """Refuse a configuration whose sizes are no counts, or whose heads do not divide what they share.

    Of a kind without bilinear heads these are the sizes that it has, those of the models inside it among them. Where
    it has one for each layer, or a special meaning for numbers below one, that is left to the model.

    Raises
    ------
    ValueError
        It names the size.
    """
    if config.model_type not in ARCHITECTURES:
        for part in (config, *_inside(config)):
            _require_own_sizes(part)
        return
    optional = {name: 2**24 for name in OPTIONAL_SIZES if getattr(config, name, None) is not None}
    for name, most in (SIZES | optional).items():
        _require_size(name, getattr(config, name, None), most)
    name, whole = "num_attention_heads", config.hidden_size
    if "num_key_value_heads" in optional:  # whose heads have a width of their own
        name, whole = "num_key_value_heads", config.num_attention_heads
    if whole % getattr(config, name):
        raise ValueError(f"model: expected {name} to divide {whole}, got {getattr(config, name)}")


def _require_size(name: str, size, most: int, least: int = 1) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or not least <= size <= most:
        raise ValueError(f"model: expected {name} from {least} to {most}, got {size!r}")


def _require_own_sizes(config) -> None:
    """Refuse the sizes that a configuration has, if they are no counts or more than any model has."""
    for name, most in (SIZES | dict.fromkeys(OPTIONAL_SIZES, 2**24) | OTHER_SIZES).items():
        size = _own(config, name)
        if isinstance(size, (str, bool)) or isinstance(size, (int, float)) and not size <= most:
            raise ValueError(f"model: expected {name} of up to {most}, got {size!r}")
    for name in ("num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads"):
        if isinstance(size := _own(config, name), int):
            _require_size(name, size, SIZES[name])


def _own(config, name: str):
    """A value of a configuration; None where it has none, or another one for each layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # asked for the one value of what differs from layer to layer
        return None


def _inside(config) -> list:
    """The configurations inside one: of its text, its pictures, its sound."""
    return [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]


def base_model(model) -> nn.Module:
    """The model under a `TextModel` or under the task head of a Hugging Face model; else the model itself."""
    if not isinstance(model, nn.Module):
        model = getattr(model, "model", model)
    return getattr(model, "base_model", model)


def attention_modules(model) -> list[nn.Module]:
    """The self-attention modules of a supported base model, layer by layer."""
    kind = architecture(getattr(model, "config", model))
    return [layer.get_submodule(kind.attention) for layer in model.get_submodule(kind.layers)]


def projections(kind: Architecture, module: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
    """Weights (heads x size, d) and biases (heads x size,) or None of an attention's queries, keys and values."""
    if len(kind.maps) == 1:  # GPT-2: one matrix (d, 3 x heads x size), which multiplies tokens from the right
        packed = module.get_submodule(kind.maps[0])
        return list(zip(packed.weight.detach().mT.chunk(3), packed.bias.detach().chunk(3)))
    linear = [module.get_submodule(name) for name in kind.maps]
    return [(m.weight.detach(), None if m.bias is None else m.bias.detach()) for m in linear]


def output_maps(model) -> list[Tensor]:
    """Weights (d, heads x size) that add up the outputs of all heads, layer by layer, of a supported base model."""
    kind = architecture(model.config)
    found = [layer.get_submodule(kind.output).weight.detach() for layer in model.get_submodule(kind.layers)]
    return [weight.mT for weight in found] if len(kind.maps) == 1 else found  # GPT-2 multiplies from the right


def is_causal(config) -> bool:
    """Whether a query sees only itself and earlier keys: decoders, and a BERT that was set up as one."""
    return architecture(config).causal or bool(getattr(config, "is_decoder", False))


def windows(config) -> list[int | None]:
    """How many keys a query of each layer sees at most, its own included; None where it sees all before it.

    Mistral has one window for all layers or none, Qwen2 one for those of its layers that slide.
    """
    count, kind = config.num_hidden_layers, config.model_type
    window = config.sliding_window if kind in ("mistral", "qwen2") else None
    sliding = [layer == "sliding_attention" for layer in config.layer_types] if kind == "qwen2" else [True] * count
    return [window if slides else None for slides in sliding]


def scale(module) -> float:
    """What an attention module multiplies its logits by.

    Raises
    ------
    ValueError
        If the module does not say, as GPT-2's in versions of transformers that are too old.
    """
    if not hasattr(module, "scaling"):
        kind = type(module).__name__
        raise ValueError(f"model: expected attention with an attribute `scaling`, got {kind} (transformers is too old)")
    return module.scaling


def rotary(model) -> tuple[Tensor | None, float]:
    """Angles per position (d_k / 2,) of a base model's rotary positions, and the factor that they put on every logit.

    None and 1 for absolute positions. Some ways of stretching rotary positions also scale queries and keys alike: the
    logits carry the square of that. Others change the angles with the length of the context: these are the angles of
    contexts within `most_positions`.

    Raises
    ------
    ValueError
        If an angle is not finite: attention kernels turn such positions into numbers all the same.
    """
    if not architecture(model.config).rotary:
        return None, 1.0
    embedding = model.rotary_emb
    angles = embedding.original_inv_freq.detach()
    if not angles.isfinite().all():
        raise ValueError(f"model: expected rope_parameters with finite angles, got {angles.tolist()}")
    return angles, float(embedding.attention_scaling) ** 2


# Position tables that begin behind the padding token, and are longer by as much.
BEHIND_PADDING = (
    *("roberta", "camembert", "data2vec-text", "esm", "lilt", "longformer", "luke", "markuplm", "mpnet"),
    *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)


def most_positions(config) -> int:
    """The longest context of a model, in tokens, its special tokens included; MOST where nothing bounds it.

    Of the configuration of any text model: that of an encoder or a language model alone (`loading.TextModel`).
    Relative positions and ALiBi bound nothing.
    """
    most = _position_table(config)
    if config.model_type in BEHIND_PADDING:
        most -= config.pad_token_id + 1
    stretched = getattr(config, "rope_parameters", None) or {}
    # One setting, or one for each kind of layers.
    for rope in (stretched, *(part for part in stretched.values() if isinstance(part, dict))):
        if rope.get("rope_type") == "longrope":  # has other angles beyond the context it was first trained on
            most = min(most, rope.get("original_max_position_embeddings") or most)
    return most


def _position_table(config) -> int:
    """How many positions a configuration counts; MOST if it does not."""
    names = ["max_position_embeddings", "max_encoder_position_embeddings"]
    if not hasattr(config, "relative_attention_num_buckets"):  # old files of T5 tell n_positions all the same
        names += ["n_positions", "n_ctx", "max_seq_len", "max_sequence_length"]
    counts = (getattr(config, name, None) for name in names)
    return next((count for count in counts if isinstance(count, int) and count >= 1), MOST)


def special_tokens(config, tokenizer) -> tuple[list[int], list[int]]:
    """Ids of the special tokens before and after each window of text.

    They are what the tokenizer puts around a text: `<bos>` before that of a Gemma, `</s>` after that of a T5. Of models
    with bilinear heads, a window of a BERT-like one is [CLS] text [SEP], whatever the tokenizer does, and one of a
    decoder starts with the token of the beginning where its tokenizer puts that in front of a text (Llama, Mistral),
    and has no special token elsewhere (GPT-2, Qwen2).

    Raises
    ------
    ValueError
        If the tokenizer of a BERT-like model does not have them.
    """
    kind = ARCHITECTURES.get(config.model_type)
    if kind is None:
        return _around(tokenizer)
    if not kind.causal:
        first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
        if first is None or last is None:
            raise ValueError(
                f"model: expected a tokenizer with special tokens [CLS] and [SEP], got ids {first} and {last}"
            )
        return [first], [last]
    begins = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if begins else [], []


def _around(tokenizer) -> tuple[list[int], list[int]]:
    """Ids that a tokenizer puts before and after a text: those that are marked as special around a word."""
    for word in ("a", "the", "1", "\u4e00"):  # the first that it does not pass over in silence
        encoded = tokenizer(word, return_special_tokens_mask=True)
        ids, text = encoded["input_ids"], [i for i, special in enumerate(encoded["special_tokens_mask"]) if not special]
        if text:
            return ids[: text[0]], ids[text[-1] + 1 :]
    return ids, []
