"""Heads of small random models and of the embedded one against the models' own attention; the probe; its command."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel, T5Config, T5EncoderModel

from tokcx_lib import cli, runtime
from tokcx_lib.models import corpora, heads, loading
from tokcx_lib.models.tokens import collect_tokens, layer_streams, token_moments, token_stream, tokenize
from tokcx_lib.probe import pooled
from tokcx_lib.sampling import fits
from tokcx_lib.theory import geometry, laws

SIZES = dict(
    vocab_size=120, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=16,
    max_position_embeddings=40,
)  # fmt: skip


def small(kind, **options):
    torch.manual_seed(0)
    config, model = {"bert": (BertConfig, BertModel), "roberta": (RobertaConfig, RobertaModel)}[kind]
    model = model(config(**SIZES, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # biases start at zero
    return model


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_attention_rebuilt_from_A_and_shift_is_the_models_own(kind, implementation):
    model = small(kind)
    model.set_attn_implementation(implementation)
    found = heads.heads(model)
    assert [(h.layer, h.head) for h in found] == [(layer, head) for layer in range(2) for head in range(3)]
    model.set_attn_implementation("eager")
    ids = torch.randint(5, 50, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(ids, output_attentions=True, output_hidden_states=True)
    for head in found:
        x = out.hidden_states[head.layer][0].double()
        weights = torch.softmax((x @ head.A.mT + head.shift) @ x.mT, -1)
        assert (weights - out.attentions[head.layer][0, head.head]).abs().max() < 1e-5
        q, k, v = head.project(x)
        assert (torch.softmax(q @ k.mT, -1) - weights).abs().max() < 1e-10
        assert torch.allclose(v, x @ head.V.mT)


def test_the_embedded_model_is_the_published_one(minilm):
    assert minilm.sha256 == loading.EMBEDDED_SHA256["model.safetensors"]
    assert len(heads.heads(minilm)) == 72
    assert heads.heads(minilm)[13].layer == 1 and heads.heads(minilm)[13].head == 1


def test_a_changed_weight_file_is_refused(monkeypatch):
    monkeypatch.setitem(loading.EMBEDDED_SHA256, "model.safetensors", "0" * 64)
    with pytest.raises(ValueError, match="sha256"):
        loading.load_model("minilm")


def test_tokens_are_the_hidden_states_without_special_tokens(minilm):
    ids = tokenize(minilm, "Attention over a law. " * 30)
    assert ids.tolist() == minilm.tokenizer("Attention over a law. " * 30, add_special_tokens=False)["input_ids"]
    streams = [torch.cat(parts) for parts in zip(*layer_streams(minilm, ids, [0, 3], context=32, batch=2))]
    assert all(stream.shape == (len(ids), 384) for stream in streams)
    width = 30
    for start in (0, width, len(ids) // width * width):
        part = ids[start : start + width]
        window = torch.tensor([[101, *part, 102]])
        with torch.no_grad():
            hidden = minilm.model(window, output_hidden_states=True).hidden_states
        for stream, layer in zip(streams, (0, 3)):
            assert torch.allclose(stream[start : start + len(part)], hidden[layer][0, 1:-1], atol=1e-5)
    one = torch.cat(list(token_stream(minilm, "Attention over a law. " * 30, 3, context=32)))
    assert torch.allclose(one, streams[1], atol=1e-5)


def test_the_forward_pass_stops_at_the_layer_asked_for(minilm):
    ran = []
    layers = minilm.model.encoder.layer
    hooks = [module.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, module in enumerate(layers)]
    list(token_stream(minilm, np.arange(1000, 1020), 2))
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1]


def test_a_model_from_a_folder(tmp_path, minilm):
    small("bert").save_pretrained(tmp_path)
    minilm.tokenizer.save_pretrained(tmp_path)
    loaded = loading.load_model(str(tmp_path))
    assert len(heads.heads(loaded)) == 6 and loaded.sha256
    ids = np.arange(5, 45)
    assert torch.cat(list(token_stream(loaded, ids, 1, context=40))).shape == (40, 24)


def test_weights_that_are_not_safetensors_are_refused(tmp_path, minilm):
    model = small("bert")
    model.config.save_pretrained(tmp_path)
    minilm.tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        loading.load_model(str(tmp_path))


def test_unsupported_architectures_are_named():
    model = T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20))
    with pytest.raises(ValueError, match="bert, roberta.*t5"):
        heads.heads(model)


@pytest.mark.parametrize(
    "call, names",
    [
        (lambda m: layer_streams(m, np.arange(9), [6]), "layer"),
        (lambda m: layer_streams(m, np.arange(9), [0], context=600), "context"),
        (lambda m: layer_streams(m, "", [0]), "text"),
        (lambda m: tokenize(m, 3), "text"),
        (lambda m: collect_tokens(m, np.arange(9), [0], tokens=10), "text"),
        (lambda m: pooled.pooled_probe(m, np.arange(9), tokens=1), "tokens"),
        (lambda m: loading.load_model("no/such-model"), "model"),
        (lambda m: loading.load_model(device="cuda:99"), "device"),
    ],
)
def test_bad_input_is_named(call, names, minilm, monkeypatch):
    with pytest.raises(ValueError, match=rf"^{names}: .*(expected|available)"):
        call(minilm)


def test_head_geometry_is_that_of_the_logits(minilm):
    """Loads of tokens off centre, with the query bias, are the standard deviations of the head's own logits."""
    ids = tokenize(minilm, corpora.open_corpus("scipy-docs").text)[:5000]
    (x,) = collect_tokens(minilm, ids, [0])
    mean, cov = token_moments(x)
    assert torch.allclose(mean, x.double().mean(0)) and torch.allclose(cov, torch.cov(x.double().mT, correction=0))
    for head in heads.heads(minilm)[:12:5]:
        q, k, _ = head.project(x.double())
        spread = (q[:50] @ k.mT).std(-1, correction=0)
        assert torch.allclose(geometry.load(x[:50].double(), head.A, cov, head.shift), spread, rtol=1e-6)
        found = heads.head_geometry(head, x[:50], cov)
        assert found["load_median"] == pytest.approx(spread.median().item())
        assert found["load_95"] == pytest.approx(spread.quantile(0.95).item())
        assert found["reach"] == pytest.approx(geometry.reach(cov))
        assert found["horizon"] == pytest.approx(geometry.horizon(head.A, cov))
        assert found["coupling"] == pytest.approx(geometry.coupling(head.A, cov))
        assert found["horizon_one_sided"] == pytest.approx(geometry.horizon(head.A, cov, "one"))
        assert found["coupling_one_sided"] == pytest.approx(geometry.coupling(head.A, cov, "one"))
        # The convention of the notation page: centred query, shift A mean + c.
        centred = geometry.load(x[:50].double() - mean, head.A, cov, head.A @ mean + head.shift)
        assert torch.allclose(centred, spread, rtol=1e-6)


