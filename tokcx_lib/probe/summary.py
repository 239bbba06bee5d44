"""The first screen of a probe's report: its numbers, and the sentences that say them in plain text."""

from __future__ import annotations

import math

import pandas as pd

from tokcx_lib.probe.policies import POLICIES

PHASES = ("averaging", "extremal", "frozen")
PLACES = {"half": (1, 2), "nine_tenths": (9, 10), "every": (1, 1)}  # shares of the heads that a budget suffices for
PLACE_NAMES = {"half": "half of the heads", "nine_tenths": "9 of 10", "every": "every head"}


def in_context(table: pd.DataFrame) -> bool:
    """Whether a table is that of a probe in context; of a pooled one otherwise."""
    return "keys" in table


def require_heads(table: pd.DataFrame, meta: dict) -> None:
    """Raise ValueError unless a table has heads, and the columns that a report of its kind speaks of."""
    wanted = ["layer", "head", "phase"]
    if in_context(table):
        wanted += ["group", "load", "load_05", "load_95", "reduced", "effective"]
        wanted += [f"share_{where}" for where in ("first", "near", "own")] + [f"keys_{policy}" for policy in POLICIES]
    else:
        wanted += [f"effective_{meta['tokens']}"]
    missing = [name for name in wanted if name not in table]
    if len(table) == 0 or missing:
        named = missing or wanted
        lacking = f"column{'s' if len(named) > 1 else ''} {', '.join(named)}"
        raise ValueError(f"table: expected heads with {lacking}, got {len(table)} rows of {list(table)}")


def looks_back(table: pd.DataFrame) -> bool:
    """Whether every query of a probe in context sees earlier keys alone: loads are then noted at shorter pasts too."""
    if "load_64" not in table:
        return False
    return bool((table["load_64"].notna() | (table["keys"] < 64)).all())  # a small window has no 64 keys


def policy_names(table: pd.DataFrame) -> dict[str, str]:
    """The orders in which keys are read, in words."""
    near = "latest" if looks_back(table) else "nearest"
    names = ("drawn at random", f"{near} first", f"the first, then the {near}", "heaviest first (an oracle)")
    return dict(zip(POLICIES, names))


# ---- the numbers ----


def summary(table: pd.DataFrame, meta: dict) -> dict:
    """The numbers of the first screen, for report.json too.

    Returns
    -------
    dict
        sample ("context" or "pooled"), heads, layers, and the numbers of heads that are averaging, extremal, frozen.
        In context also key_heads; keys, the most that a query has (the median over late queries); on_first, the heads
        with more than half of their weight on the first position; budgets, by policy and by the share of heads (half,
        nine_tenths, every) that is within the error: keys, low and high (NaN with one window), of (how many keys that
        head's queries have), layer, head; and of models that look back cache_own and cache_equal: the share of their
        keys that a cache would keep, with the budgets of `first_latest`, NaN of others.
    """
    counts = table["phase"].value_counts()
    found = {
        "sample": "context" if in_context(table) else "pooled",
        "heads": len(table),
        "layers": table["layer"].nunique(),
        **{phase: int(counts.get(phase, 0)) for phase in PHASES},
    }
    if not in_context(table):
        return found
    groups = _key_heads(table)
    cached = looks_back(table)
    return found | {
        "key_heads": len(groups),
        "keys": table["keys"].max(),
        "on_first": int((table["share_first"] > 0.5).sum()),
        "budgets": {
            policy: {place: _budget(table, policy, *share) for place, share in PLACES.items()} for policy in POLICIES
        },
        "cache_own": groups["budget"].sum() / groups["keys"].sum() if cached else math.nan,
        "cache_equal": groups["keys"].clip(upper=groups["budget"].max()).sum() / groups["keys"].sum()
        if cached
        else math.nan,
    }


def _key_heads(table: pd.DataFrame) -> pd.DataFrame:
    """For each key head its keys, and the budget with which each of the heads that read it is within the error."""
    return table.groupby(["layer", "group"]).agg(keys=("keys", "max"), budget=("keys_first_latest", "max"))


