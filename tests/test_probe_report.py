"""The report of a probe: its page, report.json, the first screen in words; and two probes compared."""

import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tokcx_lib import cli, records
from tokcx_lib.models import loading
from tokcx_lib.probe import compare, context_page, pages, pooled_page, probe, report, summary
from tokcx_lib.probe.policies import POLICIES

ROOT = Path(__file__).parents[1]
META = {"model": "m", "model_sha256": None, "text": "t", "text_sha256": "0" * 64, "layers": [0, 1], "seed": 0}
CONTEXT = META | {"context": 1100, "windows": 2, "queries": 8, "error": 0.1, **records.provenance()}
POOLED = META | {"tokens": 20_000, "context": 256, "queries": 8, **records.provenance()}


def in_context(windows: int = 2) -> pd.DataFrame:
    """Two layers of four heads, two on each key head, 1,000 keys; a head's numbers grow with its place."""
    rng = np.random.default_rng(0)
    place = np.arange(8)
    table = pd.DataFrame({"layer": place // 4, "head": place % 4, "group": place % 4 // 2, "keys": 1000.0})
    table["load"] = [0.5, 1.0, 2.5, 3.0, 3.5, 4.0, 4.5, 9.0]
    table["load_05"], table["load_95"], table["load_with_first"] = (
        0.8 * table["load"],
        1.2 * table["load"],
        table["load"],
    )
    table["reduced"] = table["load"] / np.sqrt(2 * np.log(1000))
    table["phase"] = ["averaging", *5 * ["extremal"], *2 * ["frozen"]]
    table["effective"] = [600.0, 300.0, 40.0, 20.0, 9.0, 5.0, 3.0, 1.1]
    table["share_first"] = [0.0, 1e-9, 0.004, 0.1, 0.3, 0.5, 0.51, 0.9]
    table["share_near"], table["share_own"] = 0.05, 0.01
    for n in (64, 256):
        table[f"load_{n}"], table[f"effective_{n}"] = 0.9 * table["load"], 1 + table["effective"] * n / 2000
        for policy in POLICIES:
            table[f"error_{policy}_{n}"] = rng.uniform(0.01, 0.9, 8) / np.sqrt(n / 64)
        table[f"law_{n}"] = table[f"error_drawn_{n}"] / 2 if n == 64 else np.nan
    for i, policy in enumerate(POLICIES):
        table[f"keys_{policy}"] = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 400.0] if i == 2 else 100.0 * (i + 1)
        low, high = (0.5, 2.0) if windows > 1 else (np.nan, np.nan)
        table[f"keys_{policy}_low"], table[f"keys_{policy}_high"] = (table[f"keys_{policy}"] * f for f in (low, high))
    table.loc[0, "keys_drawn"] = 1000.0
    budgets = table[[f"keys_{policy}" for policy in POLICIES]].to_numpy()
    table.attrs["left_out"] = [(factor * budgets).tolist() for factor in (0.9, 1.1)] if windows > 1 else []
    return table


# A number in proportion to budgets that are 0.9 and 1.1 of themselves without the one and the other window.
REACH = np.exp(stats.t.ppf(0.975, 1) * np.std(np.log([0.9, 1.1])))


def pooled() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    table = pd.DataFrame({"layer": [0, 0], "head": [0, 1], "causal": False, "phase": ["averaging", "frozen"]})
    names = ("horizon", "coupling", "load_median", "load_05", "load_95", "exponent_sharp", "exponent_reported")
    for name in (*names, "effective_1000", "effective_20000", "tokens_unfrozen"):
        table[name] = rng.uniform(0.1, 9, 2)
    return table.assign(tokens_mean_square=[7e5, np.inf], tokens_clt=np.inf, tokens_10_percent=[5e3, np.inf])


class Page(HTMLParser):
    """Tags of a page with their attributes, and its text."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


def test_the_numbers_of_the_first_screen():
    found = summary.summary(in_context(), CONTEXT)
    assert [found[name] for name in ("sample", "heads", "layers", "key_heads", "keys")] == ["context", 8, 2, 4, 1000]
    assert [found[name] for name in (*summary.PHASES, "on_first")] == [1, 5, 2, 2]  # half of the weight is not more
    half, nine, every = found["budgets"]["first_latest"].values()
    assert half == {
        **{"keys": 40, "low": np.ceil(40 / REACH), "high": np.ceil(40 * REACH)},
        **{"of": 1000, "layer": 0, "head": 3},
    }
    assert (nine["keys"], every["keys"]) == (400, 400)
    # The budgets of the key heads are 20, 40, 60 and 400.
    assert found["cache_own"] == pytest.approx(520 / 4000) and found["cache_equal"] == pytest.approx(0.4)
    ends = [found[f"cache_own_{end}"] for end in ("low", "high")]
    assert ends == pytest.approx([520 / 4000 / REACH, 520 / 4000 * REACH]) and found["cache_equal_high"] == 1
    groups = summary.key_heads(in_context())
    assert list(groups["budget"]) == [20, 40, 60, 400] and list(groups["head"]) == [1, 3, 1, 3]
    assert list(groups["high"]) == [40, 80, 120, 800]
    once = summary.summary(in_context(1), CONTEXT | {"windows": 1})
    assert np.isnan(once["cache_own_low"]) and np.isnan(once["budgets"]["drawn"]["half"]["high"])

    windowed = in_context().assign(window=[*4 * [50.0], *4 * [np.nan]])
    windowed.loc[:3, "keys"] = 50.0
    found = summary.summary(windowed, CONTEXT)
    assert found["cache_own"] == pytest.approx(520 / 2100)
    assert found["cache_equal"] == pytest.approx((2 * 50 + 2 * 400) / 2100)


def test_the_first_screen_in_plain_text():
    lines = report.sentences(in_context(), CONTEXT)
    assert lines[0] == (
        "At 1,100 tokens: 1 head averages over many keys, in 5 few keys decide, 2 are frozen on one or a handful; "
        "2 put more than half of their weight on the first position."
    )
    assert "within 10%" in lines[1] and "of the 1,000 keys that" in lines[1]
    assert re.split(r"  +", lines[2].strip()) == ["half of the heads", "9 of 10", "every head"]
    ends = [f"{np.ceil(40 / REACH):.0f}–{np.ceil(40 * REACH):.0f}", f"{np.ceil(400 / REACH):.0f}–1,000"]
    cells = ["the first key, then the latest", f"40 ({ends[0]})", f"400 ({ends[1]})", f"400 ({ends[1]})"]
    assert re.split(r"  +", lines[5].strip()) == cells
    assert re.split(r"  +", lines[3].strip())[-1].startswith("all 1,000")
    assert "over 2 windows" in lines[7] and re.search(
        r"to 13% .*–.* if each of the 4 key heads .* to 40% \(11%–100%\)", lines[8]
    )

    encoder = in_context(1).drop(columns=["load_64", "effective_64", "load_256", "effective_256"])
    lines = report.sentences(encoder, CONTEXT | {"windows": 1})
    assert not any("(" in line for line in lines[3:7]) or "oracle" in lines[6]
    assert (
        "nearest first" in lines[4]
        and lines[-1].startswith("One window")
        and not any("cache" in line for line in lines)
    )
    said = report.sentences(pooled(), POOLED)
    assert said == ["At 20,000 tokens, by the loads of their median queries: 1 head averages over many keys, in 0 few "
                    "keys decide, 1 is frozen on one or a handful."]  # fmt: skip


def strict(content: str):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(content, parse_constant=refuse)


DOCUMENTED = set(re.findall(r"`([\w.]+)`", (ROOT / "book/reference/report.md").read_text(encoding="utf-8")))


def documented(name: str) -> str:
    """A key as the page about report.json has it."""
    return re.sub(rf"_({'|'.join(POLICIES[::-1])})(?=_|$)", "_POLICY", re.sub(r"_[1-9]\d*$", "_N", name))


def keys_of(value) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("table, meta", [(in_context(), CONTEXT), (pooled(), POOLED)], ids=["in context", "pooled"])
def test_report_json_is_strict_whole_and_documented(table, meta, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "drawn", lambda *arguments, **options: b"png")
    meta = meta | {"seconds": 1.5, "seconds_model": np.float64(1), "seconds_statistics": 0.5, "peak_memory_gb": np.nan}
    paths = report.write(table, meta, tmp_path)
    assert {path.name for path in paths} == {path.name for path in tmp_path.iterdir()}
    found = strict((tmp_path / "report.json").read_text())
    parts = ["schema", "probe", "summary", *(["key_heads"] if "keys" in table else []), "heads"]
    assert list(found) == parts and found["schema"] == report.SCHEMA
    assert found["probe"]["peak_memory_gb"] is None and found["probe"]["versions"] == meta["versions"]
    rows = pd.DataFrame(found["heads"])
    numbers = table.select_dtypes("number")
    expected = numbers.where(np.isfinite(numbers))
    assert list(rows) == list(table) and rows["phase"].tolist() == table["phase"].tolist()
    pd.testing.assert_frame_equal(rows[list(expected)].astype(float), expected.astype(float), rtol=1e-5)

    assert {documented(key) for key in keys_of(found) - {*meta["versions"], *POLICIES}} <= DOCUMENTED


def test_every_column_of_real_probes_is_documented():
    model = loading.load_model("minilm")
    text = "Attention over a law of tokens, and what a head makes of it. " * 30
    pool = probe(model, text, tokens=300, layers=[0])
    for table in (probe(model, text, windows=2, context=80, queries=4, layers=[0]), pool):
        assert {documented(name) for name in table} <= DOCUMENTED
        assert {*POLICIES} <= DOCUMENTED


def cells(content: str, first: str) -> list[str]:
    """The text of the cells of the last row of a page that begins with `first`."""
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", content)]
    return [re.sub("<.*?>", "", cell) for cell in [row for row in rows if row and row[0] == first][-1]]


def test_the_page_of_a_probe_in_context(tmp_path):
    meta = CONTEXT | {"seconds": 75.0, "seconds_model": 60.2, "peak_memory_gb": 1.25, "model": "smollm2"}
    paths = report.write(in_context(), meta, tmp_path)
    figures = ["phases", "errors", "growth", "load", "effective", "first", "budget"]
    names = ["heads.csv", "report.html", *(f"{name}.png" for name in figures), "report.json", "probe.json"]
    assert [path.name for path in paths] == names
    content = (tmp_path / "report.html").read_text()
    row = ["1.3", "1", "1,000", "9.00", "7.20 – 10.8", "2.42", "frozen", "1.10", "90%", "5.0%", "1.0%"]
    row += ["100 (50–200)", "200 (100–400)", "400 (200–800)", "400 (200–800)"]
    assert cells(content, "1.3") == row
    layer = ["1", "4.25", "4.00", "50%", "100", "200", "65", "400", "23%"]
    assert cells(content.partition("All heads")[0], "1") == layer
    page = Page(content)
    links = [v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "srcset", "href")]
    assert len(links) == 7 + 4 and all(link.startswith("data:image/png;base64,") for link in links)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 7 and all(len(image["alt"]) > 30 for image in images)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    words = re.sub(r"\s+", " ", " ".join(page.words))
    assert "nan" not in words.lower() and "url(" not in words and "@import" not in words
    for line in report.sentences(in_context(), meta):
        if not line.startswith("  "):
            assert line in words
    assert (
        "1.3: 400 of 1,000 (200–800) keys" in words.replace(" :", ":")
        and "1 min 15 s; of which the model 1 min 0 s" in words
    )
    assert (
        "needs fewer keys on 8 heads" in words
        and "1.2 GB" in words
        and "four bits" in words
        and "2.00 at 64 keys (2.00–2.00)" in words
    )


@pytest.mark.parametrize("case", ["one window", "an encoder", "sliding windows", "a short context", "a frozen head"])
def test_whatever_a_table_lacks_its_page_is_whole(case, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "inside", lambda *_: {"alt": "", "light": "", "dark": ""})  # each figure is drawn once
    table, meta = in_context(), CONTEXT
    if case == "one window":
        table, meta = in_context(1), CONTEXT | {"windows": 1}
        monkeypatch.setattr(pages, "drawn", lambda *arguments, **options: b"png")
    elif case == "an encoder":
        table = table.drop(columns=["load_64", "effective_64", "load_256", "effective_256"])
    elif case == "sliding windows":
        table["window"] = [*4 * [50.0], *4 * [np.nan]]
        table.loc[:3, "keys"] = 50.0
        table.loc[:3, ["error_latest_256", "error_heaviest_256"]] = 0.0
        table.loc[:3, ["load_64", "effective_64", "load_256", "effective_256", "law_64"]] = np.nan
    elif case == "a short context":
        table = table[[name for name in table if not re.search(r"_(64|256)$", name)]].assign(keys=60.0)
    elif case == "a frozen head":
        table = table[table["head"] == 3].assign(load=0.0, load_05=0.0, load_95=0.0, effective=1.0, load_64=0.0)
        table["keys"] = 200.0  # fewer than the 256 of some columns
    report.write(table, meta, tmp_path)
    page = re.sub(r"\s+", " ", " ".join(Page((tmp_path / "report.html").read_text()).words))
    assert "nan" not in page.lower()
    assert ("sliding window" in page) == (case == "sliding windows")
    assert ("no intervals" in page) == (case == "one window")
    assert ("could shrink to" in page) == (case not in ("an encoder", "a short context"))
    assert (tmp_path / "errors.png").exists() == (case not in ("a short context", "a frozen head"))
    assert (tmp_path / "growth.png").exists() == (case not in ("an encoder", "a short context"))


def budgets_without_an_error(words: str) -> list[str]:
    """Where a page says 1/√n, or the budget e^(2s²), without saying in the same breath that the error is typical."""
    parts = re.split(r"(?<=[.;:,(|])\s|\s–\s", words)
    return [part for part in parts if re.search(r"1/√n|e2s²|e\^\(2s²\)", part) and "typical" not in part]


def test_each_budget_says_of_which_error_it_is(monkeypatch):
    monkeypatch.setattr(pages, "drawn", lambda *arguments, **options: b"png")
    content = pooled_page.page(pooled(), POOLED)
    words = "".join(Page(content).words)
    headings = re.findall(r'<th scope="col">(.*?)</th>', content)
    three = ["not frozen beyond", "mean square like 1/n beyond", "typical error like 1/√n beyond"]
    assert [name for name in headings if "beyond" in name] == three
    row = re.findall(r"<td>(.*?)</td>", re.search(r"<tbody>(.*?)</tbody>", content, re.S)[1])
    first = row[headings.index(three[0]) :][:3]
    assert first == [pages.number(pooled()[f"tokens_{name}"][0]) for name in ("unfrozen", "mean_square", "clt")]
    assert "e3s²/2" in words and "e2s²" in words
    for page in (words, "".join(Page(context_page.page(in_context(), CONTEXT)).words)):
        assert "1/√n" in page and budgets_without_an_error(page) == []
        assert budgets_without_an_error(page.replace("typical ", ""))


def test_what_a_page_is_given_is_shown_and_never_obeyed(monkeypatch):
    """Names are text, be they HTML or of the template's language; our own prose is HTML."""
    monkeypatch.setattr(pages, "drawn", lambda *arguments, **options: b"png")
    evil = "<script>alert(1)</script> & \"'{{ 7 * 7 }} {% raw %}"
    names = {"model": evil, "text": evil, "device": evil, "created": evil, "versions": {evil: evil}}
    # Two in the title, some in the heading, six in the facts.
    for content, count in ((pooled_page.page(pooled(), POOLED | names), 9),
                           (context_page.page(in_context(), CONTEXT | names), 10)):  # fmt: skip
        page = Page(content)
        tags = {tag for tag, _ in page.tags}
        assert "script" not in tags and {"b", "i", "table"} <= tags and "&lt;b&gt;" not in content
        assert "".join(page.words).count(evil) == count
        assert all(value.isprintable() and "<" not in value for _, given in page.tags for value in given.values())


@pytest.mark.parametrize(
    "number, shown",
    [(0.34083, "0.341"), (12.345, "12.3"), (99.96, "100"), (1234.5, "1,230"), (0, "0.00"), (np.inf, "∞"), (np.nan, "–")]
    + [(4.5678e12, "4.57&nbsp;×&nbsp;10<sup>12</sup>"), (1e-7, "1.00&nbsp;×&nbsp;10<sup>−7</sup>")],
)
def test_numbers_are_shown_with_three_digits(number, shown):
    assert pages.number(number) == shown


def test_shares_are_shown_as_percent():
    shown = [summary.percent(share) for share in (0, 1e-9, 0.0042, 0.057, 0.0996, 0.3149, 1)]
    assert shown == ["0%", "<0.1%", "0.4%", "5.7%", "10%", "31%", "100%"]


def test_a_table_without_its_columns_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^table: expected heads with columns load_05, keys_heaviest, got 8 rows"):
        report.write(in_context().drop(columns=["load_05", "keys_heaviest"]), CONTEXT, tmp_path / "out")
    with pytest.raises(ValueError, match="^table: expected heads with columns layer, .*got 0 rows of"):
        report.write(in_context()[:0], CONTEXT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_template_is_part_of_a_wheel():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    there = sorted(path.name for path in Path(report.__file__).parent.glob("*.j2"))
    assert declared == {"tokcx_lib.probe": there} and len(there) == 4


# ---- two probes ----


@pytest.fixture
def wrote(tmp_path, monkeypatch):
    """Write the report of a probe into a folder, without figures."""
    monkeypatch.setattr(pages, "drawn", lambda *arguments, **options: b"png")

    def write(name, table, meta):
        report.write(table, meta, tmp_path / name)
        return tmp_path / name

    return write


def test_two_probes_side_by_side(wrote, capsys):
    table = in_context()
    table.loc[5, ["load", "keys_first_latest"]] = 8.0, 61.0
    table.loc[2, "load"] = 2.4
    a, b = wrote("a", in_context(), CONTEXT), wrote("b", table, CONTEXT | {"error": 0.2, "text": "u"})
    found = compare.compare(a, b / "report.json")
    assert list(found) == ["a", "b"] and found.loc["cache_own"].tolist() == pytest.approx([0.13, 0.13025])
    assert found.loc["load, median"].tolist() == [3.25, 3.25] and found.loc["keys_first_latest, every", "a"] == 400
    changed = compare.changed(a, b)
    loads = changed[changed["quantity"] == "load"]
    assert loads[["layer", "head", "a", "b"]].to_numpy().tolist() == [[1, 1, 4.0, 8.0], [0, 2, 2.5, 2.4]]
    assert changed["quantity"].tolist() == ["load", "load", "keys_first_latest"]
    assert compare.differing(a, b) == {"text": ("t", "u"), "error": (0.1, 0.2)}

    assert cli.main(["compare", str(a), str(b)]) == 0
    said = capsys.readouterr().out
    assert (
        "another error: 0.1 and 0.2" in said
        and "another text: t and u" in said
        and "not to be compared" in said
        and "1.1 from 4 to 8" in said
    )
    other = wrote("c", table[table["layer"] == 0], CONTEXT)
    assert cli.main(["compare", str(a), str(other)]) == 0
    assert "distributions only" in capsys.readouterr().out
    pool = wrote("d", pooled(), POOLED)
    assert compare.compare(pool, pool).loc["tokens_10_percent, median"].tolist() == [5000.0, 5000.0]
    assert compare.changed(pool, pool).empty


@pytest.mark.parametrize(
    "content, named",
    [
        (None, "b: expected the folder of a probe, with its report.json, got"),
        ("{", "b: .*report.json cannot be read"),
        ('{"schema": 2}', "b: .*report.json: schema: expected 1, got 2"),
        ('{"schema": 1}', "b: .*report.json lacks probe, summary, heads"),
        (
            '{"schema": 1, "probe": {}, "summary": {"sample": "context"}, "heads": [{"layer": 0, "head": 0}]}',
            "schema 1",
        ),
        ("pooled", "a, b: expected two probes in context or two pooled ones, got context and pooled"),
    ],
)
def test_what_cannot_be_compared_ends_in_one_line(content, named, wrote, tmp_path, capsys):
    a, b = wrote("a", in_context(), CONTEXT), wrote("b", pooled(), POOLED)
    if content is None:
        (b / "report.json").unlink()
    elif content != "pooled":
        (b / "report.json").write_text(content)
    assert cli.main(["compare", str(a), str(b)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(named, line)
