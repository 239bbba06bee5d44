"""Any model of text loads, from a folder or from memory, and its attention is captured; what is none is named."""

import copy
import importlib.util
import json
import re

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoConfig, AutoModel

from tests.test_architectures import letter_tokenizer
from tests.test_architectures import small as bilinear
from tests.test_capture import TINY, small
from tokcx_lib.models import architectures, heads, loading, text_parts
from tokcx_lib.models.capture import capture
from tokcx_lib.models.tokens import layer_streams, window_ends
from tokcx_lib.validation import MOST

OLD = Version(transformers.__version__) < Version("5.23")
WEIGHTS = "model.safetensors"
IDS = torch.arange(5, 17)[None]
KINDS = """
    albert bart biogpt cohere2 deepseek_v3 electra gemma2 gemma3_text glm4 gpt_neox gpt_oss granite llama4_text mixtral
    modernbert nemotron olmo2 olmo3 opt phi phi3 qwen3 qwen3_moe smollm3 starcoder2 t5 xlm-roberta
""".split()
TEXT = {name: TINY[name] for name in TINY.keys() & AutoConfig.for_model("gemma3_text").to_dict().keys()}
PICTURE = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, image_size=16)
PICTURE |= dict(patch_size=4, num_channels=3)
TURNED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
WHOLES = {
    # kind: (its configuration, with others inside; what reads its text)
    "clip": (dict(text_config=TEXT, vision_config=PICTURE, projection_dim=16), "CLIPTextModel"),
    "gemma3": (dict(text_config=TEXT, vision_config=PICTURE, mm_tokens_per_image=4), "Gemma3TextModel"),
    "llama4": (
        dict(
            text_config=TEXT | dict(intermediate_size_mlp=32, num_local_experts=4),
            vision_config=PICTURE | dict(vision_output_dim=32, projector_input_dim=32, projector_output_dim=32),
        ),
        "Llama4TextModel",
    ),
    "llava": (
        dict(text_config=TEXT | {"model_type": "llama"}, vision_config=PICTURE | {"model_type": "clip_vision_model"}),
        "LlamaModel",
    ),
    "qwen2_vl": (
        dict(
            text_config=TEXT | TURNED,
            vision_config=dict(depth=1, embed_dim=32, hidden_size=32, num_heads=4, patch_size=4),
        ),
        "Qwen2VLTextModel",
    ),
    "t5gemma": (dict(encoder=TEXT, decoder=TEXT, vocab_size=99), "T5GemmaEncoder"),
}


def letters(template="<first> $A"):
    """The tokenizer of letters, which puts around a text what the template says."""
    tokenizer = letter_tokenizer("llama")
    special = [("<first>", 2), ("<last>", 3)]
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<first>")


def saved(model, folder, template="<first> $A", **options):
    model.save_pretrained(folder, **options)
    letters(template).save_pretrained(folder)
    return folder


def whole(kind, body=""):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **WHOLES[kind][0])
    model = AutoModel.from_config(config) if not body else getattr(transformers, body)(config)
    return model.eval()


