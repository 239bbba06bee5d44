"""Records refuse what was not measured; corpora are found by path, folder or hub, and verified."""

import gzip
import hashlib
import json
import lzma
import platform
import re
import textwrap
from pathlib import Path

import pandas as pd
import pytest
from markdown_it import MarkdownIt
from mdit_py_plugins.colon_fence import colon_fence_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.front_matter import front_matter_plugin
from mdit_py_plugins.myst_blocks import myst_block_plugin

from tokcx_lib import records
from tokcx_lib.models import corpora


def table(rows=3):
    return pd.DataFrame({"replicate": range(rows), "n": [10 * (i + 1) for i in range(rows)], "error": [1 / 3] * rows})


def test_a_record_comes_back_as_it_was_saved(tmp_path):
    path = records.save("a_run", table(), {"device": "cpu", "replicates": 3, "seed": 1}, tmp_path)
    assert path.read_text().splitlines()[1] == "0,10,0.333333"
    loaded = records.load("a_run", tmp_path)
    assert loaded.table["error"].tolist() == [0.333333] * 3
    assert loaded.meta["rows"] == 3 and loaded.meta["replicates"] == 3 and loaded.meta["seed"] == 1
    assert {"torch", "numpy", "python"} <= set(loaded.meta["versions"]) and loaded.meta["commit"]
    assert records.verify("a_run", tmp_path)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "a_run" in str(loaded) and "3 replicates" in str(loaded)


def test_a_large_record_is_compressed_and_replaces_a_small_one(tmp_path):
    records.save("big", table(), {}, tmp_path)
    path = records.save("big", table(100_000), {}, tmp_path)
    assert path.name == "big.csv.gz" and not (tmp_path / "big.csv").exists()
    assert len(records.load("big", tmp_path).table) == 100_000
    assert gzip.decompress(path.read_bytes()).startswith(b"replicate,n,error\n")


def edit_table(path):
    path.write_text(path.read_text().replace("0.333333", "0.3", 1))


def edit_meta(path):
    meta = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**meta, "rows": 2}))


def drop_key(path):
    meta = json.loads(path.with_suffix(".json").read_text())
    del meta["commit"]
    path.with_suffix(".json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    "damage",
    [
        edit_table,
        edit_meta,
        drop_key,
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.with_suffix(".json").write_text("{"),
        lambda path: path.with_suffix(".json").rename(path.with_name("other.json")),
    ],
)
def test_a_damaged_record_is_refused_by_name(tmp_path, damage):
    damage(records.save("a_run", table(), {}, tmp_path))
    for read in (records.load, records.verify):
        with pytest.raises(ValueError, match="a_run"):
            read("a_run", tmp_path)


