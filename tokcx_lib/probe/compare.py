"""Two probes side by side, from their report.json: the numbers of the first screen, and the heads that changed most."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from tokcx_lib import records
from tokcx_lib.probe.report import REPORT, SCHEMA
from tokcx_lib.probe.summary import PHASES, PLACES
from tokcx_lib.validation import shown

CHANGED = 5  # heads that are named for each quantity
# What the heads are compared in, by the kind of the probe: columns, and how a change is measured.
COLUMNS = {
    "context": {"load": "ratio", "effective": "ratio", "keys_first_latest": "ratio", "share_first": "difference"},
    "pooled": {"load_median": "ratio", "horizon": "ratio", "tokens_10_percent": "ratio"},
}
# What of the question may differ: it is said.
QUESTION = ("model", "model_sha256", "model_dtype", "text", "text_sha256", "tokens", "context", "windows", "queries",
            "error", "layers", "seed")  # fmt: skip


def compare(a: str | Path, b: str | Path) -> pd.DataFrame:
    """Two probes side by side: what each says on its first screen, and how their heads are distributed.

    Parameters
    ----------
    a, b : folders of two probes of one kind, in context or pooled, or their report.json.

    Returns
    -------
    DataFrame
        Indexed by quantity, columns a and b; NaN where one has no such number.

    Raises
    ------
    ValueError
        If there is no report.json, it cannot be read or has another schema, or one probe is pooled and one in context.
    """
    return pd.DataFrame({name: _quantities(each) for name, each in zip("ab", _both(a, b))}, dtype=float)


def differing(a: str | Path, b: str | Path) -> dict[str, tuple]:
    """What of the question is not the same in two probes: its values there. Arguments and errors as for `compare`."""
    one, other = (report["probe"] for report in _both(a, b))
    return {name: (one.get(name), other.get(name)) for name in QUESTION if one.get(name) != other.get(name)}


def changed(a: str | Path, b: str | Path, count: int = CHANGED) -> pd.DataFrame:
    """The heads that changed most from one probe to the other, in each of the COLUMNS of their kind.

    Arguments and errors as for `compare`; `count` heads for each quantity.

    Returns
    -------
    DataFrame
        quantity, layer, head, a, b, largest change first; empty where the probes are not of the same layers and heads.
    """
    one, other = _both(a, b)
    heads = [pd.DataFrame(report["heads"]).set_index(["layer", "head"]) for report in (one, other)]
    found = [pd.DataFrame(columns=["quantity", "layer", "head", "a", "b"])]
    if heads[0].index.equals(heads[1].index):
        for column, kind in COLUMNS[one["summary"]["sample"]].items():
            pair = pd.DataFrame({name: each[column].astype(float) for name, each in zip("ab", heads)})
            change = _change(pair, kind)
            most = change[change > 0].nlargest(count).index
            found.append(pair.loc[most].reset_index().assign(quantity=column)[list(found[0])])
    return pd.concat([each for each in found if len(each)] or found, ignore_index=True)


def _change(pair: pd.DataFrame, kind: str) -> pd.Series:
    """How much each row changed; a number that is missing, or 0 where a ratio is asked for, has not changed."""
    if kind == "difference":
        return (pair["b"] - pair["a"]).abs().fillna(0)
    logs = np.log(pair.where(pair > 0))
    return (logs["b"] - logs["a"]).abs().fillna(0)


def lines(a: str | Path, b: str | Path) -> list[str]:
    """What `tokcx compare` prints; arguments and errors as for `compare`."""
    table, other, heads = compare(a, b), differing(a, b), changed(a, b)
    said = [f"a: {a}", f"b: {b}"]
    said += [f"another {name}: {_short(name, one)} and {_short(name, two)}" for name, (one, two) in other.items()]
    if "error" in other:
        said += ["budgets are for these errors, and not to be compared"]
    said += ["", *table.to_string(float_format=_number, na_rep="–").splitlines(), ""]
    if heads.empty:
        return [*said, "the heads are not the same, or none has changed: distributions only"]
    for quantity, rows in heads.groupby("quantity", sort=False):
        each = [f"{row.layer}.{row.head} from {_number(row.a)} to {_number(row.b)}" for row in rows.itertuples()]
        said.append(f"{quantity}, most changed heads: {'; '.join(each)}")
    return said


def _short(name: str, value) -> str:
    """A value of the question; of a checksum its beginning."""
    if value is None:
        return "none"
    if name.endswith("_sha256"):
        return value[:12]
    return f"{value:,}" if isinstance(value, int) else shown(value).strip("'")


def _number(value: float) -> str:
    """Three digits, or a whole number."""
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 100 else f"{value:.3g}"


# ---- reading ----


def _both(a: str | Path, b: str | Path) -> tuple[dict, dict]:
    one, other = _read("a", a), _read("b", b)
    kinds = [report["summary"]["sample"] for report in (one, other)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"a, b: expected two probes in context or two pooled ones, got {' and '.join(kinds)}")
    return one, other


def _read(name: str, place: str | Path) -> dict:
    """The report.json of a folder, or that file."""
    if not isinstance(place, (str, Path)):
        raise ValueError(f"{name}: expected the folder of a probe, got {shown(place)}")
    file = Path(place) / REPORT if Path(place).is_dir() else Path(place)
    if not file.is_file():
        raise ValueError(f"{name}: expected the folder of a probe, with its {REPORT}, got {place}")
    what = f"{name}: {file}"
    found = records.read_json(what, file, ("schema",), {"schema": (f"{SCHEMA}", lambda value: value == SCHEMA)})
    records.require(
        what,
        found,
        ("probe", "summary", "heads"),
        {
            "probe": ("a mapping", lambda value: isinstance(value, dict)),
            "summary": (
                "that of a probe in context or a pooled one",
                lambda value: isinstance(value, dict) and value.get("sample") in COLUMNS,
            ),
            "heads": ("rows of heads", _are_heads),
        },
    )
    try:
        _quantities(found)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{what}: expected the numbers of schema {SCHEMA}, got none or another for {error}") from error
    return found


def _are_heads(value) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(row, dict) and {"layer", "head"} <= row.keys() for row in value)
    )


def _quantities(report: dict) -> dict[str, float]:
    """The numbers of the first screen, and points of the distributions over heads."""
    summary, heads = report["summary"], pd.DataFrame(report["heads"])
    found = {name: summary[name] for name in ("heads", *PHASES)}
    if summary["sample"] == "context":
        found |= {name: summary[name] for name in ("on_first", "keys", "cache_own", "cache_equal")}
        for policy, budgets in summary["budgets"].items():
            found |= {f"keys_{policy}, {place}": budgets[place]["keys"] for place in PLACES}
    for column in COLUMNS[summary["sample"]]:
        for name, place in (("10%", 0.1), ("median", 0.5), ("90%", 0.9)):
            found[f"{column}, {name}"] = heads[column].astype(float).quantile(place)
    return found
