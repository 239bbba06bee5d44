"""Figures of scalings: each has one colour and one mark throughout (chapter 15)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from tokcx_lib import plots
from tokcx_lib.studies.scaling import tables
from tokcx_lib.theory import scaling, softmax_law

LOOKS = {
    "none": (plots.INK, "o", "-", "no scaling"),
    "root": (plots.PALETTE[2], "D", "-", r"$\sqrt{\log n}$"),
    "llama4": (plots.PALETTE[3], "v", "--", "Llama 4"),
    "log": (plots.PALETTE[0], "s", "-", r"$\log n$ (SSMax, Qwen)"),
    "yarn": (plots.PALETTE[4], "P", "--", "YaRN"),
    "square": (plots.PALETTE[1], "^", "-", r"$(\log n)^2$"),
}
"""Colour, mark, line and name of each scaling. The two that are dashed follow the solid one after or before them."""


def phase_paths(ax: Axes, load: float, anchor: float, most: float = 1e10) -> None:
    """On a phase diagram (`plots.phase_diagram`): where scalings take a query of some load at the anchor."""
    n = np.geomspace(anchor, most, 200)
    for scheme, (colour, _, line, _) in LOOKS.items():
        ax.plot(load * scaling.factor(scheme, n, anchor), n, line, color=colour, linewidth=2, zorder=4)
    ax.plot([load], [anchor], "o", color=plots.INK, markersize=6, zorder=5)


def reduced_paths(ax: Axes, load: float, anchor: float, most: float = 1e10) -> None:
    """Reduced load against n under every scaling, from the anchor on, over the phases of the typical error."""
    n = np.geomspace(anchor, most, 400)
    top = 2.4
    for low, high, colour in ((1, top, plots.PALETTE[1]), (0.5, 1, plots.PALETTE[5]), (0, 0.5, plots.PALETTE[0])):
        ax.axhspan(low, high, color=1 - 0.16 * (1 - np.array(to_rgb(colour))), linewidth=0)
    for scheme, (colour, _, line, _) in LOOKS.items():
        ax.plot(n, scaling.reduced_load(load * scaling.factor(scheme, n, anchor), n), line, color=colour)
    for x, y, text in (
        (1.5 * anchor, 2.2, "frozen"),
        (most**0.7, 0.92, "few tokens decide"),
        (1.5 * anchor, 0.1, "averaging"),
    ):
        ax.text(x, y, text, va="center")
    ax.set(xscale="log", xlim=(anchor, most), ylim=(0, top), xlabel="tokens $n$", ylabel=r"reduced load $\sigma$")
    ax.grid(False)


def label_paths(
    ax: Axes, load: float, anchor: float, most: float = 1e10, nudges: dict[str, float] | None = None
) -> None:
    """Names at the right ends of `reduced_paths`; `nudges` moves some up or down, in points."""
    for scheme, (colour, _, _, name) in LOOKS.items():
        y = float(scaling.reduced_load(load * scaling.factor(scheme, most, anchor), most))
        ax.annotate(
            name,
            (most, y),
            (6, (nudges or {}).get(scheme, 0)),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )


def effective_curves(ax: Axes, table: pd.DataFrame, load: float, anchor: float, share: bool) -> list:
    """Effective tokens (or their share of n) of a query over drawn Gaussian tokens, with the exact law as lines.

    `table` has columns scheme, n and participation, one row a draw. Bars: two standard errors. Returns the marks.
    """
    grid = np.geomspace(table["n"].min(), table["n"].max(), 60)
    shown = []
    for scheme, (colour, mark, line, _) in LOOKS.items():
        exact = softmax_law.softmax_moments(grid, load * scaling.factor(scheme, grid, anchor)).participation
        unit = grid if share else np.ones_like(grid)
        ax.plot(grid, 1 / (exact * unit), line, color=colour, linewidth=1.4)
        groups = table[table["scheme"] == scheme].groupby("n")["participation"]
        mean, error = groups.mean(), 2 * groups.sem()
        unit = mean.index.to_numpy() if share else 1.0
        shown.append(
            ax.errorbar(
                mean.index, 1 / (mean * unit), error / mean**2 / unit, fmt=mark, color=colour, capsize=2, linewidth=1.2
            )
        )
    ax.set(xscale="log", yscale="log", xlabel="tokens $n$")
    ax.xaxis.set_minor_formatter(NullFormatter())
    return shown


def head_curves(ax: Axes, heads: pd.DataFrame, column: str, law: str | None = None, schemes=None) -> list:
    """Medians over heads against n, one mark a scheme, joined; `law` is a column to draw as lines beside them."""
    median = tables.medians(heads, column)
    lines = []
    for scheme in schemes or LOOKS:
        colour, mark, line, _ = LOOKS[scheme]
        joined = "" if law else line
        (drawn,) = ax.plot(median.index, median[scheme], mark + joined, color=colour, linewidth=1.2)
        lines.append(drawn)
        if law:
            beside = tables.medians(heads, law)[scheme]
            ax.plot(beside.index, beside, line, color=colour, linewidth=1.2)
    ax.set(xscale="log", yscale="log", xlabel="keys $n$")
    ax.xaxis.set_minor_formatter(NullFormatter())
    low, high = ax.get_ylim()
    if high < 30 * low:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    return lines
