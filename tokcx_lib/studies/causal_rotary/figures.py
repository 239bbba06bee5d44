"""Figures of causal and rotary attention (chapter 13)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from tokcx_lib import plots
from tokcx_lib.theory import rotary

_GREEN, _BLUE, _RED = plots.PALETTE[2], plots.PALETTE[0], plots.PALETTE[1]


def variances(ax: Axes, table: pd.DataFrame) -> None:
    """n Var of the mean of the outputs: lines are the limits, marks are measured, with two standard errors.

    `table` is that of `tables.causal_variances`.
    """
    looks = {"causal": (_RED, "o", "causal"), "whole": (_BLUE, "s", "all pairs")}
    lengths = sorted(table["n"].unique())
    for (H, mask), part in table.groupby(["horizon", "mask"]):
        colour, mark, name = looks[mask]
        limit = part["limit"].iloc[0]
        ax.plot([lengths[0] / 1.4, lengths[-1] * 1.4], [limit, limit], color=colour, linewidth=1.2)
        ax.errorbar(part["n"], part["measured"], 2 * part["error"], fmt=mark, color=colour, capsize=2)
        ax.annotate(
            f"{name}, $H = {H}$",
            (lengths[-1] * 1.4, limit),
            (4, 0),
            textcoords="offset points",
            color=colour,
            va="center",
        )
    ax.set(xscale="log", xlabel="tokens $n$", ylabel="$n$ · variance of the mean", ylim=(1, None))
    ax.set_xlim(lengths[0] / 1.6, lengths[-1] * 14)
    ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
    ax.minorticks_off()


def mean_lengths(ax: Axes, table: pd.DataFrame, angles) -> None:
    """Length of the mean output of a rotary query over its load: exact lines, and what was measured.

    `table` is that of `tables.rotary_lengths`.
    """
    n = np.unique(np.geomspace(table["n"].min(), table["n"].max(), 150).round())
    for load, colour, mark in zip(sorted(table["load"].unique()), (_BLUE, _RED), "os"):
        part = table[table["load"] == load]
        q = np.ravel([[load / len(angles) ** 0.5, 0.0] for _ in angles])
        line = [np.linalg.norm(rotary.mean_lengths(int(k), q, angles)) / load for k in n]
        ax.plot(n, line, color=colour, linewidth=1.2)
        ax.errorbar(part["n"], part["measured"] / load, 2 * part["error"] / load, fmt=mark, color=colour, capsize=2)
        at = np.argmin(np.abs(n - 13))
        ax.annotate(
            f"load {load:g}", (n[at], line[at]), (0, -13), textcoords="offset points", color=colour, va="center"
        )
    many = [np.linalg.norm(rotary.plane_factor(k, angles)) / len(angles) ** 0.5 for k in n]
    ax.plot(n, many, ":", color=plots.INK, linewidth=1.4)
    ax.annotate("many keys at each distance", (n[0], many[0]), (-4, 12), textcoords="offset points")
    ax.set(xscale="log", xlabel="keys $n$", ylabel="length of the mean output / load", ylim=(0, 1.12))


def planes(axes, table: pd.DataFrame, angles, load: float) -> None:
    """One small panel a plane: the share of the query that is left, law (line) and measured (marks), at one load.

    `table` is that of `tables.plane_lengths`.
    """
    part = table[table["load"] == load]
    n = np.geomspace(part["n"].min(), part["n"].max(), 400)
    q = np.ravel([[load / len(angles) ** 0.5, 0.0] for _ in angles])
    whole = np.unique(n.round())
    kept = np.array([rotary.mean_lengths(int(k), q, angles) for k in whole]) / (load / len(angles) ** 0.5)
    for m, (ax, theta) in enumerate(zip(axes, angles)):
        rows = part[part["plane"] == m]
        ax.plot(whole, kept[:, m], color=_BLUE, linewidth=1.4)
        ax.errorbar(rows["n"], rows["measured"], 2 * rows["error"], fmt="o", color=_RED, capsize=2)
        half = rotary.half_length(theta).item()
        ax.axvline(half, color=plots.FAINT, linestyle="--", linewidth=1)
        ax.set(xscale="log", title=rf"$\theta$ = {theta:g}", ylim=(-0.08, 1.08), xticks=[10, 10**3, 10**5])
        ax.minorticks_off()
