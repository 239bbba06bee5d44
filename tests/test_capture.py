"""What `capture` notes is what the attention read: its outputs are built again from it, for many architectures."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModel

from tokcx_lib.models import capture as captures
from tokcx_lib.models.capture import capture
from tokcx_lib.models.heads import heads
from tokcx_lib.models.loading import load_model
from tokcx_lib.runtime import one_thread
from tokcx_lib.theory import geometry

# A tiny model of any kind: what its configuration does not know is left out.
TINY = {
    **dict.fromkeys(("hidden_size", "n_embd", "dim", "d_model", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff"), 32),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "kv_lora_rank", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **{"vocab_size": 99, "max_position_embeddings": 64, "n_positions": 64, "num_key_value_heads": 2, "q_lora_rank": 16},
    **{"moe_intermediate_size": 16, "num_experts_per_tok": 2, "qk_rope_head_dim": 8, "sliding_window": 5},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "image_size": 16, "patch_size": 4, "num_channels": 3},
}
# Where the settings above do not make a model.
OTHERS = {
    "apertus": {"sliding_window": None},
    "falcon": {"head_dim": None},
    "deepseek_v3": {"head_dim": None, "num_key_value_heads": 4},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "swin": {
        "num_attention_heads": None,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "embed_dim": 16,
        "window_size": 2,
        "patch_size": 2,
    },
}
READ = """
    albert apertus arcee bart bert biogpt camembert clip_vision_model cohere cohere2 data2vec-text deepseek_v3 deit
    diffllama dinov2 dinov3_vit distilbert doge electra ernie4_5 esm eurobert exaone4 gemma gemma2 gemma3_text glm glm4
    gpt2 gpt_neox gpt_oss granite granitemoe helium hunyuan_v1_dense ijepa jetmoe lfm2 llama llama4_text minimax
    ministral ministral3 mistral mixtral modernbert nemotron nomic_bert olmo olmo2 olmo3 opt persimmon phi phi3 qwen2
    qwen3 qwen3_next roberta seed_oss siglip_vision_model smollm3 stablelm starcoder2 swin t5 vaultgemma vit xlm-roberta
