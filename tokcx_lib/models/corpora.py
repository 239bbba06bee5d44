"""Text by name or path.

``open_corpus`` looks, in this order, at a path; at a known name in the folder named by ``TOKCX_DATA``; at the Hugging
Face hub. Three texts need neither. ``scipy-docs``, the English of the installed scipy's docstrings, is the fixed text
that the chapters' live cells run on, the same on every machine. ``python-stdlib``, source code, is that of the running
Python, and ``book`` is the prose of this book: both change with the version, so a record names the checksum of the text
it was made on.

A text in a file is a stream: it is unpacked and decoded piece by piece, and no more of it than is asked for.
"""

from __future__ import annotations

import ast
import bz2
import codecs
import gzip
import hashlib
import lzma
import os
import platform
import re
import stat
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from tokcx_lib import runtime

SCIPY_DOCS_SHA256 = {"1.17.1": "ed045194817ca861420f9cd7643f434222d39079cd89d068533d66c821b2ff35"}


@dataclass(frozen=True)
class Corpus:
    """A text: its `name`, the `source` it is read from, and `pieces`, a function that reads it anew, piece by piece.

    `known_sha256` is the SHA-256 of its UTF-8 bytes where that is known already: the text was verified against it, or
    was made in memory. A file of one's own has None: to tell, all of it must be read, which `sha256` does.
    """

    name: str
    source: str
    pieces: Callable[[], Iterable[str]]
    known_sha256: str | None = None

    @cached_property
    def text(self) -> str:
        """All of it at once."""
        return "".join(self.pieces())

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of its UTF-8 bytes, of which one piece at a time is held."""
        if self.known_sha256:
            return self.known_sha256
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece.encode())
        return digest.hexdigest()


class Article(NamedTuple):
    """One article of a text: its `title` and its `paragraphs`, headings left out."""

    title: str
    paragraphs: list[str]


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
        "wikipedia-de-2m.txt.xz", "ba7f3f95260fbff558f0ba87bff53d1ffed417b2736aca8b174c9680c17b0c8c"
    ),
    "pubmed-en": _Known("pubmed-en-4m.txt.xz", "53522eb0bc2b30f11a40309915afc9b3637bfd7ee84df9b7f2e4f12093af0384"),
}


_OPENERS = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
_BYTES = 2**20  # of a text unpacked at once


def open_corpus(name_or_path: str | os.PathLike) -> Corpus:
    """A text by path (plain, .xz, .gz or .bz2, UTF-8) or by name.

    Names: ``scipy-docs``, ``wikitext2-test``, ``wikitext2-valid``, ``wikipedia-en``, ``wikipedia-de``, ``pubmed-en``,
    each verified against its published checksum; ``python-stdlib`` and ``book``, which have none (see `python_stdlib`,
    `book`).

    A file is read when its text is asked for, and no further: damage behind what is read is not noticed.

    Raises
    ------
    ValueError
        If there is no such path or name, the file is empty, damaged or not UTF-8 text, or its checksum is not the
        expected one. Reading raises it as well.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise ValueError(f"corpus: expected a name or a path, got {type(name_or_path).__name__}")
    path, name = Path(name_or_path), str(name_or_path)
    found = _what_is(path)
    if found == "a file":
        return _from_file(path.name, path, str(path))
    if name in MADE_HERE:
        return MADE_HERE[name]()
    if name not in KNOWN:
        names = ", ".join([*MADE_HERE, *KNOWN])
        raise ValueError(f"corpus: expected a file or one of {names}, got {name!r}{found and f', {found}'}")
    known = KNOWN[name]
    folder = os.environ.get("TOKCX_DATA")
    if folder and not Path(folder).is_dir():
        raise ValueError(f"TOKCX_DATA: expected a folder, got {folder!r}")
    if folder and (path := Path(folder) / known.file).is_file():
        corpus = _from_file(name, path, known.file)
    elif known.hub:
        corpus = _corpus(name, _from_hub(*known.hub), "hub:" + "/".join(known.hub))
    else:
        raise ValueError(f"corpus: {name!r} is the file {known.file}; name its folder in TOKCX_DATA (now {folder!r})")
    if corpus.sha256 != known.sha256:
        raise ValueError(f"corpus: {name!r} from {corpus.source} has sha256 {corpus.sha256}, expected {known.sha256}")
    return replace(corpus, known_sha256=known.sha256)


