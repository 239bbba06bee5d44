"""Logits that are multiplied by a factor that grows with the context: deployed scalings, and where they are critical.

A scaling multiplies every logit of a query by a factor gamma_n of its number of keys n, and so its load. To be
compared, all are written for a model that was trained at some length, the `anchor` n_0, at which (or up to which) the
factor is 1. What a factor does depends on the upper tail of the logits, which `critical_scaling` knows for tails of the
form P(logit > x) = e^{-x^p / p}, p = 2 being normal logits of load one, and `sphere_scaling` for keys on a sphere.
Beyond the critical factor a query attends to a few of its keys, however many there are. Derivations: chapter 15.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import betaincinv, betaln

from tokcx_lib.theory.softmax_law import MOST_TOKENS
from tokcx_lib.validation import as_array, as_broadcast, as_choice, as_count, as_number, as_positive

MOST_DIM = 10**6
SCHEMES = ("none", "root", "llama4", "yarn", "log", "qwen", "square")
"""Scalings that `factor` knows; "log" is that of SSMax, with its own constant chosen as 1 / log n_0."""


def factor(scheme: str, n, anchor: float) -> np.ndarray:
    """What a scaling multiplies the logits of a query with n keys by, in a model trained at n_0, the anchor.

    Parameters
    ----------
    scheme :
        ``none``: 1. ``root``: sqrt(log n / log n_0), which keeps the reduced load. ``log``: log n / log n_0. ``qwen``:
        the same from n_0 on, 1 before. ``yarn``: (1 + log(n / n_0) / 10)^2 from n_0 on, 1 before: queries *and* keys
        are multiplied by the root. ``llama4``: 1 + log(1 + floor(n / n_0)) / 10. ``square``: (log n / log n_0)^2.
    n : numbers of keys, real, from 1 to 1e250; anchor : more than 1.

    Returns
    -------
    Array of the shape of n

    Raises
    ------
    ValueError
        If the scheme is not one of these, or a number is out of range.

    Source: SSMax, arXiv:2501.19399; YaRN, arXiv:2309.00071; the code of Qwen and of Llama 4; chapter 15.
    """
    scheme, n = as_choice("scheme", scheme, SCHEMES), as_array("n", n, 1, MOST_TOKENS)
    anchor = as_number("anchor", anchor, 1 + 1e-6, MOST_TOKENS)
    ratio, beyond = np.log(n) / math.log(anchor), np.log(np.maximum(n / anchor, 1.0))
    return {
        "none": lambda: np.ones(n.shape),
        "root": lambda: np.sqrt(ratio),
        "log": lambda: ratio,
        "qwen": lambda: np.maximum(ratio, 1.0),
        "yarn": lambda: (1 + beyond / 10) ** 2,
        "llama4": lambda: 1 + np.log1p(np.floor(n / anchor)) / 10,
        "square": lambda: ratio**2,
    }[scheme]()


def reduced_load(load, n) -> np.ndarray:
    """The reduced load sigma = s / sqrt(2 log n): Gaussian logits freeze at 1. Infinite for one key.

    Parameters
    ----------
    load : numbers >= 0; n : numbers of keys, real, from 1 to 1e250. They broadcast.

    Raises
    ------
    ValueError
        If a number is out of range.
    """
    load, n = as_broadcast("load, n", as_array("load", load, 0), as_array("n", n, 1, MOST_TOKENS))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(n > 1, load / np.sqrt(2 * np.log(n)), np.inf)


def freezing_length(load: float, anchor: float) -> float:
    """Keys at which a query of load s at n_0 freezes if its logits grow like log n: e^{2 (log n_0 / s)^2}.

    That is n_0^(1 / sigma^2), sigma its reduced load at n_0. Infinite where that overflows. Without a scaling it
    *thaws* at n_0^(sigma^2) = e^{s^2 / 2} keys (`budgets.token_budget`).

    Raises
    ------
    ValueError
        If the load is not positive, or the anchor not more than 1.

    Source: chapter 15.
    """
    load, anchor = as_positive("load", load), as_number("anchor", anchor, 1 + 1e-6, MOST_TOKENS)
    exponent = 2 * (math.log(anchor) / load) ** 2
    return math.exp(exponent) if exponent < 709 else math.inf


def critical_scaling(n, power: float) -> np.ndarray:
    """The critical factor (|p| log n)^(1 - 1/p) for n logits whose upper tail is e^{-I(x)}, I(x) = |x|^p / |p|.

    p > 1: x grows without bound; p = 2 is the normal law of variance 1, and the factor sqrt(2 log n). p < 0: |x| is the
    distance to the largest possible logit, and p = -1 gives (log n)^2. Between the two, at |p| = infinity, lies log n.
    The factor is the slope I'(x) where n e^{-I(x)} = 1, that is, one over the distance between the largest logits.

    Parameters
    ----------
    n : numbers of keys, real, from 1 to 1e250; power : more than 1, or negative.

    Raises
    ------
    ValueError
        If a number is out of range.

    Source: chapter 15; Ben Arous, Bogachev and Molchanov 2005 for the thresholds.
    """
    n, power = as_array("n", n, 1, MOST_TOKENS), _power(power)
    return (abs(power) * np.log(n)) ** (1 - 1 / power)


def effective_exponent(kappa, power: float = 2.0) -> np.ndarray:
    """Exponent a of the typical effective number of tokens n^a, at kappa times the critical factor.

    With q = p / (p - 1): 1 + 2 (p - 1) kappa^q - (p - 1)(2 kappa)^q up to kappa = 1/2;
    2 + 2 (p - 1) kappa^q - 2 p kappa up to 1; then 0. For normal logits (p = 2) kappa is the reduced load, and a is
    twice the exponent of the typical error, `budgets.query_exponent`.

    Parameters
    ----------
    kappa : numbers >= 0, of any shape; power : as for `critical_scaling`.

    Raises
    ------
    ValueError
        If a number is out of range.

    Source: chapter 15.
    """
    kappa, p = as_array("kappa", kappa, 0), _power(power)
    q = p / (p - 1)
    low, high = np.minimum(kappa, 0.5), np.clip(kappa, 0.5, 1)
    averaging = 1 + (p - 1) * (2 * low**q - (2 * low) ** q)
    extremal = 2 + 2 * (p - 1) * high**q - 2 * p * high
    return np.where(kappa <= 0.5, averaging, extremal)


def _power(power: float) -> float:
    value = as_number("power", power, -1e6, 1e6)
    if not (value > 1 or value < 0):
        raise ValueError(f"power: expected a number more than 1, or negative, got {power}")
    return value


def sphere_scaling(n, dim: int) -> np.ndarray:
    """The critical factor for n keys that are uniform on the unit sphere, and a query of length one.

    As in `critical_scaling`, the slope I'(x) where n P(<u, y> > x) = 1: the density of <u, y> there over its tail. For
    n -> infinity it is k (c n)^{1/k}, k = (d - 1)/2, a power of n, where P(1 - <u, y> < e) = c e^k to leading order; as
    long as log n is well below d/2 it is near that of normal logits of the same variance 1/d, sqrt(2 d log n).

    Parameters
    ----------
    n : numbers of keys, real, from 2 to 1e250; dim : d, from 2 on.

    Returns
    -------
    Array of the shape of n, infinite where that overflows

    Raises
    ------
    ValueError
        If a number is out of range.

    Source: chapter 15; Bruno, Rigollet, Chen, Polyanskiy and Lin, arXiv:2605.08505, for the exponent 2/(d-1).
    """
    n, k = as_array("n", n, 2, MOST_TOKENS), (as_count("dim", dim, least=2, most=MOST_DIM) - 1) / 2
    rest = betaincinv(k, 0.5, 2 / n)  # 1 - x^2
    with np.errstate(over="ignore", divide="ignore"):
        return np.exp(np.log(n) + (k - 1) * np.log(rest) - betaln(k, 0.5))


def share_bound(spread) -> np.ndarray:
    """The least effective share 1 / (n sum w^2) of keys whose logits lie in an interval of this length: 1/cosh^2(D/2).

    For every n, and attained in the limit by n / (1 + e^D) keys at the top and the others at the bottom.

    Parameters
    ----------
    spread : lengths D >= 0, scaling included, of any shape.

    Raises
    ------
    ValueError
        If a length is negative or not finite.

    Source: classical (Kantorovich's inequality); chapter 15.
    """
    spread = as_array("spread", spread, 0)
    return (2 * np.exp(-spread / 2) / (1 + np.exp(-spread))) ** 2


def largest_weight(n, spread) -> np.ndarray:
    """The most that one of n keys can weigh if logits lie in an interval of length D: 1 / (1 + (n - 1) e^{-D}).

    Parameters
    ----------
    n : numbers of keys, real, from 1 to 1e250; spread : lengths D >= 0. They broadcast.

    Raises
    ------
    ValueError
        If a number is out of range.

    Source: Veličković and others, arXiv:2410.01104, for the bound e^D / n; chapter 15.
    """
    n, spread = as_broadcast("n, spread", as_array("n", n, 1, MOST_TOKENS), as_array("spread", spread, 0))
    return 1 / (1 + (n - 1) * np.exp(-spread))
