"""Figures of the errors of sparse attention: each scheme has one colour and one mark throughout (chapter 11)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokcx_lib import plots
from tokcx_lib.studies.sparse import theory

# Hues that are near each other differ in their line and their mark.
SCHEME_LOOKS = {
    "random": (plots.PALETTE[0], "o-"),
    "window": (plots.PALETTE[1], "s-"),
    "strided": (plots.INK, "^--"),
    "window + random": (plots.PALETTE[5], "v:"),
    "window + weighted": (plots.PALETTE[2], "D-"),
    "top-k": (plots.PALETTE[3], "P-"),
    "low rank": (plots.FAINT, "x--"),
    "features": (plots.PALETTE[4], "*:"),
}
BUDGET_TICKS = [32, 128, 512]
LOAD_TICKS = [0.5, 1, 2, 4, 8, 16]


def scheme_curves(ax: Axes, table: pd.DataFrame, schemes=None) -> list:
    """Mean error of sparse attention against the keys read, one line a scheme; returns the lines, for a key.

    Parameters
    ----------
    table : one row per scheme, budget and replicate, with columns scheme, budget and error. Bars: two standard errors.
    schemes : which to draw, names of `SCHEME_LOOKS`; all if None.
    """
    lines = []
    for name in schemes or SCHEME_LOOKS:
        rows = table[table["scheme"] == name].groupby("budget")["error"]
        mean, (colour, look) = rows.mean(), SCHEME_LOOKS[name]
        lines.append(
            ax.errorbar(mean.index, mean, 2 * rows.sem(), fmt=look, color=colour, linewidth=1.2, markersize=4.5)
        )
    return lines


def scheme_panels(fig: Figure, axes, panels: dict, schemes: list[str], low: float, names: dict | None = None) -> None:
    """Panels of `scheme_curves` with the same two axes, and one key: in the panel left over, or under all of them.

    Where top-k falls below the axis, the panel says how far.

    Parameters
    ----------
    axes : array (rows, columns); panels : title -> (table, levels), levels: style of a line -> height to draw it at.
    low : lower end of the axis of errors; names : other names of schemes in the key.
    """
    flat = list(axes.flat)
    for ax, (title, (table, levels)) in zip(flat, panels.items()):
        lines = scheme_curves(ax, table, schemes)
        for style, level in levels.items():
            ax.axhline(level, linestyle=style, color=plots.FAINT, linewidth=1.2, zorder=1)
        ax.set(xscale="log", yscale="log", ylim=(low, 1.9), xlim=(27, 1250), title=title)
        ax.set_xticks(BUDGET_TICKS, [str(b) for b in BUDGET_TICKS])
        ticks = 10.0 ** np.arange(np.ceil(np.log10(low)), 0.5)
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        best = table[table["scheme"] == "top-k"].groupby("budget")["error"].mean()
        if best.min() < low / 2 and "top-k" in schemes:
            digits, leaves = int(np.floor(np.log10(best.min()))), best.index[best < low][0]
            right = leaves <= 256  # of the line
            at, side = (1150, "right") if right else (30, "left")
            ax.text(at, low * 1.4, f"to $10^{{{digits}}}$", ha=side, color=SCHEME_LOOKS["top-k"][0])
    labels = [(names or {}).get(name, name) for name in schemes]
    left = flat[len(panels) :]
    if left:
        left[0].axis("off")
        left[0].legend(lines, labels, loc="center left", handlelength=2.6)
    else:
        fig.legend(lines, labels, loc="outside lower center", ncols=4, handlelength=2.6)
    shown = len(panels)
    for row in axes:
        row[0].set_ylabel("error / spread")
    for i, ax in enumerate(flat[:shown]):
        if i + axes.shape[1] >= shown:
            ax.set_xlabel("keys read, $b$")
            ax.tick_params(labelbottom=True)


def crossing(axes, gaussian: pd.DataFrame, heads: pd.DataFrame, budget: int, n: int, dim: int) -> None:
    """Error against the load at one budget: Gaussian tokens with first order (left), real heads (right).

    Parameters
    ----------
    axes : two, of one range; gaussian : columns load, scheme, budget, error; heads : the same, a load for each head.
    n, dim : keys and dimension of the Gaussian tokens. Lines end where first order has no meaning.
    """
    loads = np.geomspace(0.4, 9, 60)
    ends = {"random": np.sqrt(2 * np.log(budget) / 3), "top-k": np.sqrt(np.log(n) / 2)}
    laws = {"random": theory.subset_error, "top-k": theory.largest_error}
    for ax, rows, names in ((axes[0], gaussian, ("random", "top-k")), (axes[1], heads, ("random", "window", "top-k"))):
        here = rows[rows["budget"] == budget]
        for name in names:
            part = here[here["scheme"] == name].groupby("load")["error"]
            colour, look = SCHEME_LOOKS[name]
            joined = look if rows is heads else look[0]
            ax.errorbar(part.mean().index, part.mean(), 2 * part.sem(), fmt=joined, color=colour, linewidth=1.2)
            if rows is gaussian:
                valid = loads[loads < ends[name]]
                ax.plot(valid, [laws[name](s, dim, budget, n) for s in valid], color=colour, linewidth=1.6)
        ax.set(xscale="log", yscale="log", xlabel="load $s$", ylim=(1e-3, 2))
        ax.set_xticks(LOAD_TICKS, [f"{s:g}" for s in LOAD_TICKS])
        ax.set_yticks([0.001, 0.01, 0.1, 1], ["0.001", "0.01", "0.1", "1"])
        ax.minorticks_off()
    ignore = np.minimum(loads / np.sqrt(dim), 1)
    axes[0].plot(loads, ignore, ":", color=plots.FAINT)
    blind = heads[heads["scheme"] == "mean"].groupby("load")["error"].mean()
    axes[1].plot(blind.index, blind, ":", color=plots.FAINT)
    axes[0].set(ylabel="error / spread", title="Gaussian tokens", xlim=(0.4, 10))
    axes[1].set(title="heads of MiniLM", xlim=(0.4, 20))
    words = (
        (0, "top-k", 0.45, 0.52),
        (0, "random", 0.45, 0.041),
        (0, "mean value", 2.6, 0.24),
        (1, "top-k", 4.6, 0.035),
        (1, "random", 0.55, 0.045),
        (1, "window", 1.25, 0.56),
        (1, "mean value", 4.6, 0.125),
    )
    for panel, word, x, y in words:
        colour = SCHEME_LOOKS[word][0] if word in SCHEME_LOOKS else plots.FAINT
        axes[panel].text(x, y, word, color=colour)


def top_mass(ax: Axes, missing: dict, loads, measured: pd.DataFrame, k: int) -> None:
    """Attention that the k largest weights miss, against the load: exact, in the frozen limit (dotted), measured.

    Parameters
    ----------
    missing : number of keys -> missing mass at `loads`, exact; measured : index load, columns mean and sem of the kept
        mass, for the first number of keys.
    """
    names = {n: f"n = {n:,.0f}" if n < 1e6 else f"n = $10^{{{np.log10(n):.0f}}}$" for n in missing}
    for n, colour in zip(missing, plots.PALETTE):
        ax.plot(loads, missing[n], color=colour)
        frozen_early = np.log(n) < 15  # the label left of its curve, else above it
        at = int(np.searchsorted(loads, 5.0 if frozen_early else 3.5))
        side, move = ("right", (-10, -6)) if frozen_early else ("left", (0, 8))
        place = (loads[at], missing[n][at])
        ax.annotate(names[n], place, move, textcoords="offset points", ha=side, color=colour)
        transition = np.sqrt(2 * np.log(n))
        grid = np.linspace(1.15, 16 / transition, 60)
        frozen = [theory.frozen_missing_mass(r, k) for r in grid]
        ax.plot(grid * transition, frozen, ":", color=colour)
    ax.errorbar(measured.index, 1 - measured["mean"], 2 * measured["sem"], fmt="o", color=plots.PALETTE[0])
    ax.set(yscale="log", xlim=(0.4, 16.5), ylim=(1e-4, 2.5), xlabel="load $s$", ylabel=f"missed by the {k} largest")
    ax.set_yticks([1e-4, 1e-3, 1e-2, 0.1, 1], ["0.0001", "0.001", "0.01", "0.1", "1"])
    ax.minorticks_off()