def _what_is(path: Path) -> str:
    """What stands at a path, in words; nothing where there is none. Only a file has an end for sure."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        return f"which cannot be read ({getattr(error, 'strerror', None) or error})"
    return "a file" if stat.S_ISREG(mode) else "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"


def _corpus(name: str, text: str, source: str) -> Corpus:
    return Corpus(name, source, lambda: (text,), hashlib.sha256(text.encode()).hexdigest())


def _from_file(name: str, path: Path, source: str) -> Corpus:
    corpus = Corpus(name, source, partial(_read, path))
    if not any(corpus.pieces()):  # reads the first one
        raise ValueError(f"corpus: expected text in {path}, got an empty file")
    return corpus


def _read(path: Path) -> Iterator[str]:
    """The text of a file, without the byte-order mark that some editors begin it with."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    count = 0
    try:
        with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            while block := file.read(_BYTES):
                # Zero bytes are valid UTF-8, and no text has them.
                if b"\0" in block or count == 0 and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise ValueError(f"corpus: expected UTF-8 text in {path}, got UTF-16 or no text")
                piece = decoder.decode(block)
                count += len(piece)
                yield piece
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        count += len(error.object[: error.start].decode("utf-8-sig"))
        reason = f"{error.reason} after {count} characters"
        raise ValueError(f"corpus: expected UTF-8 text in {path}, got {reason}") from error
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"corpus: expected UTF-8 text in {path}, got {error}") from error


def _from_hub(dataset: str, file: str) -> str:
    """One parquet file of a dataset of lines, as the raw text it was made from: its empty rows stand for ' \\n'."""
    import pandas
    from huggingface_hub import hf_hub_download

    online = runtime.hub_answers()
    try:
        path = hf_hub_download(dataset, file, repo_type="dataset", local_files_only=not online)
    except Exception as error:  # the client raises many kinds, from its own and from the network's libraries
        raise ValueError(
            f"corpus: expected {file} in the folder TOKCX_DATA or on the Hugging Face hub in {dataset}; "
            f"neither could be read ({type(error).__name__ if online else 'the hub does not answer'})"
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

    lines = [line for article in scipy_articles() for line in article.paragraphs]
    corpus = _corpus("scipy-docs", "\n".join(lines) + "\n", f"docstrings of scipy {scipy.__version__}")
    expected = SCIPY_DOCS_SHA256.get(scipy.__version__)
    if corpus.sha256 != expected:
        raise ValueError(
            f"corpus: 'scipy-docs' has sha256 {corpus.sha256} with scipy {scipy.__version__}; "
            f"the book's text is that of scipy {', '.join(SCIPY_DOCS_SHA256)}"
        )
    return corpus


def scipy_articles() -> list[Article]:
    """The docstrings of scipy that have prose, one article each, in the order of files and lines.

    A paragraph that stands in several docstrings is kept in the first alone, so that no two articles share one.
    """
    import scipy

    root = Path(scipy.__file__).parent
    seen: set[str] = set()
    found = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if not {"tests", "_lib"} & set(path.relative_to(root).parts):
            for place, docstring in _docstrings(path):
                prose = dict.fromkeys(filter(_is_prose, map(_one_line, re.split(r"\n\s*\n", docstring))))
                if new := [paragraph for paragraph in prose if paragraph not in seen]:
                    seen.update(new)
                    found.append(Article(f"{path.relative_to(root).as_posix()}:{place}", new))
    return found


def wikipedia_articles(corpus: Corpus) -> list[Article]:
    """The articles of a text in which a line ` = Title = ` opens each of them, with their paragraphs.

    Raises
    ------
    ValueError
        If the text has no such line.
    """
    pieces = re.split(r"(?m)^ = (.+) = $", corpus.text)
    if len(pieces) < 3:
        raise ValueError(f"corpus: expected lines ' = Title = ' that open articles, got none in {corpus.name!r}")
    bodies = ([line.strip() for line in body.split("\n") if line.strip()] for body in pieces[2::2])
    return [Article(title, body) for title, body in zip(pieces[1::2], bodies)]


def _docstrings(path: Path) -> list[tuple[str, str]]:
    """Name and docstring of what a file defines, in the order of lines; those of the file itself come first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((n for n in ast.walk(tree) if isinstance(n, kinds)), key=lambda n: getattr(n, "lineno", 0))
    return [(getattr(node, "name", ""), text) for node in nodes if (text := ast.get_docstring(node))]


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


NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "turtledemo"}


def python_stdlib() -> Corpus:
    """The source code of the running Python's standard library: its .py files, in the order of their paths.

    Left out: installed packages, tests, the IDLE editor and the turtle demos, and files that are not UTF-8. The text
    depends on the version of Python, which `source` names, and has no fixed checksum: a record names the checksum of
    the text it was made on.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not NOT_LIBRARY & set(path.relative_to(root).parts)]
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    return _corpus("python-stdlib", "".join(_decoded(files)), f"standard library of Python {platform.python_version()}")