def changed(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def rewritten(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def answer(model, ids=IDS):
    with torch.no_grad():
        return model(ids)[0]


def refused(says):
    return pytest.raises(ValueError, match=rf"^(?=[^\n]*$)(model|tokenizer|device|dtype): expected .*{says}")


# ---- from folders ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_any_kind_loads_and_its_attention_is_captured(kind, tmp_path):
    made, _ = small(kind)
    loaded = loading.load_model(saved(made, tmp_path))
    assert torch.equal(answer(loaded.model), answer(text_parts.text_part(made)))
    found = []
    with capture(loaded.model, found.append):
        answer(loaded.model)
    assert len(found) == 2 and loaded.provenance == {"model": str(tmp_path), "model_sha256": loaded.sha256}
    assert not loaded.model.training and loaded.dtype == torch.float32
    assert all(torch.allclose(each.outputs(), each.output, atol=1e-5) for each in found)
    assert window_ends(loaded, 20) == ([2], [])
    with refused(f"got '{kind}'"):
        heads.heads(loaded)


@pytest.mark.parametrize("kind", WHOLES)
def test_of_a_model_with_others_the_one_of_text_is_taken(kind, tmp_path):
    if kind == "clip" and OLD:
        pytest.skip("in this version of transformers the text tower of CLIP does not tell its table of tokens")
    made, name = whole(kind), WHOLES[kind][1]
    rewritten(
        saved(made, tmp_path), lambda t: [t.pop(key) for key in list(t) if re.search("vision|visual|decoder", key)]
    )
    loaded = loading.load_model(tmp_path)
    assert type(loaded.model).__name__ == name and loaded.model.config.num_hidden_layers == 2
    assert torch.equal(answer(loaded.model), answer(text_parts.text_part(made)))
    found = []
    with capture(loaded.model, found.append):
        answer(loaded.model)
    assert len(found) == 2 and answer(loaded.model).shape[-1] == 32
    with refused("missing: "):
        loading.load_model(rewritten(tmp_path, lambda t: t.pop(next(key for key in t if "layers.1" in key))))


def test_an_encoder_alone_is_the_encoder_of_the_whole(tmp_path):
    made, _ = small("t5")
    alone = transformers.T5EncoderModel(copy.deepcopy(made.config)).eval()
    alone.load_state_dict(made.state_dict(), strict=False)
    one, other = (loading.load_model(saved(m, tmp_path / name, "$A <last>")) for name, m in (("a", made), ("b", alone)))
    assert torch.equal(answer(one.model), answer(other.model)) and window_ends(one, 2) == ([], [3])
    with refused(r"missing: encoder\.block\.1"):
        loading.load_model(rewritten(tmp_path / "b", lambda t: t.pop("encoder.block.1.layer.0.SelfAttention.q.weight")))


NO_TEXT = {"vit": "pixel_values", "dinov2": "pixel_values", "clip_vision_model": "pixel_values", "swin": "pixel_values"}
NO_TEXT |= {"whisper": "input_features", "wav2vec2": "input_values", "informer": "past_values", "trocr": "AutoModel"}


@pytest.mark.parametrize("kind", NO_TEXT)
def test_a_model_that_reads_no_text_is_named_before_its_weights(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with refused(f"a model of text, got '{kind}' .*{NO_TEXT[kind]}"):
        loading.load_model(tmp_path)


def test_a_part_without_a_table_of_tokens_is_named(tmp_path):
    with refused("a model of text, got 'canine' .it has no table of tokens"):
        loading.load_model(saved(small("canine")[0], tmp_path))


def test_a_model_without_attention_loads_and_is_refused_by_capture(tmp_path):
    loaded = loading.load_model(saved(small("mamba")[0], tmp_path))
    with refused("one that uses the attention interface"), capture(loaded.model, print):
        answer(loaded.model)


@pytest.mark.parametrize("case, body", [("bert", "ForSequenceClassification"), ("llama", "ForCausalLM")])
def test_precisions_and_shards_of_models_with_task_heads(case, body, tmp_path):
    made = bilinear(case, body).bfloat16()
    made.save_pretrained(tmp_path, max_shard_size="4KB")
    letter_tokenizer(case).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = {dtype: loading.load_model(tmp_path, dtype=dtype) for dtype in (None, "auto", "float16", torch.float64)}
    assert [each.dtype for each in found.values()] == [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    assert [each.provenance.get("model_dtype") for each in found.values()] == [None, "bfloat16", "float16", "float64"]
    assert len({each.sha256 for each in found.values()}) == 1
    for each in found.values():
        weight = each.model.get_input_embeddings().weight
        assert torch.equal(weight.float(), made.get_input_embeddings().weight.float().to(weight.dtype).float())
    (stream,) = layer_streams(found["auto"], np.arange(5, 25), [1], context=40)
    (exact,) = layer_streams(found[None], np.arange(5, 25), [1], context=40)
    assert stream[0].dtype == torch.bfloat16 and torch.allclose(stream[0].float(), exact[0], atol=0.3)
    assert heads.heads(found["auto"])[0].A.dtype == torch.float64
    for wrong in ("int8", torch.int8, 16):
        with refused("one of"):
            loading.load_model(tmp_path, dtype=wrong)


def test_numbers_that_float16_does_not_hold_are_named(tmp_path):
    large = rewritten(saved(small("qwen3")[0], tmp_path), lambda t: t["norm.weight"].fill_(1e5))
    assert loading.load_model(large, dtype="bfloat16").dtype == torch.bfloat16
    with refused("NaN or infinity in norm.weight"):
        loading.load_model(large, dtype="float16")
    wide = small("qwen3")[0]
    for weight in wide.layers[0].mlp.parameters():
        weight.data.fill_(1e4)
    saved(wide, tmp_path)
    assert loading.load_model(tmp_path, dtype="bfloat16").sha256
    with refused("float16 holds, got larger ones; bfloat16 or float32 may do"):
        loading.load_model(tmp_path, dtype="float16")


# ---- what no kind may have ----

QUERY = "layers.1.self_attn.q_proj.weight"
FAULTS = {
    # name: (what is done to the weights, or the settings that change; what is said)
    "a weight is missing": (lambda t: t.pop(QUERY), f"missing: {QUERY}"),
    "another shape": (lambda t: t.update({QUERY: torch.ones(3, 32)}), rf"{QUERY} has \(3, 32\)"),
    "NaN": (lambda t: t[QUERY].view(-1)[3:4].fill_(torch.nan), f"NaN or infinity in {QUERY}"),
    "eight bits": (lambda t: t.update({QUERY: t[QUERY].to(torch.int8)}), f"{QUERY} is in I8"),
    "a layer too many": ({"num_hidden_layers": 1, "layer_types": None}, r"left over: layers\.1\."),
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers.*1000000000"),
    "a trillion words": ({"vocab_size": 10**12}, "vocab_size"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "a trillion in the middle": ({"intermediate_size": 10**12}, "intermediate_size"),
    "other weights": ({"transformers_weights": "adapter_model.bin"}, "transformers_weights"),
    "code": ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "custom code"),
    "a quantisation that is not known": ({"quantization_config": {"quant_method": "nosuch"}}, "nosuch"),
    "a quantisation without a name": ({"quantization_config": {}}, "quant_method"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_any_kind_end_in_one_line(fault, tmp_path):
    change, says = FAULTS[fault]
    saved(small("qwen3")[0], tmp_path)
    changed(tmp_path, **change) if isinstance(change, dict) else rewritten(tmp_path, change)
    with refused(says):
        loading.load_model(tmp_path)


@pytest.mark.parametrize("kind", ["gemma3", "t5gemma"])
def test_sizes_of_a_model_inside_are_looked_at(kind, tmp_path):
    path = saved(whole(kind), tmp_path) / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 32', '"intermediate_size": 1000000000000'))
    with pytest.raises(ValueError, match="^model: expected intermediate_size of up to 16777216, got 1000000000000$"):
        loading.load_model(tmp_path)


@pytest.mark.skipif(OLD, reason="transformers came to it later")
def test_sizes_that_differ_from_layer_to_layer_are_left_to_the_model():
    config = AutoConfig.for_model("gemma4_text")
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        _ = config.head_dim
    architectures.require_sizes(config)


def test_masks_of_old_versions_are_no_weights_left_over(tmp_path):
    model = saved(transformers.GPTNeoModel(transformers.GPTNeoConfig(
        vocab_size=99, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )), tmp_path)  # fmt: skip
    old = {f"h.{i}.attn.attention.bias": torch.ones(9, 9, dtype=torch.bool) for i in range(2)}
    assert loading.load_model(rewritten(model, lambda t: t.update(old))).sha256
    with refused(r"left over: h\.0\.attn\.attention\.q_proj\.bias"):
        loading.load_model(rewritten(model, lambda t: t.update({"h.0.attn.attention.q_proj.bias": torch.ones(32)})))


def test_a_kernel_from_elsewhere_is_not_asked_for(tmp_path):
    changed(saved(small("qwen3")[0], tmp_path), attn_implementation="someone/kernel")
    assert loading.load_model(tmp_path).model.config._attn_implementation == "eager"


# ---- quantised ----


@pytest.mark.parametrize(
    "method, package",
    [
        ({"quant_method": "gptq", "bits": 4}, "optimum"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "torchao"}, "torchao"),
    ],
)
def test_the_package_that_a_quantised_model_takes_is_named(method, package, tmp_path):
    if importlib.util.find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is here")
    changed(saved(small("qwen3")[0], tmp_path), quantization_config=method)
    with refused(package):
        loading.load_model(tmp_path)


def in_eight_bits(tensors):
    """Weights of matrices in blocks of 8 x 8, each with its scale, as float8."""
    for name, weight in list(tensors.items()):
        if weight.ndim == 2 and "embed" not in name:
            blocks = weight.unflatten(1, (-1, 8)).unflatten(0, (-1, 8))
            scale = blocks.abs().amax((1, 3)) / 448
            tensors[name] = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers asks for accelerate")
@pytest.mark.skipif(OLD, reason="before, transformers read such weights on a GPU alone")
def test_weights_in_eight_bits_are_read_with_their_scales(tmp_path):
    made = small("qwen3")[0]
    quantised = {"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "dynamic"}
    changed(rewritten(saved(made, tmp_path), in_eight_bits), quantization_config=quantised)
    loaded = loading.load_model(tmp_path, "cpu")
    for name, weight in made.named_parameters():
        read = loaded.model.get_parameter(name)
        assert read.dtype == torch.float32 and torch.allclose(read, weight, rtol=0.07, atol=1e-4), name


# ---- from memory ----


@pytest.fixture
def in_training():
    """A model with a task head, as it stands in a training run."""
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(small("qwen3")[0].config).bfloat16().train()
    model.model.layers[0].eval()
    return model


def test_a_model_in_memory_is_taken_as_it_is(in_training):
    tokenizer = letters()
    tokenizer.backend_tokenizer.enable_truncation(4)
    before = [module.training for module in in_training.modules()], in_training.config.to_dict()
    taken = loading.as_text_model(in_training, tokenizer)
    assert taken.model is in_training.model and taken.dtype == torch.bfloat16
    assert before == ([module.training for module in in_training.modules()], in_training.config.to_dict())
    assert all(weight.requires_grad and not weight.is_inference() for weight in in_training.parameters())
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 4
    assert taken.tokenizer.backend_tokenizer.truncation is None and len(taken.tokenizer("the law")["input_ids"]) == 8
    assert taken.provenance == {"model": "Qwen3ForCausalLM", "model_sha256": taken.sha256, "model_dtype": "bfloat16"}
    assert loading.as_text_model(taken) is taken
    again = loading.text_model(in_training, tokenizer)
    with torch.no_grad():
        in_training.model.layers[1].mlp.up_proj.weight[3, 3] += 1
    assert again.sha256 == taken.sha256 != loading.text_model(in_training, tokenizer).sha256


def test_dropout_is_off_while_a_model_is_read_and_on_again_after():
    model = bilinear("bert", "ForMaskedLM").train()
    drawn = torch.get_rng_state()
    taken = loading.text_model(model, letter_tokenizer("bert"))
    streams = [torch.cat([part for (part,) in layer_streams(taken, np.arange(5, 25), [1], 40)]) for _ in range(2)]
    assert torch.equal(*streams) and model.training and taken.model.encoder.layer[0].training
    assert torch.equal(torch.get_rng_state(), drawn)
    with pytest.raises(RuntimeError), loading.evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert all(module.training for module in model.modules())


def test_names_and_pipelines_stand_for_models(in_training, tmp_path):
    saved(in_training, tmp_path)
    assert torch.equal(
        answer(loading.as_text_model(tmp_path, dtype="auto").model),
        answer(loading.load_model(tmp_path, dtype="auto").model),
    )
    pipeline = transformers.pipeline("text-generation", model=in_training, tokenizer=letters(), device="cpu")
    assert loading.as_text_model(pipeline).model is in_training.model


@pytest.mark.parametrize(
    "value, options, says",
    [
        (None, {}, "a model or pipeline of transformers, got None"),
        (7, {}, "got 7"),
        ("/no/such/folder", {}, "/no/such/folder"),
        (torch.nn.Linear(2, 2), {"tokenizer": letters()}, "got Linear"),
        ("model", {}, "that of the model 'Qwen3ForCausalLM', got None"),
        ("model", {"tokenizer": "a name"}, "a fast tokenizer .*it is a str"),
        ("model", {"tokenizer": transformers.ByT5Tokenizer()}, "a fast tokenizer .*it is a ByT5Tokenizer"),
        ("model", {"tokenizer": letters(), "device": "meta"}, ""),
        ("model", {"tokenizer": letters(), "dtype": "float32"}, "that of the model, torch.bfloat16, got float32"),
        ("minilm", {"tokenizer": letters()}, "none with a name"),
        ("taken", {"tokenizer": letters()}, "none with a TextModel"),
        ("vit", {"tokenizer": letters()}, "a model of text, got 'vit' .it reads pixel_values"),
        ("nan", {"tokenizer": letters()}, "finite weights"),
        ("nowhere", {"tokenizer": letters()}, "weights in memory"),
    ],
)
def test_what_is_no_text_model_is_named(value, options, says, in_training):
    if value == "taken":
        value = loading.text_model(in_training, letters())
    elif value == "vit":
        value = small("vit")[0]
    elif value == "nan":
        value = small("qwen3")[0]
        value.get_input_embeddings().weight.data[40, 3] = torch.nan
    elif value == "nowhere":
        value = in_training.to("meta")
    value = in_training if isinstance(value, str) and value == "model" else value
    expected = r"^device: 'meta' is not available" if options.get("device") else None
    with pytest.raises(ValueError, match=expected) if expected else refused(says):
        loading.as_text_model(value, **options)


# ---- what bounds and surrounds a text ----


@pytest.mark.parametrize(
    "template, ends",
    [
        ("$A", ([], [])),
        ("<first> $A", ([2], [])),
        ("$A <last>", ([], [3])),
        ("<last> <first> $A <last>", ([3, 2], [3])),
    ],
)
def test_special_tokens_are_what_the_tokenizer_puts_around_a_text(template, ends):
    assert architectures.special_tokens(AutoConfig.for_model("qwen3"), letters(template)) == ends


@pytest.mark.parametrize(
    "kind, settings, most",
    [
        ("qwen3", {"max_position_embeddings": 40}, 40),
        ("t5", {"n_positions": 512}, MOST),
        ("bloom", {"seq_length": 40}, MOST),
        ("mamba", {}, MOST),
        ("xlnet", {}, MOST),
        ("mpt", {"max_seq_len": 40}, 40),
        ("openai-gpt", {"n_positions": 40}, 40),
        ("led", {"max_encoder_position_embeddings": 40}, 40),
        ("xlm-roberta", {"max_position_embeddings": 42, "pad_token_id": 1}, 40),
        ("esm", {"max_position_embeddings": 42, "pad_token_id": 1}, 40),
        (
            "phi3",
            {
                "max_position_embeddings": 400,
                "original_max_position_embeddings": 40,
                "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48}
                | {"long_factor": [2.0] * 48, "original_max_position_embeddings": 40},
            },
            40,
        ),
    ],
)
def test_the_longest_context_is_that_of_the_kind(kind, settings, most):
    assert architectures.most_positions(AutoConfig.for_model(kind, **settings)) == most
