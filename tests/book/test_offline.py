"""The built pages need nothing from another host: by what they say, and in a browser that can reach none."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browser import network, typeset

# Attributes by which a page loads something. `href` does so in a <link> only: in an <a> the reader decides.
LOADS = {"src", "srcset", "data", "poster", "background"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """What a page loads, its figures, and whether it has mathematics."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self.pictures: list[tuple[str, str, bool]] = []  # source, alt text, inside a figure?
        self.captions: list[str] = []  # of each <figure>
        self.has_math = False
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        if tag not in VOID:
            self.open.append(tag)
        for name, value in given.items():
            if name in LOADS or (name == "href" and tag == "link"):
                self.loads += [part.split()[0] for part in value.split(", ") if part] if name == "srcset" else [value]
        self.loads += addresses(given.get("style", ""))
        if tag == "script" and "src" in given:
            self.scripts.append(given["src"])
        elif tag == "figure":
            self.captions.append("")
        elif tag == "img":
            self.pictures.append((given.get("src", ""), given.get("alt", ""), "figure" in self.open))
        self.has_math |= "math" in given.get("class", "").split()

    def handle_endtag(self, tag):
        while tag in self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" in self.open:
            self.loads += addresses(data)
        if "figcaption" in self.open and "figure" in self.open:
            self.captions[-1] += data.strip()


def addresses(css: str) -> list[str]:
    """What a style sheet loads."""
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.S)
    found = re.findall(r"url\(\s*[\"']?([^\"')]*)", css) + re.findall(r"@import\s+[\"']([^\"']*)", css)
    return [address for address in found if address]


def elsewhere(address: str) -> bool:
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme not in ("", "data")


@pytest.fixture(scope="module")
def pages(html):
    """Every page of the book; what lies in _static belongs to the theme."""
    files = sorted(path for path in html.rglob("*.html") if "_static" not in path.parts)
    assert len(files) > 2
    return [Page(path) for path in files]


def test_the_parser_sees_other_hosts(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<link href="https://a.org/x.css"><script src="//b.org/x.js"></script><a href="https://fine.org">to read</a>'
        '<img srcset="https://c.org/1.png 1x, 2.png 2x"><style>@import "https://d.org/x.css";</style>'
        '<p style="background: url(https://e.org/x.png)"></p><iframe src="https://f.org"></iframe>',
        encoding="utf-8",
    )
    hosts = [urlsplit(address).netloc for address in Page(page).loads if elsewhere(address)]
    assert hosts == ["a.org", "b.org", "c.org", "d.org", "e.org", "f.org"]


def test_pages_load_nothing_from_elsewhere(pages):
    assert [(page.path.name, address) for page in pages for address in page.loads if elsewhere(address)] == []


def test_style_sheets_load_nothing_from_elsewhere(html):
    sheets = list(html.rglob("*.css"))
    assert sheets
    found = [(path.name, a) for path in sheets for a in addresses(path.read_text(encoding="utf-8")) if elsewhere(a)]
    assert found == []


def test_what_pages_load_is_there(pages):
    missing = []
    for page in pages:
        for address in page.loads:
            path = unquote(urlsplit(address).path)
            if path and not elsewhere(address) and not address.startswith("data:"):
                if not (page.path.parent / path).exists():
                    missing.append((page.path.name, address))
    assert missing == []


def test_mathjax_is_local(pages):
    with_math = [page for page in pages if page.has_math]
    assert with_math
    for page in with_math:
        scripts = [script for script in page.scripts if "mathjax" in script.lower()]
        assert len(scripts) == 1 and not elsewhere(scripts[0]), page.path.name


def test_figures_have_alt_text_and_a_caption(pages):
    pictures = [(page.path.name, *picture) for page in pages for picture in page.pictures]
    # Where there is no alt text, Sphinx writes the address of the picture.
    assert [p for p in pictures if not p[2].strip() or p[2] == p[1] or re.search(r"\.(png|svg|jpe?g)$", p[2])] == []
    assert [p for p in pictures if not p[3]] == [], "a picture outside of a figure has no caption"
    assert [page.path.name for page in pages for caption in page.captions if not caption] == []


# ------------------------------------------------------------- a browser

UNTYPESET = """
return [...document.querySelectorAll(".math")]
    .filter(e => !e.querySelector("mjx-container")).map(e => e.textContent.trim().slice(0, 80))
"""
# An undefined macro is no error to MathJax: it shows its name in red.
MISTAKES = """
return [...document.querySelectorAll("mjx-merror, [data-mjx-error], mjx-container [style*='color: red']")]
    .map(e => (e.dataset.mjxError || "") + " " + (e.closest("mjx-container").parentNode.textContent || "").slice(0, 80))
"""


def test_in_a_browser_without_network(browser, html, pages, address):
    problems = []
    with browser() as session:
        session.open("about:blank")
        list(session.requests())  # what the browser's own start page did
        for page in pages:
            name = page.path.relative_to(html).as_posix()
            session.open(address + name)
            if not typeset(session):
                problems.append((name, "MathJax did not start"))
                continue
            problems += [(name, "not typeset", text) for text in session.run(UNTYPESET)]
            problems += [(name, "TeX", text) for text in session.run(MISTAKES)]
            problems += [(name, "console", e["message"]) for e in session.log("browser") if e["level"] == "SEVERE"]
            problems += [(name, *event) for event in network(session, address)]
    assert not problems, "\n".join(map(str, problems))
