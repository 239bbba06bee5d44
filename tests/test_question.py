"""The door to a probe: what a user may hand over, in Python and on the command line, and what is refused."""

import json

import numpy as np
import pytest
import torch

from tokcx_lib import cli
from tokcx_lib.models import loading
from tokcx_lib.models.tokens import tokenize
from tokcx_lib.probe import probe
from tokcx_lib.probe.question import question

TEXT = "Attention over a law of tokens, and what a head makes of it. " * 30
NUMBERS = {"windows": 2, "context": 64, "queries": 5, "layers": [1]}


@pytest.fixture(scope="module")
def table(minilm):
    return probe(minilm, TEXT, **NUMBERS)


def test_a_model_and_a_text_may_come_in_any_form(minilm, table):
    raw = probe(minilm.model, TEXT, tokenizer=minilm.tokenizer, **NUMBERS)
    ids = tokenize(minilm, TEXT)
    others = [raw, probe(minilm, ids, **NUMBERS), probe(minilm, ids.tolist(), **NUMBERS)]
    others += [probe(minilm, torch.as_tensor(ids), **NUMBERS), probe(minilm, iter(TEXT.partition(",")), **NUMBERS)]
    for other in others:
        assert other.equals(table)


def test_one_row_a_head_and_defaults_that_the_model_can_hold(minilm, table):
    assert list(table["head"]) == list(range(12)) and set(table["layer"]) == {1} and set(table["keys"]) == {64}
    asked = question(minilm, TEXT * 9)
    assert asked.settings["context"] == 512 and asked.settings["windows"] == 4 and len(asked.ids) == 4 * 510
    assert asked.settings["error"] == 0.1 and asked.settings["queries"] == 32
    pooled = probe(minilm, TEXT, tokens=300, layers=[1], queries=5)
    assert len(pooled) == 12 and "horizon" in pooled and "keys_latest" not in pooled


@pytest.mark.parametrize(
    "given, named",
    [
        ({"windows": 2, "tokens": 100}, "windows, tokens: expected one of them, got 2 and 100"),
        ({"tokens": 100, "error": 0.1}, "error: expected with windows"),
        ({"windows": 900}, r"text: expected at least 459000 tokens \(900 windows of 512\), got 480"),
        ({"windows": 0}, "windows: expected an integer >= 1, got 0"),
        ({"windows": 2.5}, "windows: expected an integer"),
        ({"context": 3}, "context: expected 4 to 512 tokens, got 3"),
        ({"context": 513}, "context: expected 4 to 512 tokens, got 513"),
        ({"queries": 0}, "queries: expected an integer >= 1"),
        ({"error": 0}, "error: expected a positive finite number, got 0"),
        ({"layers": [6]}, "layers: expected some of 0 to 5, got 6"),
        ({"layers": 3}, "layers: expected a list"),
        ({"layers": []}, "layers: expected a list of at least 1"),
        ({"seed": -1}, "seed: expected"),
        ({"tokens": 1}, "tokens: expected an integer >= 2, got 1"),
    ],
)
def test_numbers_out_of_range_are_named(minilm, given, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        question(minilm, TEXT, **given)


@pytest.mark.parametrize(
    "text", ["", [], np.zeros((2, 300), dtype=int), ["words", 3], [3, [4]], None, 5.0, [0.5] * 600]
)
def test_what_is_no_text_is_named(minilm, text):
    with pytest.raises(ValueError, match="^text: expected"):
        question(minilm, text, windows=1, context=64)


def test_the_command_reads_windows_resumes_and_keeps_samples_apart(minilm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_model", lambda *_: minilm)
    (tmp_path / "text.txt").write_text(TEXT)
    command = "probe --text text.txt --layers 0 --context 64 --windows 2 --queries 4 --out out".split()
    assert cli.main(command) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "minilm on text.txt: 2 windows of 64 tokens, device: cpu"
    assert said[1].split()[-4:] == ["drawn", "latest", "first_latest", "heaviest"]
    made = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert made["windows"] == 2 and made["seconds"] > made["seconds_statistics"] > 0 and made["peak_memory_gb"] > 0.05
    first = (tmp_path / "out" / "heads.csv").read_bytes()
    assert cli.main(command) == 0 and (tmp_path / "out" / "heads.csv").read_bytes() == first
    assert not (tmp_path / "out" / ".probe").exists()
    capsys.readouterr()
    for more, what in (
        (["--error", "0.2"], "error"),
        (["--windows", "3"], "windows"),
        (["--windows", "1", "--context", "32"], "windows, context"),
    ):
        assert cli.main([*command, *more]) == 2
        assert f"out: out holds a probe of another {what} (minilm on text.txt" in capsys.readouterr().err
    pooled = "probe --text text.txt --layers 0 --tokens 300 --queries 4 --out out".split()
    assert cli.main(pooled) == 2
    assert "out: out holds a probe of another sample of keys" in capsys.readouterr().err
    assert cli.main([*pooled, "--windows", "2"]) == 2
    assert capsys.readouterr().err == "tokcx: windows, tokens: expected one of them, got 2 and 300\n"
