"""Records: results of long runs, kept as a tidy table with its provenance and a checksum.

A record NAME is two files: NAME.csv (or NAME.csv.gz), one row per configuration, replicate and length, with six
significant digits; and NAME.json, which says what produced it. The JSON holds the checksum of the table, so a table
edited by hand is refused. They live in ``book/records`` of the project, or in the folder ``TOKCX_RECORDS``.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import platform
import re
import reprlib
import subprocess
import textwrap
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy
import pandas
import torch

import tokcx_lib

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart there
    fcntl = None

MOST_BYTES = 1_500_000  # larger tables are compressed
FORMAT = 1
NAME = r"[A-Za-z0-9_-]{1,200}"
REQUIRED = ("format", "name", "columns", "rows", "sha256", "created", "versions", "commit", "device")


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_time(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e15


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_texts(value) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


# What the values of a JSON file have to be, where it has the key: in words, and as a check. A record may say more.
SCHEMA = {
    "columns": ("a list of names", lambda value: isinstance(value, list) and all(map(_is_text, value))),
    "rows": ("a count", _is_count),
    "sha256": ("64 hexadecimal digits", lambda value: _is_text(value) and re.fullmatch("[0-9a-f]{64}", value)),
    "created": ("a text", _is_text),
    "versions": ("a mapping of texts", _is_texts),
    "commit": ("a text", _is_text),
    "device": ("a text", _is_text),
    "config": ("a mapping", lambda value: isinstance(value, dict)),
    "texts": ("a mapping of texts", _is_texts),
    "replicates": ("a count or a text", lambda value: _is_count(value) or _is_text(value)),
    "units": ("a count", _is_count),
    "unit_seconds": ("a number of seconds", _is_time),
    "wall_seconds": ("a number of seconds", _is_time),
}


class Record(NamedTuple):
    """A `table` (DataFrame) and its `meta` (what produced it)."""

    table: pandas.DataFrame
    meta: dict

    def __str__(self) -> str:
        """What ran and when; on a new line, on which device, for how long, from which commit. Lines fit a page."""
        meta = self.meta
        what = [f"record {meta['name']}"] + [f"{meta[key]} {key}" for key in ("replicates",) if key in meta]
        how = [f"device: {meta['device']}"]
        if "wall_seconds" in meta:
            how.append(f"{meta['wall_seconds'] / 60:.0f} min")
        lines = ", ".join([*what, meta["created"][:10]]), ", ".join([*how, f"commit {meta['commit'][:10]}"])
        return "\n".join(textwrap.fill(line, 80, subsequent_indent="  ") for line in lines)


def folder(path=None) -> Path:
    """The folder of records: `path`, else ``TOKCX_RECORDS``, else ``book/records`` beside the package."""
    chosen = path or os.environ.get("TOKCX_RECORDS")
    return Path(chosen) if chosen else Path(__file__).resolve().parents[1] / "book" / "records"


def provenance(device: str | torch.device = "cpu") -> dict:
    """Device, versions, commit and time: what every record says about the run that made it."""
    chosen = torch.device(device)
    if chosen.type == "cuda":
        described = torch.cuda.get_device_name(chosen)
    else:
        described = f"{chosen.type} ({torch.get_num_threads()} threads, {platform.machine()})"
    return {
        "device": described,
        "versions": {
            "python": platform.python_version(),
            "tokcx": tokcx_lib.__version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "commit": _commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """The commit of the checkout this library runs from, with '+' if its code was changed since; else 'unknown'."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "tokcx_lib")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def save(name: str, table: pandas.DataFrame, meta: dict, path=None) -> Path:
    """Write a record; returns the path of its table.

    Parameters
    ----------
    name : letters, digits, - and _.
    table : tidy, with unique column names; floats are rounded to six significant digits.
    meta : JSON-able; `provenance` is added where it lacks a key.
    path : the folder, default `folder()`.

    Raises
    ------
    ValueError
        If the name, the table or the meta data cannot be stored.
    """
    if not re.fullmatch(NAME, name):
        raise ValueError(f"name: expected letters, digits, - and _, at most 200, got {name!r}")
    if len(table) == 0 or not table.columns.is_unique:
        raise ValueError(f"table: expected rows and unique columns, got {len(table)} rows, {list(table.columns)}")
    content = table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()
    suffix = ".csv"
    if len(content) > MOST_BYTES:
        content, suffix = gzip.compress(content, mtime=0), ".csv.gz"
    described = {
        **provenance(),
        **meta,
        "format": FORMAT,
        "name": name,
        "columns": list(map(str, table.columns)),
        "rows": len(table),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    require("meta", described, REQUIRED, SCHEMA)
    try:
        text = json.dumps(described, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta: expected values that JSON can hold, got {error}") from error
    target = folder(path)
    target.mkdir(parents=True, exist_ok=True)
    write_whole(target / (name + suffix), content, target / (name + ".json"), text.encode())
    for other in {".csv", ".csv.gz"} - {suffix}:
        (target / (name + other)).unlink(missing_ok=True)
    return target / (name + suffix)


def write_whole(*paths_and_contents: Path | bytes) -> None:
    """Write files, path and content by turns, whole or not at all: a reader never sees half of one.

    All are on the disk before the first gets its name, so that a full disk leaves what was there as it was.

    Raises
    ------
    OSError
        If one of them cannot be written; no temporary file is left.
    """
    paths, contents = paths_and_contents[::2], paths_and_contents[1::2]
    temporaries = [path.with_name(path.name + ".tmp") for path in paths]
    try:
        for temporary, content in zip(temporaries, contents, strict=True):
            temporary.unlink(missing_ok=True)  # left by a process that was killed, or a link to somewhere else
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in zip(temporaries, paths):
            os.replace(temporary, path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder, made if need be, to one process: what writes into it over some time holds this meanwhile.

    The lock is the system's (flock), on a file ``.lock`` in the folder. It goes with the process, however that ends:
    a file that a killed one left behind locks nothing. Under ``torchrun`` one rank takes it for all. On a file system
    without such locks nothing is kept.

    Raises
    ------
    ValueError
        If another process has it; the message names the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while fcntl:
        file = (folder / ".lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(
                f"out: {folder} is in use by another process; wait for it, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                file.close()
                raise
        if _is_at(file.fileno(), folder / ".lock"):
            break
        file.close()  # its last holder took the file away just after we opened it
    try:
        yield
    finally:
        if fcntl:
            (folder / ".lock").unlink(missing_ok=True)  # before the lock goes: else another's file might go
            file.close()


def _is_at(descriptor: int, path: Path) -> bool:
    """Is the open file the one that lies at the path now?"""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def load(name: str, path=None) -> Record:
    """Read a record, after verifying it.

    Raises
    ------
    ValueError
        If there is no such record, or its table is not the one its JSON describes.
    """
    content, meta = _verified(name, path)
    return Record(pandas.read_csv(BytesIO(content)), meta)


def verify(name: str, path=None) -> dict:
    """Check a record's checksum and schema; returns its meta data.

    Raises
    ------
    ValueError
        Which names the record and says what is wrong with it.
    """
    return _verified(name, path)[1]


def _verified(name: str, path) -> tuple[bytes, dict]:
    target = folder(path)
    described = target / f"{name}.json"
    if not re.fullmatch(NAME, name) or not described.is_file():
        there = sorted(p.stem for p in target.glob("*.json")) or ["none"]
        raise ValueError(f"record: expected one of {', '.join(there)} in {target}, got {name!r}")
    meta = read_json(f"record {name!r}: its JSON", described, REQUIRED, SCHEMA)
    if meta["format"] != FORMAT or meta["name"] != name:
        raise ValueError(f"record {name!r}: its JSON is of format {meta['format']!r} and named {meta['name']!r}")
    tables = [p for suffix in (".csv", ".csv.gz") if (p := target / (name + suffix)).is_file()]
    if len(tables) != 1:
        raise ValueError(f"record {name!r}: expected one table, {name}.csv or {name}.csv.gz, found {len(tables)}")
    stored = tables[0].read_bytes()
    found = hashlib.sha256(stored).hexdigest()
    if found != meta["sha256"]:
        raise ValueError(f"record {name!r}: {tables[0].name} has sha256 {found}, its JSON says {meta['sha256']}")
    try:
        content = gzip.decompress(stored) if tables[0].suffix == ".gz" else stored
        table = pandas.read_csv(BytesIO(content))
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"record {name!r}: expected a table in {tables[0].name}, got what cannot be read ({error})"
        ) from error
    if list(table.columns) != meta["columns"] or len(table) != meta["rows"]:
        raise ValueError(f"record {name!r}: expected {meta['rows']} rows of {meta['columns']}, got {table.shape}")
    return content, meta


def read_json(what: str, path: Path, required: tuple[str, ...], schema: dict) -> dict:
    """Read a JSON file that must hold a mapping with the `required` keys, its values as the `schema` says.

    Raises
    ------
    ValueError
        Which begins with `what`, and names the key that is missing or wrong.
    """

    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON")

    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what}: expected a mapping, got {reprlib.repr(found)}")
    require(what, found, required, schema)
    return found


def require(what: str, found: dict, required: tuple[str, ...], schema: dict) -> None:
    """Raise ValueError unless a mapping has the `required` keys, and values as the `schema` says; it names the key."""
    if missing := [key for key in required if key not in found]:
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    for key, (expected, fits) in schema.items():
        if key in found and not fits(found[key]):
            raise ValueError(f"{what}: {key}: expected {expected}, got {reprlib.repr(found[key])}")
