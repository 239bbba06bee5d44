"""Exercises and their self-checks: every exercise has one, which tells right answers from planted wrong ones."""

import importlib
import re
import subprocess
import sys

import numpy as np
import pytest
import sympy as sp

from tokcx_lib import check
from tokcx_lib.check import kinds
from tools import notebooks
from tools.notebooks import ROOT

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import exercise_table  # noqa: E402

CHAPTERS = notebooks.chapters(ROOT, [])
CHECKS = check.checks()
KINDS = {"pencil", "sympy", "code", "pencil and sympy", "pencil and code", "sympy and code"}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_exercise_has_kind_minutes_objective_solution_and_check(path):
    source, chapter = path.read_text(encoding="utf-8"), int(path.stem[:2])
    found = exercise_table.exercises(path)
    assert len(found) == source.count("```{exercise-start}") >= 5
    assert {e.label for e in found} == set(importlib.import_module(f"tokcx_lib.check.chapter_{chapter:02d}").CHECKS)
    assert {e.kind for e in found} <= KINDS and all(5 <= e.minutes <= 60 for e in found)
    assert sum("pencil" in e.kind or "sympy" in e.kind for e in found) >= 3
    assert sum("code" in e.kind for e in found) >= 2 and any(e.stretching for e in found)
    aims = re.search(r"^```\{admonition\} You will\n.*?^```", source, flags=re.M | re.S)[0]
    objectives = [f"{chapter}.{number}" for number in re.findall(r"^(\d)\. ", aims, flags=re.M)]
    assert objectives == [f"{chapter}.{i + 1}" for i in range(len(objectives))]
    assert {e.objective for e in found} == set(objectives)
    for e in found:
        text = re.search(rf"^:label: {e.label}$.*?^```\{{exercise-end\}}", source, flags=re.M | re.S)[0]
        solution = re.search(
            rf"^```\{{solution-start\}} {e.label}$.*?^```\{{solution-end\}}", source, flags=re.M | re.S
        )[0]
        assert f"\n*Hand in*, under `{e.label}`, " in text, e.label
        assert re.search(rf'^assert check\.exercise\(\s*"{e.label}", ', solution, flags=re.M), e.label
    assert f"\nfrom tokcx_lib.check import chapter_{chapter:02d} as check\n" in source


def parts(label):
    """Every check of an exercise, alone, with the name of its part."""
    whole = CHECKS[label]
    return whole.expected.items() if isinstance(whole, kinds.Parts) else [(None, whole)]


def given(label, name, answer):
    """The right answer to an exercise, but for one part of it."""
    whole = CHECKS[label].answer()
    return answer if name is None else {**whole, name: answer}


def corrupted(part):
    """Answers that nobody should accept in place of the right one."""
    right = part.answer()
    if isinstance(part, kinds.Numbers):
        right = np.asarray(right, float)
        step = 3 * (part.atol + part.rtol * np.abs(right))
        return [right + step, right - step, right + 10 * step]
    if isinstance(part, kinds.Expression):
        right = sp.sympify(right)
        return [2 * right + 1, right + sp.Rational(1, 1000), right * sp.Rational(999, 1000) + sp.Rational(1, 10**6)]
    if isinstance(part, kinds.Function):
        return [lambda *x: np.asarray(right(*x)) * 1.5 + 0.1, lambda *x: np.zeros(3)]
    return [word for word in part.options if word != right]


@pytest.mark.parametrize("label", CHECKS)
def test_right_answers_pass_and_wrong_ones_do_not(label):
    right = check.exercise(label, CHECKS[label].answer())
    assert right and repr(right) == f"{label}: right."
    for name, part in parts(label):
        assert part.hint and not part.hint.isspace()
        for wrong in corrupted(part):
            verdict = check.exercise(label, given(label, name, wrong))
            assert not verdict and repr(verdict).startswith(f"{label}: not yet. "), (name, wrong)


