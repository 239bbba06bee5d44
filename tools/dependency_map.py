"""Draw which chapter needs which: book/_static/dependencies.svg, from the "Needs" lines of the chapters.

    python tools/dependency_map.py

An arrow is solid where the whole chapter is needed, dashed where it is needed for a part: then the line says which
part, in words of its own. Arrows that follow from others are left out.
"""

import re
from itertools import combinations, permutations, product
from pathlib import Path
from textwrap import wrap

import networkx as nx

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "book" / "_static" / "dependencies.svg"

# Of the book's figures: readable on white, and after the style sheet has turned lightness around for dark pages.
PARTS = {
    "Theory": "#0072B2",
    "Experiments": "#D55E00",
    "Beyond the paper": "#009E73",
    "Language models": "#9C3D7A",
}
INK, LINES = "#000000", "#767676"
WIDTH, HEIGHT, ACROSS, DOWN = 172, 66, 36, 24  # of a box, and between boxes


def chapters() -> dict[int, str]:
    """Text of each chapter by its number."""
    return {int(path.name[:2]): path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("chapters/[0-9]*.md"))}


def needs(texts: dict[int, str]) -> dict[tuple[int, int], bool]:
    """(needed, chapter): is all of the needed chapter meant?"""
    number = {re.search(r"^\((ch-[\w-]+)\)=", text, re.M)[1]: n for n, text in texts.items()}
    edges = {}
    for chapter, text in texts.items():
        line = re.search(r"\*Needs\*(.*?)\*Reading\*", text, re.S)[1].replace("\n", " ")
        # "{ref}`Chapters 1 <a>` to {ref}`3 <b>`" is short for three of them.
        spans = re.findall(r"\{ref\}`[^`<]*<(ch-[\w-]+)>` to \{ref\}`[^`<]*<(ch-[\w-]+)>`", line)
        for first, last in spans:
            edges |= {(n, chapter): True for n in range(number[first], number[last] + 1)}
        for clause in re.split(r"[;,.]", line):
            found = re.findall(r"\{ref\}`[^`<]*<([\w-]+)>`", clause)
            rest = set(re.sub(r"\{ref\}`[^`]*`", "", clause).split()) - {"and", "the", "to"}
            for label in found:
                if label in number and (number[label], chapter) not in edges:
                    edges[number[label], chapter] = not rest
    return edges


def solid(edges: dict[tuple[int, int], bool]) -> nx.DiGraph:
    """The chapters, and between them the arrows that stand for a whole one."""
    graph = nx.DiGraph()
    graph.add_nodes_from(chapter for edge in edges for chapter in edge)
    graph.add_edges_from(edge for edge, whole in edges.items() if whole)
    return graph


def drawn(edges: dict[tuple[int, int], bool]) -> dict[tuple[int, int], bool]:
    """The arrows that do not follow from others that are solid."""
    every = solid(edges)
    least = nx.transitive_reduction(every)

    def follows(edge, whole):
        return edge not in least.edges if whole else nx.has_path(every, *edge)

    return {edge: whole for edge, whole in edges.items() if not follows(edge, whole)}


def columns(numbers, edges) -> list[list[int]]:
    """Chapters by the length of the longest chain of solid arrows before them, each column in the best order."""
    graph = solid(edges)
    graph.add_nodes_from(numbers)
    by_depth = [permutations(sorted(column)) for column in nx.topological_generations(graph)]
    return [list(column) for column in min(product(*by_depth), key=lambda order: tangle(order, edges))]


def tangle(order, edges) -> tuple[int, float]:
    """How many arrows cross between columns in this order, then how far up or down arrows go."""
    place = {n: i - (len(column) - 1) / 2 for column in order for i, n in enumerate(column)}
    level = {n: k for k, column in enumerate(order) for n in column}
    ends = [(level[a], level[b], place[a], place[b]) for a, b in edges]
    crossings = sum(
        (p[0], p[1]) == (q[0], q[1]) and (p[2] - q[2]) * (p[3] - q[3]) < 0 for p, q in combinations(ends, 2)
    )
    return crossings, sum(abs(end[2] - end[3]) ** 2 for end in ends)


def boxes(numbers, edges) -> dict[int, tuple[float, float]]:
    """Upper left corner of each chapter's box."""
    order = columns(numbers, edges)
    tall = max(map(len, order))
    return {
        n: (2 + k * (WIDTH + ACROSS), 2 + (i + (tall - len(column)) / 2) * (HEIGHT + DOWN))
        for k, column in enumerate(order)
        for i, n in enumerate(column)
    }


