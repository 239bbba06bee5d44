"""Long runs in units: each is checkpointed as it ends, so that a run can be killed, resumed, extended and shared out.

An experiment cuts its work into units, such as replicates or heads, each of which can be done alone, from its own seed
(`Experiment`, `Plan`, `Part`). `run` does those that are missing and writes the record. Finished units lie in a folder
NAME.parts beside it, one file each, written whole or not at all and carrying its own checksum; a run that was killed
loses the unit in flight and nothing else, and the table of a resumed run is that of an uninterrupted one, byte for
byte.
Under ``torchrun`` the units are dealt out to the ranks, and the first one assembles the record.
`verify` runs a few units again and compares them to a record.
"""

from __future__ import annotations

import json
import reprlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from tokcx_lib import checkpoints, records, runtime
from tokcx_lib.sampling import distributed
from tokcx_lib.validation import as_count

BUDGET = 60.0  # seconds that `verify` spends on units, more or less
MOST_UNITS = 5  # units that `verify` runs again at most

# What run.json beside the checkpoints has to say, in the manner of `records.SCHEMA`.
SESSION = {"commit": str, "device": str, "versions": dict, "ranks": int}
STATE = {
    "config": records.SCHEMA["config"],
    "sessions": (
        "a list of what ran",
        lambda value: isinstance(value, list) and value and all(map(_is_session, value)),
    ),
    "finished": ("true or false", lambda value: isinstance(value, bool)),
}


def _is_session(value) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in SESSION.items())


class Part(NamedTuple):
    """What one unit found.

    `table` holds its rows, with the columns that name the unit; `arrays` what `Plan.finish` needs of it besides. They
    are kept with the checkpoint, and do not go into the record.
    """

    table: pd.DataFrame
    arrays: dict[str, np.ndarray] = {}


class Plan(NamedTuple):
    """A run that is ready to go: what its units share (limits, a model, a pool of tokens) has been made.

    `units` names them, in the order of the table; `work(*unit)` does one; `meta` is what else to say in the record.
    `finish`, where there is one, turns the rows of all units and their arrays, in order, into the table of the record;
    `summary` turns the arrays into more of its meta data.
    """

    units: list[tuple[int, ...]]
    work: Callable[..., Part]
    meta: dict = {}
    finish: Callable[[pd.DataFrame, list[dict[str, np.ndarray]]], pd.DataFrame] | None = None
    summary: Callable[[list[dict[str, np.ndarray]]], dict] | None = None


class Experiment(NamedTuple):
    """A named run: `plan(config, device)` opens it, and the columns `keys` name its units.

    `full` is its configuration at paper scale, JSON-able; `quick` what the quick profile changes in it. `tolerance` is
    the difference, relative to the largest number of a column, that a unit may show when it is run again on another
    machine.
    """

    plan: Callable[[dict, torch.device], Plan]
    keys: tuple[str, ...]
    full: dict
    quick: dict
    tolerance: float = 1e-4

    def config(self, profile: str = "full", replicates: int | None = None) -> dict:
        """The configuration of a profile, with another number of replicates if one is given.

        Raises
        ------
        ValueError
            If the profile is unknown, or the experiment's units are not replicates.
        """
        if profile not in runtime.PROFILES:
            raise ValueError(f"profile: expected one of {', '.join(runtime.PROFILES)}, got {profile!r}")
        config = {**self.full, **(self.quick if profile == "quick" else {})}
        if replicates is not None:
            if "replicates" not in config:
                raise ValueError(f"replicates: this experiment has no number of replicates to set, got {replicates}")
            config["replicates"] = as_count("replicates", replicates)
        return json.loads(json.dumps(config))


