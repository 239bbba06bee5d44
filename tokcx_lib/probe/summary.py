"""The first screen of a probe's report: its numbers, and the sentences that say them in plain text."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from tokcx_lib.probe.policies import POLICIES, Estimate, jackknife, whole

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
    names = ("drawn at random", f"{near} first", f"the first key, then the {near}", "heaviest first (an oracle)")
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
        nine_tenths, every) that is within the error: keys, low and high (NaN with one window), layer and head of the
        one that needs so many, of (how many keys its queries have); and of models that look back cache_own and
        cache_equal, each with _low and _high: the share of their keys that a cache would keep, with the budgets of
        `first_latest`, NaN of others.
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
    own, equal = (_cached(table, share) for share in (_own, _equal))
    return found | {
        "key_heads": len(table.groupby(["layer", "group"])),
        "keys": table["keys"].max(),
        "on_first": int((table["share_first"] > 0.5).sum()),
        "budgets": {
            policy: {place: _budget(table, policy, *share) for place, share in PLACES.items()} for policy in POLICIES
        },
        **dict(zip(("cache_own", "cache_own_low", "cache_own_high"), own)),
        **dict(zip(("cache_equal", "cache_equal_low", "cache_equal_high"), equal)),
    }


def key_heads(table: pd.DataFrame) -> pd.DataFrame:
    """One row a key head: layer, group; the keys that its queries have, the budget of `first_latest` with which every
    head that reads it is within the error, the head that needs it, and the upper end of the intervals of all of these.
    """
    most = table.loc[table.groupby(["layer", "group"])["keys_first_latest"].idxmax()]
    high = table.groupby(["layer", "group"])["keys_first_latest_high"].max().to_numpy()
    found = most[["layer", "group", "keys", "keys_first_latest", "head"]].assign(high=high)
    return found.rename(columns={"keys_first_latest": "budget"}).reset_index(drop=True)


def _over_windows(table: pd.DataFrame, measure) -> Estimate:
    """A number made of the budgets (heads, policies) of all heads, with its interval over windows.

    From the budgets with each window left out (`context.probe_in_context`); NaN without those of just these heads.
    """
    budgets = table[[f"keys_{policy}" for policy in POLICIES]].to_numpy()
    left_out = [np.array(each) for each in table.attrs.get("left_out", ())]
    if len(left_out) < 2 or any(each.shape != budgets.shape for each in left_out):  # rows were taken from the table
        return Estimate(measure(budgets), math.nan, math.nan)
    every = set(range(len(left_out)))

    def of(kept) -> float:
        missing = every - set(kept)
        return measure(left_out[missing.pop()] if missing else budgets)

    return jackknife(of, np.arange(len(left_out)))


def _cached(table: pd.DataFrame, share) -> Estimate:
    """A share of the keys that a cache keeps, at most 1; NaN for models that do not look back, and have no cache."""
    if not looks_back(table):
        return Estimate(math.nan, math.nan, math.nan)
    column = POLICIES.index("first_latest")
    _, group = np.unique(table[["layer", "group"]].to_numpy(), axis=0, return_inverse=True)
    keys, needed = np.zeros(group.max() + 1), np.zeros(group.max() + 1)
    np.maximum.at(keys, group, table["keys"])

    def measure(budgets: np.ndarray) -> float:
        needed[:] = 0
        np.maximum.at(needed, group, budgets[:, column])
        return share(needed, keys)

    return Estimate(*(min(number, 1.0) for number in _over_windows(table, measure)))


def _own(needed: np.ndarray, keys: np.ndarray) -> float:
    """Each key head keeps the largest budget of the heads that read it."""
    return float(needed.sum() / keys.sum())


def _equal(needed: np.ndarray, keys: np.ndarray) -> float:
    """All keep that of the worst."""
    return float(np.minimum(needed.max(), keys).sum() / keys.sum())


def _budget(table: pd.DataFrame, policy: str, part: int, of: int) -> dict:
    """The smallest budget that is enough for part/of of the heads, which is that of one of them."""
    place = -(-part * len(table) // of) - 1
    head = table.sort_values(f"keys_{policy}", kind="stable").iloc[place]
    column = POLICIES.index(policy)
    _, low, high = _over_windows(table, lambda budgets: float(np.sort(budgets[:, column])[place]))
    return {
        "keys": head[f"keys_{policy}"],
        "low": np.clip(whole(low), 1, table["keys"].max()),
        "high": np.clip(whole(high), 1, table["keys"].max()),
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
        f"values), a query has to read, of the {found['keys']:,.0f} keys that the median one has:"
    )


def intervals_sentence(meta: dict) -> str:
    """What the intervals of the budgets are, or why there are none."""
    windows = meta["windows"]
    if windows < 2:
        return "One window was read, so there are no intervals: more windows (--windows) give them."
    few = "; it is wide where windows are few" if windows < 5 else ""
    return f"With each its 95% interval over {windows} windows{few}."


def cache_sentence(found: dict) -> str:
    """How far a cache could shrink; empty for models that do not look back, which have none."""
    if math.isnan(found["cache_own"]):
        return ""
    own, equal = (_with_interval(found, f"cache_{kind}") for kind in ("own", "equal"))
    return (
        f"The cache of keys and values could shrink to {own} if each of the {found['key_heads']:,} key heads kept its "
        f"own budget of the first and the latest keys, to {equal} if all had the same: that of the worst."
    )


def _with_interval(found: dict, name: str) -> str:
    """A share, and where it is known its interval: 11% (6.1%–22%)."""
    low, high = found[f"{name}_low"], found[f"{name}_high"]
    return percent(found[name]) + ("" if math.isnan(low) else f" ({percent(low)}–{percent(high)})")


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