""".split()
# Of these, since a version of transformers between our lowest and the book's.
LATER = ("diffllama", "nemotron", "swin", "t5")
REFUSED = "big_bird bloom deberta-v2 falcon longformer mamba mpnet mpt rembert roformer".split()


def small(kind: str):
    """A model of a kind with random weights, and inputs for it: two rows of twelve tokens, or of pictures."""
    if kind in LATER and Version(transformers.__version__) < Version("5.23"):
        pytest.skip(f"in this version of transformers {kind} computes its attention itself")
    settings = {name: value for name, value in (TINY | OTHERS.get(kind, {})).items() if value is not None}
    known = AutoConfig.for_model(kind)
    names = {name for name in settings if hasattr(known, name)} | OTHERS.get(kind, {}).keys()
    config = AutoConfig.for_model(kind, **{name: settings[name] for name in names if name in settings})
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :7]
    return model, inputs


def answer(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def captured(model, inputs) -> tuple[list[captures.Attention], torch.Tensor]:
    found: list[captures.Attention] = []
    with capture(model, found.append):
        output = answer(model, inputs)
    return found, output


@pytest.mark.parametrize("kind", READ)
def test_the_models_outputs_are_built_again_from_what_its_attention_read(kind):
    model, inputs = small(kind)
    before = answer(model, inputs)
    found, output = captured(model, inputs)
    assert torch.allclose(output, before, atol=1e-5) and torch.equal(answer(model, inputs), before)
    for each in found:
        assert torch.allclose(each.outputs(), each.output, atol=1e-5), each.name
        assert each.q.shape[-1] == each.k.shape[-1] and each.q.shape[1] % each.k.shape[1] == 0
    assert {each.name for each in found} == {each.name for each in found if not captures.CROSS.search(each.name)}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_computes_its_attention_itself_is_refused(kind):
    model, inputs = small(kind)
    with pytest.raises(
        ValueError, match="^model: expected one that uses the attention interface .* computes its attention"
    ):
        captured(model, inputs)


def test_what_layers_add_to_softmax_is_noted():
    (capped, _), _ = captured(*small("gemma2"))
    assert capped.cap == 50 and capped.window == 5
    with_sinks = captured(*small("gpt_oss"))[0]
    assert all(each.sinks is not None for each in with_sinks)
    causal = captured(*small("llama"))[0][0]
    unseen = torch.ones(12, 12, dtype=torch.bool).triu(1)
    assert causal.causal and (causal.seen() == ~unseen).all()
    assert (causal.logits()[..., unseen] == -torch.inf).all() and causal.logits()[..., ~unseen].isfinite().all()
    windowed = captured(*small("mistral"))[0][0]
    near = torch.ones(12, 12, dtype=torch.bool).tril().triu(-4)
    assert windowed.causal and (windowed.seen() == near).all()
    rows = torch.tensor([3, 11])
    for each in (causal, windowed, capped, with_sinks[0]):
        assert (each.seen(rows) == each.seen()[..., rows, :]).all()
        assert torch.allclose(each.logits(rows), each.logits()[..., rows, :])
        early = each.beginning(7)
        assert torch.equal(early.seen(), each.seen()[..., :7, :7])
        assert torch.allclose(early.outputs(), each.output[:, :7], atol=1e-5)
    both = captured(*small("bert"))[0][0]
    assert not both.causal and both.seen().all()


def test_a_position_bias_is_noted_and_attention_to_an_encoder_is_left_out():
    found = captured(*small("t5"))[0]
    assert len(found) == 4  # two of the encoder, two of the decoder
    assert all(each.position is not None for each in found)


@pytest.mark.parametrize("fault", ["scale", "causality", "groups", "cap", "sinks"])
def test_a_wrong_capture_does_not_pass(fault):
    """The test above can fail: each of these makes other outputs."""
    kind = {"cap": "gemma2", "sinks": "gpt_oss"}.get(fault, "llama")
    model, inputs = small(kind)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # logits that a cap is felt by
            if "q_proj" in name or "k_proj" in name or "sinks" in name:
                weight.mul_(20).add_(0.5)
    each = captured(model, inputs)[0][0]
    wrong = {
        "scale": lambda: {"q": each.q * each.q.shape[-1] ** 0.5},
        "causality": lambda: {"mask": None, "causal": False},
        "groups": lambda: {"k": each.k.flip(1)},
        "cap": lambda: {"cap": None},
        "sinks": lambda: {"sinks": None},
    }[fault]()
    changed = captures.Attention(**({name: getattr(each, name) for name in each.__dataclass_fields__} | wrong))
    assert torch.allclose(each.outputs(), each.output, atol=1e-4)
    assert not torch.allclose(changed.outputs(), each.output, atol=1e-3)


def test_settings_come_back_when_the_model_fails():
    model, inputs = small("llama")
    before = model.config._attn_implementation
    with (
        pytest.raises(RuntimeError, match="halt"),
        capture(model, lambda each: (_ for _ in ()).throw(RuntimeError("halt"))),
    ):
        answer(model, inputs)
    assert model.config._attn_implementation == before


def test_horizons_of_queries_and_keys_are_those_of_the_bilinear_forms():
    """||Cov(q)^(1/2) Cov(k)^(1/2)||, over the same tokens, is ||Sigma^(1/2) A Sigma^(1/2)||: 72 heads of MiniLM."""
    loaded = load_model("minilm")
    model, every = loaded.model.double(), heads(loaded)
    ids = torch.randint(1000, 20_000, (2, 250), generator=torch.Generator().manual_seed(2))
    tokens: dict[int, torch.Tensor] = {}
    hooks = [
        layer.attention.self.register_forward_pre_hook(lambda _, given, i=i: tokens.update({i: given[0].flatten(0, 1)}))
        for i, layer in enumerate(model.encoder.layer)
    ]
    found, _ = captured(model, {"input_ids": ids})
    for hook in hooks:
        hook.remove()
    model.float()
    measured, derived = [], []
    with one_thread():
        for each in found:
            half = geometry.root(tokens[each.layer].T.cov(correction=0))
            for head in every[12 * each.layer : 12 * (each.layer + 1)]:
                q, k = (
                    geometry.root(part[:, head.head].flatten(0, 1).T.cov(correction=0)) for part in (each.q, each.k)
                )
                measured.append(torch.linalg.matrix_norm(q @ k, 2).item())
                derived.append(torch.linalg.matrix_norm(half @ head.A @ half, 2).item())
    assert len(measured) == 72 and measured == pytest.approx(derived, rel=1e-6)
