"""Figures of the heads of a language model (chapter 14): errors under four policies, the law, loads, sinks, budgets."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from tokcx_lib import plots
from tokcx_lib.probe.policies import POLICIES
from tokcx_lib.studies.language_model.tables import median_errors, phases, sinks

NAMES = {"drawn": "drawn", "latest": "latest", "first_latest": "first + latest", "heaviest": "heaviest"}
LOOKS = dict(zip(POLICIES, (plots.PALETTE[0], plots.PALETTE[1], plots.PALETTE[2], plots.PALETTE[3])))
LEAST_ERROR = 0.006
LEAST_COST = 0.003  # nats
KEYS = "keys read $n$"


def _lengths(ax: Axes, first: int, last: int) -> None:
    ticks = [n for n in (1, 4, 16, 64, 256, 1024, 4096, 16384) if first <= n <= last]
    ax.set(xscale="log")
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(ticks, [f"{n:,}" for n in ticks])


def policy_curves(ax: Axes, table: pd.DataFrame) -> None:
    """Error of the median head against the keys that it reads, by policy, with intervals over windows (bands)."""
    errors, ends = median_errors(table), []
    for policy in POLICIES:
        rows = errors[(errors["error"] == policy) & (errors["value"] > LEAST_ERROR)]
        ax.plot(rows["n"], rows["value"], "o", color=LOOKS[policy], markersize=4)
        ax.plot(rows["n"], rows["value"], color=LOOKS[policy], linewidth=0.9)
        ax.fill_between(rows["n"], rows["low"], rows["high"], color=LOOKS[policy], alpha=0.18, linewidth=0)
        if policy == "heaviest":  # there is no room at its end
            middle = rows.iloc[len(rows) // 2]
            ax.annotate(NAMES[policy], (middle["n"], middle["low"]), (-6, -4), textcoords="offset points",
                        color=LOOKS[policy], ha="right", va="top")  # fmt: skip
        else:
            ends.append((rows["n"].iloc[-1], rows["value"].iloc[-1], NAMES[policy], LOOKS[policy]))
    ax.set(yscale="log", xlabel=KEYS, ylabel="error / spread of values")
    plots.label_ends(ax, ends)
    _lengths(ax, 1, errors["n"].max())


def law_curves(ax: Axes, table: pd.DataFrame) -> None:
    """Drawn keys without the first position: measured (marks), the exact law (line), the Gaussian twin (crosses)."""
    errors = median_errors(table, ("rest", "law", "twin"))
    rows = {name: part for name, part in errors.groupby("error")}
    rest, law, twin = rows["rest"], rows["law"], rows["twin"]
    ax.fill_between(rest["n"], rest["head_10"], rest["head_90"], color=plots.PALETTE[0], alpha=0.10, linewidth=0)
    ax.errorbar(rest["n"], rest["value"], [rest["value"] - rest["low"], rest["high"] - rest["value"]], fmt="o",
                color=plots.PALETTE[0], capsize=2)  # fmt: skip
    ax.plot(law["n"], law["value"], color=plots.INK, linewidth=1.4)
    ax.plot(twin["n"], twin["value"], "x", color=plots.PALETTE[1], markersize=7, markeredgewidth=1.6)
    start = law["value"].iloc[0]
    ax.plot(law["n"], start * (law["n"] / law["n"].iloc[0]) ** -0.5, "--", color=plots.FAINT, linewidth=1.2)
    ax.set(yscale="log", xlabel=KEYS)
    last = law["n"].iloc[len(law) // 2]
    ax.annotate(r"$1/\sqrt{n}$", (last, start * (last / law["n"].iloc[0]) ** -0.5), (-2, -6), color=plots.FAINT,
                textcoords="offset points", ha="right", va="top")  # fmt: skip
    ax.text(0.03, 0.25, "● measured", color=plots.PALETTE[0], transform=ax.transAxes)
    ax.text(0.03, 0.17, "— exact law of drawn keys", color=plots.INK, transform=ax.transAxes)
    ax.text(0.03, 0.09, "× Gaussian twin", color=plots.PALETTE[1], transform=ax.transAxes)
    _lengths(ax, rest["n"].min(), rest["n"].max())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks([0.1, 0.2, 0.5, 1.0], ["0.1", "0.2", "0.5", "1"])


def load_curves(ax: Axes, table: pd.DataFrame) -> None:
    """Loads of queries that have n keys, and of n keys drawn from a late past, between the lines of the phases."""
    found = phases(table)
    n = found["n"]
    for share, text, where in ((1.0, "frozen\nabove", (10, 0)), (0.5, "averaging\nbelow", (10, 0))):
        line = share * np.sqrt(2 * np.log(n))
        ax.plot(n, line, "--", color=plots.INK, linewidth=1.1)
        ax.annotate(text, (n.iloc[-1], line.iloc[-1]), where, textcoords="offset points", va="center", color=plots.INK)
    ax.fill_between(n, found["load_10"], found["load_90"], color=plots.PALETTE[0], alpha=0.12, linewidth=0)
    spread = [found["load"] - found["load_low"], found["load_high"] - found["load"]]
    ax.errorbar(n, found["load"], spread, fmt="o-", color=plots.PALETTE[0], linewidth=1.2, capsize=2)
    ax.plot(n, found["past_load"], "s-", color=plots.PALETTE[1], linewidth=1.2, markersize=4)
    ax.annotate("queries that have $n$ keys", (n.iloc[1], found["load"].iloc[1]), (0, 20), textcoords="offset points",
                color=plots.PALETTE[0], va="bottom")  # fmt: skip
    ax.annotate("late queries, $n$ drawn", (n.iloc[0], found["past_load"].iloc[0]), (3, 7), textcoords="offset points",
                color=plots.PALETTE[1], va="bottom")  # fmt: skip
    ax.set(xlabel="keys $n$", ylabel="load $s$ of the median head", ylim=(0, None))
    _lengths(ax, n.min(), n.max())


def sink_dots(axes: list[Axes], table: pd.DataFrame, keys: int) -> None:
    """Layer by layer, a dot for each head: weight on the first position; effective tokens with and without it, and of
    as many Gaussian `keys`."""
    found = sinks(table, keys)
    shift = (found["head"] - found["head"].mean()) * 0.07
    axes[0].plot(found["layer"] + shift, found["share_first"], "o", color=plots.PALETTE[0], markersize=3.5, alpha=0.7)
    axes[0].set(ylabel="weight on the first", ylim=(-0.03, 1.03))
    middle = found.groupby("layer")[["effective", "effective_rest", "law"]].median()
    axes[1].plot(found["layer"] + shift, found["effective_rest"], "o", color=plots.PALETTE[0], markersize=3.5,
                 alpha=0.55)  # fmt: skip
    axes[1].plot(middle.index, middle["effective_rest"], color=plots.PALETTE[0], linewidth=1.6)
    axes[1].plot(middle.index, middle["effective"], color=plots.PALETTE[1], linewidth=1.6)
    axes[1].plot(middle.index, middle["law"], "--", color=plots.INK, linewidth=1.4)
    axes[1].set(yscale="log", xlabel="layer", ylabel="effective tokens")
    for text, colour, place in (("all keys", plots.PALETTE[1], 0.42), ("without the first", plots.PALETTE[0], 0.6),
                                ("- - law of that load", plots.INK, 0.83)):  # fmt: skip
        axes[1].text(place - 0.1, 0.93, text, color=colour, transform=axes[1].transAxes)


def law_scatter(ax: Axes, table: pd.DataFrame, n: int) -> None:
    """Head by head, the error of n drawn keys against the exact law at its loads; colours: share on the first."""
    at = table[table["n"] == n].groupby(["layer", "head"])[["rest", "law"]]
    heads = at.agg(lambda values: float(np.sqrt(np.mean(np.square(values)))))
    found = sinks(table).set_index(["layer", "head"])["share_first"].reindex(heads.index)
    dots = ax.scatter(heads["law"], heads["rest"], s=16, c=found, cmap="cividis", vmin=0, vmax=1, alpha=0.9)
    ends = np.array([0.8 * min(heads.min()), 1.15 * max(heads.max())])
    ax.fill_between(ends, ends * 0.8, ends * 1.25, color=plots.FAINT, alpha=0.12, linewidth=0)
    ax.plot(ends, ends, color=plots.INK, linewidth=1.1)
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="exact law", ylabel="measured")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_locator(FixedLocator([0.02, 0.05, 0.1, 0.2, 0.5, 1]))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.figure.colorbar(dots, ax=ax, label="weight on the first position")


def budget_dots(ax: Axes, heads: pd.DataFrame) -> None:
    """Keys that each head needs, by layer: first + latest (dots, and the median of a layer), and the oracle."""
    shift = (heads["head"] - heads["head"].mean()) * 0.07
    for policy in ("first_latest", "heaviest"):
        keys = heads[f"keys_{policy}"]
        ax.plot(heads["layer"] + shift, keys, "o", color=LOOKS[policy], markersize=3.5, alpha=0.6)
        middle = keys.groupby(heads["layer"]).median()
        ax.plot(middle.index, middle, color=LOOKS[policy], linewidth=1.6)
    ax.axhline(heads["keys"].max(), color=plots.INK, linestyle="--", linewidth=1.1)
    ax.set(yscale="log", xlabel="layer", ylabel="keys for an error of 10%", ylim=(0.8, 2.6 * heads["keys"].max()))
    ax.text(0.01, 0.93, "- - all keys", transform=ax.transAxes)
    ax.text(0.22, 0.93, "● the first and the latest", color=LOOKS["first_latest"], transform=ax.transAxes)
    ax.text(0.62, 0.93, "● the heaviest (oracle)", color=LOOKS["heaviest"], transform=ax.transAxes)


def loss_points(ax: Axes, both: pd.DataFrame) -> None:
    """What a token costs more against the error of the heads, from `loss_tables.foretold`: marks by policy, labelled
    with the number of keys, their intervals where these are above zero, and the power of the error that fits."""
    some = both[both["excess"] > LEAST_COST]
    for policy in POLICIES:
        rows = some.loc[some.index.get_level_values("order") == policy]
        low = np.minimum(rows["half"], 0.999 * rows["excess"])
        low = np.where(rows["half"] < rows["excess"], low, 0.0)
        ax.errorbar(rows["rms"], rows["excess"], [low, np.where(low > 0, rows["half"], 0.0)], fmt="o",
                    color=LOOKS[policy], capsize=2, linewidth=1)  # fmt: skip
        for (_, keys), row in rows.iterrows():
            offset = {"latest": (6, -16), "first_latest": (-5, -12)}.get(policy, (-5, 4))  # where no bar stands
            ax.annotate(f"{keys:,}", (row["rms"], row["excess"]), offset, color=LOOKS[policy],
                        textcoords="offset points", fontsize=9, ha="left" if offset[0] > 0 else "right")  # fmt: skip
    slope, start = np.polyfit(np.log(some["rms"]), np.log(some["excess"]), 1)
    ends = np.array([some["rms"].min(), some["rms"].max()])
    ax.plot(ends, np.exp(start) * ends**slope, color=plots.INK, linewidth=1.1)
    for place, policy in enumerate(POLICIES):
        ax.text(0.03, 0.93 - 0.075 * place, f"● {NAMES[policy]}", color=LOOKS[policy], transform=ax.transAxes)
    ax.set(xscale="log", yscale="log", xlabel="error of the heads / spread of values", ylabel="nats a token more")
    ax.set_xlim(0.6 * some["rms"].min(), 1.25 * some["rms"].max())
    ax.set_xticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5], ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5"])
    ax.xaxis.set_minor_formatter(NullFormatter())
