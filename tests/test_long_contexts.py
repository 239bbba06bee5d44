"""Every number on the page about long contexts is one that the records, or the library, give."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tokcx_lib import records
from tokcx_lib.probe import summary
from tokcx_lib.probe.policies import POLICIES, keys_needed
from tokcx_lib.studies.depth import tables as depth_tables
from tokcx_lib.studies.language_model import loss_tables
from tokcx_lib.studies.language_model import tables as head_tables
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


DEAR, CHEAP = ("heaviest", 16), ("first_latest", 256)  # one error, two costs
NO_COST = "heaviest", 1024  # not different from zero
SLOWEST = 7


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
    pattern = planes.meta["planes"]["pattern"]
    found |= {"fastpattern": points(groups.loc["fast", "pattern"]), "slowest": points(sum(pattern[-SLOWEST:]))}
    together = loss_tables.foretold(answers.table, forecast.table)
    agreement, without = loss_tables.agreement(together), loss_tables.agreement(together.drop(NO_COST))
    found |= {"exponent": f"{agreement['exponent']:.2f}", "rank": f"{agreement['rank']:.2f}"}
    found |= {"exponent_without": f"{without['exponent']:.2f}"}
    found |= {"scatter": f"{agreement['scatter']:.1f}", "anchored": f"{excess['anchored', 64]:.1f}"}
    lines = (
        f"| {n:,} | " + " | ".join(f"{excess[order, n]:.2f}" for order in orders) + " |" for n in (16, 64, 256, 1024)
    )
    found["losses"] = "\n".join(lines).replace("-0.00", "0.00")
    own = answers.table.query("keys == 0 and order == 'heaviest'")["mean_keys"].mean()
    found |= {"ownheavy": f"{own:.0f}", "ownloss": f"{excess['heaviest', 0]:.2f}"}
    many = answers.table.query("keys == 0 and order == 'first_latest'")["mean_keys"].mean()
    found |= {"ownmany": f"{many:.0f}", "first256": f"{excess['first_latest', 256]:.2f}"}
    (one, cost), (other, less) = together.loc[[DEAR, CHEAP], ["rms", "excess"]].to_numpy()
    assert f"{one:.2f}" == f"{other:.2f}"
    found |= {"pairerror": f"{one:.2f}", "dear": f"{cost:.2f}", "cheap": f"{less:.2f}", "times": f"{cost / less:.1f}"}
    config, late = forecast.meta["config"], answers.meta["config"]
    found |= {"first_query": f"{config['context'] // 2:,}", "last_query": f"{config['context'] - 1:,}"}
    found |= {"first_counted": f"{late['prompt']:,}", "last_counted": f"{late['context'] - 1:,}"}
    queries = np.linspace(config["context"] // 2, config["context"] - 1, config["queries"]).round() + 1
    found |= {"fewest": f"{queries.min():,.0f}", "most": f"{queries.max():,.0f}"}
    heads = records.load("language_model_heads")
    chapter = head_tables.budgets(heads.table, heads.meta["config"]["queries"], loss_tables.ERROR)
    chapter = summary.summary(chapter, {})
    found |= {f"chapter_{policy}": f"{each['half']['keys']:,.0f}" for policy, each in chapter["budgets"].items()}
    found |= {"past": f"{round(np.median(queries), -1):,.0f}", "long_past": f"{chapter['keys']:,.0f}"}
    found |= {"pasts": f"{chapter['keys'] / np.median(queries):.0f}"}
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


def points(share):
    return f"{100 * share:.1f}"


def language_model():
    w = words()
    names = {"drawn": "at random", "latest": "the latest", "first_latest": "the first and the latest"}
    names |= {"heaviest": "the heaviest"}
    return [
        "| keys read | 2,048 tokens, half | nine tenths | 8,192 tokens, half | nine tenths |",
        *(f"| {name} | {w[order]} |" for order, name in names.items()),
        f"The queries have {w['fewest']} to {w['most']} keys in the windows of 2,048 tokens, the median one about "
        f"{w['past']}; in those of 8,192",
        f"the median one has {w['long_past']}. So pasts are about {w['pasts']} times as long.",
        f"all windows of 8,192 tokens together, and the past of the median query as the most, and so prints "
        f"{w['chapter_drawn']}, {w['chapter_latest']}, {w['chapter_first_latest']} and {w['chapter_heaviest']} keys "
        "for half of the heads.",
        f"the 1,024 latest keys, a token costs {w['latest1024']} nats more than with all; with the first position in "
        f"place of one of them, {w['first1024']}.",
        "a prompt of 1,792 tokens as it is",
        f"rounded to 4 bits, {w['forecast_articles']} articles of Wikipedia at each length for the heads, "
        f"{w['answers_articles']} for the loss.",
        f"over a window of 2,048 tokens, the {w['standing']} planes that turn by a radian at most carry "
        f"{w['content']} in",
        f"the {w['fast']} that turn once in 64 tokens or faster carry {w['fastcontent']}.",
        f"What depends on the distance of a key alone ({w['pattern']} in all) is",
        f"of those {w['pattern']}, the {w['fast']} fastest carry {w['fastpattern']} points, and the {SLOWEST} slowest "
        f"{w['slowest']}.",
        f"the first cost {w['stillstanding']} nats a token and the second {w['stillfast']}; taken away, "
        f"{w['gonestanding']} and {w['gonefast']}.",
        f"means over {w['heads']} heads on {w['planes_articles']} of Wikipedia",
        f"the losses are of {w['still_articles']} (record",
        f"from 16 to 1,024, the power is {w['exponent']}; it is {w['exponent_without']} without the 1,024 heaviest",
        f"a rank correlation of {w['rank']}, which",
        f"the loss lies within a factor of {w['scatter']} of",
        *w["losses"].split("\n"),
        f"with 64 keys {w['anchored']} nats.",
        "The 16 heaviest keys and the first and the latest 256 both leave an error of "
        f"{w['pairerror']} spreads, but the former cost {w['dear']} nats and the latter {w['cheap']}: {w['times']} "
        "times as much",
        "Errors are those of queries from position "
        f"{w['first_query']} on, losses those of tokens from {w['first_counted']} on: with 1,024 keys,",
        f"with 256 tokens of each article after the prompt; 95% intervals over articles reach to {w['halfwidth']} of",
        f"late tokens of {w['loss_articles']} (record",
        f"cost {w['ratiolow']} to {w['ratiohigh']} times as much as after a prompt",
        f"keep its own error at about a tenth, {w['ownheavy']} on average, a token still costs {w['ownloss']} nats "
        f"more, a perplexity {w['ownfactor']} times as large.",
        f"first and the latest keys it takes {w['ownmany']} on average and costs {w['ownfirst']} nats, more than 256 "
        f"of them in every head ({w['first256']}).",
        f"the latest keys cost {w['ownlatest']} nats and keys at random {w['owndrawn']}, but",
        f"measured at positions from {w['first_query']} to {w['last_query']}, where",
        f"the positions from {w['first_counted']} to {w['last_counted']} whose",
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
    more, less = each["first_latest", 0], each["first_latest", 256]
    assert stats.ttest_rel(more, less, alternative="greater").pvalue < 0.025
    assert (each[DEAR] > each[CHEAP]).all() and len(each) == 8
    assert 3.5 < excess[DEAR] / excess[CHEAP] < 4.5
    together = loss_tables.foretold(answers.table, forecast.table)
    assert (together["excess"] > 0).all() and len(together) == 16  # all are in the power that fits best
    assert together.index[together["excess"] < together["half"]].tolist() == [NO_COST]
    assert forecast.meta["config"]["context"] // 2 < answers.meta["config"]["prompt"]  # budgets are of shorter pasts
    planes = records.load("language_model_planes").meta
    theta, pattern = planes["theta"], np.array(planes["planes"]["pattern"])
    assert np.argsort(theta)[:SLOWEST].tolist() == list(range(len(theta)))[: -SLOWEST - 1 : -1]
    assert pattern[:-SLOWEST].max() < pattern.sum() / 5 and pattern[:-SLOWEST].min() > 0.003  # no plane has most
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
