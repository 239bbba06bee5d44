"""Texts as streams: what is no text is refused in one line, and pieces have the token ids of the whole."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tokcx_lib
from tokcx_lib import cli, corpora, heads, probe, tokenization

# ---- token ids ----

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>", "[CLS]", "<|endoftext|>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
# As later decoders split: digits by threes, punctuation with the line breaks that follow it.
PATTERN = r"'[a-z]+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(**options):
    return models.BPE(), None, pre_tokenizers.ByteLevel(**options)


def by_pattern():
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    return models.BPE(), None, pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


def spaces_replaced(model):
    parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return model, normalizers.Sequence(parts), None


KINDS = {
    "byte-level": lambda: byte_level(add_prefix_space=False),
    "byte-level with a space": lambda: byte_level(add_prefix_space=True),
    "byte-level, another pattern": by_pattern,
    "metaspace, first": lambda: (models.BPE(unk_token="<unk>"), None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "metaspace, always": lambda: (models.BPE(unk_token="<unk>"), None, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "metaspace, never": lambda: (models.BPE(unk_token="<unk>"), None, pre_tokenizers.Metaspace(prepend_scheme="never")),
    "metaspace, unsplit": lambda: (models.BPE(unk_token="<unk>"), None, pre_tokenizers.Metaspace(split=False)),
    "unigram": lambda: (models.Unigram(), normalizers.NFKC(), pre_tokenizers.Metaspace()),
    "unigram without words": lambda: spaces_replaced(models.Unigram()),
    "bytes where unknown": lambda: spaces_replaced(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)),
    "words": lambda: (models.WordLevel(unk_token="<unk>"), normalizers.Lowercase(), pre_tokenizers.Whitespace()),
    "words between spaces": lambda: (
        models.WordLevel(unk_token="<unk>"), normalizers.Strip(), pre_tokenizers.WhitespaceSplit()
    ),
    "wordpiece": None,
}  # fmt: skip
TRAINERS = {models.BPE: trainers.BpeTrainer, models.Unigram: trainers.UnigramTrainer, models.WordLevel: trainers.WordLevelTrainer}


@pytest.fixture(scope="module")
def minilm():
    return heads.load_model("minilm")


@pytest.fixture(scope="module")
def tokenizers(minilm):
    """One small tokenizer of each kind, trained on a source of this library."""
    lines = Path(corpora.__file__).read_text(encoding="utf-8").splitlines(keepends=True)
    made = {"wordpiece": minilm.tokenizer}
    for kind, parts in KINDS.items():
        if parts:
            model, normalizer, pre_tokenizer = parts()
            tokenizer = Tokenizer(model)
            if normalizer:
                tokenizer.normalizer = normalizer
            if pre_tokenizer:
                tokenizer.pre_tokenizer = pre_tokenizer
            known = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()} if "byte-level" in kind else {}
            known |= {"unk_token": "<unk>"} if "unigram" in kind else {}
            special = SPECIAL + BYTES if "bytes" in kind else SPECIAL
            trainer = TRAINERS[type(model)](vocab_size=700, special_tokens=special, show_progress=False, **known)
            tokenizer.train_from_iterator(lines, trainer)
            tokenizer.add_tokens(["<tool>", AddedToken("<wide>", lstrip=True, rstrip=True, normalized=False)])
            made[kind] = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    return made


def of_the_whole(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


PARTS = st.one_of(
    st.sampled_from(["\n", "\n\n", "\r\n", " ", "   \n", "\t", "\x0c", "\u2028", "\x85", ".", "\n\n\n \n"]),
    st.sampled_from([*SPECIAL, "[MASK]", "[SEP]", "<tool>", " <wide>\n", "<0x0A>", "▁", "<|end", "oftext|>"]),
    st.sampled_from(["a", "the ", "return", " tokens", "_name", "(x)", "'s", "1234", "ß", "é", "e\u0301", "注意", "ﬁ", "🙂"]),
    st.text(max_size=8).filter(lambda text: "\0" not in text),
    st.builds(lambda part, times: part * times, st.sampled_from(["a", "ab", " ", "\n", "=", "ein ", "x\n"]), st.integers(1, 900)),
)
TEXTS = st.lists(PARTS, max_size=60).map("".join)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_ids_of_the_whole(kind, tokenizers, monkeypatch):
    tokenizer = tokenizers[kind]
    numbers = tokenization._special(tokenizer)
    # Windows small enough for a text of some thousand characters to have several.
    for name, value in {"PIECE": 64, "STEP": 257, "SHARED": 256, "AHEAD": 3}.items():
        monkeypatch.setattr(tokenization, name, value)
    seen = []

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(TEXTS, st.integers(1, 200), st.integers(1, 4))
    @example("def f(x):\n\n    return x\n" * 60, 7, 1)
    @example("a" * 3000, 64, 1)
    def check(text, size, times):
        text = text * times
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        whole = of_the_whole(tokenizer, text)
        try:
            found = probe.first_ids(SimpleNamespace(tokenizer=tokenizer), pieces).tolist()
        except ValueError as error:
            assert "reads as special" in str(error) and set(whole) & set(numbers), error
        else:
            assert found == whole
            seen.append(len(whole))

    check()
    assert len(seen) > 15 and max(seen) > 200