def run(
    name: str,
    experiment: Experiment,
    profile: str = "full",
    device=None,
    replicates: int | None = None,
    resume: bool = False,
    path=None,
) -> Path | None:
    """Run an experiment, unit by unit, and write its record.

    Parameters
    ----------
    name : of the record; profile : ``quick`` or ``full``; replicates : a number other than the profile's.
    resume : go on from the units that an earlier run of the same configuration left. More replicates than it had may be
        asked for. Without `resume`, units of an unfinished run are an error, and those of a finished one are replaced.
    path : folder of the record, default that of the book.

    Returns
    -------
    Path of the table; None on ranks other than the first

    Raises
    ------
    ValueError
        If the configuration is not that of the run to resume, a checkpoint was damaged, there are units of an
        unfinished run and `resume` is false, or another run of this record is under way in the same folder.
    OSError
        If a file cannot be written. What was finished before is kept.
    """
    place = distributed.own_device(device)
    config = experiment.config(profile, replicates)
    folder = Path(records.folder(path)) / f"{name}.parts"
    # The ranks of one run share the folder; nobody else does.
    with records.locked(folder) if distributed.rank() == 0 else nullcontext():
        return _run(name, experiment, place, config, resume, folder, path)


def _run(
    name: str, experiment: Experiment, place: torch.device, config: dict, resume: bool, folder: Path, path
) -> Path | None:
    made = {**records.provenance(place), "ranks": distributed.world()}
    if distributed.rank() == 0:
        _open(name, folder, config, made, resume)
    distributed.barrier()

    plan = experiment.plan(config, place)
    missing = [unit for unit in plan.units if not _file(folder, unit).is_file()]
    # Every rank lists what is missing before any of them adds to it.
    distributed.barrier()
    for unit in tqdm(
        distributed.shard(missing), unit="unit", desc=name, disable=None if distributed.rank() == 0 else True
    ):
        start = time.perf_counter()
        part = plan.work(*unit)
        _write_part(folder, unit, experiment.keys, part, time.perf_counter() - start)
    distributed.barrier()
    return _assemble(name, folder, plan, config, path) if distributed.rank() == 0 else None


def _open(name: str, folder: Path, config: dict, made: dict, resume: bool) -> None:
    """Make the folder of checkpoints, or check that the one there belongs to this run."""
    state = folder / "run.json"
    if state.is_file():
        there = _read_state(state)
        if not resume and not there["finished"]:
            done = len(list(folder.glob("*.csv")))
            raise ValueError(f"run: {folder} has {done} units of an unfinished run; resume it (--resume), or delete it")
        if resume:
            settings = (config.keys() | there["config"].keys()) - {
                "replicates"
            }  # of these there may be more than before
            different = sorted(key for key in settings if config.get(key) != there["config"].get(key))
            if different:
                raise ValueError(
                    f"resume: {folder} was made with another {', '.join(different)}; delete it to start anew"
                )
            before = there["sessions"]
            sessions = before if _same_code(before[-1], made) else [*before, made]
            _write_state(state, config, sessions, finished=False)
            return
    # Units without a description are left over from a deletion that was cut short.
    for old in folder.iterdir():
        if old.name != ".lock":
            old.unlink()
    _write_state(state, config, [made], finished=False)


def _same_code(one: dict, other: dict) -> bool:
    return all(one[key] == other[key] for key in ("commit", "device", "versions", "ranks"))


def _write_state(state: Path, config: dict, sessions: list[dict], finished: bool) -> None:
    described = {"config": config, "sessions": sessions, "finished": finished}
    records.write_whole(state, (json.dumps(described, indent=2, allow_nan=False) + "\n").encode())


def _read_state(state: Path) -> dict:
    return records.read_json(
        f"run: {state} was damaged; delete its folder to start anew. It", state, tuple(STATE), STATE
    )


def _file(folder: Path, unit: tuple[int, ...]) -> Path:
    return folder / ("-".join(map(str, unit)) + ".csv")


