"""Heads and tokens of every supported architecture against the models' own attention; what is refused, and why."""

import importlib
import inspect
import json
import re

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tokcx_lib.models import architectures, heads, loading
from tokcx_lib.models.tokens import layer_streams, token_stream, tokenize

COMMON = dict(vocab_size=60, hidden_size=24, intermediate_size=16, num_hidden_layers=2, max_position_embeddings=40)
ENCODER = dict(COMMON, num_attention_heads=3)
GPT2 = dict(vocab_size=60, n_embd=24, n_layer=2, n_head=3, n_inner=16, n_positions=40, bos_token_id=3, eos_token_id=3)
# Queries of 8 coordinates where 24 / 4 would give 6; every head of keys serves two of queries.
DECODER = dict(COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0)


def stretched(kind, **options):
    return dict(DECODER, rope_parameters={"rope_type": kind, "rope_theta": 100.0, "factor": 4.0, **options})


CASES = {
    "bert": ("Bert", ENCODER),
    "bert decoder": ("Bert", dict(ENCODER, is_decoder=True)),
    "roberta": ("Roberta", ENCODER),
    "distilbert": (
        "DistilBert",
        dict(vocab_size=60, dim=24, n_layers=2, n_heads=3, hidden_dim=16, max_position_embeddings=40),
    ),
    "gpt2": ("GPT2", GPT2),
    "gpt2 scaled by layer": (
        "GPT2",
        dict(GPT2, scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False, reorder_and_upcast_attn=True),
    ),
    "llama": ("Llama", DECODER),
    "llama with biases": ("Llama", dict(DECODER, attention_bias=True)),
    "llama linear": ("Llama", stretched("linear")),
    "llama dynamic": ("Llama", stretched("dynamic")),
    "llama yarn": ("Llama", stretched("yarn", original_max_position_embeddings=10)),
    "llama longrope": (
        "Llama",
        stretched("longrope", original_max_position_embeddings=20, short_factor=[1, 2, 3, 4], long_factor=[9] * 4),
    ),
    "llama 3": (
        "Llama",
        stretched("llama3", original_max_position_embeddings=10, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    "qwen2": ("Qwen2", {key: value for key, value in DECODER.items() if key != "head_dim"}),
    "qwen2 with a window": ("Qwen2", dict(DECODER, use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "mistral": ("Mistral", dict(DECODER, sliding_window=None)),
    "mistral with a window": ("Mistral", dict(DECODER, sliding_window=6)),
}
FAMILIES = ["bert", "roberta", "distilbert", "gpt2", "llama", "llama yarn", "qwen2", "mistral with a window"]
IDS = torch.randint(5, 50, (1, 20), generator=torch.Generator().manual_seed(1))


def small(case, body="Model"):
    """A random model of a case, every parameter perturbed: biases and the weights of norms start as constants."""
    torch.manual_seed(0)
    name, options = CASES[case]
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}{body}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def attention_inputs(model, ids):
    """What each self-attention module reads (1, n, d), and the model's own attention weights, from a plain pass."""
    read = []
    named = re.compile("(SelfAttention|GPT2Attention|LlamaAttention|Qwen2Attention|MistralAttention)$")
    modules = [module for module in model.modules() if named.search(type(module).__name__)]
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: read.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for module in modules
    ]
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    return read, weights


def rebuilt(head, x, window, key_bias=True):
    """Attention weights (n, n) of a head over tokens (n, d), one distance at a time, from A and the shift."""
    n = len(x)
    logits = x.new_full((n, n), -torch.inf)
    if not head.causal:
        return torch.softmax((x @ head.A.mT + head.shift) @ x.mT, -1)
    for distance in range(min(n, window or n)):
        there = head.at(distance)
        query, key = x[distance:], x[: n - distance]
        values = ((query @ there.A.mT + there.shift) * key).sum(-1)
        logits.diagonal(-distance).copy_(values + (there.key_bias_term(query) if key_bias else 0))
    return torch.softmax(logits, -1)


def window_of(model, layer):
    """How many keys a query of this layer sees, its own included; None for all before it."""
    if getattr(model.config, "layer_types", ["sliding_attention"] * 2)[layer] != "sliding_attention":
        return None
    return getattr(model.config, "sliding_window", None)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_attention_rebuilt_from_A_and_shift_is_the_models_own(case, implementation):
    model = small(case)
    model.set_attn_implementation(implementation)
    found = heads.heads(model)
    count = model.config.num_attention_heads
    assert [(h.layer, h.head) for h in found] == [(layer, head) for layer in range(2) for head in range(count)]
    assert all(h.causal == ("bert" not in case or "decoder" in case) for h in found)
    assert all((h.rotary is not None) == (count == 4) for h in found)
    model.set_attn_implementation("eager")
    read, weights = attention_inputs(model, IDS)
    for head in found:
        x = read[head.layer][0].double()
        own = weights[head.layer][0, head.head]
        last = own[-1][own[-1] > 0]
        assert 1.5 / len(last) < last.max() < 0.999  # neither uniform nor on a single key
        assert (rebuilt(head, x, window_of(model, head.layer)) - own).abs().max() < 1e-5


@pytest.mark.parametrize("case", ["gpt2", "llama with biases", "qwen2"])
def test_the_bias_of_the_keys_matters_with_rotary_positions_alone(case):
    model = small(case)
    model.set_attn_implementation("eager")
    read, weights = attention_inputs(model, IDS)
    for head in heads.heads(model):
        without = rebuilt(head, read[head.layer][0].double(), None, key_bias=False)
        error = (without - weights[head.layer][0, head.head]).abs().max()
        assert error < 1e-5 if head.rotary is None else error > 1e-3


@pytest.mark.parametrize("case", ["bert", "llama yarn", "qwen2"])
def test_projections_give_the_logits_of_A_and_shift(case):
    x = torch.randn(7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for head in heads.heads(small(case)):
        for there in (head, head.at(0), head.at(13)):
            q, k, v = there.project(x)
            assert torch.allclose(q @ k.mT, (x @ there.A.mT + there.shift) @ x.mT, atol=1e-10)
            assert torch.allclose(v, x @ there.V.mT)
        # At no distance nothing turns; at any other the queries of a rotary head keep their length.
        assert torch.allclose(head.at(0).A, head.A, atol=1e-12) and torch.allclose(head.at(0).shift, head.shift)
        turned = head.at(13)
        assert torch.allclose(turned.project(x)[0].norm(dim=-1), head.project(x)[0].norm(dim=-1))
        if head.rotary is None:
            assert turned is head
        else:
            assert turned.rotary is None and (turned.A - head.A).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["bert", "llama"])
@pytest.mark.parametrize("distance", [-1, 1.5, True])
def test_a_distance_is_a_count(case, distance):
    with pytest.raises(ValueError, match="^distance: expected an integer >= 0"):
        heads.heads(small(case))[0].at(distance)


def test_grouped_keys_are_those_of_the_group():
    found = heads.heads(small("llama"))[:4]
    assert torch.equal(found[0].W_K, found[1].W_K) and torch.equal(found[2].W_V, found[3].W_V)
    assert not torch.equal(found[1].W_K, found[2].W_K) and not torch.equal(found[0].W_Q, found[1].W_Q)


@pytest.mark.parametrize("case", ["bert", "distilbert", "gpt2", "llama"])
def test_output_maps_add_up_the_heads(case):
    model = small(case)
    kind = architectures.architecture(model.config)
    module = model.get_submodule(kind.layers)[0].get_submodule(kind.output)
    maps, count = heads.output_maps(model), model.config.num_attention_heads
    assert len(maps) == len(heads.heads(model)) and maps[0].shape[1] == len(heads.heads(model)[0].W_V)
    x = torch.randn(5, sum(W.shape[1] for W in maps[:count]), generator=torch.Generator().manual_seed(2))
    bias = 0 if module.bias is None else module.bias
    with torch.no_grad():
        expected = module(x)
    assert torch.allclose(sum(part @ W.mT for part, W in zip(x.chunk(count, 1), maps)) + bias, expected, atol=1e-5)


@pytest.mark.parametrize("case, body", [("bert", "ForMaskedLM"), ("gpt2", "LMHeadModel"), ("llama", "ForCausalLM")])
def test_a_model_with_a_task_head_has_the_heads_of_its_base(case, body):
    model = small(case, body)
    pairs = zip(heads.heads(model), heads.heads(model.base_model), strict=True)
    assert all(torch.equal(a.A, b.A) and torch.equal(a.shift, b.shift) for a, b in pairs)
    text = loading.TextModel("with a task head", model, letter_tokenizer(case), None)
    bare = loading.TextModel("its base", model.base_model, text.tokenizer, None)
    (ours,), (expected,) = (list(token_stream(m, IDS[0], 1, context=40)) for m in (text, bare))
    assert ours.shape == (20, 24) and torch.equal(ours, expected)


LETTERS = {letter: 5 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz \n")}


def letter_tokenizer(case):
    """A tokenizer of letters, in the bytes-as-letters form of GPT-2, that surrounds a text as its family does."""
    vocabulary = {"<unk>": 0, "<pad>": 1, "<first>": 2, "<last>": 3}
    vocabulary |= {{" ": "\u0120", "\n": "\u010a"}.get(letter, letter): i for letter, i in LETTERS.items()}
    letters = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = {"unk_token": "<unk>", "pad_token": "<pad>"}
    if "bert" in case:
        names |= {"cls_token": "<first>", "sep_token": "<last>"}
        template = "<first> $A <last>"
    else:
        names |= {"bos_token": "<first>", "eos_token": "<last>"}
        template = "$A" if case.startswith(("gpt2", "qwen2")) else "<first> $A"
    special = [("<first>", 2), ("<last>", 3)]
    letters.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=letters, **names)


@pytest.mark.parametrize("case", FAMILIES)
def test_tokens_are_what_the_attention_of_a_saved_model_reads(case, tmp_path):
    small(case).save_pretrained(tmp_path)
    letter_tokenizer(case).save_pretrained(tmp_path)
    loaded = loading.load_model(str(tmp_path), device="cpu")
    assert loaded.sha256 and loaded.model.config.model_type == case.split()[0]
    before, after = ([2], [3]) if "bert" in case else ([], []) if case in ("gpt2", "qwen2") else ([2], [])
    text = "the law of a token\nis read off the text\nthat holds its window of keys\n" + "qvxjz" * 2
    ids = tokenize(loaded, text)
    assert ids.tolist() == [LETTERS[letter] for letter in text]
    context = 16
    width = context - len(before) - len(after)
    streams = [torch.cat(parts) for parts in zip(*layer_streams(loaded, text, [1, 0], context, batch=2))]
    assert all(stream.shape == (len(text), 24) and stream.dtype == torch.float32 for stream in streams)
    loaded.model.set_attn_implementation("eager")
    found = heads.heads(loaded)
    for start in range(0, len(text), width):
        part = ids[start : start + width].tolist()
        read, weights = attention_inputs(loaded.model, torch.tensor([[*before, *part, *after]]))
        inside = slice(len(before), len(before) + len(part))
        for stream, layer in zip(streams, (1, 0)):
            assert torch.allclose(stream[start : start + len(part)], read[layer][0, inside], atol=1e-5)
    # The loaded model's own rotary angles are the ones that its heads carry.
    for head in found:
        own = weights[head.layer][0, head.head]
        again = rebuilt(head, read[head.layer][0].double(), window_of(loaded.model, head.layer))
        assert (again - own).abs().max() < 1e-5


@pytest.mark.parametrize(
    "case, least, most",
    [
        ("bert", 3, 40),
        ("roberta", 3, 38),
        ("distilbert", 3, 40),
        ("gpt2", 1, 40),
        ("llama", 2, 40),
        ("llama longrope", 2, 20),
        ("qwen2", 1, 40),
    ],
)
def test_positions_bound_the_context(case, least, most):
    model = loading.TextModel(case, small(case), letter_tokenizer(case), None)
    ids = np.resize(np.arange(5, 45), 45)
    for context in (least, most):
        assert torch.cat(list(token_stream(model, ids, 1, context))).shape == (45, 24)
    for context in (least - 1, most + 1):
        with pytest.raises(ValueError, match="^context: expected"):
            token_stream(model, ids, 1, context)


@pytest.mark.parametrize("case", ["distilbert", "gpt2", "llama"])
def test_the_forward_pass_stops_at_the_layer_asked_for(case):
    model = loading.TextModel(case, small(case), letter_tokenizer(case), None)
    whole = architectures.architecture(model.model.config)
    ran = []
    for i, layer in enumerate(model.model.get_submodule(whole.layers)):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    list(token_stream(model, np.arange(5, 25), 1, context=40))
    assert ran == [0]


SMALL = dict(COMMON, num_attention_heads=4)
REFUSED = {
    "qwen3": (transformers.Qwen3Config(**SMALL), "normalises queries and keys"),
    "gemma3_text": (transformers.Gemma3TextConfig(**SMALL), "normalises queries and keys"),
    "olmo2": (transformers.Olmo2Config(**SMALL), "normalises queries and keys"),
    "gemma2": (transformers.Gemma2Config(**SMALL), "caps its logits"),
    "t5": (transformers.T5Config(), "relative positions"),
    "gpt2": (transformers.GPT2Config(**GPT2, add_cross_attention=True), "cross-attention"),
    "llama": (transformers.LlamaConfig(**SMALL, is_causal=False), "not causal"),
    "bert": (transformers.BertConfig(**ENCODER, position_embedding_type="relative_key"), "relative_key positions"),
    "gpt_neox": (transformers.GPTNeoXConfig(**SMALL), ""),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_name_what_is_supported_and_why(kind):
    config, why = REFUSED[kind]
    message = f"^model: expected one of {', '.join(architectures.SUPPORTED)}, got '{kind}'.*{why}"
    with pytest.raises(ValueError, match=message):
        architectures.architecture(config)


@pytest.mark.parametrize("kind", architectures.NORMALISED)
def test_families_refused_for_their_norms_have_them(kind):
    module = transformers.CONFIG_MAPPING[kind].__module__.replace("configuration", "modeling")
    source = inspect.getsource(importlib.import_module(module))
    assert "self.q_norm = " in source and "self.k_norm = " in source


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of-another-kind"}))
    with pytest.raises(ValueError, match="^model: expected a kind of model that transformers knows, .*of-another-kind"):
        loading.load_model(str(tmp_path))
    with pytest.raises(ValueError, match="^model: expected one of bert, .*got 'Linear'"):
        heads.heads(torch.nn.Linear(2, 2))
