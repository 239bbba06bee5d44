"""The report of a probe: a page that stands alone, with heat maps, the phase diagram, and a reading of the numbers.

The page asks no other host for anything and runs no script; its figures are inside it, drawn once for light and once
for dark screens.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from html import escape
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from tokcx_lib import plots, records
from tokcx_lib.probe.layers import DISTANCES
from tokcx_lib.probe.plan import differing, read_plan

MADE = "probe.json"  # what made the other files
_ELSEWHERE = "choose another folder, or give --force to replace it"
HARDEST = 3  # heads that the reading names
LIGHT_INK = "#dfe3e7"  # of maps on a dark screen
PHASES = {
    "averaging": "many tokens share the attention, and errors fall like 1/√n",
    "extremal": "the few tokens with the largest logits decide, and errors fall more slowly than 1/√n",
    "frozen": "one token or a handful take almost all of the attention, and more tokens still change which",
}


def write(table: pd.DataFrame, meta: dict, folder: Path) -> list[Path]:
    """Write heads.csv, report.html, four PNG files and probe.json, which says what made them; returns their paths.

    Parameters
    ----------
    table : from `measure.probe`.
    meta : what was probed: model, text, tokens, queries, seed and context; the checksums model_sha256, text_sha256 and
        tokens_sha256 (of the token ids), each where it is known; and the device, versions and created of
        `records.provenance`. All of it goes into probe.json; where it has the plan (`plan.plan`), `require_unused`
        knows this probe again.

    Raises
    ------
    ValueError
        If the table is not that of a probe of so many tokens.
    OSError
        If a file cannot be written; none is then left in half.
    """
    if len(table) == 0 or (column := f"effective_{meta['tokens']}") not in table:
        shown = f"{len(table)} rows of {list(table)}"
        raise ValueError(f"table: expected heads with a column {column}, got {shown}")
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "heads.csv": table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode(),
        "report.html": page(table, meta).encode(),
        # On their own they are opened on any ground: white belongs to them.
        **{f"{name}.png": _draw(table, meta, draw, ground="white") for name, (_, draw) in FIGURES.items()},
        MADE: (json.dumps(meta, indent=2) + "\n").encode(),
    }
    paths = [folder / name for name in files]
    records.write_whole(*(item for path, content in zip(paths, files.values()) for item in (path, content)))
    return paths


def require_unused(folder: Path, plan: dict) -> None:
    """Raise ValueError if a folder holds another probe than that of a plan, finished or not: its files would be lost.

    The same probe is welcome: it goes on from its checkpoint, or writes the same numbers again.
    """
    wrote = [name for name in (MADE, "heads.csv", "report.html") if (folder / name).exists()]
    finished, unfinished = read_plan(folder / MADE), read_plan(folder / ".probe" / "plan.json")
    if wrote and finished is None:
        raise ValueError(f"out: {folder} has a {wrote[-1]}, and nothing says of which probe; {_ELSEWHERE}")
    for made, kind in ((finished, "a"), (unfinished, "an unfinished")):
        if made is not None and (others := differing(made, plan)):
            what = f"{made.get('model')} on {made.get('text', 'a text')}, {made.get('tokens')} tokens"
            raise ValueError(f"out: {folder} holds {kind} probe of another {', '.join(others)} ({what}); {_ELSEWHERE}")


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


def _draw(table: pd.DataFrame, meta: dict, draw: Callable, ground: str = "none", ink: str = plots.INK) -> bytes:
    """One figure as PNG, with text and axes of some ink."""
    parts = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with mpl.rc_context():
        plots.use_style()
        mpl.rcParams.update(dict.fromkeys(parts, ink))
        figure = draw(table, meta)
        content = BytesIO()
        figure.savefig(content, format="png", facecolor=ground)
    return content.getvalue()


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


# Name of the file: alternative text, and what draws it.
FIGURES = {
    "horizon": ("Heat map of the attention horizon of every head, layers down and heads across.", _horizon_map),
    "load": ("Heat map of the median load of every head, layers down and heads across.", _load_map),
    "effective": (
        "Heat map of the median effective number of tokens of every head, layers down and heads across.",
        _effective_map,
    ),
    "phases": (
        "Phase diagram of load and number of tokens: regions averaging, few tokens decide, and frozen, with a dot at "
        "the median load of every head.",
        _phases,
    ),
}


# ---- the reading ----


def hardest(table: pd.DataFrame, count: int = HARDEST) -> pd.DataFrame:
    """The heads of largest median load, largest first."""
    return table.sort_values("load_median", ascending=False, kind="stable").head(count)


def reading(table: pd.DataFrame, meta: dict) -> list[tuple[str, str]]:
    """What the numbers say, as pairs of a heading and HTML, which begins with a paragraph."""
    n, found = meta["tokens"], table["phase"].value_counts()
    phases = "; ".join(
        f"<b>{found.get(name, 0)} {name}</b> ({what})" for name, what in PHASES.items() if found.get(name, 0)
    )
    slowest = table.loc[table["coupling"].idxmax()]
    largest = "".join(_one_head(head, meta) for _, head in hardest(table).iterrows())
    return [
        (
            "Where the heads are",
            f"By the load of its median query, on {n:,} tokens{_or_window(table)}, the {len(table)} heads are in these "
            f"phases: {phases}.",
        ),
        (
            "The hardest heads",
            "The load of a query is the standard deviation of its logits over the keys. The larger it is, the fewer "
            "tokens share the attention and the more of them it takes until the output has converged. The largest "
            f"median loads:</p>\n<ul>{largest}</ul>",
        ),
        (
            "What a token budget means",
            "If the logits of a query of load <i>s</i> were Gaussian, its output would depend on single tokens up to "
            "about <i>e</i><sup><i>s</i>²/2</sup> tokens (<i>not frozen beyond</i>), and its error would fall like "
            "1/√<i>n</i> only beyond about <i>e</i><sup>2<i>s</i>²</sup> (<i>1/√n beyond</i>). Both are of leading "
            "exponential order. <i>10% at</i> is exact under the same assumption: the tokens after which the root mean "
            "square error is a tenth of the output's component along the query's direction. A query of small load has "
            "a small output, so that it too takes many tokens to a tenth of it.",
        ),
        (
            "How fast the moments converge",
            f"The mean and covariance of a head's outputs over all its queries converge like <i>n</i><sup>−β</sup>, "
            f"where β depends on the coupling Ψ = <i>H</i>². The slowest is {_name(slowest)}, with "
            f"<i>H</i> = {_number(slowest['horizon'])}: β = {slowest['exponent_sharp']:.3f} for Gaussian tokens, at "
            f"least {_number(slowest['exponent_reported'])} by the reported theorem.",
        ),
    ]


def _name(head: pd.Series) -> str:
    return f"layer {head['layer']}, head {head['head']}"


def _one_head(head: pd.Series, meta: dict) -> str:
    return (
        f"<li><b>{_name(head)}</b>: load {_number(head['load_median'])} "
        f"(95% of queries below {_number(head['load_95'])}), "
        f"{_number(_effective(head, meta))} effective of {_keys(head, meta):,} tokens; with Gaussian logits, 10% at "
        f"{_number(head['tokens_10_percent'])} tokens</li>"
    )


def caveats(table: pd.DataFrame, meta: dict) -> list[str]:
    """What the numbers do not say, as sentences of HTML."""
    n = meta["tokens"]
    found = [
        "<b>Budgets and phases assume Gaussian logits.</b> Then a share <i>e</i><sup>−<i>s</i>²</sup> of many tokens "
        "is effective. On real heads of load above 2 the measured share is often far higher, so a budget ranks "
        "heads; it "
        "does not bound what they need." + _measured_share(table, meta),
        "<b>The covariance stands in for the sub-Gaussian matrix</b> that a bound would want, so horizons, couplings "
        "and loads describe these tokens and are not constants of a theorem. The same holds for the exponents.",
        f"<b>Tokens are pooled.</b> They were computed in windows of {meta['context']} tokens, and the queries attend "
        f"to all {n:,} of them. The model itself looks at its own context only.",
        f"<b>Medians are over {min(meta['queries'], n):,} queries</b> drawn at random; a share of the queries has "
        "larger loads (column 5–95%).",
    ]
    if table["causal"].any():
        found.append(
            "<b>These heads are causal.</b> A query at position <i>i</i> sees <i>i</i> keys: read <i>n</i> as the "
            "number of earlier tokens. Phases and effective tokens are those of a query that sees all of the "
            f"{n:,} pooled tokens."
        )
    if "window" in table:
        found.append(
            "<b>Some heads read a sliding window.</b> Their queries see no more keys than column window says: phases "
            "and effective tokens are those of so many, and heads.csv leaves larger numbers of keys empty."
        )
    if f"horizon_{DISTANCES[0]}" in table:
        distances = " and ".join(f"{distance:,}" for distance in DISTANCES)
        found.append(
            "<b>Positions are rotary</b>, so logits depend on the distance between query and key. Maps, phases and "
            f"effective tokens are those at distance 0; the table gives horizon and load at distances {distances} too."
        )
    return found


def _measured_share(table: pd.DataFrame, meta: dict) -> str:
    loaded = table[table["load_median"] > 2]
    if loaded.empty:
        return " No median load here is above 2."
    ratio = _each(_effective, loaded, meta) / _each(_keys, loaded, meta) * (loaded["load_median"] ** 2).map(_exp)
    heads = "the one head" if len(loaded) == 1 else f"the {len(loaded)} heads"
    least = "" if len(loaded) == 1 else "at least "
    times = f"{least}{_number(ratio.min())} times <i>e</i><sup>−<i>s</i>²</sup>"
    return f" Here, on {heads} of median load above 2, it is {times}."


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


# ---- the page ----


def _number(value: float) -> str:
    """Three digits, as HTML: 0.341, 12.3, 1,230, 4.56 × 10¹² (not broken)."""
    if math.isinf(value):
        return "∞"
    if value == 0 or 1e-4 <= abs(value) < 9_995_000:
        rounded = float(f"{value:.3g}")
        return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{value:#.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits}&nbsp;×&nbsp;10<sup>{int(exponent)}</sup>".replace("-", "−")


def _columns(table: pd.DataFrame, meta: dict) -> dict[str, Callable[[pd.Series], str]]:
    """Headings of the table of heads, and what fills a cell."""

    def plain(name: str) -> Callable[[pd.Series], str]:
        return lambda head: _number(head[name])

    found: dict[str, Callable[[pd.Series], str]] = {
        "layer": lambda head: str(head["layer"]),
        "head": lambda head: str(head["head"]),
        "horizon": plain("horizon"),
        "median load": plain("load_median"),
        "5–95%": lambda head: f"{_number(head['load_05'])} – {_number(head['load_95'])}",
        "effective": lambda head: _number(_effective(head, meta)),
        "phase": lambda head: f'<span class="{head["phase"]}">{head["phase"]}</span>',
        "not frozen beyond": plain("tokens_unfrozen"),
        "1/√n beyond": plain("tokens_clt"),
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


def _heads_table(table: pd.DataFrame, meta: dict) -> str:
    columns = _columns(table, meta)
    top = "".join(f'<th scope="col">{name}</th>' for name in columns)
    cells = ("".join(f"<td>{cell(head)}</td>" for cell in columns.values()) for _, head in table.iterrows())
    rows = (f"<tr>{row}</tr>" for row in cells)
    return f"<table><thead><tr>{top}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table>"


def _figure(name: str, table: pd.DataFrame, meta: dict, caption: str) -> str:
    alt, draw = FIGURES[name]
    light = _data(_draw(table, meta, draw))
    if name == "phases":
        picture = f'<img class="ink" alt="{escape(alt)}" src="{light}">'
    else:
        # Turned around, the colours of a map would say the opposite: only its text turns light.
        dark = _data(_draw(table, meta, draw, ink=LIGHT_INK))
        source = f'<source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
        picture = f'<picture>{source}<img alt="{escape(alt)}" src="{light}"></picture>'
    return f'<figure><div class="wide">{picture}</div><figcaption>{caption}</figcaption></figure>'


def _data(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def _facts(table: pd.DataFrame, meta: dict) -> str:
    def checked(name: str, value) -> str:
        checksum = meta.get(f"{name}_sha256")
        shown = f' <span class="faint">sha256 {checksum[:12]}</span>' if checksum else ""
        return escape(str(value)) + shown

    layers = sorted(table["layer"].unique())
    run = 1 < len(layers) == layers[-1] - layers[0] + 1
    span = f"{layers[0]}–{layers[-1]}" if run else ", ".join(map(str, layers))
    facts = {
        "model": checked("model", meta["model"]),
        "text": checked("text", meta["text"]),
        "heads": f"{len(table)}, in {'layers' if len(layers) > 1 else 'layer'} {span}",
        "tokens": checked("tokens", f"{meta['tokens']:,}, in windows of {meta['context']}"),
        "queries": f"{min(meta['queries'], meta['tokens']):,}, drawn with seed {meta['seed']}",
        "device": escape(meta["device"]),
        "made": escape(
            meta["created"].replace("T", " ").replace("+00:00", " UTC")
            + " with "
            + ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
        ),
    }
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items()) + "</dl>"


def page(table: pd.DataFrame, meta: dict) -> str:
    """The page, as HTML with its figures inside; arguments as for `write`."""
    n = meta["tokens"]
    found = table["phase"].value_counts()
    counts = "".join(f'<li class="{name}"><b>{found.get(name, 0)}</b> {name}</li>' for name in PHASES)
    said = "\n".join(f"<h3>{heading}</h3>\n<p>{text}" for heading, text in reading(table, meta))
    warned = "\n".join(f"<li>{text}</li>" for text in caveats(table, meta))
    named = ", ".join(f"{head['layer']}.{head['head']}" for _, head in hardest(table).iterrows())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Heads of {escape(str(meta["model"]))} on {escape(str(meta["text"]))}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>How many tokens do the heads of {escape(str(meta["model"]))} need?</h1>
{_facts(table, meta)}
<ul class="counts" aria-label="heads in each phase at {n:,} tokens">{counts}</ul>
</header>
<main>
<h2>The heads in the phase diagram</h2>
{
        _figure(
            "phases",
            table,
            meta,
            f"Each dot is a head at its median load, on {n:,} tokens{_or_window(table)}. "
            f"Those named, layer.head, have the largest loads: {named}. Dashed: the token budgets. "
            "Lines: relative error of a Gaussian query.",
        )
    }
<h2>Reading</h2>
{said}
<h2>What the numbers do not say</h2>
<ul>
{warned}
</ul>
<h2>Maps</h2>
{
        _figure(
            "horizon",
            table,
            meta,
            "Horizon: how far the head's strongest direction tilts the law of the keys. "
            "Where it is large, moments converge slowly.",
        )
    }
{_figure("load", table, meta, "Load: standard deviation of the logits of the median query.")}
{
        _figure(
            "effective",
            table,
            meta,
            f"Effective tokens 1/Σw²: how many of {n:,} keys{_or_window(table)} share the "
            "attention of the median query.",
        )
    }
<h2>All heads</h2>
<div class="wide">{_heads_table(table, meta)}</div>
<p class="faint">Every column of the probe is in heads.csv, beside this page.</p>
</main>
</body>
</html>
"""


