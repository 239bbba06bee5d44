"""What chapter 14 reads off its records of heads: errors, slopes, phases, sinks, budgets, with intervals over windows.

Windows are independent pieces of text, and heads are all the heads that there are: intervals are jackknives over
windows, of medians or counts over heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats
from scipy.interpolate import CubicSpline

from tokcx_lib import runtime
from tokcx_lib.probe import summary
from tokcx_lib.probe.policies import LEVEL, POLICIES, Estimate, jackknife, keys_needed, whole
from tokcx_lib.probe.queries import late_queries
from tokcx_lib.records import Record
from tokcx_lib.theory import budgets as phases_of
from tokcx_lib.theory import drawn_keys
from tokcx_lib.validation import as_count, as_kind, as_list, as_positive

PER_GROUP = 3  # query heads that share the keys of one key head
FIRST = 64  # keys from which on exponents are told


def cube(table: pd.DataFrame, column: str) -> tuple[np.ndarray, list[int]]:
    """A column of `measures.window_table` as (windows, heads, lengths), at the lengths where it has numbers.

    Heads are in the order of layers. ValueError unless the table has the column, and all rows of a grid.
    """
    table = as_kind("table", table, pd.DataFrame)
    if column not in table:
        raise ValueError(f"column: expected one of {', '.join(table)}, got {column!r}")
    given = table.dropna(subset=[column]).sort_values(["window", "layer", "head", "n"])
    shape = [given["window"].nunique(), len(given[["layer", "head"]].drop_duplicates()), given["n"].nunique()]
    if math.prod(shape) != len(given):
        raise ValueError(f"table: expected a row for each window, head and n, {math.prod(shape)}, got {len(given)}")
    return given[column].to_numpy().reshape(shape), sorted(given["n"].unique().tolist())


def _typical(array: np.ndarray) -> np.ndarray:
    """Root mean square over windows, then the median over heads: (lengths,)."""
    return np.median(np.sqrt(np.square(array).mean(0)), 0)


def median_errors(table: pd.DataFrame, columns: Sequence[str] = POLICIES) -> pd.DataFrame:
    """Errors of the median head, root mean squares over windows, with their intervals over windows.

    Returns
    -------
    DataFrame, one row for each column and n where it is not zero: error, n, value, low, high; and head_10, head_90, the
    range of the heads between them.
    """
    rows = []
    for column in as_list("columns", columns):
        array, lengths = cube(table, column)
        heads = np.sqrt(np.square(array).mean(0))
        for place, n in enumerate(lengths):
            if not (array[:, :, place] > 0).any():
                continue
            with np.errstate(divide="ignore", invalid="ignore"):  # of errors that are rounded to 0: no interval
                found = jackknife(lambda part, place=place: _typical(part)[place], array)
            rows.append((column, n, *found, *np.quantile(heads[:, place], [0.1, 0.9])))
    return pd.DataFrame(rows, columns=["error", "n", "value", "low", "high", "head_10", "head_90"])


def _plain(measure: Callable[[np.ndarray], float], windows: np.ndarray) -> Estimate:
    """A number of any sign, with its jackknife interval."""
    value, count = measure(windows), len(windows)
    if count < 2:
        return Estimate(value, math.nan, math.nan)
    left = np.array([measure(np.delete(windows, out, axis=0)) for out in range(count)])
    deviation = math.sqrt((count - 1) / count * np.square(left - left.mean()).sum())
    reach = stats.t.ppf((1 + LEVEL) / 2, count - 1) * deviation
    return Estimate(value, value - reach, value + reach)


def slope(table: pd.DataFrame, column: str, first: int, last: int) -> Estimate:
    """Exponent b of the median head's error n^-b between two lengths, with its interval over windows."""
    array, lengths = cube(table, column)
    if first not in lengths or last not in lengths or first >= last:
        raise ValueError(
            f"first, last: expected two of {', '.join(map(str, lengths))}, increasing, got {first}, {last}"
        )
    ends = array[:, :, [lengths.index(first), lengths.index(last)]]

    def measure(part: np.ndarray) -> float:
        few, many = _typical(part)
        return math.log(few / many) / math.log(last / first)

    return _plain(measure, ends)