def part(chapter: int) -> str:
    return list(PARTS)[min((chapter - 1) // 4, len(PARTS) - 1)]


def arrow(a: int, b: int, whole: bool, both: bool, at) -> str:
    """A curve from box a to box b; straight up or down within a column."""
    (x, y), (u, v) = at[a], at[b]
    if x == u:
        middle = x + WIDTH / 2
        start, end = (y + HEIGHT, v - 4) if y < v else (y, v + HEIGHT + 4)
        if both:
            start += 4 if y < v else -4
        path = f"M{middle:g},{start:g} L{middle:g},{end:g}"
    else:
        x, y, u, v = x + WIDTH, y + HEIGHT / 2, u - 4, v + HEIGHT / 2
        bend = (u - x) / 2
        path = f"M{x:g},{y:g} C{x + bend:g},{y:g} {u - bend:g},{v:g} {u:g},{v:g}"
    dash = "" if whole else ' stroke-dasharray="5 4"'
    tail = ' marker-start="url(#tip)"' if both else ""
    return f'  <path data-from="{a}" data-to="{b}" d="{path}"{dash}{tail} marker-end="url(#tip)"/>'


def tint(colour: str) -> str:
    return f'fill="{colour}" fill-opacity="0.1" stroke="{colour}"'


def box(chapter: int, title: str, at) -> str:
    x, y = at[chapter]
    colour, lines = PARTS[part(chapter)], wrap(title, 16)
    top = y + HEIGHT / 2 + 5 - 8.5 * (len(lines) - 1)
    words = "".join(f'<tspan x="{x + 42:g}" y="{top + 17 * i:g}">{line}</tspan>' for i, line in enumerate(lines))
    return (
        f'  <rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="7" {tint(colour)}/>\n'
        f'  <text x="{x + 22:g}" y="{y + HEIGHT / 2 + 7:g}" text-anchor="middle" font-size="19" font-weight="600"'
        f' fill="{colour}">{chapter}</text><text font-size="14" fill="{INK}">{words}</text>'
    )


def legend(foot: float) -> tuple[list[str], float]:
    """What colours and dashes mean, in one line at the foot, and how far it goes."""
    found, x = [], 2
    for name, colour in PARTS.items():
        found.append(f'  <rect x="{x}" y="{foot - 13}" width="14" height="14" rx="3" {tint(colour)}/>')
        found.append(f'  <text x="{x + 22}" y="{foot - 1}" font-size="14">{name}</text>')
        x += 50 + 8 * len(name)
    for name, dash in (("all of it", ""), ("a part of it", ' stroke-dasharray="5 4"')):
        line = f'd="M{x + 20},{foot - 6} h34" stroke="{LINES}" stroke-width="1.6"{dash}'
        found.append(f'  <path {line} marker-end="url(#tip)"/>')
        found.append(f'  <text x="{x + 66}" y="{foot - 1}" font-size="14">{name}</text>')
        x += 90 + 8 * len(name)
    return found, x - 24


def svg() -> str:
    texts = chapters()
    titles = {n: re.search(r"^# \d+ · (.*)$", text, re.M)[1].replace("$", "") for n, text in texts.items()}
    shown = drawn(needs(texts))
    at = boxes(texts, shown)
    foot = max(y for _, y in at.values()) + HEIGHT + 40
    words, end = legend(foot)
    width = max(max(x for x, _ in at.values()) + WIDTH + 2, end)
    arrows = []
    for (a, b), whole in sorted(shown.items()):
        if (b, a) not in shown or a < b:
            arrows.append(arrow(a, b, whole, (b, a) in shown, at))
    size = f'viewBox="0 0 {width:g} {foot + 8:g}" width="{width:g}" height="{foot + 8:g}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}'
            ' font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6.5" markerHeight="6.5"'
            ' orient="auto-start-reverse">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{LINES}"/></marker></defs>',
            f'<g fill="none" stroke="{LINES}" stroke-width="1.6">',
            *arrows,
            "</g>",
            "<g>",
            *(box(n, titles[n], at) for n in texts),
            "</g>",
            f'<g fill="{INK}">',
            *words,
            "</g>",
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(svg(), encoding="utf-8")
    for (a, b), whole in sorted(needs(chapters()).items(), key=lambda item: item[0][::-1]):
        print(f"{b} needs {a}" + ("" if whole else ", a part of it"))
    print(f"wrote {PICTURE.relative_to(ROOT)}")