def test_a_layer_probed_alone_has_the_same_numbers(minilm):
    ids = tokenize(minilm, corpora.open_corpus("scipy-docs").text)[:3000]
    both = pooled.pooled_probe(minilm, ids, [3, 5], tokens=1500, queries=64, seed=1)
    alone = pd.concat(
        [pooled.pooled_probe(minilm, ids, [k], tokens=1500, queries=64, seed=1) for k in (3, 5)], ignore_index=True
    )
    pd.testing.assert_frame_equal(both, alone)


def test_slopes_of_known_power_laws():
    """A running mean of i.i.d. terms has exponent 1/2; its prefixes share terms, and the interval knows."""
    covered, lengths = 0, [100, 200, 400, 800, 1600]
    for trial in range(60):
        draws = laws.Gaussian(1.0).sample(40 * 1600, runtime.stream(1, trial)).reshape(40, 1600)
        rows = [(r, n, abs(draws[r, :n].mean().item())) for r in range(40) for n in lengths]
        slope = fits.fit_slope(pd.DataFrame(rows, columns=["replicate", "n", "error"]), "error", resamples=300)
        assert slope.low <= slope.exponent <= slope.high
        covered += slope.low <= 0.5 <= slope.high
    assert covered >= 51  # of 60 at nominal 95%: fewer than 51 has probability 1e-4
    exact = pd.DataFrame([(r, n, n**-0.3) for r in (0, 1) for n in lengths], columns=["replicate", "n", "error"])
    assert fits.fit_slope(exact, "error").exponent == pytest.approx(0.3)
    with pytest.raises(ValueError, match="table: expected"):
        fits.fit_slope(exact[:5], "error")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["probe", "--text", "nosuch"], "nosuch"),
        (["probe", "--text", "scipy-docs", "--tokens", "90000000"], "90000000"),
        (["probe", "--text", "scipy-docs", "--layer", "17"], "17"),
        (["probe", "--text", "scipy-docs", "--model", "no/such-model"], "no/such-model"),
        (["probe", "--text", "scipy-docs", "--device", "cuda:99"], "cuda:99"),
        (["run", "nosuch"], "real_heads_moments"),
        (["verify", "nosuch"], "nosuch"),
    ],
)
def test_bad_input_ends_with_one_line_and_code_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert last.startswith("tokcx: ") and message in last


def test_version_and_layers(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("tokcx ")
    assert cli._layers("0,3-5") == [0, 3, 4, 5]
    for wrong in ("a", "3-1", "", "-1"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["probe", "--text", "scipy-docs", "--layers=" + wrong])
        assert stop.value.code == 2


def test_special_tokens_on_request(minilm):
    ids = tokenize(minilm, "Attention over a law. " * 30)[:90]
    kept = torch.cat([x for (x,) in layer_streams(minilm, ids, [2], context=32, special=True)])
    without = torch.cat(list(token_stream(minilm, ids, 2, context=32)))
    assert kept.shape == (3 * 32, 384)
    windows = kept.reshape(3, 32, 384)
    assert torch.equal(windows[:, 1:-1].reshape(-1, 384), without)
    with torch.no_grad():
        hidden = minilm.model(torch.tensor([[101, *ids[:30], 102]]), output_hidden_states=True).hidden_states[2]
    assert torch.allclose(windows[0], hidden[0], atol=1e-5)
