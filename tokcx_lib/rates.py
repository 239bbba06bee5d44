"""Exponents and constants of the book's theorems."""

from __future__ import annotations

import math

from tokcx_lib.validation import as_positive

_EXPONENTS = {
    "reported": lambda psi: 1 / (2 * (1 + 32 * psi)),
    "balance": lambda psi: 1 / (2 * (1 + psi)),
    "subgaussian": lambda psi: min(0.5, 1 / (4 * psi)),
    "gaussian": lambda psi: min(0.5, 1 / (1 + psi)),
    "bias": lambda psi: min(1.0, (math.sqrt(1 + 4 / psi) - 1) / 2),
}


def exponent(psi: float, kind: str) -> float:
    """Exponent beta of the error n^-beta of the moments of self-attention, for a coupling psi = H^2 > 0.

    Parameters
    ----------
    kind :
        ``reported``: 1/(2(1 + 32 psi)), Theorem 4.4 of Bohbot, Letrouit, Peyré and Vialard (ICML 2026);
        ``balance``: 1/(2(1 + psi)), the reference curve drawn by the same authors;
        ``subgaussian``: min(1/2, 1/(4 psi)), a lower bound on the exponent of sub-Gaussian tokens (ours, chapter 10);
        ``gaussian``: min(1/2, 1/(1 + psi)), the exponent of Gaussian tokens (ours, chapter 10);
        ``bias``: min(1, (sqrt(1 + 4/psi) - 1)/2), the exponent of the bias of the second moment (ours, chapter 9).

    Raises
    ------
    ValueError
        If psi is not positive and finite, or the kind is not one of these.
    """
    if kind not in _EXPONENTS:
        raise ValueError(f"kind: expected one of {', '.join(_EXPONENTS)}, got {kind!r}")
    return _EXPONENTS[kind](as_positive("psi", psi))


def hardmax_mean(n: float, sigma: float = 1.0) -> float:
    """Asymptote of E|mean of the transformed tokens| under hardmax: sigma ln 4 / (2 sqrt(2 ln n)), n > 1.

    For scalar tokens N(0, sigma^2). Source: Proposition 5.1 of Bohbot, Letrouit, Peyré and Vialard (ICML 2026).
    """
    if not as_positive("n", n) > 1:
        raise ValueError(f"n: expected a number greater than 1, got {n}")
    return as_positive("sigma", sigma) * math.log(4) / (2 * math.sqrt(2 * math.log(n)))