def slopes(table: pd.DataFrame, columns: Sequence[str], lengths: Sequence[int]) -> pd.DataFrame:
    """Local exponents between successive lengths: one row each, for every column its value, and low and high."""
    rows = []
    for first, last in zip(lengths, lengths[1:]):
        row = {"from": first, "to": last}
        for column in columns:
            value, low, high = slope(table, column, first, last)
            row |= {column: value, f"{column}_low": low, f"{column}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def against_law(table: pd.DataFrame, measured: str = "rest", law: str = "law") -> pd.DataFrame:
    """Measured error over a predicted one, head by head: by n the median over heads, its interval over windows, the
    range of 8 of 10 heads, and the share of heads within a fifth (ratio 0.8 to 1.25)."""
    top, lengths = cube(table, measured)
    bottom, _ = cube(table, law)
    rows = []
    for place, n in enumerate(lengths):
        both = np.stack([top[:, :, place], bottom[:, :, place]], -1)

        def ratios(part: np.ndarray) -> np.ndarray:
            squares = np.square(part).mean(0)
            return np.sqrt(squares[:, 0] / squares[:, 1])

        heads = ratios(both)
        found = jackknife(lambda part: float(np.median(ratios(part))), both)
        within = float(((heads > 0.8) & (heads < 1.25)).mean())
        rows.append((n, *found, *np.quantile(heads, [0.1, 0.9]), within))
    return pd.DataFrame(rows, columns=["n", "value", "low", "high", "head_10", "head_90", "within"])


def phases(table: pd.DataFrame) -> pd.DataFrame:
    """Queries that have n keys, by n: medians over heads of load, reduced load and effective tokens; how many heads
    average, or are frozen; and of n drawn keys of late queries the load and the effective tokens.

    Loads and effective tokens leave the first position out, but for `effective_all`. `load_low` and `load_high`:
    interval over windows; `load_10` and `load_90`: range of 8 of 10 heads.
    """
    load, lengths = cube(table, "load")
    rest, every = cube(table, "effective_rest")[0], cube(table, "effective")[0]
    past, shorter = cube(table, "past_load")
    drawn = cube(table, "past_effective")[0]
    rows = []
    for place, n in enumerate(lengths):
        heads = np.median(load[:, :, place], 0)
        value, low, high = jackknife(lambda part: float(np.median(np.median(part, 0))), load[:, :, place])
        kinds = [phases_of.phase(s, n) for s in heads]
        row = {"n": n, "load": value, "load_low": low, "load_high": high}
        row |= dict(zip(("load_10", "load_90"), np.quantile(heads, [0.1, 0.9])))
        row |= {"reduced": value / math.sqrt(2 * math.log(n)), "averaging": kinds.count("averaging")}
        row |= {"frozen": kinds.count("frozen"), "effective": np.median(np.median(rest[:, :, place], 0))}
        row |= {"effective_all": np.median(np.median(every[:, :, place], 0))}
        late = n in shorter
        row |= {"past_load": np.median(np.median(past[:, :, shorter.index(n)], 0)) if late else value}
        row |= {"past_effective": np.median(np.median(drawn[:, :, shorter.index(n)], 0)) if late else row["effective"]}
        rows.append(row)
    return pd.DataFrame(rows)


def sinks(table: pd.DataFrame, keys: float | None = None) -> pd.DataFrame:
    """Late queries, a row for each head: layer, head, share_first, load, skew, effective tokens of all keys and of all
    but the first. Medians over windows, of the share the mean. Given the `keys` that a late query has, also `law`: of
    as many Gaussian keys with that load, in the median list, as the others are of the median query."""
    context = as_kind("table", table, pd.DataFrame)["n"].max()
    late = table[table["n"] == context].groupby(["layer", "head"])
    found = late[["load", "skew", "effective", "effective_rest", "along"]].median()
    found["share_first"] = late["share_first"].mean()
    found["share_near"] = late["share_near"].mean()
    if keys is not None:
        loads, law = _median_effective(as_count("keys", keys, least=2) - 1)
        found["law"] = np.exp(CubicSpline(loads, np.log(law))(found["load"]))
    return found.reset_index()


@functools.cache
def _median_effective(keys: int, lists: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Loads, and the median of the effective tokens 1 / sum w^2 over lists of so many Gaussian keys.

    Rare lists with one large weight make 1 / E sum w^2 about half as large at the loads of real heads: where medians
    over queries were measured, it is no yardstick.
    """
    loads, stream = np.linspace(0, 12, 13), runtime.stream(1402, keys)
    found = np.empty((len(loads), lists))
    for place in range(lists):
        z = torch.randn(keys, generator=stream, dtype=torch.float64)
        powers = torch.exp(loads[1] * (z - z.max()))  # e^{s z} at the first load; the others are its powers
        weights = torch.ones_like(z)
        for row in range(len(loads)):
            found[row, place] = weights.sum() ** 2 / weights.square().sum()
            weights = weights * powers
    return loads, np.median(found, axis=1)


def median_keys(context: int, queries: int) -> float:
    """How many keys the median late query of a window has: the upper one of two medians."""
    rows = late_queries(range(as_count("context", context, least=2)), True, as_count("queries", queries))
    return float(np.quantile(rows.numpy() + 1, 0.5, method="higher"))


def budgets(table: pd.DataFrame, queries: int, error: float = 0.1) -> pd.DataFrame:
    """Keys that each head needs under each policy, in the form of `probe.context`, for `probe.summary.summary`.

    Parameters
    ----------
    table : of one text; queries : late ones in each window; error : root mean square, in units of the spread of the
        values.
    """
    error = as_positive("error", error)
    arrays = {policy: cube(table, policy) for policy in POLICIES}
    lengths = arrays[POLICIES[0]][1]
    keys = median_keys(lengths[-1], queries)
    fewer = [n for n in lengths if n < keys]
    late = sinks(table)
    found = late[["layer", "head", "load", "effective", "share_first"]].copy()
    found["group"], found["keys"] = found["head"] // PER_GROUP, keys
    found["reduced"] = found["load"] / math.sqrt(2 * math.log(keys))
    found["phase"] = [phases_of.phase(s, keys) for s in found["load"]]
    found["load_64"] = found["load"]  # says that queries look back
    windows = len(arrays[POLICIES[0]][0])
    left_out = np.zeros((windows, len(found), len(POLICIES)))
    for column, policy in enumerate(POLICIES):
        squares = np.square(arrays[policy][0][:, :, : len(fewer)])
        squares = np.pad(squares, ((0, 0), (0, 0), (0, 1)))

        def needed(part: np.ndarray) -> list[float]:
            return [keys_needed([*fewer, int(keys)], head, error) for head in part.mean(0)]

        found[f"keys_{policy}"] = np.clip([whole(k) for k in needed(squares)], 1, keys)
        for out in range(windows if windows > 1 else 0):
            left_out[out, :, column] = needed(np.delete(squares, out, axis=0))
    found.attrs["left_out"] = left_out.tolist() if windows > 1 else []
    return found


def matched_law(table: pd.DataFrame, queries: int) -> pd.DataFrame:
    """The law of drawn keys at the load with which lists of as many Gaussian keys have, in the median, the effective
    tokens that were measured (which are of the median query).

    Beside the measured errors of the rest: `matched`, that law, and `first_order`, sqrt((N/n - 1) / effective tokens).

    Returns
    -------
    DataFrame: window, layer, head, n, rest, matched, first_order, at the n where `rest` was measured.
    """
    table = as_kind("table", table, pd.DataFrame)
    context = int(table["n"].max())
    total = median_keys(context, queries) - 1  # without the first position
    late = table[table["n"] == context].set_index(["window", "layer", "head"])["effective_rest"]
    coarse, falling = _median_effective(int(total))
    loads = np.linspace(0, coarse[-1], 241)  # beyond, one key has all the weight
    falling = np.exp(CubicSpline(coarse, np.log(falling))(loads))
    load = pd.Series(np.interp(np.log(late), np.log(falling[::-1]), loads[::-1]), late.index)
    found = table.dropna(subset=["rest"])[["window", "layer", "head", "n", "rest"]]
    at = pd.MultiIndex.from_frame(found[["window", "layer", "head"]])
    lengths, nodes = sorted(found["n"].unique()), loads[::8]
    laws = np.sqrt([drawn_keys.drawn_error(lengths, total, s).rest for s in nodes])
    matched = pd.DataFrame(CubicSpline(nodes, laws)(load), load.index, lengths).reindex(at).to_numpy()
    place = np.searchsorted(lengths, found["n"])
    first = np.sqrt((total / found["n"] - 1) / late.reindex(at).to_numpy())
    return found.assign(matched=matched[np.arange(len(found)), place], first_order=first)


def budget_table(heads: pd.DataFrame) -> pd.DataFrame:
    """Keys that are enough for half of the heads, for 9 of 10 and for every one, by policy, each with its interval."""
    found = summary.summary(heads, {})
    rows = {}
    for policy, places in found["budgets"].items():
        rows[policy] = {
            summary.PLACE_NAMES[place]: f"{summary.keys_in_words(b)} ({summary.interval(b)})".removesuffix(" ()")
            for place, b in places.items()
        }
    return pd.DataFrame(rows).T


def text_row(table: pd.DataFrame, queries: int) -> dict[str, float]:
    """One line on a text: windows, median load and count of frozen heads at the context, heads with more than half of
    their weight on the first position, the exponent of drawn keys from 64 to 1,024 and that of the law, errors over the
    law at 1,024, error of the first and the latest 256, and their median budget."""
    context = int(table["n"].max())
    last = phases(table).iloc[-1]
    half, one = (min(n, context // 4) for n in (1024, 256))
    heads = budgets(table, queries)
    ratio = against_law(table).set_index("n")["value"]
    near = median_errors(table, ["first_latest"]).set_index("n")["value"]
    return {
        "windows": table["window"].nunique(),
        "load": last["load"],
        "frozen": int(last["frozen"]),
        "sinks": int((heads["share_first"] > 0.5).sum()),
        "exponent": slope(table, "rest", FIRST, half).value,
        "law": slope(table, "law", FIRST, half).value,
        "over law": ratio[half],
        "first + latest": near[one],
        "budget": heads["keys_first_latest"].median(),
    }


def headline(record: Record) -> str:
    """The chapter in one sentence, with its interval, from the record `language_model_heads`."""
    record = as_kind("record", record, Record)
    few, many = FIRST, 16 * FIRST
    fewer = [math.exp(b * math.log(many / few)) for b in slope(record.table, "rest", few, many)]
    law = math.exp(slope(record.table, "law", few, many).value * math.log(many / few))
    heads = len(record.table[["layer", "head"]].drop_duplicates())
    return (
        f"On {record.table['window'].nunique()} long articles of Wikipedia, the median error of the {heads} heads of a "
        f"language model (SmolLM2-135M) is {fewer[0]:.2f} times smaller (95% interval {fewer[1]:.2f} to "
        f"{fewer[2]:.2f}) over {many:,} random keys of the past than over {few}, the first key apart; averaging would "
        f"make it 4 times smaller or more, and the exact law of their loads says {law:.2f}."
    )


def factors(table: pd.DataFrame, queries: int) -> pd.DataFrame:
    """What a measured error is made of, median over heads, by n: measured over the law, the Gaussian twin and the law
    at the load of the effective tokens (`matched`); `shape`, the error of the real weights with values that do not go
    with them, over the law of that; `values`, the error over the former; `skew`, the twin with the measured skewness
    over the Gaussian one; `within`, the share of heads within a fifth of their law.
    """
    pairs = {"law": ("rest", "law"), "twin": ("rest", "twin"), "shape": ("weights", "law_weights")}
    pairs |= {"values": ("rest", "weights"), "skew": ("twin_skewed", "twin")}
    found = {name: against_law(table, *pair).set_index("n") for name, pair in pairs.items()}
    shown = pd.DataFrame({name: each["value"] for name, each in found.items()})
    shown["matched"] = against_law(matched_law(table, queries), "rest", "matched").set_index("n")["value"]
    return shown.assign(within=found["law"]["within"])
