"""The page of a probe in context: the answer, then figures, the hardest heads, layers, and what it does not say."""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd
from markupsafe import Markup

from tokcx_lib.probe import pages, summary
from tokcx_lib.probe.context_figures import at, figures, numbers
from tokcx_lib.probe.pages import number
from tokcx_lib.probe.policies import POLICIES

HARDEST = 5  # heads that are named, by budget and by load
PHASES = {
    "averaging": "many keys share the attention, and typical errors of drawn keys fall like 1/√n",
    "extremal": "the few keys with the largest logits decide, and typical errors fall more slowly than 1/√n",
    "frozen": "one key or a handful take almost all of the attention, and more keys still change which",
}


def page(table: pd.DataFrame, meta: dict) -> str:
    """The page, as HTML with its figures inside; arguments as for `report.write`."""
    found, columns = summary.summary(table, meta), _columns(table)
    return pages.TEMPLATES.get_template("context.html.j2").render(
        meta=meta,
        kicker=_kicker(meta),
        phases_sentence=summary.phases_sentence(found, meta),
        budgets_sentence=summary.budgets_sentence(found, meta),
        places=list(summary.PLACE_NAMES.values()),
        budgets=_budgets(found, table),
        intervals_sentence=summary.intervals_sentence(meta),
        cache_sentence=summary.cache_sentence(found),
        phases=PHASES,
        pictures={name: pages.inside(picture, table, meta) for name, picture in figures(table).items()},
        error=f"{100 * meta['error']:g}%",
        law_sentence=_law_sentence(table),
        hardest=_hardest(table),
        layers=_layers(table),
        caveats=caveats(table, meta),
        facts=_facts(table, meta),
        columns=list(columns),
        rows=[[cell(head) for cell in columns.values()] for _, head in table.iterrows()],
    )


# ---- the first screen ----


def _kicker(meta: dict) -> str:
    windows = "one window" if meta["windows"] == 1 else f"{meta['windows']:,} windows"
    return f"{meta['text']}, {windows} of {meta['context']:,} tokens"


def _budgets(found: dict, table: pd.DataFrame) -> dict[str, list[tuple[str, str]]]:
    """By the name of a policy: budgets, each with its interval."""
    return {
        name: [(summary.keys_in_words(b), summary.interval(b)) for b in found["budgets"][policy].values()]
        for policy, name in summary.policy_names(table).items()
    }


# ---- the reading ----


def _law_sentence(table: pd.DataFrame) -> str:
    """How far the errors of drawn keys are from those that the law says; empty where it says none."""
    ratios = {n: (at(table, "error_drawn", n) / at(table, "law", n)).dropna() for n in numbers(table, "law")}
    said = [
        f"{ratio.median():.2f} at {n:,} keys ({ratio.quantile(0.1):.2f}–{ratio.quantile(0.9):.2f})"
        for n, ratio in ratios.items()
        if len(ratio)
    ]
    if not said:
        return ""
    return (
        "Dashed: what the exact law of as many Gaussian keys predicts for those drawn, from the measured loads, with "
        f"nothing fitted. Measured over predicted, the median head and 80% of the heads: {'; '.join(said)}."
    )


def _hardest(table: pd.DataFrame) -> dict[str, list[Markup]]:
    """The heads with the largest budgets and the largest loads, each in a line."""
    near = "latest" if summary.looks_back(table) else "nearest"
    by_budget = table.sort_values("keys_first_latest", ascending=False, kind="stable").head(HARDEST)
    by_load = table.sort_values("load", ascending=False, kind="stable").head(HARDEST)
    return {
        f"Largest budget, the first and the {near} keys": [
            Markup("<b>{}</b>: {} keys; {}, {}").format(
                _name(head), _budget(head, "first_latest"), _load(head), _weights(head)
            )
            for _, head in by_budget.iterrows()
        ],
        "Largest load": [
            Markup("<b>{}</b>: {}, {}, {}; {} keys, the first and the {}").format(
                _name(head), _load(head), head["phase"], _weights(head), _budget(head, "first_latest"), near
            )
            for _, head in by_load.iterrows()
        ],
    }