def _budget(table: pd.DataFrame, policy: str, part: int, whole: int) -> dict:
    """The smallest budget that is enough for part/whole of the heads, which is that of one of them."""
    name = f"keys_{policy}"
    place = -(-part * len(table) // whole) - 1
    head = table.sort_values(name, kind="stable").iloc[place]
    low, high = head.get(f"{name}_low", math.nan), head.get(f"{name}_high", math.nan)
    return {
        "keys": head[name],
        "low": low,
        "high": high,
        "of": head["keys"],
        "layer": int(head["layer"]),
        "head": int(head["head"]),
    }


# ---- the words ----


def percent(share: float) -> str:
    """A share as a reader wants it: 31%, 5.7%, below 0.1%."""
    if share >= 0.0995 or share == 0:
        return f"{100 * share:.0f}%"
    return f"{100 * share:.1f}%" if share >= 0.0005 else "<0.1%"


def keys_in_words(budget: dict) -> str:
    """A budget: 219, or "all 7,696" where no fewer keys are enough."""
    return ("all " if budget["keys"] >= budget["of"] else "") + f"{budget['keys']:,.0f}"


def interval(budget: dict) -> str:
    """The interval of a budget, 30–900, or nothing where there is none."""
    return "" if math.isnan(budget["low"]) else f"{math.floor(budget['low']):,}–{math.ceil(budget['high']):,}"


def phases_sentence(found: dict, meta: dict) -> str:
    """How many heads are in which phase, and how many put their weight on the first position."""
    averaging, extremal, frozen = (found[phase] for phase in PHASES)
    said = (
        f"{averaging:,} {'head averages' if averaging == 1 else 'heads average'} over many keys, "
        f"in {extremal:,} few keys decide, {frozen:,} {'is' if frozen == 1 else 'are'} frozen on one or a handful"
    )
    if found["sample"] == "pooled":
        return f"At {meta['tokens']:,} tokens, by the loads of their median queries: {said}."
    first = found["on_first"]
    puts = "puts more than half of its" if first == 1 else "put more than half of their"
    return f"At {meta['context']:,} tokens: {said}; {first:,} {puts} weight on the first position."


def budgets_sentence(found: dict, meta: dict) -> str:
    """What the budgets are for; the table of them follows."""
    return (
        f"To keep a head's output within {100 * meta['error']:g}% (root mean square, in units of the spread of its "
        f"values), a query has to read, of its {found['keys']:,.0f} keys:"
    )


def intervals_sentence(meta: dict) -> str:
    """What the intervals of the budgets are, or why there are none."""
    windows = meta["windows"]
    if windows < 2:
        return "One window was read, so there are no intervals: more windows (--windows) give them."
    few = "; it is wide where windows are few" if windows < 5 else ""
    return f"With each its 95% interval over {windows} windows, that of the head at that place{few}."


def cache_sentence(found: dict) -> str:
    """How far a cache could shrink; empty for models that do not look back, which have none."""
    if math.isnan(found["cache_own"]):
        return ""
    own, equal = percent(found["cache_own"]), percent(found["cache_equal"])
    return (
        f"The cache of keys and values could shrink to {own} if each of the {found['key_heads']:,} key heads kept its "
        f"own budget of the first and the latest keys, to {equal} if all had the same: that of the worst."
    )


def sentences(found: dict, meta: dict, names: dict[str, str]) -> list[str]:
    """The first screen as lines of plain text; `found` from `summary`, `names` from `policy_names`."""
    lines = [phases_sentence(found, meta)]
    if found["sample"] == "pooled":
        return lines
    rows = [["", *PLACE_NAMES.values()]]
    for policy, name in names.items():
        budgets = found["budgets"][policy].values()
        rows.append([name, *(f"{keys_in_words(b)} ({interval(b)})".removesuffix(" ()") for b in budgets)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = [
        "  " + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    lines += [budgets_sentence(found, meta), *table, intervals_sentence(meta), cache_sentence(found)]
    return [line for line in lines if line]
