"""The page of a pooled probe: heat maps, the phase diagram, a reading of the numbers and what they do not say."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from tokcx_lib import plots
from tokcx_lib.probe import pages
from tokcx_lib.probe.layers import DISTANCES
from tokcx_lib.probe.pages import Picture, number

HARDEST = 3  # heads that the reading names
PHASES = {
    "averaging": "many tokens share the attention, and typical errors fall like 1/√n",
    "extremal": "the few tokens with the largest logits decide, and typical errors fall more slowly than 1/√n",
    "frozen": "one token or a handful take almost all of the attention, and more tokens still change which",
}


def _keys(head: pd.Series, meta: dict) -> int:
    """How many keys a query of this head reads: all tokens, or those of the head's window."""
    window = head.get("window", math.nan)
    return meta["tokens"] if math.isnan(window) else min(int(window), meta["tokens"])


def _effective(head: pd.Series, meta: dict) -> float:
    """The effective tokens among those."""
    return head[f"effective_{_keys(head, meta)}"]


def _each(measure: Callable[[pd.Series, dict], float], table: pd.DataFrame, meta: dict) -> pd.Series:
    return table.apply(measure, axis=1, args=(meta,))


# ---- figures ----


def _map(table: pd.DataFrame, value: str, title: str) -> Figure:
    layers, across = table["layer"].nunique(), table["head"].nunique()
    figure = Figure(figsize=(max(1.2 + 0.6 * across, 5.0), 1.1 + 0.42 * layers))
    # A head that looks at nothing has no place on a logarithmic scale.
    plots.head_map(figure.subplots(), table, value, title, log=bool(table[value].min() > 0))
    return figure


def _horizon_map(table: pd.DataFrame, meta: dict) -> Figure:
    return _map(table, "horizon", "attention horizon $H$ (two-sided)")


def _load_map(table: pd.DataFrame, meta: dict) -> Figure:
    return _map(table, "load_median", "median load $s$")


def _effective_map(table: pd.DataFrame, meta: dict) -> Figure:
    found = table.assign(effective=_each(_effective, table, meta))
    return _map(found, "effective", f"effective tokens among {meta['tokens']:,}{_or_window(table)}")


def _or_window(table: pd.DataFrame) -> str:
    return " or a window" if "window" in table else ""


def _phases(table: pd.DataFrame, meta: dict) -> Figure:
    figure = Figure(figsize=(8.4, 5.2))
    axes = figure.subplots()
    load, n = table["load_median"].clip(lower=0.01), meta["tokens"]
    read = _each(_keys, table, meta).astype(float)
    span = (min(0.3, 0.8 * load.min()), max(20.0, 1.25 * load.max()))
    marks = pd.DataFrame({"load": load, "tokens": read})
    plots.phase_diagram(axes, span, (min(10.0, read.min()), max(1e12, 1e3 * n)), heads=marks)
    for step, (_, head) in enumerate(hardest(table).iterrows()):
        axes.annotate(
            f"{head['layer']}.{head['head']}",
            (max(head["load_median"], 0.01), _keys(head, meta)),
            (0, 9 if step % 2 == 0 else -17),
            textcoords="offset points",
            ha="center",
            fontsize=10,
        )
    return figure


# Name of the file: what it shows.
FIGURES = {
    "horizon": Picture(
        "Heat map of the attention horizon of every head, layers down and heads across.", _horizon_map, map=True
    ),
    "load": Picture("Heat map of the median load of every head, layers down and heads across.", _load_map, map=True),
    "effective": Picture(
        "Heat map of the median effective number of tokens of every head, layers down and heads across.",
        _effective_map,
        map=True,
    ),
    "phases": Picture(
        "Phase diagram of load and number of tokens: regions averaging, few tokens decide, and frozen, with a dot at "
        "the median load of every head.",
        _phases,
    ),
}


def figures(table: pd.DataFrame) -> dict[str, Picture]:
    """The figures of a pooled probe, by the names of their files."""
    return FIGURES


# ---- the reading ----


def hardest(table: pd.DataFrame, count: int = HARDEST) -> pd.DataFrame:
    """The heads of largest median load, largest first."""
    return table.sort_values("load_median", ascending=False, kind="stable").head(count)


