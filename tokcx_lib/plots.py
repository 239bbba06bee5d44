"""One style and the few recurring figures.

Figures have a transparent ground and black text, and the book's style sheet turns their lightness around on dark pages
(``invert(1) hue-rotate(180deg)``, which keeps hues). Colours are chosen for both: each is readable as text, 4.5 to 1,
on white and, turned around, on a dark page; and any two of a figure differ on both, for the colour-blind too
(`tests/test_colours.py` computes it).
"""

from __future__ import annotations

from functools import cache

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, to_rgb
from matplotlib.ticker import NullFormatter

from tokcx_lib.theory import budgets
from tokcx_lib.theory.softmax_law import MOST_TILT

PALETTE = ["#4276BC", "#983B02", "#00654B", "#B20B83", "#3104B1", "#9B6C00"]  # blue, red, green, pink, violet, ochre
INK = "#000000"
FAINT = "#767676"


def use_style() -> None:
    """Set the book's matplotlib style: figures as wide as the text, with its font size."""
    mpl.rcParams.update(
        {
            "figure.figsize": (7.2, 4.2),
            "figure.dpi": 160,
            "figure.facecolor": "none",
            "figure.constrained_layout.use": True,
            "axes.facecolor": "none",
            "savefig.dpi": 160,
            "font.size": 11.5,
            "axes.titlesize": 12,
            "axes.titlelocation": "left",
            "axes.labelsize": 12,
            "axes.prop_cycle": mpl.cycler(color=PALETTE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "grid.linewidth": 0.6,
            "lines.linewidth": 2.0,
            "lines.markersize": 5.5,
            "legend.frameon": False,
        }
    )


def error_curves(ax: Axes, table: pd.DataFrame, error: str, by: str, labels: dict | None = None, scale=None) -> None:
    """Mean error against n on logarithmic axes, with two standard errors over replicates, labelled at the right end.

    Parameters
    ----------
    table : one row per replicate and n, with columns n, `error` and `by`.
    labels : text for each value of `by` (default: the value); its order is the order of colours.
    scale : dict or Series, what to divide the errors of each value of `by` by.
    """
    labels = labels or {value: str(value) for value in table[by].unique()}
    ends = []
    for (value, label), colour in zip(labels.items(), PALETTE * 3):
        rows = table[table[by] == value].groupby("n")[error]
        unit = 1.0 if scale is None else scale[value]
        mean, spread = rows.mean() / unit, 2 * rows.sem() / unit
        ax.errorbar(mean.index, mean, spread, fmt="o-", color=colour, linewidth=1.2, capsize=2)
        ends.append((mean.index[-1], mean.iloc[-1], label, colour))
    ax.set(xscale="log", yscale="log", xlabel="tokens $n$")
    ax.xaxis.set_minor_formatter(NullFormatter())
    label_ends(ax, ends)


def label_ends(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Text at the right ends of curves on a logarithmic axis: up where two would overlap, but not beyond its top."""
    place = ax.get_subplotspec()  # None for axes that were put somewhere by hand
    rows = place.get_gridspec().nrows if place else 1
    height = ax.figure.get_figheight() * 72 * 0.8 / rows  # of the axes, in points, roughly
    gap = 1.25 * mpl.rcParams["font.size"]
    low, high = np.log(ax.get_ylim())
    ends = sorted(ends, key=lambda end: end[1])
    wanted = [(np.log(y) - low) / (high - low) * height for _, y, _, _ in ends]
    placed = []
    for i, at in enumerate(wanted):
        placed.append(max(at, placed[-1] + gap if i else at))
    top = height
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], top)
        top = placed[i] - gap
    for (x, y, label, colour), at, where in zip(ends, wanted, placed):
        ax.annotate(label, (x, y), (8, where - at), textcoords="offset points", color=colour, va="center")


def slope_guide(ax: Axes, n, start: float, exponent: float = 0.5, label: str = r"$1/\sqrt{n}$") -> None:
    """A dashed line start (n / n[0])^-exponent, labelled at its right end: what a rate looks like."""
    n = np.asarray(n, dtype=float)
    line = start * (n / n[0]) ** -exponent
    ax.plot(n, line, "--", color=FAINT, linewidth=1.2)
    ax.annotate(label, (n[-1], line[-1]), (8, 0), textcoords="offset points", color=FAINT, va="center")


MAP_GAP = (0.47, 0.58)  # of cividis, where neither black nor white numbers are readable on both pages


@cache
def map_colours() -> ListedColormap:
    """The colours of heat maps with numbers: cividis without its middle, dark below 0.5 and light above.

    White numbers are readable on the dark ones and black numbers on the light ones, also on a dark page, where the
    style sheet turns the lightness of all of them around.
    """
    low, high = MAP_GAP
    parts = np.concatenate([np.linspace(0, low, 128), np.linspace(high, 1, 128)])
    return ListedColormap(mpl.colormaps["cividis"](parts), "cividis without its middle")


def head_map(ax: Axes, table: pd.DataFrame, value: str, title: str, log: bool = True):
    """Heat map of one number per head: layers down, heads across, the number written in each cell.

    `table` has columns layer, head and `value`; returns the image, for a colour bar.
    """
    grid = table.pivot(index="layer", columns="head", values=value)
    norm = LogNorm(grid.min().min(), grid.max().max()) if log else None
    image = ax.imshow(grid, cmap=map_colours(), norm=norm, aspect="auto")
    for (row, column), number in np.ndenumerate(grid.to_numpy()):
        shade = image.norm(number)
        text = f"{number:,.0f}" if abs(number) >= 9.95 else f"{number:#.2g}"
        ax.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if shade < 0.5 else "black")
    ax.set(xlabel="head", ylabel="layer", title=title)
    ax.set_xticks(range(len(grid.columns)), grid.columns)
    ax.set_yticks(range(len(grid.index)), grid.index)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return image


def phase_diagram(
    ax: Axes,
    loads: tuple[float, float] = (0.3, 20.0),
    tokens: tuple[float, float] = (10.0, 1e12),
    errors=(0.5, 0.2, 0.1, 0.05, 0.02, 0.01),
    heads: pd.DataFrame | None = None,
) -> None:
    """The phases of a query in the plane of its load and the number of tokens, with contours of its relative error.

    Tints and dashed lines: the phases of the typical error, at the token budgets n = e^{s^2/2} and n = e^{2 s^2}
    (`budgets.token_budget`), reduced load 1 and 1/2. Dotted: n = e^{3 s^2/2}, reduced load 1/sqrt(3), beyond which the
    *mean square* error falls like 1/n. Contours: `budgets.relative_error`, its root by the exact law of Gaussian
    tokens. Both axes are logarithmic.

    Parameters
    ----------
    loads, tokens : ranges of the axes; errors : relative errors to draw contours of.
    heads : marks to draw: columns load and tokens, and, where wanted, colour (one for each mark).
    """
    s, n = np.geomspace(*loads, 120), np.geomspace(*tokens, 70)
    ends = [np.minimum(np.exp(np.minimum(c * s**2, 700)), 10 * tokens[1]) for c in (0.5, 2.0)]
    frozen, extremal, averaging = (1 - 0.16 * (1 - np.array(to_rgb(PALETTE[i]))) for i in (1, 5, 0))
    for low, high, tint in zip((tokens[0] / 10, *ends), (*ends, 10 * tokens[1]), (frozen, extremal, averaging)):
        ax.fill_between(s, low, high, where=high > low, color=tint, linewidth=0)
    for end in ends:
        ax.plot(s, end, "--", color=INK, linewidth=1.1)
    square = np.minimum(np.exp(np.minimum(1.5 * s**2, 700)), 10 * tokens[1])
    ax.plot(s, square, ":", color=INK, linewidth=1.4)
    levels = np.log(sorted(errors))
    logarithm = np.log(budgets.relative_error(n[:, None], np.minimum(s, MOST_TILT)))
    ax.set(xscale="log", yscale="log", xlim=loads, ylim=tokens, xlabel="load $s$", ylabel="tokens $n$")
    curves = ax.contour(s, n, logarithm, levels, colors=INK, linestyles="-", linewidths=0.9, alpha=0.75)
    left = s[8]
    places = [(left, np.exp(np.interp(-x, -logarithm[:, 8], np.log(n)))) for x in levels]
    ax.clabel(curves, fmt=lambda level: f"{100 * np.exp(level):.3g}%", fontsize=10, manual=places)
    if heads is not None:
        colour = heads["colour"] if "colour" in heads else PALETTE[0]
        ax.scatter(heads["load"], heads["tokens"], s=26, c=colour, alpha=0.75, edgecolors="none", zorder=3)
    ax.grid(False)
    level = tokens[0] * (tokens[1] / tokens[0]) ** 0.93
    clt, unfrozen = np.sqrt(np.log(level) / 2), np.sqrt(2 * np.log(level))
    for low, high, tint, text in (
        (loads[0], clt, averaging, "typical error\nlike " + r"$1/\sqrt{n}$"),
        (clt, unfrozen, extremal, "few tokens\ndecide"),
        (unfrozen, loads[1], frozen, "frozen"),
    ):
        ground = {"facecolor": tint, "edgecolor": "none", "pad": 2.0}  # contours do not run through the words
        ax.text(np.sqrt(low * high), level, text, ha="center", va="center", bbox=ground)
