"""Every number on the page about long contexts is one that the records, or the library, give."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tokcx_lib import records
from tokcx_lib.probe.policies import POLICIES, keys_needed
from tokcx_lib.studies.depth import tables as depth_tables
from tokcx_lib.studies.language_model import loss_tables
from tokcx_lib.studies.sparse import tables as sparse_tables
from tokcx_lib.theory import rotary

PAGE = Path(__file__).resolve().parents[1] / "book/reference/long_contexts.md"


def loads():
    heads = records.load("real_heads_english").table
    low, median, high = heads["effective_200000"].quantile([0, 0.5, 1])
    phases = heads["phase"].value_counts()
    needed = heads["tokens_10_percent"]
    quarter = needed.quantile(0.75)
    return [
        f"from {heads['load_median'].min():.2f} to {heads['load_median'].max():.1f}.",
        "Given 200,000 tokens",
        f"over {low:.0f} of them, the median head over {round(median, -3):,.0f}, and the widest over "
        f"{round(high, -3):,.0f}.",
        f"Of the {len(heads)} heads, {phases['averaging']} average, {phases['extremal']} depend",
        f"and {phases['frozen']} is frozen",
        f"need {needed.median():,.0f} keys in the median head, more than {quarter // 100 * 100:,.0f} in a quarter",
        f"$10^{{{np.floor(np.log10(needed.max())):.0f}}}$",
    ]


def kept_keys():
    record = records.load("sparse_heads")
    rows = sparse_tables.with_loads(record.table, record.meta)
    errors = rows[rows["budget"] == 128].groupby(["case", "scheme"])["error"].mean().unstack()
    held = rows[(rows["budget"] == 128) & (rows["scheme"] == "window")].groupby("case")["mass"].mean()
    cases = 0, 2, 3
    names = ["random", "window", "top-k"]
    loads = {case: record.meta["cases"][case]["load_median"] for case in cases}
    lines = [f"| {loads[c]:.2f} | " + " | ".join(f"{e:.3f}" for e in errors.loc[c, names]) + " |" for c in cases]
    assert errors.loc[0, names].idxmax() == "top-k"
    assert errors.loc[3, names].idxmin() == "top-k"
    total = rows["budget"].max()
    return [
        *lines,
        f"With 128 keys of about {round(total, -2):,},",
        f"at most {100 * held.loc[list(cases)].max():.1f}% of",
    ]


def planes():
    kept = [rotary.slow_planes(1e5, 64, n) for n in (2048, 8192)]
    assert f"{rotary.half_length(1.0):.2f}" == "3.79"
    return [
        "at $3.79/\\theta$ of them. With base 100,000 and heads of 64 dimensions, as in SmolLM2,",
        f"{kept[0]} of 32 planes keep at least half over 2,048 tokens, and {kept[1]} over 8,192.",
    ]


def layers():
    table = records.load("depth_model").table
    passed = depth_tables.model_layers(table).loc[32, "passed"].dropna()
    last = table[(table["n"] == 32) & (table["layer"] == 6)]
    off = ((last["error"] ** 2).mean() / (last["spread"] ** 2).mean()) ** 0.5
    *most, end = (f"{factor:.2f}" for factor in passed)
    return [
        "reads 32 keys of its context",
        f"layers 2 to {passed.index.max()} pass on {', '.join(most)} and {end} times the error",
        f"off by {off:.2f} of their spread.",
    ]


@functools.cache
def words():
    """What the records of the language model say, as the page says it."""
    forecast, answers = records.load("language_model_forecast"), records.load("language_model_answers")
    planes, still = records.load("language_model_planes"), records.load("language_model_still")
    whole = records.load("language_model_loss")
    needed, costs = loss_tables.budgets(forecast.table), loss_tables.costs(answers.table)
    orders = ("drawn", "latest", "first_latest", "heaviest")
    longer = longer_budgets()
    both = {order: [*needed.loc[order, ["half", "nine_tenths"]], *longer[order]] for order in orders}
    found = {order: " | ".join(f"{keys:,.0f}" for keys in both[order]) for order in orders}
    excess = costs["excess"]
    found |= {"latest1024": f"{excess['latest', 1024]:.2f}", "first1024": f"{excess['first_latest', 1024]:.2f}"}
    found |= {
        f"{name}_articles": count(record.meta["config"]["replicates"])
        for name, record in {
            "forecast": forecast,
            "answers": answers,
            "planes": planes,
            "still": still,
            "loss": whole,
        }.items()
    }
    for name in ("planes_articles", "still_articles", "loss_articles"):
        found[name] += " article" + "s" * (found[name] != "one")
    nats = still.table.groupby(["change", "name"])["excess"].mean()
    found |= {f"{change}{name}": f"{nats[change, name]:.2f}" for change, name in nats.index}
    groups = planes.table.groupby("group")[["pattern", "content"]].mean()
    found |= {name: str(len(planes.meta["groups"][name])) for name in ("standing", "fast")}
    found |= {"content": percent(groups.loc["standing", "content"]), "pattern": percent(groups["pattern"].sum())}
    found |= {"fastcontent": percent(groups.loc["fast", "content"])}
    agreement = loss_tables.agreement(loss_tables.foretold(answers.table, forecast.table))
    found |= {"exponent": f"{agreement['exponent']:.1f}", "rank": f"{agreement['rank']:.2f}"}
    found |= {"scatter": f"{agreement['scatter']:.1f}", "anchored": f"{excess['anchored', 64]:.1f}"}
    lines = (
        f"| {n:,} | " + " | ".join(f"{excess[order, n]:.2f}" for order in orders) + " |" for n in (16, 64, 256, 1024)
    )
    found["losses"] = "\n".join(lines).replace("-0.00", "0.00")
    own = answers.table.query("keys == 0 and order == 'heaviest'")["mean_keys"].mean()
    found |= {"ownheavy": f"{own:.0f}", "ownloss": f"{excess['heaviest', 0]:.2f}"}
    many = answers.table.query("keys == 0 and order == 'first_latest'")["mean_keys"].mean()
    found |= {"ownmany": f"{many:.0f}", "first256": f"{excess['first_latest', 256]:.2f}"}
    errors = loss_tables.forecasts(forecast.table)["rms"]
    found |= {f"rms{order}": f"{errors[order, 1024]:.2f}" for order in ("drawn", "latest")}
    large = costs[costs["excess"] > 0.1]
    found["halfwidth"] = percent((large["half"] / large["excess"]).max())
    both = whole.table["replicate"].unique()
    same = loss_tables.costs(answers.table[answers.table["replicate"].isin(both)])["excess"]
    ratios = (loss_tables.costs(whole.table)["excess"] / same)[same > 0.1].dropna()
    found |= {"ratiolow": f"{ratios.min():.1f}", "ratiohigh": f"{ratios.max():.1f}"}
    kinds = {"ownfirst": "first_latest", "ownlatest": "latest", "owndrawn": "drawn"}
    found |= {name: f"{excess[order, 0]:.2f}" for name, order in kinds.items()}
    found |= {"ownfactor": f"{costs.loc[('heaviest', 0), 'factor']:.2f}"}
    return found | {"heads": str(len(forecast.table[["layer", "head"]].drop_duplicates()))}


@functools.cache
def longer_budgets():
    """Keys for half and nine tenths of the heads in windows of 8,192 tokens: of each head the median over windows."""
    table = records.load("language_model_heads").table
    lengths, found = sorted(table["n"].unique()), {}
    for order in POLICIES:
        errors = table.pivot_table(index=["layer", "head", "window"], columns="n", values=order)[lengths].to_numpy()
        needed = [keys_needed(lengths, row**2, loss_tables.ERROR) for row in errors]
        each = np.median(np.reshape(needed, (-1, table["window"].nunique())), 1)
        found[order] = np.quantile(each, [0.5, 0.9], method="higher")
    return found


def count(number):
    return {1: "one", 2: "two", 4: "four", 6: "six", 8: "eight"}[number]


def percent(share):
    return f"{100 * share:.0f}%"


def language_model():
    w = words()
    names = {"drawn": "at random", "latest": "the latest", "first_latest": "the first and the latest"}
    names |= {"heaviest": "the heaviest"}
    return [
        "| keys read | 2,048 tokens, half | nine tenths | 8,192 tokens, half | nine tenths |",
        *(f"| {name} | {w[order]} |" for order, name in names.items()),
        f"the 1,024 latest keys, a token costs {w['latest1024']} nats more than with all; with the first position in "
        f"place of one of them, {w['first1024']}.",
        "a prompt of 1,792 tokens as it is",
        f"rounded to 4 bits, {w['forecast_articles']} articles of Wikipedia at each length for the heads, "
        f"{w['answers_articles']} for the loss.",
        f"over a window of 2,048 tokens, the {w['standing']} planes that turn by a radian at most carry "
        f"{w['content']} in",
        f"the {w['fast']} that turn once in 64 tokens or faster carry {w['fastcontent']}.",
        f"spread over all planes ({w['pattern']} in all)",
        f"the first cost {w['stillstanding']} nats a token and the second {w['stillfast']}; taken away, "
        f"{w['gonestanding']} and {w['gonefast']}.",
        f"means over {w['heads']} heads on {w['planes_articles']} of Wikipedia",
        f"the losses are of {w['still_articles']} (record",
        f"grows like the {w['exponent']} power",
        f"from 16 to 1,024, the two have a rank correlation of {w['rank']}, and the loss lies within a factor of "
        f"{w['scatter']} of",
        *w["losses"].split("\n"),
        f"with 64 keys {w['anchored']} nats.",
        f"1,024 keys at random err less than the 1,024 latest, {w['rmsdrawn']} spreads against {w['rmslatest']}, and",
        f"with 256 tokens of each article after the prompt; 95% intervals over articles reach to {w['halfwidth']} of",
        f"late tokens of {w['loss_articles']} (record",
        f"cost {w['ratiolow']} to {w['ratiohigh']} times as much as after a prompt",
        f"keep its own error at a tenth, {w['ownheavy']} on average, a token still costs {w['ownloss']} nats more, a "
        f"perplexity {w['ownfactor']} times as large.",
        f"the first and the latest keys cost {w['ownfirst']} nats, the latest {w['ownlatest']}, and keys at random "
        f"{w['owndrawn']}:",
        f"it takes {w['ownmany']} on average, and costs more than 256 of them in every head ({w['first256']}).",
    ]


def conclusions():
    """What the page says without a number, for the records to bear out."""
    forecast, answers = records.load("language_model_forecast"), records.load("language_model_answers")
    needed, excess = loss_tables.budgets(forecast.table), loss_tables.costs(answers.table)["excess"]
    assert needed["nine_tenths"].idxmin() == "heaviest" and needed.loc["heaviest", "nine_tenths"] < 100
    longer = longer_budgets()
    assert longer["heaviest"][0] < 1.5 * needed.loc["heaviest", "half"] and longer["heaviest"][1] < 100
    assert (longer["first_latest"] < 1.5 * needed.loc["first_latest", ["half", "nine_tenths"]]).all()
    assert needed.loc["drawn", "half"] > 1024 and longer["drawn"][0] > 4096
    each = answers.table.pivot_table(index="replicate", columns=["order", "keys"], values="excess")
    for more, less in (
        (("drawn", 0), ("heaviest", 0)),
        (("first_latest", 0), ("first_latest", 256)),
        (("drawn", 1024), ("latest", 1024)),
    ):
        assert stats.ttest_rel(each[more], each[less], alternative="greater").pvalue < 0.025
    assert (excess["anchored"][[16, 64, 256]] > excess["first_latest"][[16, 64, 256]] + 1).all()
    assert answers.meta["config"]["prompt"] == 1792 and answers.table["tokens"].unique().tolist() == [256]


STATEMENTS = (loads, kept_keys, planes, layers, language_model)
LIMITS = ("encoder of 6 layers", "between 2 and 5", "like $1/\\sqrt n$", "contexts of 256 tokens")


def left_over(page, fragments):
    """What is left of a page without some of its words, which must be there, its own numbering and its links."""
    page = re.sub(r"\{ref\}`[^`]*`|\{cite:\w\}`[^`]*`|`[\w.]+`|^## \d\. ", " ", page, flags=re.MULTILINE)
    page = " ".join(re.sub(r"^\|-.*$", "", page, flags=re.MULTILINE).split())
    for fragment in fragments:
        assert page.count(fragment) == 1, fragment
        page = page.replace(fragment, " ")
    return page


def numbers(page):
    return re.findall(r"\d[\d.,]*", page.replace("SmolLM2", "").replace("MiniLM", ""))


def test_every_number_is_computed_again():
    page = PAGE.read_text(encoding="utf-8")
    fragments = [fragment for statement in STATEMENTS for fragment in statement()]
    assert numbers(left_over(page, [*fragments, *LIMITS])) == []


@pytest.mark.parametrize("right, wrong", [("0.461", "0.561"), ("33,000", "35,000"), ("14 of 32", "15 of 32")])
def test_a_number_that_is_not_the_records_is_seen(right, wrong):
    page = PAGE.read_text(encoding="utf-8")
    fragments = [fragment for statement in STATEMENTS for fragment in statement()]
    assert right in page
    with pytest.raises(AssertionError):
        left_over(page.replace(right, wrong), fragments)


def test_the_records_bear_out_what_has_no_number():
    conclusions()


def test_it_has_six_statements_each_with_its_limits():
    page = PAGE.read_text(encoding="utf-8")
    parts = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    assert [part[0] for part in parts] == list("123456")
    assert all(part.count("*Limits.*") == 1 for part in parts)
