"""The report of a probe: the table, a page that stands alone, its figures, and report.json for other programs.

A table with a column `keys` is that of a probe in context (`probe.context`), any other that of a pooled one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import pandas as pd

from tokcx_lib import records
from tokcx_lib.probe import context_page, pages, pooled_page, summary
from tokcx_lib.probe.plan import differing, read_plan

MADE = "probe.json"  # what made the other files
REPORT = "report.json"
SCHEMA = 1  # of report.json; another where a key goes, or means something else
_ELSEWHERE = "choose another folder, or give --force to replace it"


def write(table: pd.DataFrame, meta: dict, folder: Path) -> list[Path]:
    """Write heads.csv, report.html, figures as PNG, report.json, and probe.json, which says what made them.

    Parameters
    ----------
    table : from `context.probe_in_context`, or `pooled.pooled_probe`.
    meta : what was probed: model, text, context, queries, seed, and tokens (pooled) or windows and error (in context);
        the checksums model_sha256, text_sha256 and tokens_sha256 (of the token ids), each where it is known; the
        device, versions and created of `records.provenance`; and of a probe in context what it took, where that is
        known: seconds, seconds_model, seconds_statistics, peak_memory_gb. All of it goes into probe.json; where it has
        the plan, `require_unused` knows this probe again.

    Returns
    -------
    list of Path, the files

    Raises
    ------
    ValueError
        If the table has not the columns of its kind, or is not that of a probe of so many tokens.
    OSError
        If a file cannot be written; none is then left in half.
    """
    summary.require_heads(table, meta)
    kind = _page_of(table)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "heads.csv": table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode(),
        "report.html": kind.page(table, meta).encode(),
        # On their own they are opened on any ground: white belongs to them.
        **{
            f"{name}.png": pages.drawn(picture, table, meta, ground="white")
            for name, picture in kind.figures(table).items()
        },
        REPORT: _json(content(table, meta), indent=1),
        MADE: _json(meta, indent=2),
    }
    paths = [folder / name for name in files]
    records.write_whole(*(item for path, content in zip(paths, files.values()) for item in (path, content)))
    return paths


def _page_of(table: pd.DataFrame) -> ModuleType:
    return context_page if summary.in_context(table) else pooled_page


def content(table: pd.DataFrame, meta: dict) -> dict:
    """What report.json holds: schema, probe (the meta), summary (the first screen's numbers), heads (one each).

    In context also key_heads, one each.
    """
    found = {"schema": SCHEMA, "probe": meta, "summary": summary.summary(table, meta)}
    if summary.in_context(table):
        found["key_heads"] = _rows(summary.key_heads(table))
    return found | {"heads": _rows(table)}


def _rows(table: pd.DataFrame) -> list[dict]:
    return [{name: _rounded(value) for name, value in row.items()} for row in table.to_dict("records")]


def _rounded(value):
    """Six digits of a number, as heads.csv has them."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _json(value, indent: int) -> bytes:
    return (json.dumps(_plain(value), indent=indent, allow_nan=False) + "\n").encode()


def _plain(value):
    """A value of JSON, with null for what is no finite number."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if hasattr(value, "item"):  # a number of numpy
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sentences(table: pd.DataFrame, meta: dict) -> list[str]:
    """The first screen of the page as lines of plain text, for a terminal; arguments as for `write`."""
    summary.require_heads(table, meta)
    return summary.sentences(summary.summary(table, meta), meta, summary.policy_names(table))


def require_unused(folder: Path, plan: dict) -> None:
    """Raise ValueError if a folder holds another probe than that of a plan, finished or not: its files would be lost.

    The same probe is welcome: it goes on from its checkpoint, or writes the same numbers again.
    """
    wrote = [name for name in (MADE, "heads.csv", "report.html") if (folder / name).exists()]
    finished, unfinished = read_plan(folder / MADE), read_plan(folder / ".probe" / "plan.json")
    if wrote and finished is None:
        raise ValueError(f"out: {folder} has a {wrote[-1]}, and nothing says of which probe; {_ELSEWHERE}")
    for made, kind in ((finished, "a"), (unfinished, "an unfinished")):
        if made is not None and (others := differing(made, plan)):
            what = f"{made.get('model')} on {made.get('text', 'a text')}, {_size(made)}"
            raise ValueError(f"out: {folder} holds {kind} probe of another {', '.join(others)} ({what}); {_ELSEWHERE}")


def _size(made: dict) -> str:
    """How much of a text a probe read, as its plan has it."""
    if "tokens" in made:
        return f"{made['tokens']} tokens"
    return f"{made.get('windows')} windows of {made.get('context')} tokens"