STYLE = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --text: #1c2024; --faint: #5f666d; --line: #d9dde1; --surface: #f5f6f7;
  --averaging: #0072b2; --extremal: #8a5a00; --frozen: #b34700;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ground: #14181d; --text: #dfe3e7; --faint: #99a2ab; --line: #343b43; --surface: #1d2229;
    --averaging: #6cb8e8; --extremal: #e9b44c; --frozen: #f28c50;
  }
  /* Transparent with black ink: it turns light and keeps its hue. */
  img.ink { filter: invert(1) hue-rotate(180deg); }
}
body {
  background: var(--ground); color: var(--text); margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem;
  font: 1rem/1.6 system-ui, sans-serif;
}
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1.2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 0.6rem; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 0.2rem; }
p, main > ul { margin: 0 0 0.8rem; max-width: 44rem; }
main > ul { padding-left: 1.2rem; }
main > ul li { margin-bottom: 0.5rem; }
sup { line-height: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1.2rem; margin: 0; font-size: 0.92rem; }
dt, .faint { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
.counts { display: flex; flex-wrap: wrap; gap: 0.75rem; list-style: none; margin: 1.5rem 0 0; padding: 0; }
.counts li {
  border-left: 4px solid currentColor; background: var(--surface); border-radius: 0.25rem;
  padding: 0.5rem 1.1rem 0.5rem 0.9rem;
}
.counts b { font-size: 1.5rem; margin-right: 0.3rem; font-variant-numeric: tabular-nums; }
.averaging { color: var(--averaging); } .extremal { color: var(--extremal); } .frozen { color: var(--frozen); }
figure { margin: 1rem 0 1.8rem; }
figcaption { color: var(--faint); font-size: 0.9rem; max-width: 44rem; }
.wide { overflow-x: auto; }
img { height: auto; max-width: 100%; }
picture img { max-width: max(100%, 44rem); } /* on a phone a map scrolls */
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 0.25rem 0.55rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; }
tbody tr:hover { background: var(--surface); }
"""
