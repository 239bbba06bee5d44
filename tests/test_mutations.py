"""Every number and every sign in a derivation matters: `tests/mutations.py` says what is changed, and what is not."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest

from tests import mutations
from tools import notebooks
from tools.notebooks import ROOT

CHAPTERS = notebooks.chapters(ROOT, [])


def reports(*arguments, root=ROOT):
    """What the tool says, a dictionary a chapter: run by itself, since forks and threads do not mix."""
    command = [sys.executable, str(ROOT / "tests" / "mutations.py"), "--json", "--root", str(root), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert answer.returncode in (0, 1) and answer.stdout, answer.stderr
    return [json.loads(line) for line in answer.stdout.splitlines()]


def test_a_sample_of_mutants_dies():
    for report in reports("--sample", "4"):
        assert not report["failure"] and not report["alive"], report


@pytest.mark.slow
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_mutant_dies(path):
    (report,) = reports(path.stem)
    assert not report["failure"] and not report["alive"], "\n".join([report["failure"], *report["alive"]])
    print(f"{report['mutants']} mutants of {path.stem} died in {report['seconds']:.0f} s")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_sympy_checks_are_tagged(path):
    """A cell that asserts what sympy found is a derivation, and says so; solutions of exercises included."""
    for number, cell in enumerate(notebooks.code_cells(notebooks.source_notebook(path)), start=1):
        if re.search(r"assert sp\.simplify\(", cell.source):
            assert mutations.is_derivation(cell), f"code cell {number} of {path.stem} has no tag: derivation"


# --------------------------------------------------------- the tool itself

PAGE = """\
---
jupytext:
  formats: ipynb,md:myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A page

```{{code-cell}} python3
import sympy as sp
from myst_nb import glue
```

```{{code-cell}} python3
raise RuntimeError("no derivation needs this cell")
```

```{{code-cell}} python3
:tags: [derivation]

{first}
```

```{{code-cell}} python3
:tags: [derivation]

{second}
```
"""
STRICT = """\
x = sp.symbols("x1")
f = sp.expand((x + 3) * (x - 2))
assert sp.simplify(f - x**2 - x + 6) == 0
for point in (4, 5):
    assert abs(f.subs(x, point) - point**2 - point + 6) < 1e-9
print(f"{2 * 3} is a string")
glue("f", f)"""
LOOSE = """\
g = f + 7
assert g.has(x)"""
LATER = "assert f.subs(x, 0) == -6"


@pytest.fixture
def page(tmp_path):
    def write(first, second):
        (tmp_path / "chapters").mkdir()
        (tmp_path / "chapters" / "01_page.md").write_text(PAGE.format(first=first, second=second), encoding="utf-8")
        return tmp_path

    return write


def test_good_derivation_has_no_survivor(page):
    (report,) = reports(root=page(STRICT, LATER))
    assert report["failure"] == "" and report["alive"] == []
    assert report["mutants"] == 19


def test_planted_survivor_is_found(page):
    (report,) = reports(root=page(STRICT, LOOSE))
    assert len(report["alive"]) == 2
    for line, change in zip(report["alive"], ("+ 7 -> - 7", "7 -> 8")):
        assert line == f"01_page, code cell 4, line 1: {change} in `g = f + 7`: survived"


def test_later_derivations_count(page):
    """A cell without any check is covered if a later derivation uses its result."""
    (report,) = reports(root=page('x = sp.symbols("x")\nf = x - 6', LATER))
    assert report["alive"] == [] and report["mutants"] == 5


def test_endless_mutant_times_out(page):
    endless = "k = 3\nwhile k != 0:\n    k = k - 1"
    (report,) = reports("--limit", "2", root=page(endless, "assert k == 0"))
    assert any("k - 1" in line and line.endswith("timed out") for line in report["alive"])


def test_chapter_that_fails_by_itself_is_said_so(page):
    (report,) = reports(root=page("assert 1 == 2", "pass"))
    assert "fails without any mutation: AssertionError" in report["failure"]


@pytest.mark.parametrize(
    "code, changes",
    [
        ("y = -2 * x", ["* x -> / x", "-2 -> 2", "2 -> 3"]),
        ("y += 1.0", ["+ 1.0 -> - 1.0", "1.0 -> 1.05"]),
        ("assert abs(u) < 1e-9", []),
        ("assert u < 0.5", ["0.5 -> 0.525"]),
        ("assert u > 0.5", ["0.5 -> 0.525"]),
        ("assert abs(u - 2) > 0.1\nassert u != 3 * v\nassert not close(u, 2)", []),
        ("assert isclose(u, v, rel=1e-6)", []),
        ("for k in (1, 2):\n    assert u < k", []),
        ("for k in (1, 2):\n    u = k", ["1 -> 2", "2 -> 3"]),
        ("s = sum(k for k in range(4))", ["4 -> 5"]),
        ("t = True\nsp.symbols('x3:5')\nprint(f'{2 * u:.3f}')", []),
        ("u.evalf(30)\nmp.dps = 20", []),
        ("u = v[0]", ["0 -> 1"]),
    ],
)
def test_what_is_mutated(code, changes):
    tree = ast.parse(code)
    found = [mutations.mutate(tree, index)[1] for index in range(len(mutations.sites(tree)))]
    assert found == changes


def test_names_that_a_cell_needs():
    assert mutations.names("a = b\nc = a + d\nf = lambda e: e + g") == ({"b", "d", "g"}, {"a", "c", "f"})
    needed, bound = mutations.names("import m.n as o\ndef h(p):\n    q = p + r\n    return q\ns = [h(t) for t in u]")
    assert {"r", "u"} <= needed and {"o", "h", "s"} <= bound and not {"p", "q", "t"} & (needed | bound)
    # A name that a comprehension binds is nobody else's, though another part of the statement needs one of that name.
    assert mutations.names("s = t + [[t for t in u] for u in v][0]") == ({"t", "v"}, {"s"})
    assert mutations.names("s = {k: {a + i for i in w} for k, a in z.items()}") == ({"w", "z"}, {"s"})