def _write_part(folder: Path, unit: tuple[int, ...], keys: tuple[str, ...], part: Part, seconds: float) -> None:
    """The arrays first: the table says that the unit is finished, and holds the checksum of both."""
    for key, value in zip(keys, unit, strict=True):
        if not (part.table[key] == value).all():
            raise ValueError(f"unit {unit}: expected {key} = {value} in all its rows, got {part.table[key].unique()}")
    target, packed = _file(folder, unit), b""
    if part.arrays:
        packed = checkpoints.pack(part.arrays)
        records.write_whole(target.with_suffix(".npz"), packed)
    rows = part.table.to_csv(index=False, lineterminator="\n").encode()  # all digits: rounding comes with the record
    checkpoints.write(target, rows, packed, note=f"{seconds:.3f} s")


def _read_part(name: str, folder: Path, unit: tuple[int, ...]) -> tuple[Part, float]:
    target = _file(folder, unit)
    arrays = target.with_suffix(".npz")
    packed = arrays.read_bytes() if arrays.is_file() else b""
    try:
        rows, took = checkpoints.read(target, packed)
        seconds = float(took.removesuffix(" s"))
    except ValueError as error:
        message = f"record {name!r}: its checkpoint {target} was damaged or edited; delete it and resume"
        raise ValueError(message) from error
    return Part(pd.read_csv(BytesIO(rows)), checkpoints.unpack(packed) if packed else {}), seconds


def _assemble(name: str, folder: Path, plan: Plan, config: dict, path) -> Path:
    parts, seconds = zip(*(_read_part(name, folder, unit) for unit in plan.units))
    table = pd.concat([part.table for part in parts], ignore_index=True)
    arrays = [part.arrays for part in parts]
    table = table if plan.finish is None else plan.finish(table, arrays)
    summary = {} if plan.summary is None else plan.summary(arrays)
    sessions = _read_state(folder / "run.json")["sessions"]
    meta = {
        **sessions[0],
        **plan.meta,
        **summary,
        "config": config,
        "units": len(plan.units),
        "unit_seconds": round(float(np.median(seconds)), 3),
        "wall_seconds": round(sum(seconds) / sessions[0]["ranks"], 1),
    }
    if "replicates" in config:
        meta.setdefault("replicates", config["replicates"])
    if len(sessions) > 1:  # resumed with other code, or elsewhere
        meta["sessions"] = sessions
    saved = records.save(name, table, meta, path)
    _write_state(folder / "run.json", config, sessions, finished=True)
    return saved


class Verified(NamedTuple):
    """What `verify` did: the record's `meta`, the `units` run again, and the largest relative `difference` seen."""

    meta: dict
    units: list[tuple[int, ...]]
    difference: float


