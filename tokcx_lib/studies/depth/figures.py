"""Figures of errors through layers and over the heads of a layer (chapter 12)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from tokcx_lib import plots
from tokcx_lib.studies.depth import influence
from tokcx_lib.studies.depth.slopes import ERRORS, typical


def first_order_curves(ax: Axes, table: pd.DataFrame, stack: str, error: str) -> None:
    """Typical error after each layer of a stack: measured (marks), and first order on the same tokens (lines).

    Parameters
    ----------
    table : of `slopes.with_first_order`; error : query or mean. Bars: two standard errors.
    """
    seen, first = ERRORS[error]
    ends, part = [], table[table["stack"] == stack]
    for (layer, rows), colour in zip(part.groupby("layer"), plots.PALETTE):
        roots = rows[seen].abs().pow(0.5).groupby(rows["n"])
        size, line = roots.mean() ** 2, rows.groupby("n")[first].apply(typical)
        ax.errorbar(size.index, size, 4 * roots.mean() * roots.sem(), fmt="o", color=colour, capsize=2)
        ax.plot(line.index, line, color=colour, linewidth=1.2)
        ends.append((size.index[-1], size.iloc[-1], f"layer {layer}", colour))
    ax.set(xscale="log", yscale="log", xlabel="tokens $n$", ylabel="typical error")
    plots.label_ends(ax, ends)


def slow_approach(ax: Axes, found: pd.DataFrame, horizons: list[float], stack: str) -> None:
    """Exponent of the largest token's pull on the mean of the tokens, against the number of tokens, layer by layer.

    Dashed: its limit; dotted: what it would be if couplings added up; bars: the slopes measured over 10^4 to 10^10.

    Parameters
    ----------
    found : of `slopes.exponents`; horizons : those of the layers of the stack.
    """
    digits = np.geomspace(4, 2000, 80)
    rows = found[(found["stack"] == stack) & (found["error"] == "mean")].set_index("layer")
    chain = influence.influences(horizons)
    for layer, colour in zip(rows.index[rows["far"].notna()], plots.PALETTE[1:]):
        psi, row = chain[layer - 1].over_queries(), rows.loc[layer]
        ax.plot(digits, [psi.exponent(k, 1.02 * k) for k in digits], color=colour, linewidth=1.6)
        ax.fill_between([4, 10], row.measured - 2 * row.stderr, row.measured + 2 * row.stderr, color=colour, alpha=0.2)
        ax.plot([4, 10], [row.measured] * 2, color=colour, linewidth=3)
        ax.axhline(row.theory, color=colour, linewidth=1, linestyle="--")
        ax.axhline(row.summed, color=colour, linewidth=1, linestyle=":")
        ax.annotate(f"layer {layer}", (digits[-1], row.theory), (8, 0), textcoords="offset points", color=colour,
                    va="center")  # fmt: skip
    ax.set(xscale="log", xlabel="tokens $n$", ylabel="exponent")
    ax.set_xticks([4, 10, 100, 1000], ["$10^4$", "$10^{10}$", "$10^{100}$", "$10^{1000}$"])
    ax.minorticks_off()


def errors_of_a_layer(ax: Axes, side: pd.DataFrame) -> None:
    """Error of the sum of the heads of each layer, if they were independent, of the worst head, and if all agreed.

    Parameters
    ----------
    side : of `tables.head_layers`.
    """
    looks = {
        "agreed": ("^", 7, "if all agreed"),
        "quadrature": ("_", 18, "if independent"),
        "total": ("o", 7, "sum of the heads"),
        "worst": ("v", 6, "worst head"),
    }
    for (what, (mark, size, label)), colour in zip(looks.items(), (1, 0, 0, 2)):
        ax.plot(side.index, side[what], mark, color=plots.PALETTE[colour], markersize=size, label=label)
    ax.set(xlabel="layer", ylabel="error / spread", ylim=(0, None))
    ax.legend(fontsize=10)


def pairs_of_heads(ax: Axes, pairs: pd.DataFrame) -> None:
    """Correlation of the errors of every two heads of a layer, measured against first order.

    Parameters
    ----------
    pairs : of `tables.head_pairs`.
    """
    ends = [1.1 * pairs[["measured", "expected"]].min(axis=None), 1.1 * pairs[["measured", "expected"]].max(axis=None)]
    ax.plot(ends, ends, color=plots.FAINT, linewidth=1)
    ax.plot(pairs["expected"], pairs["measured"], "o", color=plots.PALETTE[0], markersize=4, alpha=0.5)
    ax.set(xlabel="first order", ylabel="measured", title="correlation of two heads")


def errors_of_a_model(axes: list[Axes], rms: pd.DataFrame, n: int) -> None:
    """Left, error of the hidden states after each layer, for each number of keys; right, what it is made of at n keys.

    Parameters
    ----------
    axes : two of them; rms : of `tables.model_layers`.
    """
    relative = rms[["error", "fresh", "inherited"]].div(rms["spread"], axis=0)
    keys = rms.index.get_level_values("n").unique()
    lines = [(axes[0], relative["error"][k], f"n = {k}") for k in keys]
    lines += [(axes[1], relative[what][n], what) for what in relative]
    for (ax, line, label), colour in zip(lines, [*plots.PALETTE[: len(keys)], *plots.PALETTE]):
        ax.plot(line.index, line, "o-", color=colour)
        ax.annotate(label, (line.index[-1], line.iloc[-1]), (8, 0), va="center", textcoords="offset points",
                    color=colour)  # fmt: skip
    axes[0].set(xlabel="after layer", ylabel="error / spread")
    axes[1].set(xlabel="after layer", title=f"n = {n}")