def _name(head: pd.Series) -> str:
    return f"{head['layer']}.{head['head']}"


def _load(head: pd.Series) -> str:
    return f"load {number(head['load'])} (5–95% of the queries: {number(head['load_05'])}–{number(head['load_95'])})"


def _weights(head: pd.Series) -> str:
    first = summary.percent(head["share_first"])
    return f"{number(head['effective'])} effective tokens, {first} of the weight on the first position"


def _budget(head: pd.Series, policy: str) -> str:
    """A budget, of how many keys, with its interval where it has one: 219 of 7,696 (30–900)."""
    name = f"keys_{policy}"
    low, high = head.get(f"{name}_low", math.nan), head.get(f"{name}_high", math.nan)
    interval = summary.interval({"low": low, "high": high})
    return f"{head[name]:,.0f} of {head['keys']:,.0f}" + (f" ({interval})" if interval else "")


def _layers(table: pd.DataFrame) -> dict[str, list]:
    """Medians over the heads of each layer: `columns` and `rows`."""
    found = {
        "layer": lambda heads: f"{heads['layer'].iloc[0]}",
        "load": lambda heads: number(heads["load"].median()),
        "effective": lambda heads: number(heads["effective"].median()),
        "on first": lambda heads: summary.percent(heads["share_first"].median()),
        **{name: _median_of(f"keys_{policy}") for policy, name in _short_names(table).items()},
    }
    if summary.looks_back(table):
        found["kept"] = _kept
    if "window" in table:
        found["window"] = lambda heads: _window(heads.iloc[0])
    rows = [[cell(heads) for cell in found.values()] for _, heads in table.groupby("layer")]
    return {"columns": list(found), "rows": rows}


def _kept(heads: pd.DataFrame) -> str:
    """The share of a layer's keys that its key heads keep, each its own budget."""
    groups = summary.key_heads(heads)
    return summary.percent(groups["budget"].sum() / groups["keys"].sum())


def _short_names(table: pd.DataFrame) -> dict[str, str]:
    """The orders of keys, as headings of columns."""
    near = "latest" if summary.looks_back(table) else "nearest"
    return dict(zip(POLICIES, ("drawn", near, f"first + {near}", "heaviest")))


def _median_of(column: str) -> Callable[[pd.DataFrame], str]:
    return lambda heads: f"{heads[column].median():,.0f}"


def _window(head: pd.Series) -> str:
    return "" if math.isnan(head["window"]) else f"{head['window']:,.0f}"


def caveats(table: pd.DataFrame, meta: dict) -> list[Markup]:
    """What the numbers do not say, as sentences of HTML."""
    found = [
        Markup(
            "<b>Errors are those of single heads' outputs</b>, not of the model's loss. How the errors of many heads "
            "add up in the layers above is not measured here."
        ),
        Markup(
            "<b>The unit is the spread of the head's own values.</b> A head whose output is small beside it, such as "
            "one that averages, is within {:g}% with few keys, whatever these say."
        ).format(100 * meta["error"]),
        Markup(
            "<b>Heaviest first is an oracle:</b> nobody knows the largest weights before reading all keys. Nor is it "
            "the best order for every head: of one that averages, the keys of largest weight are a biased sample. {}"
        ).format(_beaten(table)),
        Markup(
            "<b>Errors are distances to the output over this finite past</b>, not to a limit: they end at 0 where all "
            "of it is read, and keys are drawn without replacement. Of a longer past more keys may be needed."
        ),
        Markup(
            "<b>Loads, weights and budgets are those of these queries:</b> {}, in {} of this text. Other texts and "
            "other lengths have others."
        ).format(_which_queries(table), "one window" if meta["windows"] == 1 else f"{meta['windows']:,} windows"),
        Markup(
            "<b>Phases take the logits for Gaussian, and are no budgets.</b> They say where the load of a head stands "
            "among the keys it has; a frozen head may still need most of them, since no short list has the right few. "
            "Budgets and errors are measured and assume nothing. The first position is left out of the load."
        ),
        Markup(
            "<b>A root mean square is over queries.</b> Single ones, such as those that look up a name far back, may "
            "err much more; no tail of the queries is measured here."
        ),
    ]
    if "window" in table:
        found.append(
            Markup(
                "<b>Some heads read a sliding window</b> (column window). Theirs are the keys in it: their budgets, "
                "phases and errors are among so many."
            )
        )
    if _rounded(meta["model"]):
        found.append(
            Markup(
                "<b>The model was read from a GGUF file</b>, whose weights were rounded{}: the heads are those of the "
                "rounded model."
            ).format(" to about four bits" if meta["model"] == "smollm2" else "")
        )
    return found