BUDGETS = Markup(
    "<p>If the logits of a query of load <i>s</i> were Gaussian, its output would depend on single tokens up to "
    "about <i>e</i><sup><i>s</i>²/2</sup> tokens (<i>not frozen beyond</i>). Its mean square error, which rare "
    "draws carry, would fall like 1/<i>n</i> only beyond about <i>e</i><sup>3<i>s</i>²/2</sup> (<i>mean square like "
    "1/n beyond</i>), and the smaller error of a typical draw like 1/√<i>n</i> only beyond about "
    "<i>e</i><sup>2<i>s</i>²</sup> (<i>typical error like 1/√n beyond</i>). All three are of leading "
    "exponential order. <i>10% at</i> is exact under the same assumption: the tokens after which the root mean "
    "square error is a tenth of the output's component along the query's direction. A query of small load has "
    "a small output, so that it too takes many tokens to a tenth of it.</p>"
)


def reading(table: pd.DataFrame, meta: dict) -> list[tuple[str, Markup]]:
    """What the numbers say, as pairs of a heading and paragraphs of HTML."""
    return [
        ("Where the heads are", _in_phases(table, meta)),
        ("The hardest heads", _hardest_heads(table, meta)),
        ("What a token budget means", BUDGETS),
        ("How fast the moments converge", _slowest_head(table)),
    ]


def _in_phases(table: pd.DataFrame, meta: dict) -> Markup:
    found = table["phase"].value_counts()
    phases = Markup("; ").join(
        Markup("<b>{} {}</b> ({})").format(found[name], name, what) for name, what in PHASES.items() if name in found
    )
    return Markup(
        "<p>By the load of its median query, on {:,} tokens{}, the {} heads are in these phases: {}.</p>"
    ).format(meta["tokens"], _or_window(table), len(table), phases)


def _hardest_heads(table: pd.DataFrame, meta: dict) -> Markup:
    heads = Markup("").join(_one_head(head, meta) for _, head in hardest(table).iterrows())
    return Markup(
        "<p>The load of a query is the standard deviation of its logits over the keys. The larger it is, the fewer "
        "tokens share the attention and the more of them it takes until the output has converged. The largest "
        "median loads:</p>\n<ul>{}</ul>"
    ).format(heads)


def _one_head(head: pd.Series, meta: dict) -> Markup:
    return Markup(
        "<li><b>{}</b>: load {} (95% of queries below {}), {} effective of {:,} tokens; with Gaussian logits, 10% at "
        "{} tokens</li>"
    ).format(
        _name(head),
        number(head["load_median"]),
        number(head["load_95"]),
        number(_effective(head, meta)),
        _keys(head, meta),
        number(head["tokens_10_percent"]),
    )


def _slowest_head(table: pd.DataFrame) -> Markup:
    slowest = table.loc[table["coupling"].idxmax()]
    return Markup(
        "<p>The mean and covariance of a head's outputs over all its queries converge like <i>n</i><sup>−β</sup>, "
        "where β depends on the coupling Ψ = <i>H</i>². The slowest is {}, with <i>H</i> = {}: β = {:.3f} for Gaussian "
        "tokens, at least {} by the reported theorem.</p>"
    ).format(
        _name(slowest),
        number(slowest["horizon"]),
        slowest["exponent_sharp"],
        number(slowest["exponent_reported"]),
    )


def _name(head: pd.Series) -> str:
    return f"layer {head['layer']}, head {head['head']}"


def caveats(table: pd.DataFrame, meta: dict) -> list[Markup]:
    """What the numbers do not say, as sentences of HTML."""
    tokens, queries = meta["tokens"], min(meta["queries"], meta["tokens"])
    found = [
        Markup(
            "<b>Budgets and phases assume Gaussian logits.</b> Then a share <i>e</i><sup>−<i>s</i>²</sup> of many "
            "tokens is effective. On real heads of load above 2 the measured share is often far higher, so a budget "
            "ranks heads; it does not bound what they need. {}"
        ).format(_measured_share(table, meta)),
        Markup(
            "<b>The covariance stands in for the sub-Gaussian matrix</b> that a bound would want, so horizons, "
            "couplings and loads describe these tokens and are not constants of a theorem. The same holds for the "
            "exponents."
        ),
        Markup(
            "<b>Tokens are pooled.</b> They were computed in windows of {} tokens, and the queries attend to all {:,} "
            "of them. The model itself looks at its own context only."
        ).format(meta["context"], tokens),
        Markup(
            "<b>Medians are over {:,} queries</b> drawn at random; a share of the queries has larger loads (column "
            "5–95%)."
        ).format(queries),
    ]
    return found + _of_positions(table, tokens)


