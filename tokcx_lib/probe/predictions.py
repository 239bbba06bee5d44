"""What the theory predicts for a head: columns of the probe's table, from a coupling and a load that were measured."""

from __future__ import annotations

import math

from tokcx_lib.theory import budgets, rates


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