def _decoded(files: list[Path]) -> Iterator[str]:
    for path in files:
        try:
            yield path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue


def book() -> Corpus:
    """The prose of this book: its chapters, then its other pages, in the order of their paths, mathematics as it is.

    Left out: front matter, code, the fences and options of directives, labels and comments. The text changes with the
    book, and has no fixed checksum: a record names the checksum of the text it was made on.

    Raises
    ------
    ValueError
        If this library does not run from a checkout of the project.
    """
    root = Path(__file__).resolve().parents[2]
    chapters = sorted((root / "chapters").glob("*.md"))
    pages = [path for path in (root / "book").rglob("*.md") if not path.relative_to(root).parts[1].startswith("_")]
    if not chapters:
        raise ValueError(f"corpus: 'book' is read from a checkout of the project, and {root} is none")
    files = chapters + sorted(pages, key=lambda path: path.relative_to(root).as_posix())
    return _corpus("book", "".join(_prose(path.read_text(encoding="utf-8")) for path in files), "pages of this book")


_FENCE = re.compile(r"\s*(`{3,}|~{3,}|:{3,})\s*(\{[\w:-]+\})?(.*)")
# What stands in these directives, and in fences that name a language or nothing, is no prose.
_NO_PROSE = {"{code-cell}", "{code-block}", "{figure}", "{image}", "{bibliography}"}


def _prose(page: str) -> str:
    """A page of MyST without front matter, code, fences, options of directives, labels and comments."""
    lines = page.splitlines(keepends=True)
    if lines and lines[0].strip() == "---":
        end = next(i for i, line in enumerate(lines[1:], 1) if line.strip() == "---")
        lines = lines[end + 1 :]
    kept, fences, options = [], [], False  # open fences, the outermost first; whether options may stand here
    for line in lines:
        fence = _FENCE.fullmatch(line.rstrip("\n"))
        if fence and fences and not fence[2] and not fence[3].strip() and fence[1].startswith(fences[-1][0]):
            fences.pop()
        elif fence and not any(code for _, code in fences):
            fences.append((fence[1], fence[2] is None or fence[2] in _NO_PROSE))
            options = True
        elif not any(code for _, code in fences):
            options = options and re.match(r"\s*:[\w-]+:", line) is not None
            if not options and not re.fullmatch(r"\s*(\([\w-]+\)=|%.*)\s*", line):
                kept.append(line)
    return "".join(kept)


MADE_HERE = {"scipy-docs": scipy_docs, "python-stdlib": python_stdlib, "book": book}
