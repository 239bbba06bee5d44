"""Self-checks of the exercises: whether an answer is right, and if not, where to look. The answer is never printed.

    from tokcx_lib import check
    check.exercise("3.2", {"horizon": 1.5, "ratio": 4})

Numbers are those of the page: exercise 3.2 is the second of chapter 3. The page says what to hand in. Each chapter has
a module here, with one check for every exercise.
"""

from __future__ import annotations

import importlib
import pkgutil

from tokcx_lib.check.kinds import Check, Verdict


def exercise(number: str, answer) -> Verdict:
    """Check an answer.

    Parameters
    ----------
    number : of the exercise, such as "3.2".
    answer : what the page asks to hand in: a number or several, a sympy expression, a function, one of a few words, or
        a dictionary of these.

    Returns
    -------
    Verdict
        True if the answer is right. In a notebook it shows as a sentence, with a hint where the answer is not right.

    Raises
    ------
    ValueError
        If there is no such exercise, or the answer is not of the kind that it asks for.
    """
    known = checks()
    if str(number) not in known:
        raise ValueError(f"number: expected an exercise, one of {', '.join(known)}, got {number!r}")
    return known[str(number)].verdict(str(number), answer)


def checks() -> dict[str, Check]:
    """The check of every exercise, in the order of the book."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name.startswith("chapter_"))
    return {
        f"{int(name.removeprefix('chapter_'))}.{i}": check
        for name in modules
        for i, check in enumerate(importlib.import_module(f"{__name__}.{name}").CHECKS, start=1)
    }
