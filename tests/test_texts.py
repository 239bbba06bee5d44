"""Texts as streams: what is no text is refused in one line, and pieces have the token ids of the whole."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokcx_lib import cli
from tokcx_lib.models import corpora, loading, tokenization
from tokcx_lib.models.tokens import first_ids, tokenize
from tokcx_lib.probe import pooled, report

# ---- token ids ----

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>", "[CLS]", "<|endoftext|>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
# As later decoders split: digits by threes, punctuation with the line breaks that follow it.
PATTERN = r"'[a-z]+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def metaspace(**options):
    return models.BPE(unk_token="<unk>"), None, pre_tokenizers.Metaspace(**options)


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
    "metaspace, first": lambda: metaspace(prepend_scheme="first"),
    "metaspace, always": lambda: metaspace(prepend_scheme="always"),
    "metaspace, never": lambda: metaspace(prepend_scheme="never"),
    "metaspace, unsplit": lambda: metaspace(split=False),
    "unigram": lambda: (models.Unigram(), normalizers.NFKC(), pre_tokenizers.Metaspace()),
    "unigram without words": lambda: spaces_replaced(models.Unigram()),
    "bytes where unknown": lambda: spaces_replaced(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)),
    "words": lambda: (models.WordLevel(unk_token="<unk>"), normalizers.Lowercase(), pre_tokenizers.Whitespace()),
    "words between spaces": lambda: (
        models.WordLevel(unk_token="<unk>"), normalizers.Strip(), pre_tokenizers.WhitespaceSplit()
    ),
    "wordpiece": None,
}  # fmt: skip
TRAINERS = {
    models.BPE: trainers.BpeTrainer,
    models.Unigram: trainers.UnigramTrainer,
    models.WordLevel: trainers.WordLevelTrainer,
}


@pytest.fixture(scope="module")
def tokenizers(minilm):
    """One small tokenizer of each kind, trained on a source of this library."""
    source = Path(corpora.__file__).read_text(encoding="utf-8")
    blocks = re.split("(?=\ndef )", source)  # with their blank lines, which byte-level tokenizers make tokens of
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
            tokenizer.train_from_iterator(blocks, trainer)
            state = json.loads(tokenizer.to_str())
            state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTES]
            tokenizer = Tokenizer.from_str(json.dumps(state))
            tokenizer.add_tokens(["<tool>", AddedToken("<wide>", lstrip=True, rstrip=True, normalized=False)])
            made[kind] = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    return made


def of_the_whole(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


PARTS = st.one_of(
    st.sampled_from(["\n", "\n\n", "\r\n", " ", "   \n", "\t", "\x0c", "\u2028", "\x85", ".", "\n\n\n \n"]),
    st.sampled_from([*SPECIAL, "[MASK]", "[SEP]", "<tool>", " <wide>\n", "<0x0A>", "▁", "<|end", "oftext|>"]),
    st.sampled_from(
        ["a", "the ", "return", " tokens", "_name", "(x)", "'s", "1234", "é", "e\u0301", "注意", "ﬁ", "🙂"]
    ),
    st.text(max_size=8).filter(lambda text: "\0" not in text),
    st.builds(str.__mul__, st.sampled_from(["a", "ab", " ", "\n", "=", "ein ", "x\n"]), st.integers(1, 900)),
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

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(TEXTS, st.integers(1, 200), st.integers(1, 4))
    @example("def f(x):\n\n    return x\n" * 60, 7, 1)
    @example("a" * 3000, 64, 1)
    def check(text, size, times):
        text = text * times
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        whole = of_the_whole(tokenizer, text)
        try:
            found = first_ids(SimpleNamespace(model=None, tokenizer=tokenizer), pieces).tolist()
        except ValueError as error:  # refused, and for cause: a token that takes the blanks before it, however many
            named, taken = "reads as special" in str(error), "in pieces, got one that it cannot" in str(error)
            assert named and set(whole) & set(numbers) or taken and re.search(r"\s{64}<wide>", text), error
        else:
            assert found == whole
            seen.append(len(whole))

    check()
    assert len(seen) > 15 and max(seen) > 200


@pytest.mark.parametrize("kind", ["byte-level", "unigram without words", "wordpiece"])
@pytest.mark.parametrize("text", ["a" * 20_000, "no line ends " * 1500, "\n" * 20_000], ids=["run", "line", "blank"])
def test_the_time_is_in_proportion_to_the_text(kind, text, tokenizers, monkeypatch):
    for name, value in {"PIECE": 256, "STEP": 257, "SHARED": 256}.items():
        monkeypatch.setattr(tokenization, name, value)
    read, encode = [], tokenization._encode

    def counted(tokenizer, texts, places=False):
        read.append(sum(map(len, texts)))
        return encode(tokenizer, texts, places)

    monkeypatch.setattr(tokenization, "_encode", counted)
    assert len(tokenize(SimpleNamespace(model=None, tokenizer=tokenizers[kind]), text)) or kind == "wordpiece"
    assert sum(read) <= 6 * len(text)  # windows that double, and what they share


@pytest.mark.parametrize("kind, run", [("unigram without words", "a"), ("wordpiece", "a")])
def test_a_text_that_hangs_together_without_end_is_refused(kind, run, tokenizers, monkeypatch):
    for name, value in {"PIECE": 2048, "STEP": 257, "SHARED": 256, "LONGEST": 10_000}.items():
        monkeypatch.setattr(tokenization, name, value)
    asked = iter([run * 1000] * 1000)
    with pytest.raises(ValueError, match="^text: expected words, got .* cannot read in pieces"):
        first_ids(SimpleNamespace(model=None, tokenizer=tokenizers[kind]), asked, 10**6)
    assert len(list(asked)) > 950  # not all of it was waited for


def test_the_fixed_text_keeps_its_ids(minilm):
    """Records rest on them."""
    text = corpora.open_corpus("scipy-docs")
    if text.sha256 != "ed045194817ca861420f9cd7643f434222d39079cd89d068533d66c821b2ff35":
        pytest.skip(f"the ids are those of the book's text, and this is that of {text.source}")
    ids = tokenize(minilm, text.text)
    assert ids.dtype == np.int64 and len(ids) == 228_575
    known = "b64c1ce2ca305594fae036dde534ea4bb36ef4dccb711a08423738085129b164"
    assert hashlib.sha256(ids.tobytes()).hexdigest() == known


def test_names_of_special_tokens_are_text(minilm, tokenizers):
    tokenizer = minilm.tokenizer
    tokenizer.backend_tokenizer.encode_special_tokens = False
    ids = tokenize(minilm, "[CLS] one [MASK] two [PAD]\n[SEP]")
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids).replace(" ", "") == "[cls]one[mask]two[pad][sep]"
    assert not tokenizer.backend_tokenizer.encode_special_tokens  # as it was
    for kind in ("unigram", "words between spaces"):  # a word of the vocabulary, which nothing tells from the token
        with pytest.raises(ValueError, match="^text: .*'<pad>', which this tokenizer reads as special"):
            tokenize(SimpleNamespace(model=None, tokenizer=tokenizers[kind]), "one <pad> two")
    unknown = SimpleNamespace(model=None, tokenizer=tokenizers["words between spaces"])
    assert len(set(tokenize(unknown, "qqqq zzzz <unk>"))) == 1  # words that a vocabulary lacks are no fault


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["a", 3], "\ud800"], ids=repr)
def test_what_is_no_text_is_named(text, minilm, tokenizers):
    for model in (minilm, SimpleNamespace(model=None, tokenizer=tokenizers["byte-level"])):
        with pytest.raises(ValueError, match="^text: expected"):
            first_ids(model, text)
    assert len(tokenize(minilm, "")) == len(first_ids(model, [])) == 0


# ---- files and names ----

LINES = ("Words of a text, line by line: a number, 4711, and a name. " * 3 + "\n").encode() * 400


def flipped(packed, place):
    return packed[:place] + bytes([packed[place] ^ 255]) + packed[place + 1 :]


FILES = {
    "truncated.gz": gzip.compress(LINES)[:-200],
    "truncated.xz": lzma.compress(LINES)[:-100],
    "truncated.bz2": bz2.compress(LINES)[:-60],
    "garbage.gz": b"not packed" * 9,
    "garbage.xz": b"not packed" * 9,
    "garbage.bz2": b"not packed" * 9,
    "flipped.gz": flipped(gzip.compress(LINES), 40),
    "flipped.xz": flipped(lzma.compress(LINES), 90),
    "flipped.bz2": flipped(bz2.compress(LINES), 90),
    "xz-named.gz": lzma.compress(LINES),
    "gz-named.txt": gzip.compress(LINES),
    "empty.txt": b"",
    "empty.xz": b"",
    "nothing.gz": gzip.compress(b""),
    "mark.txt": b"\xef\xbb\xbf",
    "blank.txt": b" \n" * 5000,
    "invalid.txt": LINES[:60_000] + b"\xff" + LINES,
    "cut.txt": LINES + "é".encode()[:1],
    "latin.txt": "é à ü\n".encode("latin-1") * 500,
    "utf16.txt": LINES.decode().encode("utf-16"),
    "utf16le.txt": LINES.decode().encode("utf-16-le"),
    "zeros.gz": gzip.compress(bytes(2**21)),
}
SAID = {
    "truncated.gz": "end-of-stream",
    "invalid.txt": "invalid start byte after 60000 characters",
    "cut.txt": f"unexpected end of data after {len(LINES)} characters",
    "empty.txt": "got an empty file",
    "nothing.gz": "got an empty file",
    "blank.txt": "at least 1000000 tokens, got 0",
    "utf16.txt": "got UTF-16",
    "utf16le.txt": "got UTF-16",
    "zeros.gz": "got UTF-16 or no text",
}
PLACES = {
    "device": lambda folder: "/dev/zero",
    "null": lambda folder: os.devnull,
    "fifo": lambda folder: os.mkfifo(folder / "fifo") or folder / "fifo",
    "link to a device": lambda folder: (folder / "link.txt").symlink_to("/dev/zero") or folder / "link.txt",
    "link to itself": lambda folder: (folder / "loop").symlink_to("loop") or folder / "loop",
    "link to nothing": lambda folder: (folder / "gone").symlink_to("nothing") or folder / "gone",
    "folder": lambda folder: folder,
    "long name": lambda folder: "x" * 5000,
    "zero byte": lambda folder: "a\0b",
    "no name": lambda folder: "",
}


@pytest.fixture
def probed(minilm, monkeypatch, capsys):
    """Run `tokcx probe` on a text: its exit code and what it says on standard error."""
    monkeypatch.setattr(loading, "load_model", lambda *arguments: minilm)

    def run(text, *more):
        code = cli.main(["probe", "--text", str(text), "--layers", "0", "--tokens", "1000000", *more])
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_text_ends_in_one_line(name, probed, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    code, said = probed(tmp_path / name)
    assert code == 2 and said.count("\n") == 1, said
    assert said.startswith("tokcx: corpus: expected") or name == "blank.txt"
    assert SAID.get(name, str(tmp_path / name)) in said


@pytest.mark.parametrize("place", PLACES)
def test_what_has_no_end_or_is_not_there_is_not_waited_for(place, probed, tmp_path):
    code, said = probed(PLACES[place](tmp_path))
    assert code == 2 and said.count("\n") == 1 and said.startswith("tokcx: corpus: expected a file"), said
    named = {"device": "device", "null": "device", "fifo": "pipe", "link to a device": "device", "folder": "a folder"}
    assert named.get(place, "got") in said


def test_a_socket_is_not_waited_for(probed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
        code, said = probed("socket")
    assert code == 2 and said.count("\n") == 1 and "socket or device" in said


def test_a_file_that_may_not_be_read_is_named(probed, tmp_path, monkeypatch):
    (tmp_path / "secret.gz").write_bytes(gzip.compress(LINES))

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setitem(corpora._OPENERS, ".gz", refuse)
    code, said = probed(tmp_path / "secret.gz")
    assert code == 2 and said.count("\n") == 1 and "Permission denied" in said


def test_without_a_network_one_line_at_once(probed, tmp_path, monkeypatch, caplog):
    from huggingface_hub import constants

    with socket.socket() as closed:  # a port where nobody listens
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("TOKCX_DATA", str(tmp_path))
        code, said = probed("wikitext2-test")
        assert code == 2 and said.count("\n") == 1 and "the hub does not answer" in said and not caplog.records
        monkeypatch.setenv("TOKCX_DATA", str(tmp_path / "nosuch"))
        code, said = probed("wikitext2-test")
    assert code == 2 and said == f"tokcx: TOKCX_DATA: expected a folder, got '{tmp_path / 'nosuch'}'\n"


def test_no_more_of_a_file_is_read_than_is_used(minilm, tmp_path):
    """So damage behind that is not seen; all of the text cannot be had."""
    path = tmp_path / "damaged.gz"
    path.write_bytes(gzip.compress(LINES * 60)[:-9])
    corpus = corpora.open_corpus(path)
    assert (first_ids(minilm, corpus.pieces(), 2000) == tokenize(minilm, LINES.decode())[:2000]).all()
    for read in (lambda: corpus.text, lambda: corpus.sha256):
        with pytest.raises(ValueError, match="^corpus: expected UTF-8 text"):
            read()


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, pack in {"a.txt": bytes, "a.XZ": lzma.compress, "a.bz2": bz2.compress}.items():
        (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbf" + LINES))
        corpus = corpora.open_corpus(tmp_path / name)
        assert corpus.text.encode() == LINES and corpus.sha256 == hashlib.sha256(LINES).hexdigest()


def test_characters_that_lie_across_two_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_BYTES", 3)
    text = "aé注🙂\r\nb" * 50
    (tmp_path / "a.gz").write_bytes(gzip.compress(text.encode()))
    assert corpora.open_corpus(tmp_path / "a.gz").text == text


def test_the_report_tells_the_checksum_of_what_was_read(probed, minilm, tmp_path, monkeypatch):

    (tmp_path / "a.txt").write_bytes(LINES * 60)
    told = {}
    columns = ["layer", "head", "horizon", "coupling", "load_median", "load_95", "exponent_sharp", "tokens_10_percent"]
    table = pd.DataFrame([dict.fromkeys(columns, 1) | {"phase": "averaging"}])
    monkeypatch.setattr(pooled, "pooled_probe", lambda *arguments, **options: table)
    monkeypatch.setattr(report, "write", lambda table, meta, out: told.update(meta) or [])
    assert probed(tmp_path / "a.txt", "--tokens", "400", "--out", str(tmp_path / "out")) == (0, "")
    ids = tokenize(minilm, LINES.decode())[:400]
    assert told["text_sha256"] is None and told["tokens_sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()


MEASURED = """
import resource, sys
from transformers import PreTrainedTokenizerFast
from types import SimpleNamespace
from tokcx_lib.models import corpora
from tokcx_lib.models.tokens import first_ids

model = SimpleNamespace(model=None, tokenizer=PreTrainedTokenizerFast(tokenizer_file=sys.argv[1]))
first_ids(model, "Some words. " * 100_000, 2000)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
corpus = corpora.open_corpus(sys.argv[2])
assert len(first_ids(model, corpus.pieces(), 2000)) == 2000
assert len(corpus.sha256) == 64
print(peak() - before)
"""


def test_memory_follows_what_is_used(tokenizers, tmp_path):
    tokenizer, packed = tmp_path / "tokenizer.json", tmp_path / "large.gz"
    tokenizers["byte-level"].backend_tokenizer.save(str(tokenizer))
    packed.write_bytes(gzip.compress((LINES * 20)[: 2**20], 1) * 300)  # 300 MB
    assert packed.stat().st_size < 10e6
    command = [sys.executable, "-c", MEASURED, str(tokenizer), str(packed)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 60  # MB
