"""What a reader sees on the built pages: no bare TeX, no sentence that Markdown took for something else.

And, in a browser, on a phone, on a desktop and on paper: no formula cut, no full stop alone on its line, and all text
readable on its ground, in light and in dark mode.
"""

import re
from contextlib import contextmanager

import pytest
import yaml
from browser import typeset
from bs4 import BeautifulSoup
from markdown_it.renderer import RendererHTML
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.mdit import create_md_parser

from tools import slides
from tools.notebooks import ROOT

# ------------------------------------------------------------- what a page says

TEX = re.compile(r"\$|\\[a-zA-Z()\[\]{}|,;!]|[_^]\{|\{,\}")
TYPESET_LATER = re.compile(r"\$\$.+?\$\$|\$[^$]+\$", re.S)
NO_PROSE = "script, style, code, pre, svg, .math"
ATTRIBUTES = ("alt", "title", "aria-label", "content")
# MathJax drops a line break in words, and half a pair of bars in a subscript is a symbol's name that TeX misread.
IN_FORMULAS = [
    ("line break in words", r"\\(?:text\w*|mbox)\s*\{[^{}]*\n[^{}]*\}"),
    ("half a pair of bars", r"[_^]\{[^{}|]*\|[^{}|]*\}"),
]


def faults(html: str, slide: bool = False) -> list[tuple[str, str]]:
    """What is wrong with the text of a page, each as its kind and the words there.

    On a slide formulas are still between dollars, and a theorem is a quotation that starts in bold. A page has neither.
    """
    soup = BeautifulSoup(html, "html.parser")
    found, formulas = [], [e.get_text() for e in soup.select(".math")]
    for quotation in soup.find_all("blockquote"):
        if not (slide and quotation.select_one("p:first-child > strong:first-child")):
            found.append(("quotation", quotation.get_text()))
    found += [("TeX in an output", e.get_text()) for e in soup.select(".cell_output pre") if TEX.search(e.get_text())]
    for name in ATTRIBUTES:
        found += [(f"TeX in {name}", e[name]) for e in soup.select(f"[{name}]") if TEX.search(e[name])]
    for element in soup.select(NO_PROSE):
        element.clear()
    for text in soup.find_all(string=True):
        words = str(text)
        if slide:
            formulas += TYPESET_LATER.findall(words)
            words = TYPESET_LATER.sub("", words)
        found += [("TeX", words)] if TEX.search(words) else []
    for kind, pattern in IN_FORMULAS:
        found += [(kind, part) for formula in formulas for part in re.findall(pattern, formula)]
    return [(kind, " ".join(words.split())[:100]) for kind, words in found]


@pytest.mark.parametrize(
    "html, kind",
    [
        ("<p>the exponent $b = 1/2</p>", "TeX"),
        ("<p>for 1 \\le r and so on</p>", "TeX"),
        ("<p>left over: \\( of a formula</p>", "TeX"),
        ("<p>the power n^{-1/2}</p>", "TeX"),
        ("<p>1{,}000 tokens</p>", "TeX"),
        ("<title>The $r$th moment</title>", "TeX"),
        ("<figcaption><p>Slope $\\beta$.</p></figcaption>", "TeX"),
        ('<img src="a.png" alt="Curves of $n$">', "TeX in alt"),
        ('<a title="On the $r$th moment">1968</a>', "TeX in title"),
        ('<div class="cell_output"><pre>E|M_{n|} = 1</pre></div>', "TeX in an output"),
        ("<blockquote><p>one half. The three still counts</p></blockquote>", "quotation"),
        ('<span class="math">\\(\\text{mean\nof the others}\\)</span>', "line break in words"),
        ('<div class="math">\\[E|M_{n|} = 1\\]</div>', "half a pair of bars"),
    ],
)
def test_a_planted_fault_is_seen(html, kind):
    assert [found for found, _ in faults(html)] == [kind]
    assert (
        faults(
            '<p>Two ≤ r, <code>a_{b}$</code> and <span class="math">\\(n^{-1/2}\\text{ if }r\\)</span>.</p>'
            '<pre>f"{x}_{y}"</pre>'
        )
        == []
    )


