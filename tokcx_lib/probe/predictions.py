"""What the theory predicts for a head: columns of the probe's table, from a coupling and a load that were measured."""

from __future__ import annotations

import math

import numpy as np

from tokcx_lib.theory import budgets, rates, softmax_law


def predictions(coupling: float, load: float, tokens: int) -> dict[str, float | str]:
    """What the theory says of a head with some coupling and median load on `tokens` tokens.

    Three exponents of the error n^-beta (`rates.exponent`), two token budgets of the load (`budgets.token_budget`),
    the tokens to a relative error of 10% (`budgets.sample_complexity`; infinite beyond its range) and the
    `budgets.phase`.
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
        "tokens_clt": budget.clt,
        "tokens_10_percent": needed,
        "phase": budgets.phase(load, tokens),
    }


def drawn_errors(n: np.ndarray, loads: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Errors of an output over n keys drawn from an endless Gaussian past, root mean square over queries: as n.

    In units of the spread of the values: a share `along` of their variance goes with the logits, and errs as Gamma_n
    does around its limit, the load; the rest is averaged with weights w, and errs by sum w^2.

    Parameters
    ----------
    n : numbers of keys (k,); loads, along : of one shape, a query each; loads beyond 300 count as 300.

    Source: chapter 9.
    """
    loads, n = np.minimum(loads.ravel(), softmax_law.MOST_TILT), np.reshape(n, (-1, 1))
    share = softmax_law.softmax_moments(n, loads).participation
    squares = along.ravel() * softmax_law.map_error(n, loads) + (1 - along.ravel()) * share
    return np.sqrt(squares.mean(-1))