def _of_positions(table: pd.DataFrame, tokens: int) -> list[Markup]:
    """Caveats of heads that do not see all tokens, or see where they are."""
    found = []
    if table["causal"].any():
        found.append(
            Markup(
                "<b>These heads are causal.</b> A query at position <i>i</i> sees <i>i</i> keys: read <i>n</i> as the "
                "number of earlier tokens. Phases and effective tokens are those of a query that sees all of the {:,} "
                "pooled tokens."
            ).format(tokens)
        )
    if "window" in table:
        found.append(
            Markup(
                "<b>Some heads read a sliding window.</b> Their queries see no more keys than column window says: "
                "phases and effective tokens are those of so many, and heads.csv leaves larger numbers of keys empty."
            )
        )
    if f"horizon_{DISTANCES[0]}" in table:
        found.append(
            Markup(
                "<b>Positions are rotary</b>, so logits depend on the distance between query and key. Maps, phases and "
                "effective tokens are those at distance 0; the table gives horizon and load at distances {} too."
            ).format(" and ".join(f"{distance:,}" for distance in DISTANCES))
        )
    return found


def _measured_share(table: pd.DataFrame, meta: dict) -> Markup:
    loaded = table[table["load_median"] > 2]
    if loaded.empty:
        return Markup("No median load here is above 2.")
    with np.errstate(over="ignore"):  # infinite then
        ratio = _each(_effective, loaded, meta) / _each(_keys, loaded, meta) * np.exp(loaded["load_median"] ** 2)
    heads = "the one head" if len(loaded) == 1 else f"the {len(loaded)} heads"
    least = "" if len(loaded) == 1 else "at least "
    return Markup("Here, on {} of median load above 2, it is {}{} times <i>e</i><sup>−<i>s</i>²</sup>.").format(
        heads, least, number(ratio.min())
    )


# ---- the page ----


def _columns(table: pd.DataFrame, meta: dict) -> dict[str, Callable[[pd.Series], str]]:
    """Headings of the table of heads, and what fills a cell."""

    def plain(name: str) -> Callable[[pd.Series], str]:
        return lambda head: number(head[name])

    found: dict[str, Callable[[pd.Series], str]] = {
        "layer": lambda head: str(head["layer"]),
        "head": lambda head: str(head["head"]),
        "horizon": plain("horizon"),
        "median load": plain("load_median"),
        "5–95%": lambda head: Markup("{} – {}").format(number(head["load_05"]), number(head["load_95"])),
        "effective": lambda head: number(_effective(head, meta)),
        "phase": lambda head: Markup('<span class="{0}">{0}</span>').format(head["phase"]),
        "not frozen beyond": plain("tokens_unfrozen"),
        "mean square like 1/n beyond": plain("tokens_mean_square"),
        "typical error like 1/√n beyond": plain("tokens_clt"),
        "10% at": plain("tokens_10_percent"),
        "β": lambda head: f"{head['exponent_sharp']:.3f}",
    }
    if "window" in table:
        found["window"] = lambda head: "" if math.isnan(head["window"]) else f"{head['window']:,.0f}"
    for distance in DISTANCES:
        if f"horizon_{distance}" in table:
            found[f"horizon at {distance:,}"] = plain(f"horizon_{distance}")
            found[f"load at {distance:,}"] = plain(f"load_median_{distance}")
    return found


def _facts(table: pd.DataFrame, meta: dict) -> dict[str, tuple[str, str]]:
    """What was probed, each with the beginning of its checksum, where one is known."""
    facts = {
        "model": meta["model"],
        "text": meta["text"],
        "heads": pages.heads(table),
        "tokens": f"{meta['tokens']:,}, in windows of {meta['context']}",
        "queries": f"{min(meta['queries'], meta['tokens']):,}, drawn with seed {meta['seed']}",
        "device": meta["device"],
        "made": pages.made(meta),
    }
    return pages.with_checksums(facts, meta)


def page(table: pd.DataFrame, meta: dict) -> str:
    """The page, as HTML with its figures inside; arguments as for `report.write`."""
    found, columns = table["phase"].value_counts(), _columns(table, meta)
    return pages.TEMPLATES.get_template("pooled.html.j2").render(
        meta=meta,
        facts=_facts(table, meta),
        tokens=f"{meta['tokens']:,}",
        or_window=_or_window(table),
        counts={name: found.get(name, 0) for name in PHASES},
        named=", ".join(f"{head['layer']}.{head['head']}" for _, head in hardest(table).iterrows()),
        pictures={name: pages.inside(picture, table, meta) for name, picture in FIGURES.items()},
        reading=reading(table, meta),
        caveats=caveats(table, meta),
        columns=list(columns),
        rows=[[cell(head) for cell in columns.values()] for _, head in table.iterrows()],
    )
