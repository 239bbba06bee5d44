"""Figures of the errors of sparse attention: each scheme has one colour and one mark throughout (chapter 11)."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from tokcx_lib import plots

SCHEME_LOOKS = {
    "random": (plots.PALETTE[0], "o-"),
    "window": (plots.PALETTE[1], "s-"),
    "strided": (plots.PALETTE[4], "^-"),
    "window + random": (plots.PALETTE[5], "v-"),
    "window + weighted": (plots.PALETTE[2], "D-"),
    "top-k": (plots.PALETTE[3], "P-"),
    "low rank": (plots.FAINT, "x--"),
    "features": (plots.INK, "*:"),
}


def scheme_curves(ax: Axes, table: pd.DataFrame, schemes=None, together: dict | None = None) -> None:
    """Mean error of sparse attention against the keys read, one line a scheme, labelled at its right end.

    Parameters
    ----------
    table : one row per scheme, budget and replicate, with columns scheme, budget and error. Bars: two standard errors.
    schemes : which to draw, names of `SCHEME_LOOKS`; all if None.
    together : scheme -> label, for lines that lie on each other; an empty label is not written.
    """
    ends = []
    for name in schemes or SCHEME_LOOKS:
        rows = table[table["scheme"] == name].groupby("budget")["error"]
        mean, (colour, look) = rows.mean(), SCHEME_LOOKS[name]
        ax.errorbar(mean.index, mean, 2 * rows.sem(), fmt=look, color=colour, linewidth=1.2, markersize=4.5)
        label = (together or {}).get(name, name)
        if label:
            ends.append((mean.index[-1], mean.iloc[-1], label, colour))
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(mean.index, [f"{b:g}" for b in mean.index])
    ax.minorticks_off()
    plots.label_ends(ax, ends)
