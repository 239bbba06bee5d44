"""Folders of models that are broken, one fault each: every one is refused in one line that names what is wrong."""

import json
import logging
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.test_architectures import letter_tokenizer, small
from tokcx_lib import records
from tokcx_lib.models import architectures, checkpoint_files, heads, loading
from tokcx_lib.models.tokens import collect_tokens, layer_streams, tokenize
from tokcx_lib.probe import pooled, report
from tokcx_lib.theory import budgets

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
QUERY = "encoder.layer.1.attention.self.query.weight"
DEEP = 100_000  # nested lists, more than any reader's stack


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Folders of whole models by case, made when first asked for; not to be written to."""
    root = tmp_path_factory.mktemp("healthy")

    def folder(case):
        path = root / case.replace(" ", "-")
        if not path.exists():
            small(case).save_pretrained(path)
            letter_tokenizer(case).save_pretrained(path)
        return path

    return folder


@pytest.fixture
def copy(healthy, tmp_path):
    """A folder of a whole model to spoil."""
    return lambda case: shutil.copytree(healthy(case), tmp_path / "model")


# ---- faults: what is done to a folder ----


def config(**changes):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def weights(change):
    """Weights after `change`, which takes a dictionary of tensors by name and changes it."""

    def spoil(folder):
        tensors = load((folder / WEIGHTS).read_bytes())
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def without(name):
    return weights(lambda tensors: tensors.pop(name))


def entry(value, name=QUERY):
    return weights(lambda tensors: tensors[name].view(-1)[7:8].fill_(value))


def content(name, new):
    """A file with new bytes, or those that a function makes of the old ones."""

    def spoil(folder):
        path = folder / name
        path.write_bytes(new(path.read_bytes()) if callable(new) else new)

    return spoil


def half(old):
    return old[: len(old) // 2]


def nested(name):
    return content(name, b"[" * DEEP + b"]" * DEEP)


def gone(name):
    return lambda folder: (folder / name).unlink()


def a_folder(name):
    def spoil(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


def a_pipe(name):
    def spoil(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def header(change):
    """Weights with another header, whose length is right."""

    def new(old):
        size = struct.unpack("<Q", old[:8])[0]
        head = change(old[8 : 8 + size])
        return struct.pack("<Q", len(head)) + head + old[8 + size :]

    return content(WEIGHTS, new)


def offsets(old):
    entries = json.loads(old)
    entries[QUERY]["data_offsets"] = [0, 10**15]
    return json.dumps(entries).encode()


def in_shards(spoil):
    """Weights in two shards with an index, and then `spoil`, which takes the folder and the index to write."""

    def spoiled(folder):
        tensors = load((folder / WEIGHTS).read_bytes())
        (folder / WEIGHTS).unlink()
        index = {"metadata": {}, "weight_map": {}}
        for i, name in enumerate(sorted(tensors)):
            index["weight_map"][name] = f"model-0000{1 + i % 2}-of-00002.safetensors"
        for shard in set(index["weight_map"].values()):
            inside = {name: tensors[name] for name, place in index["weight_map"].items() if place == shard}
            save_file(inside, folder / shard, metadata={"format": "pt"})
        (folder / INDEX).write_text(json.dumps(index))
        spoil(folder, index)

    return spoiled


def indexed(change):
    def spoil(folder, index):
        (folder / INDEX).write_text(json.dumps(change(index) or index))

    return in_shards(spoil)


def elsewhere(folder, index):
    shard = index["weight_map"][QUERY]
    shutil.move(folder / shard, folder.parent / shard)
    index["weight_map"] = {n: f"../{place}" if place == shard else place for n, place in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def pickled(folder):
    torch.save(load((folder / WEIGHTS).read_bytes()), folder / WEIGHTS)


def only_pickles(folder):
    torch.save(load((folder / WEIGHTS).read_bytes()), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def named_pickle(folder):
    torch.save(load((folder / WEIGHTS).read_bytes()), folder / "adapter_model.bin")
    config(transformers_weights="adapter_model.bin")(folder)


def no_tokenizer(folder):
    for path in [*folder.glob("tokenizer*"), *folder.glob("special_tokens*")]:
        path.unlink()


def another_tokenizer(tokenizer, **names):
    def spoil(folder):
        no_tokenizer(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)

    return spoil


def words(vocabulary, unknown="<unk>"):
    found = Tokenizer(models.WordLevel(vocabulary, **({"unk_token": unknown} if unknown else {})))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return found


def special_beyond(folder):
    name = folder / "tokenizer.json"
    found = json.loads(name.read_text())
    for token in found["added_tokens"]:
        token["id"] += 58 * (token["content"] == "<last>")
    found["model"]["vocab"]["<last>"] = 61
    name.write_text(json.dumps(found))


def a_python_tokenizer(folder):
    no_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))


FAULTS = {
    # name: (model, what is done to its folder, what the message says)
    "a weight is missing": ("bert", without(QUERY), QUERY),
    "a bias is missing": ("bert", without(QUERY.replace("weight", "bias")), "query.bias"),
    "a packed weight is missing": ("gpt2", without("h.0.attn.c_attn.weight"), r"h\.0\.attn\.c_attn\.weight"),
    "the embeddings are missing": ("llama", without("embed_tokens.weight"), "embed_tokens.weight"),
    "weights of other names": (
        "bert",
        weights(lambda t: [t.__setitem__("other." + name, t.pop(name)) for name in list(t)]),
        "missing",
    ),
    "no weights at all": ("bert", weights(dict.clear), "embeddings.*missing|missing.*embeddings"),
    "a weight of another shape": (
        "bert",
        weights(lambda t: t.__setitem__(QUERY, torch.zeros(24, 23))),
        rf"{QUERY}.*24, 23",
    ),
    "more words than the table has": ("bert", config(vocab_size=61), r"word_embeddings\.weight"),
    "other widths": ("bert", config(hidden_size=48), r"\(24,?\)?"),
    "a weight that is NaN": ("bert", entry(np.nan), QUERY),
    "a weight that is infinite": ("bert", entry(np.inf), QUERY),
    "a bias that is NaN": ("llama with biases", entry(np.nan, "layers.0.self_attn.q_proj.bias"), "q_proj.bias"),
    "a norm that is NaN": ("mistral", entry(np.nan, "layers.1.input_layernorm.weight"), "input_layernorm.weight"),
    "weights that are integers": ("bert", weights(lambda t: t.__setitem__(QUERY, t[QUERY].to(torch.int8))), QUERY),
    "fewer layers than weights": ("bert", config(num_hidden_layers=1), r"encoder\.layer\.1"),
    "biases that the configuration leaves out": ("llama with biases", config(attention_bias=False), "bias"),
    "truncated weights": ("bert", content(WEIGHTS, half), "weights"),
    "weights cut in their header": ("bert", content(WEIGHTS, lambda old: old[:100]), "weights"),
    "an empty file of weights": ("bert", content(WEIGHTS, b""), "weights"),
    "a header of 10^15 bytes": (
        "bert",
        content(WEIGHTS, lambda old: struct.pack("<Q", 10**15) + old[8:]),
        "weights",
    ),
    "a header of 99 MB": (
        "bert",
        content(WEIGHTS, lambda old: struct.pack("<Q", 99_000_000) + old[8:]),
        "weights",
    ),
    "a header that is no JSON": ("bert", header(lambda old: b"{" + bytes(range(128, 255))), "weights"),
    "a header that is nested": ("bert", header(lambda old: b"[" * DEEP + b"]" * DEEP), "weights"),
    "offsets beyond the file": ("bert", header(offsets), "weights"),
    "weights that are a pickle": ("bert", pickled, "weights"),
    "weights that are garbage": ("bert", content(WEIGHTS, bytes(range(256)) * 20), "weights"),
    "weights that are a folder": ("bert", a_folder(WEIGHTS), WEIGHTS),
    "weights that are a pipe": ("bert", a_pipe(WEIGHTS), WEIGHTS),
    "no weights": ("bert", gone(WEIGHTS), "safetensors"),
    "pickled weights alone": ("bert", only_pickles, "safetensors"),
    "pickled weights that the configuration names": ("bert", named_pickle, "transformers_weights"),
    "a shard is missing": (
        "bert",
        in_shards(lambda f, i: (f / i["weight_map"][QUERY]).unlink()),
        "model-0000.-of-00002",
    ),
    "a shard is truncated": (
        "bert",
        in_shards(lambda f, i: content(i["weight_map"][QUERY], half)(f)),
        "weights",
    ),
    "a shard outside the folder": ("bert", in_shards(elsewhere), r"\.\./model-0000"),
    "a shard that is a pickle": (
        "bert",
        indexed(lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "pytorch_model.bin")}),
        "pytorch_model.bin",
    ),
    "a shard by number": ("bert", indexed(lambda i: {"weight_map": dict.fromkeys(i["weight_map"], 7)}), "7"),
    "a shard without its weight": (
        "bert",
        in_shards(lambda f, i: save_file({"x": torch.zeros(1)}, f / i["weight_map"][QUERY], {"format": "pt"})),
        "missing|weights",
    ),
    "an empty index": ("bert", in_shards(lambda f, i: (f / INDEX).write_text("")), INDEX),
    "a truncated index": ("bert", in_shards(lambda f, i: content(INDEX, half)(f)), INDEX),
    "an index without a map": ("bert", indexed(lambda i: {"metadata": {}}), INDEX),
    "an index with a list": ("bert", indexed(lambda i: {"weight_map": list(i["weight_map"])}), INDEX),
    "an index of no shards": ("bert", indexed(lambda i: {"metadata": {}, "weight_map": {}}), INDEX),
    "an index that is nested": ("bert", in_shards(lambda f, i: nested(INDEX)(f)), INDEX),
    "no configuration": ("bert", gone("config.json"), "config"),
    "an empty configuration": ("bert", content("config.json", b""), "config"),
    "a truncated configuration": ("bert", content("config.json", half), "config"),
    "a configuration that is a list": ("bert", content("config.json", b"[]"), "config"),
    "a configuration that is a number": ("bert", content("config.json", b"3"), "config"),
    "a configuration of no model": ("bert", content("config.json", b"{}"), "model_type"),
    "a configuration that is nested": ("bert", nested("config.json"), "config"),
    "a configuration that is not UTF-8": ("bert", content("config.json", b'{"model_type": "b\xff"}'), "config"),
    "a configuration that is a folder": ("bert", a_folder("config.json"), "config"),
    "a configuration that is a pipe": ("bert", a_pipe("config.json"), "config"),
    "a model type that is a number": ("bert", config(model_type=3), "3"),
    "a model type that is a list": ("bert", config(model_type=["bert"]), "config.json.*list"),
    "a width of zero": ("bert", config(hidden_size=0), "hidden_size.*0"),
    "a width below zero": ("llama", config(hidden_size=-24), "hidden_size.*-24"),
    "a width in words": ("bert", config(hidden_size="wide"), "hidden_size.*wide|hidden_size.*str"),
    "a width in parts": ("bert", config(hidden_size=24.5), "hidden_size.*24.5|hidden_size.*float"),
    "no heads": ("bert", config(num_attention_heads=0), "num_attention_heads.*0"),
    "heads below zero": ("bert", config(num_attention_heads=-1), "num_attention_heads.*-1"),
    "heads that do not divide the width": ("bert", config(num_attention_heads=5), "heads"),
    "packed heads that do not divide the width": ("gpt2", config(n_head=5), "heads"),
    "no heads of keys": ("llama", config(num_key_value_heads=0), "num_key_value_heads.*0"),
    "heads of keys that do not divide": ("llama", config(num_key_value_heads=3), "num_key_value_heads.*3"),
    "heads of width zero": ("llama", config(head_dim=0), "head_dim.*0"),
    "heads of odd width": ("llama", config(num_attention_heads=8, head_dim=3), "k_proj"),
    "no layers": ("bert", config(num_hidden_layers=0), "num_hidden_layers.*0"),
    "layers below zero": ("llama", config(num_hidden_layers=-1), "num_hidden_layers.*-1"),
    "a billion layers": ("bert", config(num_hidden_layers=10**9), "num_hidden_layers.*1000000000"),
    "more layers than weights": ("llama", config(num_hidden_layers=3), r"layers\.2\."),
    "layers in words": ("llama", config(num_hidden_layers="two"), "num_hidden_layers.*two|num_hidden_layers.*str"),
    "a trillion words": ("bert", config(vocab_size=10**12), "word_embeddings|vocab_size"),
    "a trillion positions": ("gpt2", config(n_positions=10**12), "wpe|max_position_embeddings"),
    "no positions": ("llama", config(max_position_embeddings=0), "max_position_embeddings.*0"),
    "a trillion in the middle": ("llama", config(intermediate_size=10**12), "mlp|intermediate_size"),
    "no middle": ("llama", config(intermediate_size=0), "mlp|intermediate_size"),
    "an unknown activation": ("bert", config(hidden_act="nosuch"), "nosuch"),
    "an activation by number": ("llama", config(hidden_act=7), "hidden_act"),
    "an epsilon in words": ("bert", config(layer_norm_eps="small"), "layer_norm_eps"),
    "an epsilon below zero": ("bert", config(layer_norm_eps=-1e6), "finite"),
    "a padding token beyond the table": ("bert", config(pad_token_id=1000), "pad|Padding"),
    "unknown rotary positions": ("llama", config(rope_parameters={"rope_type": "nosuch", "rope_theta": 1e4}), "nosuch"),
    "rotary positions without their factor": (
        "llama",
        config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
        "factor",
    ),
    "rotary positions stretched by zero": (
        "llama",
        config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 0}),
        "factor|finite",
    ),
    "rotary positions by number": ("llama", config(rope_parameters=3), "rope"),
    "rotary positions of base zero": (
        "llama",
        config(rope_parameters={"rope_type": "default", "rope_theta": 0.0}),
        "finite|rope_theta",
    ),
    "a window of no keys": ("mistral with a window", config(sliding_window=0), "sliding_window.*0"),
    "a window below zero": ("mistral with a window", config(sliding_window=-3), "sliding_window.*-3"),
    "a window in words": ("mistral with a window", config(sliding_window="wide"), "sliding_window"),
    "layers of unknown kinds": ("qwen2 with a window", config(layer_types=["other", "kind"]), "layer_types|other"),
    "layers of too few kinds": ("qwen2 with a window", config(layer_types=["full_attention"]), "layer_types"),
    "weights of an unknown quantisation": ("llama", config(quantization_config={"quant_method": "nosuch"}), "quant"),
    "a quantisation that is a list": ("llama", config(quantization_config=[4]), "config"),
    "no tokenizer": ("bert", no_tokenizer, "tokenizer"),
    "no tokenizer of a decoder": ("llama", no_tokenizer, "tokenizer"),
    "no tokenizer of bytes": ("gpt2", no_tokenizer, "tokenizer"),
    "no tokenizer of RoBERTa": ("roberta", no_tokenizer, "tokenizer"),
    "no tokenizer of DistilBERT": ("distilbert", no_tokenizer, "tokenizer"),
    "no tokenizer of Qwen2": ("qwen2", no_tokenizer, "tokenizer"),
    "no tokenizer of Mistral": ("mistral", no_tokenizer, "tokenizer"),
    "a tokenizer of special tokens alone": (
        "bert",
        another_tokenizer(
            words({"<unk>": 0, "<first>": 1, "<last>": 2}), unk_token="<unk>", cls_token="<first>", sep_token="<last>"
        ),
        "tokenizer",
    ),
    "an empty tokenizer": ("bert", content("tokenizer.json", b""), "tokenizer"),
    "a truncated tokenizer": ("bert", content("tokenizer.json", half), "tokenizer"),
    "a tokenizer that is a list": ("bert", content("tokenizer.json", b"[]"), "tokenizer"),
    "a tokenizer of no kind": (
        "bert",
        content("tokenizer.json", lambda old: old.replace(b'"BPE"', b'"nosuch"')),
        "tokenizer",
    ),
    "a tokenizer that is nested": ("bert", nested("tokenizer.json"), "tokenizer"),
    "a tokenizer that is a folder": ("bert", a_folder("tokenizer.json"), "tokenizer"),
    "a tokenizer that is a pipe": ("bert", a_pipe("tokenizer.json"), "tokenizer"),
    "a truncated configuration of the tokenizer": ("bert", content("tokenizer_config.json", half), "tokenizer"),
    "a nested configuration of the tokenizer": ("bert", nested("tokenizer_config.json"), "tokenizer"),
    "a configuration of the tokenizer that is a list": ("bert", content("tokenizer_config.json", b"[]"), "tokenizer"),
    "a tokenizer of Python alone": ("bert", a_python_tokenizer, "tokenizer"),
    "a tokenizer that fails on unknown words": (
        "bert",
        another_tokenizer(words({"<first>": 1, "<last>": 2, "a": 3}, None), cls_token="<first>", sep_token="<last>"),
        "tokenizer",
    ),
    "a tokenizer without special tokens": (
        "bert",
        another_tokenizer(words({"<unk>": 0, "a": 1, "b": 2}), unk_token="<unk>"),
        "special token",
    ),
    "a special token beyond the table": ("bert", special_beyond, "61"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_folder_is_refused_in_one_line(fault, copy, capfd):
    case, spoil, says = FAULTS[fault]
    folder = copy(case)
    spoil(folder)
    with pytest.raises(ValueError) as refused:
        loading.load_model(str(folder), device="cpu")
    line = str(refused.value)
    assert line.startswith("model: expected ") and " got " in line
    assert "\n" not in line and len(line) < 500
    assert re.search(says, line.replace(str(folder), "FOLDER")), line
    assert capfd.readouterr() == ("", "")


# ---- what passes, and what is read off it ----


def renamed(change):
    return weights(lambda tensors: [tensors.__setitem__(change(name), tensors.pop(name)) for name in list(tensors)])


def with_task_head(case, body):
    return lambda folder: small(case, body).save_pretrained(folder)


SOUND = {
    "shards": ("bert", in_shards(lambda folder, index: None)),
    "no pooler": ("bert", weights(lambda t: [t.pop(name) for name in list(t) if name.startswith("pooler")])),
    "a task head": ("bert", with_task_head("bert", "ForMaskedLM")),
    "a tied task head": ("gpt2", with_task_head("gpt2", "LMHeadModel")),
    "a task head of its own": ("llama", with_task_head("llama", "ForCausalLM")),
    "masks among the weights": (
        "gpt2",
        weights(lambda t: t.update({f"h.0.attn.{name}": torch.ones(9, 9) for name in ("bias", "masked_bias")})),
    ),
    "positions among the weights": (
        "bert",
        weights(lambda t: t.__setitem__("embeddings.position_ids", torch.arange(40)[None])),
    ),
    "angles among the weights": (
        "llama",
        weights(lambda t: t.__setitem__("layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))),
    ),
    "old names of norms": ("bert", renamed(lambda name: re.sub("LayerNorm.weight", "LayerNorm.gamma", name))),
    "other files": ("bert", lambda folder: (folder / "onnx").mkdir()),
}


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_folder_gives_the_heads_of_the_whole(kind, healthy, copy):
    case, change = SOUND[kind]
    folder = copy(case)
    change(folder)
    found = loading.load_model(str(folder))
    assert len(heads.heads(found)) == 2 * found.model.config.num_attention_heads
    if "task head" not in kind:  # that one is another random model
        pairs = zip(heads.heads(found), heads.heads(loading.load_model(str(healthy(case)))), strict=True)
        assert all(torch.equal(a.A, b.A) and torch.equal(a.V, b.V) for a, b in pairs)


def test_the_checksum_of_shards_is_of_all_of_them(copy):
    folder = copy("bert")
    in_shards(lambda folder, index: None)(folder)
    before = loading.load_model(str(folder)).sha256
    assert before and before == loading.load_model(str(folder)).sha256
    for shard in sorted(folder.glob("*.safetensors")):
        old = shard.read_bytes()
        shard.write_bytes(old[:-4] + struct.pack("<f", 0.125))
        assert loading.load_model(str(folder)).sha256 != before
        shard.write_bytes(old)


CODE = "import pathlib\npathlib.Path({!r}).write_text('run')\nraise SystemExit\n"
AUTO_MAP = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoTokenizer": ["own.Slow", "own.Fast"]}


class Opened:
    """What writes a file when it is read from a pickle."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("known", [True, False])
