"""Kinds of answers, and how each is compared: numbers, expressions, functions, words, and several of these together.

A check holds the right answer, or computes it from the library when it is asked; `hint`, for every wrong answer; and
`misses`, answers that come from a known mistake, each with a hint of its own. `by_label` makes the `exercise` of a
module from its checks.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy as sp


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is `right`, which is its truth value, and what to tell the student."""

    right: bool
    message: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Check:
    """What all kinds share. `expected` is the right answer, or a function of no argument that computes it."""

    expected: Any
    hint: str
    misses: Sequence[tuple[Any, str]] = ()

    def answer(self):
        """The right answer."""
        return self.expected() if callable(self.expected) else self.expected

    def read(self, answer):
        """The answer in the form that `same` compares; ValueError if it is of another kind."""
        raise NotImplementedError

    def same(self, one, other) -> bool:
        """Whether two answers, as `read` returns them, agree."""
        raise NotImplementedError

    def advice(self, answer) -> str | None:
        """None if the answer is right, else a hint."""
        given = self.read(answer)
        if self.same(given, self.read(self.answer())):
            return None
        return next((hint for wrong, hint in self.misses if self.same(given, self.read(wrong))), self.hint)

    def verdict(self, label: str, answer) -> Verdict:
        """What `check.exercise` returns."""
        advice = self.advice(answer)
        return Verdict(advice is None, f"{label}: right." if advice is None else f"{label}: not yet. {advice}")


def by_label(checks: Mapping[str, Check]) -> Callable[[str, Any], Verdict]:
    """The function `exercise(label, answer)` for these checks."""

    def exercise(label: str, answer) -> Verdict:
        """Check the answer to the exercise of this label, such as "ex-exponential"; `tokcx_lib.check` says more."""
        if not isinstance(label, str) or label not in checks:
            likely = difflib.get_close_matches(str(label), checks) if len(checks) > 20 else []
            known = ("perhaps " if likely else "one of ") + ", ".join(likely or checks)
            raise ValueError(f"label: expected that of an exercise, {known}, got {label!r}")
        return checks[label].verdict(label, answer)

    return exercise


@dataclass(frozen=True)
class Numbers(Check):
    """One number, or a sequence of as many as `expected` has, to a relative tolerance or an absolute one."""

    rtol: float = 0.01
    atol: float = 0.0

    def read(self, answer) -> np.ndarray:
        try:
            given = np.asarray(answer, dtype=float)
        except (TypeError, ValueError) as error:
            raise ValueError(f"answer: expected numbers, got {answer!r}") from error
        if not np.isfinite(given).all():
            raise ValueError(f"answer: expected finite numbers, got {answer!r}")
        shape = np.shape(self.answer())
        if given.shape != shape:
            many = "one number" if shape == () else f"numbers of shape {shape}"
            raise ValueError(f"answer: expected {many}, got shape {given.shape}")
        return given

    def same(self, one, other) -> bool:
        return np.allclose(one, other, rtol=self.rtol, atol=self.atol)


@dataclass(frozen=True)
class Expression(Check):
    """A formula in the symbols named in `symbols`, compared at points between `low` and `high` by symbols' names.

    `expected` is a sympy expression or a string for one; assumptions of the student's symbols do not matter.
    """

    symbols: str = ""
    low: float = 0.2
    high: float = 0.9

    def read(self, answer) -> list[complex]:
        known = {name: sp.Symbol(name) for name in self.symbols.split()}
        try:
            formula = sp.sympify(answer, locals=known)
        except (sp.SympifyError, TypeError, AttributeError, SyntaxError) as error:
            raise ValueError(f"answer: expected a formula in {self.symbols}, got {answer!r}") from error
        unknown = sorted(symbol.name for symbol in getattr(formula, "free_symbols", ()) if symbol.name not in known)
        if unknown or not isinstance(formula, sp.Expr):
            raise ValueError(f"answer: expected a formula in {self.symbols}, got {answer!r}")
        points = self.low + (self.high - self.low) * np.random.default_rng(0).random((7, len(known)))
        named = {symbol: symbol.name for symbol in formula.free_symbols}
        return [
            complex(formula.subs({symbol: at[named[symbol]] for symbol in named}).evalf())
            for at in (dict(zip(known, point)) for point in points)
        ]

    def same(self, one, other) -> bool:
        return np.allclose(one, other, rtol=1e-8, atol=1e-12)


@dataclass(frozen=True)
class Function(Check):
    """A function, compared on `inputs`, each a tuple of arguments. `expected` is the right function itself."""

    inputs: Sequence[tuple] = ()
    rtol: float = 0.01
    atol: float = 0.0

    def answer(self):
        return self.expected

    def read(self, answer) -> list[np.ndarray]:
        if not callable(answer):
            raise ValueError(f"answer: expected a function, got {answer!r}")
        return [np.asarray(answer(*arguments), dtype=float) for arguments in self.inputs]

    def same(self, one, other) -> bool:
        pairs = list(zip(one, other))
        return all(a.shape == b.shape and np.allclose(a, b, rtol=self.rtol, atol=self.atol) for a, b in pairs)


@dataclass(frozen=True)
class Choice(Check):
    """One of a few words, `options`."""

    options: Sequence[str] = ()

    def read(self, answer) -> str:
        given = str(answer).strip().lower()
        if given not in self.options:
            raise ValueError(f"answer: expected one of {', '.join(self.options)}, got {answer!r}")
        return given

    def same(self, one, other) -> bool:
        return one == other


class Parts(Check):
    """Several answers under names: a dictionary with a check for each, in `expected`."""

    def __init__(self, **parts: Check):
        super().__init__(expected=parts, hint="")

    def answer(self) -> dict:
        return {name: part.answer() for name, part in self.expected.items()}

    def advice(self, answer) -> str | None:
        names = ", ".join(repr(name) for name in self.expected)
        if not isinstance(answer, Mapping) or set(answer) != set(self.expected):
            raise ValueError(f"answer: expected a dictionary with {names}, got {answer!r}")
        for name, part in self.expected.items():
            try:
                part.read(answer[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        advice = ((name, part.advice(answer[name])) for name, part in self.expected.items())
        return next((f"Look at {name!r}. {hint}" for name, hint in advice if hint is not None), None)