def verify(name: str, experiment: Experiment | None, device=None, path=None, budget: float = BUDGET) -> Verified:
    """Check a record: its checksum and schema, and some of its units, run again.

    As many units are run again as fit into `budget` seconds, at least one and at most five, spread over the run: by the
    record's own account, and, once one has run, by the time that they take here; opening the experiment counts. Every
    number must agree to the experiment's tolerance, relative to the largest of its column.
    Draws come from the same seeds on every device, so this compares numbers, not statistics.

    Parameters
    ----------
    experiment : what made the record; None if its units cannot be run again (then only its checksum is checked).

    Raises
    ------
    ValueError
        Which names the record, and says what is wrong with it: checksum, schema, a text that is not the one it was made
        on, or the rows that differ and by how much.
    """
    start = time.perf_counter()
    table, meta = records.load(name, path)
    if experiment is None:
        return Verified(meta, [], 0.0)
    plan = experiment.plan(_config_of(name, experiment, table, meta), runtime.device(device))
    _require_texts(name, meta.get("texts", {}), plan.meta.get("texts", {}))
    afford = min(MOST_UNITS, int(budget // max(meta.get("unit_seconds", budget), 1e-3)))
    chosen = sorted(set(np.linspace(0, len(plan.units) - 1, max(afford, 1) + 2)[1:-1].round().astype(int)))
    units, worst, longest = [], 0.0, 0.0
    for unit in (plan.units[i] for i in chosen):
        now = time.perf_counter()
        if units and now - start + longest > budget:
            break
        units.append(unit)
        found = plan.work(*unit).table.reset_index(drop=True)
        rows = (table[list(experiment.keys)].to_numpy() == np.array(unit)).all(axis=1)
        stored = table[rows].reset_index(drop=True)
        missing = [column for column in found if column not in stored]
        if missing or len(found) != len(stored):
            raise ValueError(f"record {name!r}: unit {unit} has {len(stored)} rows of {list(stored)}, not {len(found)}")
        for column in found:
            worst = max(worst, _difference(name, unit, column, stored[column], found[column], experiment.tolerance))
        longest = max(longest, time.perf_counter() - now)
    return Verified(meta, units, worst)


def _config_of(name: str, experiment: Experiment, table: pd.DataFrame, meta: dict) -> dict:
    """The configuration of a record; ValueError unless it is one of the experiment's, and the table has its columns."""
    profiles = [experiment.config(profile) for profile in runtime.PROFILES]
    config = {**experiment.full, **meta.get("config", {})}
    for key, value in config.items():
        if key == "replicates" and key in experiment.full:  # may be any number; each has a row or more
            fits, expected = isinstance(value, int) and 1 <= value <= len(table), f"a count up to its {len(table)} rows"
        else:
            accepted = [profile[key] for profile in profiles if key in profile]
            fits, expected = (
                value in accepted,
                " or ".join(dict.fromkeys(map(reprlib.repr, accepted))) or "no such setting",
            )
            # JSON sorts the names in a setting; the order of a unit's rows is that of the experiment's own.
            config[key] = accepted[accepted.index(value)] if fits else value
        if not fits:
            raise ValueError(f"record {name!r}: config: {key}: expected {expected}, got {reprlib.repr(value)}")
    if missing := [key for key in experiment.keys if key not in table]:
        raise ValueError(
            f"record {name!r}: its table lacks {', '.join(missing)}, which name the units of this experiment"
        )
    return config


def _require_texts(name: str, made_on: dict[str, str], here: dict[str, str]) -> None:
    """Raise ValueError unless the texts of a record, name -> sha256, are those that its units would read now."""
    for text in sorted(made_on.keys() | here.keys()):
        if made_on.get(text) != here.get(text):
            was, now = (f"sha256 {texts[text]}" if text in texts else "no such text" for texts in (made_on, here))
            raise ValueError(f"record {name!r}: made on text {text!r} with {was}, here it has {now}")


def _difference(name: str, unit, column: str, stored: pd.Series, found: pd.Series, tolerance: float) -> float:
    """Largest difference of two columns relative to the largest number in them."""
    if not pd.api.types.is_numeric_dtype(found):
        if list(stored) != list(found):
            raise ValueError(f"record {name!r}: unit {unit}, {column}: expected {list(found)}, got {list(stored)}")
        return 0.0
    if not pd.api.types.is_numeric_dtype(stored):
        raise ValueError(f"record {name!r}: unit {unit}, {column}: expected numbers, got {list(stored)[:3]} …")
    a, b = stored.to_numpy(float), found.to_numpy(float)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    gap = np.where(same, 0.0, np.abs(a - b))
    size = np.nanmax(np.abs(np.concatenate([a, b])), initial=0.0)
    # Six significant digits are stored.
    relative = float(np.max(gap) / size) if size > 0 else 0.0
    if not relative <= tolerance + 5e-6:
        row = int(np.argmax(gap))
        raise ValueError(
            f"record {name!r}: unit {unit}, {column}, row {row}: stored {a[row]:.6g}, run again {b[row]:.6g}, "
            f"more than {tolerance:g} of the largest apart"
        )
    return relative
