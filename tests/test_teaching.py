"""The teaching pages: complete, in step with the chapters, with snippets that compile and a map that is up to date."""

import ast
import importlib
import re
import sys
from pathlib import Path

import networkx as nx
import pytest
import yaml

from tools import dependency_map

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(ROOT.glob("chapters/[0-9]*.md"))
CHAPTERS = {int(path.name[:2]): path.read_text(encoding="utf-8") for path in FILES}
NAMES = ("plan", "notes", "misconceptions", "assignment", "projects")
PAGES = {name: (ROOT / f"book/teaching/{name}.md").read_text(encoding="utf-8") for name in NAMES}

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import exercise_table  # noqa: E402

EXERCISES = {e.label: e for path in FILES for e in exercise_table.exercises(path)}


def rows(section: str) -> list[list[str]]:
    """Cells of the tables in a piece of Markdown, heads left out."""
    lines = [line.strip() for line in section.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    rules = [i for i, line in enumerate(lines) if set(line) <= set("|- ")]
    return [row for i, row in enumerate(table) if i not in rules and i + 1 not in rules]


def between(text: str, start: str, end: str = r"\n\(") -> str:
    return re.split(end, text.split(f"({start})=", 1)[1])[0]


def minutes(cell: str) -> dict[str, int]:
    return {label: int(number) for label, number in re.findall(r"\{ref\}`(ex-[\w-]+)` \((\d+)\)", cell)}


def test_pages_are_in_the_table_of_contents():
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    (files,) = [[page["file"] for page in part["chapters"]] for part in parts if "Teaching" in part["caption"]]
    assert {f"book/teaching/{name}" for name in PAGES} <= set(files)
    assert "<teaching>" in (ROOT / "book/intro.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("week", [1, 2, 3, 4, 5])
def test_each_week_fills_two_hours(week):
    section = between(PAGES["plan"], f"week-{week}")
    table = rows(section)
    assert sum(int(row[0]) for row in table) == 120
    for time, what in table:
        if what.startswith("Exercise"):
            assert sum(minutes(what).values()) == int(time), what
    home = re.search(r"\*At home\*(.*?)together (\d+) minutes", section, re.S)
    assert sum(minutes(home[1]).values()) == int(home[2])


def test_the_lecture_fills_ninety_minutes():
    clock = 0
    for start, time, *_ in rows(between(PAGES["plan"], "lecture-90")):
        hour, minute = map(int, start.split(":"))
        assert 60 * hour + minute == clock
        clock += int(time)
    assert clock == 90


def test_minutes_of_exercises_are_those_of_the_chapters():
    quoted = minutes(PAGES["plan"])
    assert len(quoted) > 20
    assert quoted == {label: EXERCISES[label].minutes for label in quoted}


def test_times_are_those_of_the_chapters():
    table = rows(between(PAGES["plan"], "teaching-times"))
    assert len(table) == len(CHAPTERS)
    for row in table:
        text = re.sub(r"\s+", " ", CHAPTERS[int(re.search(r"`(\d+)", row[0])[1])])
        assert f"*Reading* {row[1]} minutes, *running* {row[2]} on a CPU" in text


def test_objectives_of_the_module():
    """Each names objectives of chapters, and exercises that measure one of them."""
    table = rows(PAGES["plan"].split("## What students will be able to do")[1].split("(teaching-prerequisites)")[0])
    assert 8 <= len(table) <= 13
    for row in table:
        cell = re.sub(
            r"(\d+)\.(\d) to \1\.(\d)",
            lambda m: ", ".join(f"{m[1]}.{k}" for k in range(int(m[2]), int(m[3]) + 1)),
            row[2],
        )
        objectives = set(cell.split(", "))
        assert all(re.fullmatch(r"\d+\.[1-6]", one) and int(one.split(".")[0]) in CHAPTERS for one in objectives)
        shown = re.findall(r"`([\d.]+) <(ex-[\w-]+)>`", row[3])
        assert shown
        for number, label in shown:
            assert number == EXERCISES[label].number and EXERCISES[label].objective in objectives, label


def test_reading_group_covers_every_chapter():
    section = between(PAGES["plan"], "reading-group")
    assert {int(n) for n in re.findall(r"\{ref\}`(\d+) <ch-", section)} == set(CHAPTERS)
    sessions = rows(section)
    assert 6 <= len(sessions) <= 8
    assert all(row[-1].count("?") >= 2 for row in sessions)


def test_rubric_sums_to_a_hundred():
    table = rows(PAGES["assignment"].split("## Rubric")[1].split("## For graders")[0])
    assert sum(int(row[1]) for row in table) == 100
    assert {row[0].split(",")[0] for row in table} == {f"Task {k}" for k in range(1, 5)}
    assert all(len(row) == 5 and all(row) for row in table)


def test_misconceptions():
    entries = re.split(r"\n## \d+\. ", PAGES["misconceptions"])[1:]
    assert len(entries) >= 10
    for entry in entries:
        assert entry.startswith('"')
        for mark in ("*Why it is wrong.*", "*Show*", "*Ask:*"):
            assert mark in entry, entry[:60]
        shown = entry.split("*Show*")[1].split("*Ask:*")[0]
        assert re.search(r"\{(numref|ref|prf:ref)\}`", shown), entry[:60]
        # A number that a page computes would go stale here. Names such as 32 keys of a figure are words.
        assert not re.search(r"\d\.\d|\d%", entry), entry[:60]


def test_notes_on_every_chapter():
    entries = re.split(r"\n## Chapter ", PAGES["notes"])[1:]
    titles = {n: re.search(r"^# (.*)$", text, re.M)[1] for n, text in CHAPTERS.items()}
    assert [entry.split("\n")[0] for entry in entries] == list(titles.values())
    for entry in entries:
        for mark in ("The idea", "On the board", "Where they get stuck", "Live", "Exercises", "Time"):
            assert f"**{mark}.**" in entry, (entry[:10], mark)


def test_projects():
    entries = re.split(r"\n## \d+\. ", PAGES["projects"])[1:]
    assert len(entries) == 7
    for entry in entries:
        for mark in ("Question", "Why", "First step", "A good result", "Size"):
            assert f"**{mark}.**" in entry, (entry[:40], mark)
        (snippet,) = re.findall(r"```python\n(.*?)```", entry, re.S)
        names = compile(snippet, entry.splitlines()[0], "exec").co_names
        assert any(name.split(".")[0] == "tokcx_lib" for name in names)


def test_the_names_that_snippets_import_exist():
    snippets = [code for page in PAGES.values() for code in re.findall(r"```python\n(.*?)```", page, re.S)]
    assert len(snippets) >= 7
    for code in snippets:
        assert max(map(len, code.splitlines())) <= 76, "wider than the page"
        for node in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)):
            for name in (alias.name for alias in node.names if node.module.split(".")[0] == "tokcx_lib"):
                try:
                    found = importlib.import_module(f"{node.module}.{name}")
                except ModuleNotFoundError:  # a function of a module
                    found = getattr(importlib.import_module(node.module), name)
                for attribute in re.findall(rf"\b{name}\.(\w+)", code):
                    assert hasattr(found, attribute), f"{name}.{attribute}"


