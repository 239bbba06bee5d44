"""Text by name or path.

``open_corpus`` looks, in this order, at a path; at a known name in the folder named by ``TOKCX_DATA``; at the Hugging
Face hub. One corpus needs neither: ``scipy-docs``, the English of the installed scipy's docstrings, is the fixed text
that the chapters' live cells run on, the same on every machine.
"""

from __future__ import annotations

import ast
import bz2
import gzip
import hashlib
import lzma
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

SCIPY_DOCS_SHA256 = {"1.17.1": "ed045194817ca861420f9cd7643f434222d39079cd89d068533d66c821b2ff35"}


class Corpus(NamedTuple):
    """A text: its `name`, the `text` itself, the `sha256` of its UTF-8 bytes, and the `source` it was read from."""

    name: str
    text: str
    sha256: str
    source: str


class _Known(NamedTuple):
    file: str  # its name in TOKCX_DATA
    sha256: str  # of the plain text
    hub: tuple[str, str] | None = None  # dataset and parquet file on the Hugging Face hub


KNOWN = {
    "wikitext2-test": _Known(
        "wikitext2-test.raw.xz",
        "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
        ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
    ),
    "wikitext2-valid": _Known(
        "wikitext2-valid.raw.xz",
        "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",
        ("Salesforce/wikitext", "wikitext-2-raw-v1/validation-00000-of-00001.parquet"),
    ),
    "wikipedia-en": _Known(
        "wikipedia-en-20m.txt.xz", "75117029134977405da2066b7712e1bd783972eab60f2049847f5cee669a56b3"
    ),
    "wikipedia-de": _Known(
        "wikipedia-de-2m.txt.xz", "564a6a7031e80956f7e3661a465ac3770a9ee858677ae5f420f4a5e499cc7ea9"
    ),
}

NAMES = ("scipy-docs", *KNOWN)

_OPENERS = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}


def open_corpus(name_or_path: str | os.PathLike) -> Corpus:
    """Read a text by path (plain, .xz, .gz or .bz2, UTF-8) or by name.

    Names: ``scipy-docs``, ``wikitext2-test``, ``wikitext2-valid``, ``wikipedia-en``, ``wikipedia-de``. A named text is
    verified against its published checksum.

    Raises
    ------
    ValueError
        If there is no such path or name, the file is not UTF-8 text, or its checksum is not the expected one.
    """
    path = Path(name_or_path)
    if path.is_file():
        return _corpus(path.name, _read(path), str(path))
    name = str(name_or_path)
    if name == "scipy-docs":
        return scipy_docs()
    if name not in KNOWN:
        raise ValueError(f"corpus: expected a file or one of {', '.join(NAMES)}, got {name!r}")
    known = KNOWN[name]
    folder = os.environ.get("TOKCX_DATA")
    if folder and (path := Path(folder) / known.file).is_file():
        corpus = _corpus(name, _read(path), known.file)
    elif known.hub:
        corpus = _corpus(name, _from_hub(*known.hub), "hub:" + "/".join(known.hub))
    else:
        raise ValueError(f"corpus: {name!r} is the file {known.file}; name its folder in TOKCX_DATA (now {folder!r})")
    if corpus.sha256 != known.sha256:
        raise ValueError(f"corpus: {name!r} from {corpus.source} has sha256 {corpus.sha256}, expected {known.sha256}")
    return corpus


def _corpus(name: str, text: str, source: str) -> Corpus:
    return Corpus(name, text, hashlib.sha256(text.encode()).hexdigest(), source)


def _read(path: Path) -> str:
    opener = _OPENERS.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            return file.read().decode("utf-8")
    except (UnicodeDecodeError, lzma.LZMAError, EOFError, OSError) as error:
        raise ValueError(f"corpus: expected UTF-8 text in {path}, got {error}") from error


def _from_hub(dataset: str, file: str) -> str:
    """One parquet file of a dataset of lines, as the raw text it was made from: its empty rows stand for ' \\n'."""
    import pandas
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(dataset, file, repo_type="dataset")
    except Exception as error:  # the client raises many kinds, from its own and from the network's libraries
        raise ValueError(
            f"corpus: expected {file} in the folder TOKCX_DATA or on the Hugging Face hub in {dataset}; "
            f"neither could be read ({type(error).__name__})"
        ) from error
    return "".join(row or " \n" for row in pandas.read_parquet(path)["text"])


def scipy_docs() -> Corpus:
    """The English of scipy's docstrings: paragraphs of prose in the order of files and lines, repeats left out.

    Raises
    ------
    ValueError
        If the installed scipy is not the pinned version, so that the text would not be the fixed one.
    """
    import scipy

    root = Path(scipy.__file__).parent
    seen: dict[str, None] = {}  # an ordered set
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if not {"tests", "_lib"} & set(path.relative_to(root).parts):
            for docstring in _docstrings(path):
                seen.update(dict.fromkeys(filter(_is_prose, map(_one_line, re.split(r"\n\s*\n", docstring)))))
    corpus = _corpus("scipy-docs", "\n".join(seen) + "\n", f"docstrings of scipy {scipy.__version__}")
    expected = SCIPY_DOCS_SHA256.get(scipy.__version__)
    if corpus.sha256 != expected:
        raise ValueError(
            f"corpus: 'scipy-docs' has sha256 {corpus.sha256} with scipy {scipy.__version__}; "
            f"the book's text is that of scipy {', '.join(SCIPY_DOCS_SHA256)}"
        )
    return corpus


def _docstrings(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((n for n in ast.walk(tree) if isinstance(n, kinds)), key=lambda n: getattr(n, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def _one_line(paragraph: str) -> str:
    return " ".join(paragraph.replace("`", "").split())


def _is_prose(line: str) -> bool:
    """A sentence or more: eight words, mostly letters, closed by a full stop; no code, table or section heading."""
    letters = sum(c.isalpha() or c == " " for c in line)
    return (
        line.count(" ") >= 7
        and line.endswith(".")
        and letters >= 0.85 * len(line)
        and not any(mark in line for mark in (">>>", "---", "===", "+-", " : "))
    )
