"""Figures of the sharp exponent (chapter 10): theory as lines, measurement as marks, labels in ink."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from scipy import stats

from tokcx_lib import plots
from tokcx_lib.sampling import binned
from tokcx_lib.studies.sharp.tables import prefactor
from tokcx_lib.theory import rates, stable_density
from tokcx_lib.theory.attention import attention_map

COLOURS = plots.PALETTE[:4]
MARKS = ("o", "s", "^", "D")
KINDS = {
    "reported": ("reported", COLOURS[3], ":"),
    "balance": ("reference curve", COLOURS[0], "--"),
    "subgaussian": ("sub-Gaussian", COLOURS[2], "-."),
    "gaussian": ("Gaussian, sharp", COLOURS[1], "-"),
}


def rate_curves(axes, table: pd.DataFrame) -> None:
    """Mean error of mean and variance against n, two standard errors, with lines of the sharp exponent and of half it.

    `table` of `tables.with_errors`; two axes. Lines go through the marks from 10^8 tokens on.
    """
    for ax, (error, title) in zip(axes, {"mean_error": "mean", "variance_error": "variance"}.items()):
        for (horizon, rows), colour, mark in zip(table.groupby("horizon"), COLOURS, MARKS):
            group, beta = rows.groupby("n")[error], rates.exponent(horizon**2, "gaussian")
            mean, spread = group.mean(), 2 * group.sem()
            n = mean.index.to_numpy(float)
            late, level = n >= 1e8, prefactor(mean, beta)
            ax.errorbar(n, mean, spread, fmt=mark, color=colour, markersize=4.5, linewidth=1.2)
            ax.plot(n, level * n**-beta, color=colour, linewidth=1.3)
            if horizon > 1:
                ax.plot(n[late], level * (1e8 * n[late]) ** (-beta / 2), ":", color=colour, linewidth=1.4)
            ax.annotate(f"$H = {horizon:g}$", (n[-1], mean.iloc[-1]), (8, -4), textcoords="offset points")
        ax.set(xscale="log", yscale="log", xlim=(5e3, 8e14), title=title, xlabel="tokens $n$")
        ax.set_xticks([1e4, 1e8, 1e12])
    axes[0].set_ylabel("typical error")


def exponents(ax) -> None:
    """The four exponents against the coupling, on logarithmic axes."""
    grid = np.geomspace(0.01, 100, 200)
    for kind, (label, colour, style) in KINDS.items():
        values = [rates.exponent(psi, kind) for psi in grid]
        ax.plot(grid, values, style, color=colour)
        shift = {"gaussian": 9, "balance": 0, "subgaussian": -10}.get(kind, 0)
        ax.annotate(label, (grid[-1], values[-1]), (7, shift), textcoords="offset points", va="center")
    ax.set(xscale="log", yscale="log", xlabel=r"coupling $\Psi$", ylabel=r"exponent $\beta$", xlim=(0.01, 2500))
    ax.set_xticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
    ax.set_yticks([0.5, 0.1, 0.01, 0.001], ["½", "0.1", "0.01", "0.001"])
    ax.minorticks_off()


def stable_histograms(axes, table: pd.DataFrame, horizons=(1.5, 2.0)) -> None:
    """Means over 10^12 tokens in units of their median size, beside the stable and the normal law of that size."""
    edges, at = np.linspace(-15, 15, 41), np.linspace(-15, 15, 241)
    for ax, horizon in zip(axes, horizons):
        means = table[(table["n"] == 10**12) & (table["horizon"] == horizon)]["mean"]
        alpha = 1 + 1 / horizon**2
        unit, normal_unit = stable_density.quartile(alpha), stats.norm.ppf(0.75)
        ax.hist(means / means.abs().median(), edges, density=True, color=COLOURS[0], alpha=0.4)
        stable = unit * np.exp(stable_density.log_density(at * unit, alpha))
        ax.plot(at, stable, color=COLOURS[1])
        ax.plot(at, normal_unit * stats.norm.pdf(at * normal_unit), "--", color=plots.INK, linewidth=1.3)
        ax.annotate("stable", (11, np.interp(11, at, stable)), (0, 26), textcoords="offset points", ha="center")
        ax.annotate("normal", (-4.1, 0.03), (-6, 0), textcoords="offset points", ha="right")
        ax.set(yscale="log", ylim=(3e-4, 1), xlabel="mean / median size")
        ax.set(title=rf"$H = {horizon:g}$, $\alpha = {alpha:.2f}$")
    axes[0].set_ylabel("density")


def one_token(axes, n: int, horizon: float, stream) -> float:
    """What one token at sqrt(2 log n) + 0.1 does to the map of scalar attention, and to each query by its density.

    Returns the place of the largest contribution, in units of sqrt(2 log n).
    """
    level = (2 * np.log(n)) ** 0.5
    rest = binned.draw(n - 1, stream, limit=level)
    keys = torch.cat([torch.repeat_interleave(rest.points, rest.counts.long()), rest.outer])[:, None]
    query = torch.linspace(-level, level, 241, dtype=torch.float64)[:, None]
    before = attention_map(keys, query, [[horizon]])[:, 0]
    after = attention_map(torch.cat([keys, keys.new_tensor([[level + 0.1]])]), query, [[horizon]])[:, 0]
    assert (after - before > -1e-12).all()
    gain = (after - before).clamp(min=0) * torch.exp(-(query[:, 0] ** 2) / 2) / (2 * np.pi) ** 0.5
    left, right = axes
    left.plot(query, after, color=COLOURS[1])
    left.plot(query, before, "--", color=COLOURS[0])
    left.annotate("with it", (2.0, 4.35), ha="right")
    left.annotate("without", (3.0, 2.9))
    left.set(xlabel="query $x$", ylabel="output")
    right.plot(query, gain, color=COLOURS[1])
    star = level * horizon / (1 + horizon**2)
    arrow = {"arrowstyle": "->", "color": plots.INK}
    right.annotate("$x^*$", (star, 0), (0, 26), ha="center", textcoords="offset points", arrowprops=arrow)
    right.set(xlabel="query $x$", ylabel="lift × density")
    return query[gain.argmax()].item() / level


def phases(axes, stream, reduced=(0.3, 0.75, 1.3), n: int = 10**6) -> list[tuple[float, float, float]]:
    """Share of the weight by token value, one draw of n tokens, at each reduced load; with the limit, and the edge.

    Returns (reduced load, effective tokens, largest weight) for each.
    """
    y = torch.randn(n, generator=stream, dtype=torch.float64)
    edge, at, found = (2 * np.log(n)) ** 0.5, np.linspace(-2, 11, 300), []
    for ax, sigma in zip(axes, reduced):
        weights = torch.softmax(sigma * edge * y, 0)
        ax.hist(y.numpy(), np.arange(-2, 6, 0.2), weights=weights.numpy() / 0.2, color=COLOURS[0], alpha=0.75)
        ax.plot(at, stats.norm.pdf(at, sigma * edge), color=COLOURS[1], linewidth=1.6)
        ax.axvline(edge, linestyle="--", color=plots.INK, linewidth=1.1)
        ax.set(title=rf"$\sigma = {sigma:g}$", xlabel="token $y$", ylim=(0, 2.4), xlim=(-2, 10.5))
        found.append((sigma, 1 / weights.square().sum().item(), weights.max().item()))
    axes[0].set_ylabel("share of weight")
    return found