def test_no_code_of_a_folder_is_run(known, copy, tmp_path):
    folder, mark = copy("bert"), tmp_path / "mark"
    (folder / "own.py").write_text(CODE.format(str(mark)))
    config(auto_map=AUTO_MAP, **({} if known else {"model_type": "own"}))(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": AUTO_MAP}))
    if known:
        assert len(heads.heads(loading.load_model(str(folder)))) == 6
    else:
        with pytest.raises(ValueError, match="^model: expected a kind of model that transformers knows, .*custom code"):
            loading.load_model(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", WEIGHTS])
def test_no_pickle_is_read(name, copy, tmp_path):
    folder, mark = copy("bert"), tmp_path / "mark"
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Opened(mark)))
    config(transformers_weights=name if name.startswith("adapter") else None)(folder)
    with pytest.raises(ValueError, match="^model: expected "):
        loading.load_model(str(folder))
    assert not mark.exists()
    pickle.loads((folder / name).read_bytes())
    assert mark.exists()


class Panic(BaseException):
    """As Rust code raises it."""


@pytest.mark.parametrize(
    "raised", [Panic("at\nonce \x1b[31m"), MemoryError(), RecursionError("deep"), ImportError("no peft")]
)
def test_whatever_is_raised_becomes_one_line(raised, capfd):
    with pytest.raises(ValueError) as refused:
        with checkpoint_files.reading("a whole", "folder"):
            logging.getLogger("transformers").error("a line")
            warnings.warn("another", stacklevel=1)
            raise raised
    assert str(refused.value).startswith("model: expected a whole, got 'folder' (" + type(raised).__name__)
    assert str(refused.value).isprintable() and refused.value.__cause__ is raised
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("transformers").isEnabledFor(logging.ERROR)


