"""The slides in a real browser that reaches no other host: formulas set, pictures there, nothing cut off."""

import re

import pytest

from tools import slides
from tools.notebooks import ROOT

LECTURES = sorted((ROOT / "book" / "teaching" / "slides").glob("*.md"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return slides.write_slides(ROOT, tmp_path_factory.mktemp("slides") / "out")


def test_five_lectures_with_notes_on_every_slide(pages):
    assert [page.stem for page in pages] == [path.stem for path in LECTURES] and len(pages) == 5
    for path in LECTURES:
        parts = path.read_text(encoding="utf-8").split("\n---\n")
        assert len(parts) >= 10 and all("\nNote:\n" in part for part in parts)


def test_no_slide_asks_another_host(pages):
    for page in pages:
        wanted = re.findall(r'(?:src|href)="([^"#]+)"', page.read_text(encoding="utf-8"))
        files = [target for target in wanted if not target.startswith("data:")]
        assert len(files) >= 5 and all((page.parent / target).is_file() for target in files), files


def test_every_slide_fits_and_is_typeset(browser, pages):
    with browser() as session:
        for page in pages:
            session.post("/url", {"url": page.as_uri()})
            session.run("return window.MathJax.startup.promise.then(() => true)")
            total = session.run("return Reveal.getTotalSlides()")
            assert total == LECTURES[pages.index(page)].read_text(encoding="utf-8").count("\n---\n") + 1
            for number in range(total):
                session.run(f"Reveal.slide({number}); Reveal.layout()")
                shown = session.run(
                    "const s = document.querySelector('.slides > section.present');"
                    "return [s.scrollHeight, [...s.querySelectorAll('img')].every(i => i.complete && i.naturalWidth "
                    "> 0),"
                    " s.querySelectorAll('mjx-merror').length, s.innerText]"
                )
                assert shown[0] <= 700 and shown[1] and shown[2] == 0, (page.name, number, shown)
                assert "{" not in re.sub(r"\\\w+", "", shown[3]) or "glue" not in shown[3]
        assert not [entry for entry in session.log("browser") if entry["level"] == "SEVERE"]


def test_what_is_not_in_a_chapter_is_refused():
    book = slides.plain.Book({}, {})
    for line, error in (
        ("!figure 01_none fig-a", "expected a chapter"),
        ("!figure 03_moment_rate fig-none", "has no figure"),
    ):
        with pytest.raises(ValueError, match=error):
            slides.lecture(f"# A title\n{line}\n", ROOT, book)
