"""Checkpoints: states of long work, written whole with a checksum, so that a killed process goes on from there.

The last line of a state holds the checksum of it and of what it belongs to: the plan of its work, or a file beside it.
It is trusted only if both are still the same; numbers go through unchanged, so the work ends as if it had never been
interrupted. What else becomes of a state that is not trusted is for its owner to say: `studies.runs` refuses a unit
that was finished, `probe.resuming` starts anew.
"""

from __future__ import annotations

import hashlib
import re
from io import BytesIO
from pathlib import Path

import numpy as np

from tokcx_lib import records


def write(path: Path, content: bytes, belongs: bytes, note: str) -> None:
    """Write a state whole or not at all, and ``# checksum note`` as its last line; the note is not in the checksum.

    Raises
    ------
    OSError
        If it cannot be written. What was there is kept.
    """
    records.write_whole(path, content + f"# {_checksum(content, belongs)} {note}\n".encode())


def read(path: Path, belongs: bytes) -> tuple[bytes, str]:
    """The content and the note of a state.

    Raises
    ------
    ValueError
        If the checksum is not that of its content and of what it should belong to.
    OSError
        If it cannot be read.
    """
    content, _, last = path.read_bytes().rpartition(b"# ")
    found = re.fullmatch(rb"([0-9a-f]{64}) ([ -~]*)\n", last)
    if not found or found[1].decode() != _checksum(content, belongs):
        raise ValueError(f"{path} was damaged or edited")
    return content, found[2].decode()


def _checksum(content: bytes, belongs: bytes) -> str:
    found = hashlib.sha256(content)
    found.update(belongs)
    return found.hexdigest()


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """Named arrays as the bytes of an .npz file."""
    buffer = BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def unpack(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of `pack`, each bit as it was; nothing in them is executed."""
    with np.load(BytesIO(content), allow_pickle=False) as stored:
        return dict(stored)