@pytest.mark.parametrize("wish", [KeyboardInterrupt, SystemExit])
def test_the_wish_to_stop_passes(wish):
    with pytest.raises(wish), checkpoint_files.reading("a whole", "folder"):
        raise wish


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "a\nb", "", None, 7, "/no/such/folder", "a b", __file__])
def test_what_is_no_model_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^model: expected [^\n]*, got [^\n]*$"):
        loading.load_model(name)


def test_attention_without_a_scale_is_refused():
    model = small("gpt2")
    for module in architectures.attention_modules(model):
        del module.scaling
    with pytest.raises(ValueError, match="^model: expected attention with an attribute `scaling`, got GPT2Attention"):
        heads.heads(model)


# ---- text that the model does not know ----


@pytest.fixture(scope="module")
def bert(healthy):
    return loading.load_model(str(healthy("bert")))


@pytest.mark.parametrize("ids, said", [([5, 60], "5 to 60"), ([-1, 5], "-1 to 5"), ([5.5, 6.0], "float64")])
def test_ids_beyond_the_table_are_refused(ids, said, bert):
    with pytest.raises(ValueError, match=rf"^text: expected token ids from 0 to 59, got .*{said}"):
        layer_streams(bert, np.array(ids), [0], context=40)


def test_a_text_that_is_mostly_unknown_is_refused(bert):
    text = "the law of a token " * 20  # 380 letters
    known = text + "\u4e00" * 14  # three bytes each, and no byte of it known: a tenth and no more
    assert np.mean(tokenize(bert, known) == 0) < 0.1
    pooled.pooled_probe(bert, known, [0], 380, 16, context=40)
    unknown = text + "\u4e00" * 20
    share = np.mean(tokenize(bert, unknown) == 0)
    assert 0.1 < share < 0.2
    message = rf"^text: expected at most 10% of its tokens unknown to .*, got {share:.1%} of 440"
    for call in (
        lambda: pooled.pooled_probe(bert, unknown, [0], 440, 16, context=40),
        lambda: collect_tokens(bert, unknown, [0], 440),
        lambda: layer_streams(bert, unknown, [0], 40),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ---- sliding windows ----


def test_a_window_is_the_models_own():
    for case, expected in {
        "mistral with a window": [6, 6],
        "mistral": [None, None],
        "qwen2 with a window": [None, 6],
        "qwen2": [None, None],
        "llama": [None, None],
        "bert": [None, None],
    }.items():
        assert [head.window for head in heads.heads(small(case))][:: 3 if case == "bert" else 4] == expected


def test_no_more_keys_are_reported_than_a_window_has(healthy, tmp_path):
    model = loading.load_model(str(healthy("qwen2 with a window")))
    text = "the law of a token is read off the text that holds its window of keys " * 40
    table = pooled.pooled_probe(model, text, None, 1200, 32, context=40)
    whole, sliding = table[table["layer"] == 0], table[table["layer"] == 1]
    assert whole["window"].isna().all() and (sliding["window"] == 6).all()
    assert whole[["effective_6", "effective_1000", "effective_1200"]].notna().all().all()
    assert (
        sliding["effective_6"].between(1, 6).all() and sliding[["effective_1000", "effective_1200"]].isna().all().all()
    )
    assert sliding["phase"].tolist() == [budgets.phase(load, 6) for load in sliding["load_median"]]
    assert whole["phase"].tolist() == [budgets.phase(load, 1200) for load in whole["load_median"]]
    # Where the window holds all tokens it changes nothing.
    short = pooled.pooled_probe(model, text, [1], 6, 4, context=40)
    assert short["effective_6"].notna().all()

    meta = {"tokens": 1200, "queries": 32, "seed": 0, "context": 40, "model": "m", "model_sha256": None}
    meta |= {"text": "t", "text_sha256": "0" * 64, **records.provenance()}
    assert len(report.write(table, meta, tmp_path)) == 8
    page = (tmp_path / "report.html").read_text()
    assert "nan" not in page.lower().split("base64")[0] and "sliding window" in page
    again = pd.read_csv(tmp_path / "heads.csv")
    assert again["window"].tolist()[-1] == 6 and again["effective_1200"].isna().sum() == len(sliding)


# ---- the command ----


def test_the_command_ends_in_one_line(copy, tmp_path):
    folder = copy("bert")
    content(WEIGHTS, half)(folder)
    text = tmp_path / "text.txt"
    text.write_text("the law of a token\n" * 200)
    command = [sys.executable, "-m", "tokcx_lib", "probe", "--text", str(text), "--tokens", "1000", "--model"]
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
    runs = {
        model: subprocess.Popen([*command, model], stdout=-1, stderr=-1, text=True, env=os.environ | environment)
        for model, environment in ((str(folder), {}), ("no/such-model", unreachable))
    }
    for model, run in runs.items():
        out, err = run.communicate(timeout=120)
        assert run.returncode == 2 and out == ""
        assert re.fullmatch(rf"tokcx: model: expected [^\n]*, got '{re.escape(model)}' \([^\n]+\)\n", err), err
