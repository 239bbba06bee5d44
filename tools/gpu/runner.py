"""Work through parts within a number of minutes, and keep what is finished, whatever happens to the rest.

A part is a command of its own: what crashes, is killed, runs out of memory or out of time takes nothing else with it.
Each has a folder, with its output in `log`. After each the summary is written, and all results are packed into a few
archives of a size that may be fetched.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ARCHIVES, ARCHIVE_BYTES = 7, 15 * 2**20  # at most so many files of such a size come back, and the summary
LARGE_CHECKPOINT = 200_000  # bytes; larger ones stay behind, and their unit is lost with the machine
GRACE = 5.0  # seconds between asking a part to end and ending it
RESERVE = 8.0  # seconds kept for packing
LEAST = 5.0  # seconds that a part is started with
LACKS = 75  # exit status of a part that needs what this machine does not have
MEMORY = re.compile(r"out of memory|OutOfMemoryError|MemoryError|can't allocate memory|std::bad_alloc", re.IGNORECASE)


@dataclass
class Part:
    """A part: its `name`, its `command`, and the `seconds` that it may take."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Ended:
    """How a part ended: `state` is ok, lacks, failed, killed, out of memory, out of time or not started."""

    name: str
    state: str
    seconds: float
    note: str = ""


def run_parts(parts: list[Part], out: Path, minutes: float, say=print) -> list[Ended]:
    """Run parts one after the other, each in its folder under `out`, all within so many minutes; how each ended.

    A part that would have less than LEAST seconds is not started. Results so far are packed after every part.
    """
    began, ended = time.monotonic(), []
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        left = 60 * minutes - (time.monotonic() - began) - RESERVE
        if left < LEAST:
            ended.append(Ended(part.name, "not started", 0.0, "no time left"))
        else:
            say(f"{part.name} … (at most {min(part.seconds, left):.0f} s)")
            ended.append(_run(part, out / part.name, min(part.seconds, left)))
        spent = time.monotonic() - began
        last = ended[-1]
        note = f" ({last.note})" if last.note else ""
        say(f"{last.name}: {last.state}, {last.seconds:.0f} s; {spent / 60:.1f} of {minutes:g} min{note}")
        _summarise(ended, out, spent)
        pack_results(out)
    return ended


def _run(part: Part, folder: Path, seconds: float) -> Ended:
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (folder / "log").open("wb") as log:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1", **part.environment}
        try:
            process = subprocess.Popen(
                part.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
        except OSError as error:
            return Ended(part.name, "failed", 0.0, str(error))
        late = False
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            late, code = True, None
        finally:
            _end(process)
    took = time.monotonic() - start
    text = (folder / "log").read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    if late:
        return Ended(part.name, "out of time", took, lines[-1][:200])
    if code in (0, LACKS):
        return Ended(part.name, "lacks" if code else "ok", took, lines[-1][:200])
    if MEMORY.search(text):
        return Ended(part.name, "out of memory", took, next(x for x in reversed(lines) if MEMORY.search(x))[:200])
    if code < 0:
        name = signal.Signals(-code).name
        return Ended(part.name, "killed", took, f"by {name}")  # the system's own end of memory is SIGKILL as well
    return Ended(part.name, "failed", took, lines[-1][:200])


def _end(process: subprocess.Popen) -> None:
    """End a part and all that it has started, first by asking; nothing if it has ended."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 60.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def _summarise(ended: list[Ended], out: Path, spent: float) -> None:
    summary = {"parts": [asdict(each) for each in ended], "seconds": round(spent, 1), "python": sys.version.split()[0]}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def pack_results(out: Path) -> list[Path]:
    """All results under `out` in archives results-1.tar.gz, …; large checkpoints, and what would be too much, left out.

    Files go whole into the first archive that has room, those of earlier parts first. Written anew each time, beside
    the old ones, which are there until then.
    """
    files = [path for folder in sorted(out.glob("*/"), key=_started) for path in sorted(folder.rglob("*"))]
    files = [path for path in files if path.is_file()]
    kept = [path for path in files if ".parts" not in str(path) or path.stat().st_size <= LARGE_CHECKPOINT]
    archives: list[io.BytesIO] = []
    left_out = [str(path.relative_to(out)) for path in files if path not in kept]
    for path in kept:
        packed = _packed(path, path.relative_to(out))
        room = next((each for each in archives if each.tell() + len(packed) <= ARCHIVE_BYTES), None)
        if room is None and len(packed) <= ARCHIVE_BYTES and len(archives) < ARCHIVES:
            archives.append(room := io.BytesIO())
        if room is None:
            left_out.append(str(path.relative_to(out)))
        else:
            room.write(packed)
    written = []
    for number, content in enumerate(archives, start=1):
        target = out / f"results-{number}.tar.gz"
        draft = target.with_suffix(".tmp")
        draft.write_bytes(content.getvalue())
        os.replace(draft, target)
        written.append(target)
    (out / "left-out.txt").write_text("".join(f"{name}\n" for name in left_out))
    return written


def _started(folder: Path) -> float:
    log = folder / "log"
    return log.stat().st_mtime if log.is_file() else 0.0


def _packed(path: Path, name: Path) -> bytes:
    """One file as a whole archive, compressed: archives of one file each, one after the other, are an archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=4) as archive:
        archive.add(path, arcname=str(name))
    return buffer.getvalue()


def unpack_results(archives: list[Path], into: Path) -> None:
    """Read what `pack_results` wrote."""
    for path in archives:
        with tarfile.open(path, "r:gz", ignore_zeros=True) as archive:
            archive.extractall(into, filter="data")
