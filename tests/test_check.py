"""Exercises and their self-checks: every exercise has one, which tells right answers from planted wrong ones."""

import importlib
import re
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
    assert [e.number for e in found] == [number for number in CHECKS if number.startswith(f"{chapter}.")]
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
        assert "\n*Hand in* " in text and f'assert check.exercise("{e.number}", ' in solution, e.label


def parts(number):
    """Every check of an exercise, alone, with the name of its part."""
    whole = CHECKS[number]
    return whole.expected.items() if isinstance(whole, kinds.Parts) else [(None, whole)]


def given(number, name, answer):
    """The right answer to an exercise, but for one part of it."""
    whole = CHECKS[number].answer()
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


@pytest.mark.parametrize("number", CHECKS)
def test_right_answers_pass_and_wrong_ones_do_not(number):
    right = check.exercise(number, CHECKS[number].answer())
    assert right and repr(right) == f"{number}: right."
    for name, part in parts(number):
        assert part.hint and not part.hint.isspace()
        for wrong in corrupted(part):
            verdict = check.exercise(number, given(number, name, wrong))
            assert not verdict and repr(verdict).startswith(f"{number}: not yet. "), (name, wrong)


@pytest.mark.parametrize("number", CHECKS)
def test_known_mistakes_get_their_own_hint(number):
    for name, part in parts(number):
        for wrong, hint in part.misses:
            verdict = check.exercise(number, given(number, name, wrong))
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
    assert bool(check.exercise("1.4", answer)) == right


@pytest.mark.parametrize("number", CHECKS)
def test_no_hint_gives_a_number_away(number):
    for _, part in parts(number):
        if isinstance(part, kinds.Numbers):
            shown = {f"{value:.{digits}g}" for value in np.ravel(part.answer()) for digits in (3, 4, 5)}
            for hint in (part.hint, *(hint for _, hint in part.misses)):
                numbers = set(re.findall(r"\d+(?:\.\d+)?", hint))
                assert not {number for number in numbers & shown if len(number) > 2}, hint


@pytest.mark.parametrize(
    ("number", "answer", "error"),
    [
        ("13.1", 1, "number: expected an exercise, one of 1.1, "),
        ("3.5", 1, r"answer: expected numbers of shape \(4,\), got shape \(\)"),
        ("3.5", "many", "answer: expected numbers, got 'many'"),
        ("3.5", [1, 2, 3, float("nan")], "answer: expected finite numbers"),
        ("3.1", {"balance": 1}, "answer: expected a dictionary with 'balance', 'integral', 'changes'"),
        (
            "3.1",
            {"balance": sp.Symbol("z"), "integral": 1, "changes": "both"},
            "balance: answer: expected a formula in c lambda",
        ),
        ("3.1", {"balance": 1, "integral": 1, "changes": "perhaps"}, "changes: answer: expected one of balance, "),
    ],
)
def test_answers_of_another_kind_are_refused(number, answer, error):
    with pytest.raises(ValueError, match=error):
        check.exercise(number, answer)


def test_a_check_module_for_each_chapter_and_no_other():
    there = {path.stem for path in (ROOT / "tokcx_lib/check").glob("chapter_*.py")}
    assert there == {f"chapter_{path.stem[:2]}" for path in CHAPTERS}
    assert all(importlib.import_module(f"tokcx_lib.check.{name}").__doc__ for name in there)
