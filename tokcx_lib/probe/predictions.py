"""What the theory predicts for a head: columns of the probe's table, from a coupling and a load that were measured."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.interpolate import CubicSpline

from tokcx_lib.theory import budgets, drawn_keys, rates

LOAD_STEP = 1 / 8  # of loads at which the law of drawn keys is computed


def predictions(coupling: float, load: float, tokens: int) -> dict[str, float | str]:
    """What the theory says of a head with some coupling and median load on `tokens` tokens.

    Three exponents of the error n^-beta (`rates.exponent`), three token budgets of the load (`budgets.token_budget`:
    beyond them it is not frozen, its mean square error falls like 1/n, its typical error like 1/sqrt(n)), the tokens
    to a relative error of 10% (`budgets.sample_complexity`; infinite beyond its range) and the `budgets.phase`.
    """
    psi = max(coupling, 1e-300)  # the exponents of a head that looks at nothing are their limits
    budget = budgets.token_budget(load)
    try:
        needed = budgets.sample_complexity(load, 0.1)
    except ValueError:
        needed = math.inf
    return {
        "exponent_reported": rates.exponent(psi, "reported"),
        "exponent_balance": rates.exponent(psi, "balance"),
        "exponent_sharp": rates.exponent(psi, "gaussian"),
        "tokens_unfrozen": budget.unfrozen,
        "tokens_mean_square": budget.mean_square,
        "tokens_clt": budget.clt,
        "tokens_10_percent": needed,
        "phase": budgets.phase(load, tokens),
    }


def drawn_errors(n, total: float, loads: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Errors of an output over n of N Gaussian keys, drawn at random, root mean square over queries: as n.

    In units of the spread of the values: a share `along` of their variance goes with the logits, and the rest is
    independent of them (`drawn_keys.drawn_error`).

    Parameters
    ----------
    n : numbers of keys (k,), from 1 to total; total : N; loads, along : of one shape, a query each; loads beyond 40
        count as 40.

    Source: `drawn_keys`, from the integrals of chapter 9.
    """
    loads, along = np.minimum(loads.ravel(), drawn_keys.MOST_LOAD), along.ravel()
    # From a grid of loads, which heads share: cubic splines of step 1/8 are good to 1e-4.
    first = min(max(math.floor(loads.min() / LOAD_STEP) - 1, 0), round(drawn_keys.MOST_LOAD / LOAD_STEP) - 4)
    last = max(first + 4, min(math.ceil(loads.max() / LOAD_STEP) + 1, round(drawn_keys.MOST_LOAD / LOAD_STEP)))
    grid = LOAD_STEP * np.arange(first, last + 1)
    laws = np.stack([_law(tuple(n), float(total), load) for load in grid])
    parts = CubicSpline(grid, laws)(loads)
    return np.sqrt((along[:, None] * parts[:, 0] + (1 - along)[:, None] * parts[:, 1]).mean(0))


@lru_cache(maxsize=4096)
def _law(n: tuple[float, ...], total: float, load: float) -> np.ndarray:
    """(2, len(n)): errors along the logits, and of the rest."""
    return np.stack(drawn_keys.drawn_error(n, total, load))