def test_the_needs_of_the_chapters_are_understood():
    edges = dependency_map.needs(CHAPTERS)
    assert {edge for edge in edges if edge[1] == 6} == {(1, 6), (2, 6), (3, 6)}  # "Chapters 1 to 3"
    assert edges[3, 5] and not edges[2, 5]  # "up to its section on loads"
    assert edges[9, 11] and not edges[7, 11]
    for chapter, text in CHAPTERS.items():
        line = re.search(r"\*Needs\*(.*?)\*Reading\*", text, re.S)[1]
        for label in re.findall(r"<(ch-[\w-]+)>", line):
            (needed,) = [n for n, other in CHAPTERS.items() if f"({label})=" in other]
            assert (needed, chapter) in edges


def test_the_dependency_map_is_up_to_date():
    picture = dependency_map.PICTURE.read_text(encoding="utf-8")
    shown = {(int(a), int(b)) for a, b in re.findall(r'data-from="(\d+)" data-to="(\d+)"', picture)}
    both = {(int(b), int(a)) for a, b in re.findall(r'data-from="(\d+)" data-to="(\d+)"[^>]*marker-start', picture)}
    edges = dependency_map.needs(CHAPTERS)
    assert shown | both == set(dependency_map.drawn(edges))
    # What is left out follows from what is drawn.
    arrows = nx.DiGraph(shown | both)
    assert all(nx.has_path(arrows, *edge) for edge in edges)
    assert picture == dependency_map.svg(), "run python tools/dependency_map.py"


def test_the_map_in_words():
    """The alternative text names every arrow."""
    alt = re.search(r":alt: (.*)", PAGES["plan"])[1]
    for edge in dependency_map.drawn(dependency_map.needs(CHAPTERS)):
        assert all(re.search(rf"\b{chapter}\b", alt) for chapter in edge), edge
