"""Token budgets of a query: how many tokens it needs, by leading order and exactly.

`softmax_law` says how large the mean square error is at n tokens, exactly; this module asks at which n it is as small
as wanted. The leading order needs no such law, and says which phase a query is in. Two notions of error have different
budgets: the *typical* error, that of most draws and of the mean of |Gamma_n - s|, and the root of the *mean square*,
which rare draws carry. Derivations: chapter 9.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq

from tokcx_lib.theory.softmax_law import MOST_TILT, MOST_TOKENS, map_error
from tokcx_lib.validation import as_array, as_broadcast, as_choice, as_number, as_positive


class TokenBudget(NamedTuple):
    """Numbers of tokens, to leading exponential order, by what holds beyond them.

    `unfrozen` = e^{s^2/2}: many tokens share the attention. `clt` = e^{2 s^2}: the central limit theorem holds, and
    with it the *typical* error is e^{s^2/2}/sqrt(n). `mean_square` = e^{3 s^2/2}, between the two: the root of the
    *mean square* error is that.
    """

    unfrozen: float
    clt: float

    @property
    def mean_square(self) -> float:
        """e^{3 s^2/2}, from which on the mean square error falls like 1/n; infinite where that overflows."""
        return _exp(3 * math.log(self.unfrozen))


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def token_budget(load: float) -> TokenBudget:
    """Tokens that a query of load s needs to leave the frozen phase, and to reach errors like 1/sqrt(n).

    Leading exponential order, for Gaussian logits: the reduced load s / sqrt(2 log n) falls below 1 at n = e^{s^2/2},
    below 1/sqrt(3) at n = e^{3 s^2/2} and below 1/2 at n = e^{2 s^2}. Infinite where that overflows.

    Raises
    ------
    ValueError
        If the load is not a finite number >= 0.

    Source: chapter 9; the transition of the random energy model (Bovier, Kurkova, Loewe 2002).
    """
    square = min(as_number("load", load, least=0), 1e150) ** 2
    return TokenBudget(_exp(square / 2), _exp(2 * square))


def query_exponent(reduced, kind: str = "mean_square") -> np.ndarray:
    """Exponent of the error n^-exponent of a query of reduced load sigma, as n grows and its load like sqrt(log n).

    Parameters
    ----------
    reduced : reduced loads sigma = s / sqrt(2 log n), >= 0, of any shape.
    kind :
        ``typical``: 1/2 - sigma^2 up to sigma = 1/2, then (1 - sigma)^2 up to 1, then 0;
        ``mean_square``, the root of the mean square: 1/2 - sigma^2 up to sigma = 1/sqrt(3), then
        (1 - sigma^2)^2 / (8 sigma^2) up to 1, then 0. Twice that is the exponent of the participation.

    Returns
    -------
    Array of the shape of `reduced`

    Raises
    ------
    ValueError
        If a reduced load is negative or not finite, or the kind is not one of these.

    Source: chapter 9; the typical one: chapter 10.
    """
    sigma = as_array("reduced", reduced, 0)
    typical = as_choice("kind", kind, ("typical", "mean_square")) == "typical"
    edge, inside = (0.5, np.minimum(sigma, 1)) if typical else (3**-0.5, np.clip(sigma, 0.5, 1))
    rare = (1 - inside) ** 2 if typical else (1 - inside**2) ** 2 / (8 * inside**2)
    return np.where(sigma <= edge, 0.5 - np.minimum(sigma, edge) ** 2, rare)


def phase(load: float, tokens: float) -> str:
    """The phase of a query of some load over n tokens: "averaging", "extremal" or "frozen".

    They meet where the reduced load s / sqrt(2 log n) is 1/2 and 1, which is at the budgets `clt` and `unfrozen` of
    `token_budget`: these are the phases of the *typical* error. A single token is frozen.

    Raises
    ------
    ValueError
        If the load is not a finite number >= 0, or the number of tokens, real, not a finite one >= 1.

    Source: chapter 9.
    """
    load, tokens = as_number("load", load, least=0), as_number("tokens", tokens, least=1)
    reduced = load / math.sqrt(2 * math.log(tokens)) if tokens > 1 else math.inf
    return "averaging" if reduced < 0.5 else "extremal" if reduced < 1 else "frozen"


def relative_error(n, load) -> np.ndarray:
    """Root mean square error of attention at a query of load s, relative to s: sqrt(E(Gamma_n - s)^2) / s.

    One-dimensional Gaussian law: the component along which the query looks, in units of the tokens, against its limit
    s. A mean over draws, which rare ones may carry: between the budgets most draws err less.

    Parameters
    ----------
    n : numbers of tokens, real, from 1 to 1e250; load : numbers > 0, up to 300. They broadcast.

    Returns
    -------
    Array of the broadcast shape, to about 1e-12 of its numbers

    Raises
    ------
    ValueError
        If n or a load is out of range.

    Source: chapter 9.
    """
    load = as_array("load", load, most=MOST_TILT)
    if not (load > 0).all():
        raise ValueError(f"load: expected positive numbers, got {load if load.ndim == 0 else load.ravel()[:8]}")
    as_broadcast("n, load", as_array("n", n), load)
    return np.sqrt(map_error(n, load)) / load


def sample_complexity(load: float, error: float) -> float:
    """Tokens after which a query of load s has a relative error of at most `error`: E(Gamma_n - s)^2 <= error^2 s^2.

    Inverts `relative_error`, a root mean square, which falls with n, for real n. Exact, where `token_budget` is of
    leading order.

    Parameters
    ----------
    load : positive, up to 300; error : positive, relative root mean square error. One of 1 or more is reached while the
        output is still another one altogether, at n = 1 beyond sqrt(1 + 1/s^2).

    Returns
    -------
    float, the smallest such n >= 1: rounded up to an integer below 10^15, beyond that to about ten digits

    Raises
    ------
    ValueError
        If load or error is out of range, or more than 1e250 tokens are needed.

    Source: chapter 9.
    """
    load, error = as_positive("load", load, most=MOST_TILT), as_positive("error", error)

    def excess(log_n: float) -> float:
        return float(np.log(relative_error(math.exp(log_n), load))) - math.log(error)

    last = math.log(MOST_TOKENS) - 1e-9
    if excess(0.0) <= 0:
        return 1.0
    if excess(last) > 0:
        raise ValueError(f"load, error: expected a pair that takes at most {MOST_TOKENS:g} tokens, got {load}, {error}")
    n = math.exp(brentq(excess, 0.0, last, xtol=1e-13, rtol=1e-12))
    return float(math.ceil(n - 1e-9 * n)) if n < 1e15 else n
