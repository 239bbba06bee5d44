"""Checks for chapter 15, which scaling keeps a head awake."""

import math

import numpy as np
import sympy as sp
from scipy.stats import norm

from tokcx_lib import records
from tokcx_lib.check.kinds import Choice, Expression, Numbers, Parts, by_label
from tokcx_lib.studies.scaling import tables
from tokcx_lib.theory import scaling

_n0, _sigma, _e, _C = sp.symbols("n0 sigma e C")

AHEAD = math.log(4095 * 9)  # of the needle
STATES = ("asleep", "awake", "frozen")


def _weights(schemes=("none", "root", "log")) -> np.ndarray:
    return np.array([float(scaling.largest_weight(1e6, AHEAD * scaling.factor(s, 1e6, 4096))) for s in schemes])


def _effective() -> np.ndarray:
    w = _weights()
    return 1 / (w**2 + (1 - w) ** 2 / (1e6 - 1))


def _frozen(two_sided: bool = True) -> list[float]:
    pairs = ((512, "none"), (1e6, "none"), (1e6, "root"), (1e6, "log"))
    levels = [math.sqrt(2 * math.log(n)) / (3 * float(scaling.factor(s, n, 512))) for n, s in pairs]
    return [(2 if two_sided else 1) * float(norm.sf(level)) for level in levels]


def _heads(model: str) -> tuple[list[float], list[float]]:
    """Exponents of effective numbers from 256 keys to the most: measured and by the law; without, root, log."""
    heads = tables.heads_of(records.load("scaling_heads").table, model)
    found = tables.growth(heads, 256, int(heads["n"].max())).median()
    schemes = ("none", "root", "log")
    return [found[s] for s in schemes], [found[f"law_{s}"] for s in schemes]


CHECKS = {
    "ex-scaling-kinds": Parts(
        b=Expression(
            1 / sp.log(_n0),
            "Write both as functions of log n: two lines that meet at n0. When is their slope the same?",
            misses=[
                (sp.log(_n0), "The other way round."),
                (sp.Rational(1, 10), "That is the number in use, and right for one training length only."),
            ],
            symbols="n0",
            low=2.0,
            high=9.0,
        ),
        power=Numbers(
            2,
            "YaRN multiplies queries and keys, each by the factor that its paper states.",
            misses=[(1, "That is what it multiplies the queries by. And the keys?")],
        ),
        freezes=Expression(
            10 * _sigma ** sp.Rational(-2, 3),
            "Put the square over the square root of log n, and ask where it has grown by 1/sigma.",
            misses=[
                (10 * _sigma**-2, "That is where the logarithm freezes, not its square."),
                (10 * _sigma ** sp.Rational(-1, 2), "The reduced load divides by the root of log n."),
            ],
            symbols="sigma",
        ),
    ),
    "ex-scaling-tail": Parts(
        p=Expression(
            1 / (1 - _e),
            "The critical order is (log n)^(1 - 1/p).",
            misses=[
                (_e / (_e - 1), "That is q = p/(p - 1) of something; solve 1 - 1/p = e."),
                (1 / _e, "Look at the exponent again: it is 1 - 1/p."),
            ],
            symbols="e",
        ),
        one=Choice("frozen", "Compare with the critical order of Gaussian logits, one half.", options=STATES),
        third=Choice("asleep", "Compare with the critical order of Gaussian logits, one half.", options=STATES),
    ),
    "ex-scaling-needle": Parts(
        weights=Numbers(
            lambda: _weights(),
            "Find by how much the key is ahead at 4,096; multiply that by the factor at a million.",
            misses=[
                (_weights(("none", "log", "root")), "The order is none, square root, logarithm."),
                (_weights(("none", "root", "square")), "That is the square of the logarithm."),
            ],
        ),
        effective=Numbers(
            lambda: _effective(),
            "One over the sum of the squares: of the key, and of all others, which share what is left.",
            misses=[(1 / _weights(), "That is one over the weight of the key. Squares are summed.")],
        ),
    ),
    "ex-scaling-share": Numbers(
        lambda: _frozen(),
        "The load of the query x is the factor times 3|x|; divide it by the root of 2 log n.",
        misses=[(_frozen(False), "Queries on both sides of zero count.")],
    ),
    "ex-scaling-cap": Parts(
        share=Expression(
            1 / sp.cosh(_C) ** 2,
            "How long is the interval that holds the capped logits?",
            misses=[(1 / sp.cosh(_C / 2) ** 2, "The hyperbolic tangent goes from -1 to 1.")],
            symbols="C",
        ),
        digits=Numbers(
            2 * math.log10(math.cosh(50)),
            "Set the bound equal to 1/n.",
            misses=[(2 * math.log10(math.cosh(25)), "The interval has the length 2C, not C.")],
        ),
        changes=Choice(
            "yes",
            "Draw the logits and cap them: what becomes of the distance between the two largest?",
            options=("yes", "no"),
        ),
    ),
    "ex-scaling-growth": Parts(
        measured=Numbers(
            lambda: _heads("minilm")[0],
            "Medians over heads of the columns none, root and log of `tables.growth`, from 256 to 16,384.",
            rtol=0.01,
        ),
        law=Numbers(
            lambda: _heads("minilm")[1],
            "The columns of the law, of the same table.",
            rtol=0.01,
        ),
    ),
}

exercise = by_label(CHECKS)