@pytest.mark.parametrize(
    "call, names",
    [
        (lambda path: records.save("a/b", table(), {}, path), "name"),
        (lambda path: records.save("a", table(0), {}, path), "table"),
        (lambda path: records.save("a", table(), {"x": object()}, path), "meta"),
        (lambda path: records.save("a", table(), {"x": float("nan")}, path), "meta"),
        (lambda path: records.save("a", table(), {"texts": ["novel"]}, path), "meta: texts"),
        (lambda path: records.load("missing", path), "record"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path, call, names):
    with pytest.raises(ValueError, match=rf"^{names}: expected"):
        call(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def test_every_record_of_the_book_verifies():
    names = sorted(path.stem for path in records.folder().glob("*.json"))
    assert names
    for name in names:
        meta = records.verify(name)
        assert not meta["commit"].endswith("+"), f"{name} was made with code that is in no commit"


def test_texts_by_path(tmp_path):
    text = "Zwölf Boxkämpfer jagen Viktor.\n" * 3
    for name, pack in (("a.txt", bytes), ("a.xz", lzma.compress), ("a.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(text.encode()))
        corpus = corpora.open_corpus(tmp_path / name)
        assert corpus.text == text and corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_texts_by_name_are_verified(tmp_path, monkeypatch):
    raw = " \n = Title = \n \n Some text . \n"
    known = corpora._Known("tiny.raw.xz", hashlib.sha256(raw.encode()).hexdigest(), ("org/tiny", "tiny.parquet"))
    monkeypatch.setitem(corpora.KNOWN, "tiny", known)
    monkeypatch.setenv("TOKCX_DATA", str(tmp_path))
    (tmp_path / "tiny.raw.xz").write_bytes(lzma.compress(raw.encode()))
    assert corpora.open_corpus("tiny").text == raw
    (tmp_path / "tiny.raw.xz").write_bytes(lzma.compress(raw.upper().encode()))
    with pytest.raises(ValueError, match="sha256"):
        corpora.open_corpus("tiny")


def test_texts_from_the_hub_are_the_raw_file(tmp_path, monkeypatch):
    """The hub's rows are the raw file's lines, blank ones empty."""
    import huggingface_hub

    raw = " \n = Title = \n \n Some text . \n"
    rows = [line + "\n" if line.strip() else "" for line in raw.split("\n")[:-1]]
    pd.DataFrame({"text": rows}).to_parquet(tmp_path / "tiny.parquet")
    known = corpora._Known("tiny.raw.xz", hashlib.sha256(raw.encode()).hexdigest(), ("org/tiny", "tiny.parquet"))
    monkeypatch.setitem(corpora.KNOWN, "tiny", known)
    monkeypatch.delenv("TOKCX_DATA", raising=False)
    asked = []

    def download(dataset, file, repo_type, local_files_only):
        asked.append((dataset, file, repo_type, local_files_only))
        return tmp_path / file

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for online in (True, False):  # without a network, from what was downloaded before
        monkeypatch.setattr(corpora.runtime, "hub_answers", lambda: online)
        assert corpora.open_corpus("tiny").text == raw
        assert asked.pop() == ("org/tiny", "tiny.parquet", "dataset", not online)

    def fail(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ValueError, match="TOKCX_DATA or on the Hugging Face hub"):
        corpora.open_corpus("tiny")


def test_the_fixed_text_is_english_and_checked(monkeypatch):
    corpus = corpora.open_corpus("scipy-docs")
    assert corpus.text.count("\n") > 5000 and ">>>" not in corpus.text
    monkeypatch.setattr(corpora, "SCIPY_DOCS_SHA256", {"0.1": "0" * 64})
    with pytest.raises(ValueError, match="scipy-docs.*expected|scipy-docs.*0.1"):
        corpora.open_corpus("scipy-docs")


def test_the_standard_library_is_source_without_tests_and_packages(tmp_path, monkeypatch):
    corpus = corpora.open_corpus("python-stdlib")
    assert corpus.source.endswith(platform.python_version()) and len(corpus.text) > 5_000_000
    assert "class OrderedDict(dict):" in corpus.text and "class Fraction(" in corpus.text
    assert corpus.sha256 == hashlib.sha256(corpus.text.encode()).hexdigest()
    for name, content in {
        "b.py": b"b = 2\n", "a/z.py": b"z = 1\n", "bad.py": b"\xff\xfe", "test/t.py": b"t\n", "a/tests/t.py": b"t\n",
        "site-packages/p.py": b"p\n", "idlelib/i.py": b"i\n", "c.txt": b"c\n",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert corpora.open_corpus("python-stdlib").text == "z = 1\nb = 2\n"


PAGE = """\
---
title: front matter
---

(label)=
# A title with $x$

Prose, and `code` in it.

% a comment
```{admonition} An argument
:class: option
Kept inside.
```

````{prf:theorem} Named
:label: thm
Outer prose.

```{math}
:label: eq
a = b
```

$$
c = d
$$
````

```{code-cell} python3
:tags: [derivation]
dropped = 1
```

```bash
dropped too
```

```
dropped as well
```

:::{note}
Colons: kept.
:::
Last words.
"""


def test_prose_is_what_is_left_of_a_page():
    found = [line for line in corpora._prose(PAGE).splitlines() if line]
    assert found == [
        "# A title with $x$", "Prose, and `code` in it.", "Kept inside.", "Outer prose.", "a = b", "$$", "c = d", "$$",
        "Colons: kept.", "Last words.",
    ]  # fmt: skip


def parsed_prose(page):
    """The prose of a page as markdown-it finds it, with the rules of MyST: lines in no token that holds none."""
    parser = MarkdownIt("commonmark")
    for plugin in (front_matter_plugin, myst_block_plugin, colon_fence_plugin, dollarmath_plugin):
        parser.use(plugin)
    lines = page.splitlines(keepends=True)
    for token in parser.parse(page):
        if token.type in ("fence", "colon_fence"):
            first, last = token.map
            body = lines[first + 1 : last - 1]
            while body and re.match(r"\s*:[\w-]+:", body[0]):
                del body[0]
            name = token.info.partition(" ")[0]
            prose = name.startswith("{") and name not in corpora._NO_PROSE
            kept = [parsed_prose(textwrap.dedent("".join(body)))] if prose else []
        elif token.type in ("front_matter", "myst_target", "myst_line_comment"):
            (first, last), kept = token.map, []
        else:
            continue
        lines[first:last] = kept + [""] * (last - first - len(kept))
    return "".join(lines)


def test_the_prose_of_the_book_is_that_of_a_parser():
    root = Path(corpora.__file__).parents[2]
    pages = [*root.glob("chapters/*.md"), *root.glob("book/*/*.md")]
    assert len(pages) > 20
    for path in pages:
        page = path.read_text(encoding="utf-8")
        ours, parsed = ([line.strip() for line in f(page).splitlines()] for f in (corpora._prose, parsed_prose))
        assert ours == parsed, path.name


def test_the_book_is_prose_and_needs_a_checkout(tmp_path, monkeypatch):
    text = corpora.open_corpus("book").text
    assert text.count("\n## ") > 20 and "attention" in text and r"\Sigma" in text
    for left_out in ("jupytext:", "```", "import torch", ":label:", ":tags:", "make test\n"):
        assert left_out not in text, left_out
    monkeypatch.setattr(corpora, "__file__", str(tmp_path / "tokcx_lib" / "models" / "corpora.py"))
    with pytest.raises(ValueError, match="corpus: 'book' is read from a checkout"):
        corpora.open_corpus("book")


@pytest.mark.parametrize("name", ["nosuch", "wikipedia-en"])
def test_an_unknown_or_missing_text_is_named(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TOKCX_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=f"corpus: .*{name}"):
        corpora.open_corpus(name)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "a.xz").write_bytes(b"not xz")
    for name in ("a.bin", "a.xz"):
        with pytest.raises(ValueError, match="UTF-8"):
            corpora.open_corpus(tmp_path / name)
