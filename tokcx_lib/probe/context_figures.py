"""The figures of a probe in context: heads in the phase diagram, errors against keys, growth with the context, maps."""

from __future__ import annotations

import math
import re
from functools import partial

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tokcx_lib import plots
from tokcx_lib.probe.pages import Picture
from tokcx_lib.probe.policies import POLICIES
from tokcx_lib.probe.summary import looks_back, policy_names

WIDE = 10.5  # inches of a figure as wide as the page, where its text is as large as the page's
NARROW = 2.9  # of a map, of which four stand side by side
LEAST_LOAD, LEAST_ERROR = 0.01, 1e-3  # below these, marks and curves leave their figures
NAMED = 3  # heads of largest load that the phase diagram names
HUES = dict(zip(POLICIES, plots.PALETTE))


def figures(table: pd.DataFrame) -> dict[str, Picture]:
    """The figures that a table has the numbers for, by the names of their files."""
    found = {"phases": Picture(_PHASES_ALT, _phases)}
    if len(numbers(table, "error_drawn")) > 1:
        found["errors"] = Picture(_ERRORS_ALT, _errors)
    if looks_back(table):
        found["growth"] = Picture(_GROWTH_ALT, _growth)
    for name, (column, title, what) in _maps(table).items():
        alt = f"Heat map of {what} of every head, layers down and heads across."
        found[name] = Picture(alt, partial(_map, column=column, title=title), map=True)
    return found


def numbers(table: pd.DataFrame, column: str) -> list[int]:
    """The numbers of keys N, increasing, of columns `column`_N; those which no head's queries have are left out."""
    found = (re.fullmatch(rf"{column}_([1-9]\d*)", name) for name in table)
    return sorted(n for n in (int(each[1]) for each in found if each) if n <= table["keys"].max())


def at(table: pd.DataFrame, column: str, n: int) -> pd.Series:
    """A column at N keys, for the heads whose queries have so many."""
    return table.loc[table["keys"] >= n, f"{column}_{n}"]


# ---- the phase diagram ----

_PHASES_ALT = (
    "Phase diagram of load and number of keys: regions where typical errors fall like one over the root of n, "
    "where few tokens decide, and frozen, with contours of the law's relative error and a dot for every head."
)


def _phases(table: pd.DataFrame, meta: dict) -> Figure:
    figure = Figure(figsize=(WIDE, 6.0))
    axes = figure.subplots()
    shorter = numbers(table, "effective") if looks_back(table) else []
    marks = [pd.DataFrame({"load": at(table, "load", n), "tokens": float(n)}) for n in shorter]
    marks.append(pd.DataFrame({"load": table["load"], "tokens": table["keys"].astype(float)}))
    dots = pd.concat(marks)
    dots["load"] = dots["load"].clip(lower=LEAST_LOAD)
    span = (min(0.3, 0.8 * dots["load"].min()), max(20.0, 1.25 * dots["load"].max()))
    most = table["keys"].max()
    plots.phase_diagram(axes, span, (min(16.0, dots["tokens"].min()), max(1e6, 1e3 * most)))
    axes.set_ylabel("keys $n$")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda load, _: f"{load:g}"))
    late = dots.iloc[-len(table) :]
    axes.scatter(dots["load"], dots["tokens"], s=18, color=plots.PALETTE[0], alpha=0.35, edgecolors="none", zorder=3)
    axes.scatter(late["load"], late["tokens"], s=30, color=plots.PALETTE[0], alpha=0.7, edgecolors="none", zorder=3)
    medians = [(each["load"].median(), each["tokens"].median()) for each in marks if len(each)]
    axes.plot(*zip(*medians), "o-", color=plots.INK, linewidth=1.4, markersize=4.5, zorder=4)
    _name_largest(axes, table)
    return figure


def _name_largest(axes: Axes, table: pd.DataFrame) -> None:
    """Names, layer.head, of the heads of largest load, in the order of their dots, over the last of these."""
    named = table.nlargest(NAMED, "load").iloc[::-1]
    place = (max(named["load"].iloc[-1], LEAST_LOAD), named["keys"].iloc[-1])
    halo = [withStroke(linewidth=3, foreground="white")]  # contours do not run through the words
    names = ", ".join(f"{head['layer']}.{head['head']}" for _, head in named.iterrows())
    axes.annotate(names, place, (6, 9), textcoords="offset points", ha="right", path_effects=halo)


# ---- errors against keys ----

_ERRORS_ALT = (
    "Four panels, one for each order in which keys are read: the error of a head's output against the number of keys, "
    "the median and the middle 80% of the heads; with it the exact law of drawn keys, and the error that is asked for."
)


def _errors(table: pd.DataFrame, meta: dict) -> Figure:
    figure = Figure(figsize=(WIDE, 6.4))
    names, lengths = policy_names(table), numbers(table, "error_drawn")
    for axes, policy in zip(figure.subplots(2, 2, sharex=True, sharey=True).flat, POLICIES):
        for other in POLICIES:
            if other != policy:
                _, middle, _ = _over_heads(table, f"error_{other}", lengths)
                axes.plot(lengths, middle, color=plots.FAINT, linewidth=0.9, alpha=0.7)
        low, middle, high = _over_heads(table, f"error_{policy}", lengths)
        axes.fill_between(lengths, low, high, color=HUES[policy], alpha=0.22, linewidth=0)
        axes.plot(lengths, middle, "o-", color=HUES[policy])
        if policy == "drawn":
            _law(axes, table)
        axes.axhline(meta["error"], color=plots.INK, linewidth=0.9, linestyle=":")
        axes.set(xscale="log", yscale="log")
        axes.set_title(names[policy], color=HUES[policy])
        _mark_keys(axes, lengths)
    axes.set_ylim(LEAST_ERROR, 1.6)
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    figure.supxlabel("keys read", fontsize=mpl.rcParams["axes.labelsize"])
    figure.supylabel("error, of the spread of the values", fontsize=mpl.rcParams["axes.labelsize"])
    return figure