def test_a_planted_fault_of_a_slide_is_seen():
    good = "<blockquote><p><strong>Theorem 1.</strong></p><p>Let $n \\to \\infty$.</p></blockquote>"
    assert faults(good, slide=True) == []
    for bad, kind in (
        ("<blockquote><p>one</p></blockquote>", "quotation"),
        ("a $b", "TeX"),
        ("$\\text{a\nb}$", "line break in words"),
    ):
        assert [found for found, _ in faults(good + bad, slide=True)] == [kind]


def test_pages(html):
    pages = [path for path in sorted(html.rglob("*.html")) if "_static" not in path.parts]
    found = [(path.stem, *fault) for path in pages for fault in faults(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(map(str, found))


def test_slides(tmp_path):
    pages = slides.write_slides(ROOT, tmp_path / "slides")
    found = [(path.stem, *fault) for path in pages for fault in faults(path.read_text(encoding="utf-8"), slide=True)]
    assert not found, "\n".join(map(str, found))


# ------------------------------------------------------------- what Markdown makes of a line

MYST = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["parse"]["myst_enable_extensions"]
PARSER = create_md_parser(MdParserConfig(enable_extensions=set(MYST)), RendererHTML)
# Blocks that are meant where they stand, right below a paragraph or not.
MEANT = {"fence", "colon_fence", "myst_target", "math_block", "math_block_label", "amsmath", "list_item_open"}


def interruptions(text: str) -> list[tuple[str, str]]:
    """Lines of a paragraph that start something else, as `> 1/2` and `- x` do: what, and the line.

    A list, a quotation, a heading or a table comes after an empty line, then nobody has to guess whether it is meant.
    """
    lines, found, end = text.splitlines(), [], None
    for token in PARSER.parse(text):
        if (
            token.type == "fence"
            and token.info.startswith("{")
            and not re.match(r"\{(code-cell|math|bibliography)", token.info)
        ):
            found += interruptions(re.sub(r"\A(:[\w-]+:[^\n]*\n)+\n?", "", token.content))
        if token.type == "heading_open" and token.markup in "-=" or token.type == "dl_open":
            found.append((token.type, lines[token.map[1] - 1]))
        if not token.map or token.type == "inline":
            continue
        if token.map[0] == end and token.type not in MEANT:
            found.append((token.type, lines[end]))
        end = token.map[1] if token.type == "paragraph_open" else None
    return found


@pytest.mark.parametrize(
    "line",
    ["> \\frac12$.", "- x$ is", "+ x$ is", "* x", "# x", "1. It", "1) It", "% of them", "<div>", "---", ": so", "+++"],
)
def test_an_interrupted_paragraph_is_seen(line):
    assert interruptions(f"A sentence goes\n{line}\nand on.\n")
    assert interruptions(f"```{{prf:lemma}} A title\n:label: lem\n\nA sentence goes\n{line}\nand on.\n```\n")
    assert interruptions("A sentence goes\non. Two kinds:\n\n- one\n  and on\n- two\n\n1. three\n\n> meant\n") == []


def test_no_line_interrupts_its_paragraph():
    pages = [*ROOT.glob("chapters/*.md"), *ROOT.glob("book/**/*.md")]
    slides_ = ROOT / "book" / "teaching" / "slides"  # a slide ends with ---
    found = [
        (path.name, *fault)
        for path in pages
        if path.parent != slides_
        for fault in interruptions(path.read_text(encoding="utf-8"))
    ]
    assert len(pages) > 20 and not found, "\n".join(map(str, found))


def leftovers(text: str) -> list[tuple[str, str]]:
    """What a page made from this Markdown would show that nobody meant: TeX as text, and quotations, which no page has.

    The same as `faults` says of the built page, without the build, with the words as they stand in the source.
    """
    lines, found = text.splitlines(), []
    for token in PARSER.parse(text):
        if token.type == "blockquote_open":
            found.append(("quotation", lines[token.map[0]]))
        if token.type == "inline":
            found += [
                ("TeX", part.content) for part in token.children if part.type == "text" and TEX.search(part.content)
            ]
        if token.type == "fence" and token.info.startswith("{code-cell}"):
            options = re.match(r"---\n(.*?)^---$", token.content, re.M | re.S)
            figure = yaml.safe_load(options[1]).get("mystnb", {}).get("figure", {}) if options else {}
            found += leftovers(figure.get("caption", ""))
        elif token.type == "fence" and re.match(r"\{(?!math|bibliography|raw)", token.info):
            title = token.info.partition("}")[2].strip() if re.match(r"\{(prf|exercise|admonition)", token.info) else ""
            found += leftovers(title) + leftovers(re.sub(r"\A(:[\w-]+:[^\n]*\n)+\n?", "", token.content))
    return found


@pytest.mark.parametrize(
    "fault, kind",
    [
        ("the exponent $b = 1/2 and", "TeX"),
        ("for 1 \\le r and so on", "TeX"),
        ("the exponent $b = (\\sqrt5 - 1)/2\n> \\frac12$. The three still counts", "quotation"),
        ("> \\frac12$ is where it starts", "quotation"),
        ("- a list\n\n  > in it", "quotation"),
    ],
)
def test_a_leftover_of_markdown_is_seen(fault, kind):
    good = "# The $r$-th\n\nA sentence with $a\n< b$, `$x_{1}$` and {glue:text}`n`:\n\n$$\nx\n> y\n$$\n\n"
    caption = "---\nmystnb:\n  figure:\n    caption: |\n      "
    assert leftovers(good) == []
    for text in (
        good + fault + "\n",
        f"```{{prf:lemma}} A $t$\n:label: lem\n\n{fault}\n```\n",
        "```{code-cell} python3\n" + caption + fault.replace("\n", "\n      ") + "\n---\nx = 1\n```\n",
    ):
        assert kind in {found for found, _ in leftovers(text)}, text
    assert leftovers("```{code-cell} python3\n" + caption + "A $t$\n---\nx = '$1'\n```\n") == []


def test_no_page_has_leftovers_of_markdown():
    pages = [*ROOT.glob("chapters/*.md"), *ROOT.glob("book/**/*.md")]
    slides_ = ROOT / "book" / "teaching" / "slides"  # on a slide a theorem is a quotation; `test_slides` looks at them
    found = [
        (path.name, *fault)
        for path in pages
        if path.parent != slides_
        for fault in leftovers(path.read_text(encoding="utf-8"))
    ]
    assert len(pages) > 20 and not found, "\n".join(map(str, found))


# ------------------------------------------------------------- a browser

# Everything open, as on paper: a solution is on the page too. The side bar takes its place at once.
OPEN = """
document.querySelectorAll(".toggle-hidden").forEach((e) => e.classList.remove("toggle-hidden"));
document.head.insertAdjacentHTML("beforeend", "<style>* { transition: none !important; }</style>");
"""
# Where formulas in lines of text are cut, and where what belongs to one stands on another line.
LAYOUT = """
const width = document.documentElement.clientWidth, found = [];
if (document.documentElement.scrollWidth > width) found.push(["the page scrolls sideways",
document.documentElement.scrollWidth]); const beside = (text, at) => {
    const range = document.createRange();
    range.setStart(text, at), range.setEnd(text, at + 1);
    return [range.toString(), [...range.getClientRects()].at(-1)];
};
for (const formula of document.querySelectorAll(".bd-article span.math")) {
    const parts = [...formula.querySelectorAll("mjx-c")].map((e) => e.getBoundingClientRect()).filter((r) => r.width);
    if (!parts.length) continue;
    const words = formula.querySelector("mjx-assistive-mml").textContent;
    const left = Math.min(...parts.map((r) => r.left)), right = Math.max(...parts.map((r) => r.right));
    let box = formula, scrolls = false;
    for (; box.tagName != "ARTICLE" && !scrolls; box = box.parentElement) {
        const style = getComputedStyle(box), edge = box.getBoundingClientRect();
        if (style.display == "inline") continue;
        scrolls = ["auto", "scroll"].includes(style.overflowX) && box != formula;
        if (!scrolls && (left < edge.left - 1 || right > edge.right + 1)) { found.push(["cut", words]); break; }
    }
    if (!scrolls && (left < 0 || right > width)) found.push(["outside of the window", words]);
    const lines = [...formula.querySelector("mjx-container").getClientRects()].filter((r) => r.width);
    const [before, after] = [formula.previousSibling, formula.nextSibling];
    if (after?.nodeType == 3 && /^[.,;:!?)\\]”’]/.test(after.data)) {
        const [sign, place] = beside(after, 0);
        if (Math.abs(place.left - lines.at(-1).right) > 8) found.push([`${sign} alone on its line`, words]);
    }
    if (before?.nodeType == 3 && /[(\\[“‘]$/.test(before.data)) {
        const [sign, place] = beside(before, before.length - 1);
        if (Math.abs(place.right - lines[0].left) > 8) found.push([`${sign} alone on its line`, words]);
    }
}
return found.map((fault) => fault.join(": "));
"""
# The lowest contrast of each kind of text in the article, against the ground that is shown behind it or, if asked so,
# against that or white, whichever is worse: browsers print no grounds, if they are not told to.
CONTRAST = """
const rgba = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
const over = ([r, g, b, a], ground) => [r, g, b].map((v, i) => a * v + (1 - a) * ground[i]);
const light = (colour) => {
    const [r, g, b] = colour.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
};
const WHITE = [255, 255, 255], UNREAD = "button, .headerlink, .toggle-button, mjx-assistive-mml";
const ground = (e) => (e ? over(rgba(getComputedStyle(e).backgroundColor), ground(e.parentElement)) : WHITE);
const worst = {};
for (const e of document.querySelectorAll(":is(.bd-article, #jb-print-docs-body) *")) {
    const box = e.getBoundingClientRect();
    if (!box.width || getComputedStyle(e).visibility == "hidden" || e.closest(UNREAD)) continue;
    if (e.tagName != "MJX-C" && ![...e.childNodes].some((n) => n.nodeType == 3 && n.data.trim())) continue;
    const kind = e.closest("mjx-container") ? "formula" : e.closest("pre") ? "pre" : e.tagName.toLowerCase();
    for (const behind of arguments[0] ? [ground(e), WHITE] : [ground(e)]) {
        const found = contrast(over(rgba(getComputedStyle(e).color), behind), behind);
        if (!(found >= worst[kind]?.[0])) worst[kind] = [found, e.textContent.trim().slice(0, 40)];
    }
}
return worst;
"""


@pytest.fixture(scope="module")
def session(browser, html, address):
    with browser() as session:
        yield session


def window(session, width: int) -> None:
    session.command("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)


def shown(session, address: str) -> None:
    session.open(address)
    assert typeset(session), address
    session.run(OPEN)


# The pages with most formulas in their lines, tables, long names in code, and the index of theorems.
DENSE = "chapters/0[26]_*.html chapters/10_*.html book/reference/[cl]*.html book/teaching/notes.html prf-prf.html"


@pytest.mark.parametrize("pages", [DENSE, pytest.param("**/*.html", marks=pytest.mark.slow)])
def test_formulas_are_whole_and_keep_their_full_stop(session, html, address, pages):
    found = []
    paths = {path for pattern in pages.split() for path in html.glob(pattern) if "_static" not in path.parts}
    assert len(paths) >= 7
    for path in sorted(paths):
        shown(session, address + path.relative_to(html).as_posix())
        for width in (390, 1280):
            window(session, width)
            found += [(path.stem, width, fault) for fault in session.run(LAYOUT)]
    assert not found, f"{len(found)}\n" + "\n".join(map(str, found))


def test_a_box_that_cuts_is_seen(session, address):
    """Without the book's own rules formulas are cut, and full stops alone."""
    shown(session, address + "chapters/10_sharp_rate.html")
    window(session, 390)
    session.run("document.querySelector('link[href*=\"tokcx.css\"]').remove()")
    found = session.run(LAYOUT)
    assert {fault.split(": ")[0] for fault in found} >= {"cut", ". alone on its line", ", alone on its line"}


def faint(session, white: bool = False) -> dict[str, list]:
    """Kinds of text whose contrast is below the 4.5 that WCAG asks for, each with the worst of its texts."""
    worst = session.run(CONTRAST, white)
    assert worst, "no text"
    return {kind: found for kind, found in worst.items() if found[0] < 4.5}


# Links on the tints of theorems, boxes and rows, those of the index too.
TINTED = "book/intro.html book/reference/claims.html book/teaching/plan.html chapters/0[13]_*.html prf-prf.html"


@pytest.mark.parametrize("pages", [TINTED, pytest.param("**/*.html", marks=pytest.mark.slow)])
def test_text_is_readable_on_its_ground(session, html, address, pages):
    window(session, 1280)
    found = []
    paths = {path for pattern in pages.split() for path in html.glob(pattern) if "_static" not in path.parts}
    paths -= {html / "index.html", html / "search.html"}  # one leads to another page at once, the other has no text yet
    assert len(paths) >= 6
    for path in sorted(paths):
        shown(session, address + path.relative_to(html).as_posix())
        for mode in ("light", "dark"):
            session.run("document.documentElement.dataset.theme = arguments[0]", mode)
            found += [(path.stem, mode, *fault) for fault in faint(session).items()]
    assert not found, "\n".join(map(str, found))


def test_a_link_too_light_for_its_ground_is_seen(session, address):
    """The theme's own blue, which is meant for a white page, in a box."""
    window(session, 1280)
    shown(session, address + "chapters/03_moment_rate.html")
    session.run("document.documentElement.dataset.theme = 'light'")
    assert faint(session) == {}
    session.run("document.documentElement.style.setProperty('--pst-color-link', 'var(--pst-color-primary)')")
    assert set(faint(session)) >= {"a"}


# ------------------------------------------------------------- paper

PRINTED = "return new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))"
# Displayed formulas that are wider than their place, and how small the smallest is beside the others.
WIDE = """
const size = (e) => parseFloat(getComputedStyle(e).fontSize), cut = [];
let scale = 1;
for (const formula of document.querySelectorAll('.bd-article mjx-container[display="true"] > mjx-math')) {
    const box = formula.parentElement;
    if (formula.getBoundingClientRect().width > box.clientWidth + 1) cut.push(box.textContent);
    scale = Math.min(scale, size(formula) / size(box));
}
return [cut, scale];
"""


@contextmanager
def paper(session):
    """A page as it is printed, on paper that is 7.7 inches wide between its margins."""
    window(session, 739)
    try:
        session.command("Emulation.setEmulatedMedia", media="print")
        session.run(PRINTED)
        yield
    finally:
        session.command("Emulation.setEmulatedMedia", media="")
    session.run(PRINTED)


@pytest.mark.parametrize("pages", ["chapters/0[26]_*.html", pytest.param("**/*.html", marks=pytest.mark.slow)])
def test_no_displayed_formula_is_cut_on_paper(session, html, address, pages):
    found, scales = [], []
    paths = [path for path in sorted(html.glob(pages)) if "_static" not in path.parts]
    for path in paths:
        shown(session, address + path.relative_to(html).as_posix())
        with paper(session):
            cut, scale = session.run(WIDE)
        found += [(path.stem, words) for words in cut]
        scales.append(scale)
    assert not found, "\n".join(map(str, found))
    assert 0.7 < min(scales) < 1, "a formula set much smaller than the others should be broken into lines"


def test_a_formula_that_paper_cuts_is_seen(session, address):
    """Without the width that formulas.js measures all formulas keep their size."""
    shown(session, address + "chapters/02_uniform_rate.html")
    style = "<style>mjx-math { --tokcx-width: 1 !important }</style>"
    session.run("document.head.insertAdjacentHTML('beforeend', arguments[0])", style)
    with paper(session):
        cut, scale = session.run(WIDE)
    assert cut and scale == 1


def test_a_formula_gets_a_little_smaller_before_it_scrolls(session, address):
    shown(session, address + "chapters/02_uniform_rate.html")
    scales = []
    for width in (390, 1200, 1920):
        window(session, width)
        cut, scale = session.run(WIDE)
        scales.append(scale)
        assert scale == pytest.approx(0.8) if cut else 0.8 < scale <= 1
    assert min(scales) == pytest.approx(0.8) and scales == sorted(scales)


@pytest.mark.parametrize("page", ["chapters/01_attention_on_measures.html", "book/reference/claims.html"])
def test_a_page_in_dark_mode_prints_dark_on_light(session, address, page):
    window(session, 1280)
    shown(session, address + page)
    session.run("document.documentElement.dataset.theme = 'dark'")
    assert faint(session, white=True), "in dark mode text is light, and paper white"
    with paper(session):
        assert faint(session, white=True) == {}
    assert session.run("return document.documentElement.dataset.theme") == "dark"