def _beaten(table: pd.DataFrame) -> str:
    """On how many heads another order needs fewer keys than the heaviest first."""
    others = table[[f"keys_{policy}" for policy in POLICIES if policy != "heaviest"]].min(axis=1)
    count = int((others < table["keys_heaviest"]).sum())
    on = "no head" if count == 0 else f"{count:,} {'head' if count == 1 else 'heads'}"
    return f"Here another order needs fewer keys on {on}."


def _which_queries(table: pd.DataFrame) -> str:
    """The queries that stand for all, in words."""
    return "the last eighth of the positions" if summary.looks_back(table) else "positions spread over the window"


def _rounded(model: str) -> bool:
    """Whether a model comes as a GGUF file: the packaged language model does."""
    return model == "smollm2" or str(model).lower().endswith(".gguf")


# ---- facts and the table of heads ----


def _facts(table: pd.DataFrame, meta: dict) -> dict[str, tuple[str, str]]:
    """What was probed and what it took, each with the beginning of its checksum, where one is known."""
    queries = f"up to {meta['queries']:,} of each window, {_which_queries(table)}; seed {meta['seed']}"
    facts = {
        "model": meta["model"] + (f", in {meta['model_dtype']}" if "model_dtype" in meta else ""),
        "text": meta["text"],
        "heads": pages.heads(table),
        "tokens": _kicker(meta).removeprefix(f"{meta['text']}, "),
        "queries": queries,
        "device": meta["device"],
    }
    if took := _took(meta):
        facts["took"] = took
    facts["made"] = pages.made(meta)
    return pages.with_checksums(facts, meta)


def _took(meta: dict) -> str:
    """Time and memory of the run, as far as they are known."""
    parts = []
    if (wall := meta.get("seconds")) is not None:
        parts.append(_time(wall))
    inner = {"the model": meta.get("seconds_model"), "the statistics": meta.get("seconds_statistics")}
    known = [f"{name} {_time(seconds)}" for name, seconds in inner.items() if seconds is not None]
    if known:
        parts.append(("of which " if parts else "") + ", ".join(known) + (", the rest loading" if parts else ""))
    if (memory := meta.get("peak_memory_gb")) is not None:
        parts.append(f"{memory:.1f} GB of memory at the most")
    return "; ".join(parts)


def _time(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes:,} min {left} s" if minutes else f"{left} s"


def _columns(table: pd.DataFrame) -> dict[str, Callable[[pd.Series], str]]:
    """Headings of the table of heads, and what fills a cell."""

    def share(name: str) -> Callable[[pd.Series], str]:
        return lambda head: summary.percent(head[name])

    def keys(policy: str) -> Callable[[pd.Series], str]:
        return lambda head: _budget(head, policy).replace(f" of {head['keys']:,.0f}", "")

    found: dict[str, Callable[[pd.Series], str]] = {
        "head": _name,
        "key head": lambda head: str(head["group"]),
        "keys": lambda head: f"{head['keys']:,.0f}",
        "load": lambda head: number(head["load"]),
        "5–95%": lambda head: f"{number(head['load_05'])} – {number(head['load_95'])}",
        "reduced": lambda head: f"{head['reduced']:.2f}",
        "phase": lambda head: Markup('<span class="{0}">{0}</span>').format(head["phase"]),
        "effective": lambda head: number(head["effective"]),
        "on first": share("share_first"),
        "near": share("share_near"),
        "own": share("share_own"),
        **{name: keys(policy) for policy, name in _short_names(table).items()},
    }
    if "window" in table:
        found["window"] = _window
    return found