@pytest.mark.parametrize("label", CHECKS)
def test_known_mistakes_get_their_own_hint(label):
    for name, part in parts(label):
        for wrong, hint in part.misses:
            verdict = check.exercise(label, given(label, name, wrong))
            assert not verdict and hint in verdict.message, (name, wrong)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ([0.5766, 0.7533, 0.8155], True),  # steps of 0.05, as on the page
        ([0.5628, 0.7528, 0.8076], True),  # steps of 0.002
        ([0.58, 0.75, 0.82], True),
        ([0.56, 0.75, 0.81], True),
        ([0.6, 0.7, 0.8], False),
        ([0.6, 0.75, 0.82], False),
        ([0.58, 0.7, 0.82], False),
        ([0.58, 0.75, 0.8], False),
    ],
)
def test_ratios_of_the_flat_end_are_measured_not_guessed(answer, right):
    assert bool(check.exercise("ex-flat", answer)) == right


@pytest.mark.parametrize("label", CHECKS)
def test_no_hint_gives_a_number_away(label):
    for _, part in parts(label):
        if isinstance(part, kinds.Numbers):
            shown = {f"{value:.{digits}g}" for value in np.ravel(part.answer()) for digits in (3, 4, 5)}
            for hint in (part.hint, *(hint for _, hint in part.misses)):
                numbers = set(re.findall(r"\d+(?:\.\d+)?", hint))
                assert not {number for number in numbers & shown if len(number) > 2}, hint


@pytest.mark.parametrize(
    ("label", "answer", "error"),
    [
        ("3.2", 1, "label: expected that of an exercise, one of ex-exponential, ex-shift, .* got '3.2'"),
        ("ex-momnt-rank", 1, "label: expected that of an exercise, perhaps ex-moment-rank, .* got 'ex-momnt-rank'"),
        (["ex-shift"], 1, "label: expected that of an exercise, perhaps ex-shift, "),
        ("ex-moment-constants", 1, r"answer: expected numbers of shape \(4,\), got shape \(\)"),
        ("ex-moment-constants", "many", "answer: expected numbers, got 'many'"),
        ("ex-moment-constants", [1, 2, 3, float("nan")], "answer: expected finite numbers"),
        ("ex-moment-heavy", {"balance": 1}, "answer: expected a dictionary with 'balance', 'integral', 'changes'"),
        (
            "ex-moment-heavy",
            {"balance": sp.Symbol("z"), "integral": 1, "changes": "both"},
            "balance: answer: expected a formula in c lambda",
        ),
        (
            "ex-moment-heavy",
            {"balance": 1, "integral": 1, "changes": "perhaps"},
            "changes: answer: expected one of balance, ",
        ),
    ],
)
def test_answers_of_another_kind_are_refused(label, answer, error):
    with pytest.raises(ValueError, match=error):
        check.exercise(label, answer)


def test_a_chapter_knows_its_own_exercises_and_says_which():
    own = importlib.import_module("tokcx_lib.check.chapter_03")
    assert own.exercise("ex-moment-constants", CHECKS["ex-moment-constants"].answer())
    with pytest.raises(ValueError, match=f"one of {', '.join(own.CHECKS)}, got 'ex-shift'"):
        own.exercise("ex-shift", 1)


def test_a_label_stands_for_one_exercise_of_the_book():
    sizes = [len(importlib.import_module(f"tokcx_lib.check.chapter_{path.stem[:2]}").CHECKS) for path in CHAPTERS]
    assert len(CHECKS) == sum(sizes)


def test_the_package_loads_no_chapter_before_it_is_asked():
    code = "import sys, tokcx_lib.check; print([name for name in sys.modules if 'check.chapter_' in name])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


def test_a_check_module_for_each_chapter_and_no_other():
    there = {path.stem for path in (ROOT / "tokcx_lib/check").glob("chapter_*.py")}
    assert there == {f"chapter_{path.stem[:2]}" for path in CHAPTERS}
    assert all(importlib.import_module(f"tokcx_lib.check.{name}").__doc__ for name in there)
