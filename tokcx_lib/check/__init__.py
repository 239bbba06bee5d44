"""Self-checks of the exercises: whether an answer is right, and if not, where to look. The answer is never printed.

    from tokcx_lib import check
    check.exercise("ex-moment-rank", {"horizon": 1.5, "ratio": 4})

The page of an exercise says what to hand in, and under which label. Each chapter has a module here, with one check for
every exercise, by label. A chapter imports its own, so that its stamp depends on no other:

    from tokcx_lib.check import chapter_03 as check
"""

from __future__ import annotations

import importlib
import pkgutil

from tokcx_lib.check.kinds import Check, Verdict, by_label


def exercise(label: str, answer) -> Verdict:
    """Check an answer.

    Parameters
    ----------
    label : of the exercise, such as "ex-moment-rank".
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
    return by_label(checks())(label, answer)


def checks() -> dict[str, Check]:
    """The check of every exercise, by its label, in the order of the book."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name.startswith("chapter_"))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {label: check for module in modules for label, check in module.CHECKS.items()}