def _mark_keys(axes: Axes, lengths: list[float]) -> None:
    """Ticks at these numbers of keys, and no others."""
    axes.set_xticks(lengths, [f"{n:,.0f}" for n in lengths])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)


def _over_heads(table: pd.DataFrame, column: str, lengths: list[int]) -> np.ndarray:
    """The 10%, 50% and 90% points over heads at each number of keys: (3, lengths)."""
    found = [np.nanquantile(at(table, column, n), (0.1, 0.5, 0.9)) for n in lengths]
    return np.maximum(np.array(found).T, LEAST_ERROR / 10)


def _law(axes: Axes, table: pd.DataFrame) -> None:
    """The median over heads of what the law says of drawn keys, where it speaks."""
    told = [n for n in numbers(table, "law") if at(table, "law", n).notna().any()]
    if told:
        line = [at(table, "law", n).median() for n in told]
        axes.plot(told, line, "--", color=plots.INK, linewidth=1.4, marker="s", markersize=4)
        axes.annotate("law", (told[-1], line[-1]), (6, 5), textcoords="offset points")


# ---- growth with the context ----

_GROWTH_ALT = (
    "Two panels against the number of keys that a query has: its load, between the lines where heads freeze and where "
    "they average, and the tokens that share its attention; the median and the middle 80% of the heads."
)


def _growth(table: pd.DataFrame, meta: dict) -> Figure:
    figure = Figure(figsize=(WIDE, 3.9))
    left, right = figure.subplots(1, 2)
    most = table["keys"].max()
    lengths = [n for n in numbers(table, "effective") if n < most]  # load_95 is a quantile
    full = table[table["keys"] >= most]  # with a sliding window, no more keys come
    for axes, column, hue in ((left, "load", 0), (right, "effective", 2)):
        found = [at(table, column, n) for n in lengths] + [full[column]]
        low, middle, high = np.array([each.quantile([0.1, 0.5, 0.9]) for each in found]).T
        axes.fill_between([*lengths, most], low, high, color=plots.PALETTE[hue], alpha=0.22, linewidth=0)
        axes.plot([*lengths, most], middle, "o-", color=plots.PALETTE[hue])
        axes.set(xscale="log", xlabel="keys $n$")
        _mark_keys(axes, [*(n for n in lengths if n < most / 2.5), most])
    n = np.geomspace(lengths[0], most, 50)
    frozen, averaging = np.sqrt(2 * np.log(n)), np.sqrt(np.log(n) / 2)
    left.plot(n, frozen, "--", n, averaging, "--", color=plots.INK, linewidth=1.1)
    left.annotate("frozen above", (n[-1], frozen[-1]), (0, 5), textcoords="offset points", ha="right")
    left.annotate("averaging below", (n[0], averaging[0]), (0, -5), textcoords="offset points", va="top")
    left.set(title="load $s$", ylim=(0, None))
    right.plot(n, n, "--", color=plots.INK, linewidth=1.1)
    right.annotate("all keys", (n[25], n[25]), (-6, 4), textcoords="offset points", ha="right")
    right.set(yscale="log", title="effective tokens $1/\\sum w^2$")
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return figure


# ---- maps ----


def _maps(table: pd.DataFrame) -> dict[str, tuple[str, str, str]]:
    """By the name of the file: the column, the title, and what it is in words."""
    near = "latest" if looks_back(table) else "nearest"
    return {
        "load": ("load", "load $s$", "the median load"),
        "effective": ("effective", "effective tokens", "the median number of effective tokens"),
        "first": ("share_first", "weight on first position", "the share of the weight on the first position"),
        "budget": ("keys_first_latest", f"keys, first + {near}", f"the number of first and {near} keys needed"),
    }


def _map(table: pd.DataFrame, meta: dict, column: str, title: str) -> Figure:
    """A heat map without numbers in its cells, which the table of heads has."""
    grid = table.pivot(index="layer", columns="head", values=column)
    figure = Figure(figsize=(NARROW, min(max(2.4, 1.5 + 0.14 * len(grid)), 9.0)))
    axes = figure.subplots()
    least, most = grid.min().min(), grid.max().max()
    share = column.startswith("share")
    log = not share and 0 < least < most
    image = axes.imshow(grid, cmap="cividis", norm=LogNorm(least, most) if log else None, aspect="auto")
    axes.set(xlabel="head", ylabel="layer", title=title)
    for axis, labels in ((axes.xaxis, grid.columns), (axes.yaxis, grid.index)):
        step = math.ceil(len(labels) / 10)
        axis.set_ticks(range(0, len(labels), step), labels[::step])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, location="bottom", aspect=18, pad=0.03)
    middle = math.sqrt(least * most) if log else (least + most) / 2
    ticks = [least, middle, most] if least < most else [least]
    bar.set_ticks(ticks, labels=[f"{100 * t:.0f}%" if share else f"{float(f'{t:.2g}'):,g}" for t in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    # Labels at the ends of the bar stay above it.
    for label, side in zip(bar.ax.get_xticklabels(), ("left", "center", "right") if len(ticks) > 1 else ("center",)):
        label.set_horizontalalignment(side)
    return figure
