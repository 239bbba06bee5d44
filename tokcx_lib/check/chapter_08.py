"""Checks for chapter 8, downstream."""

import math

import numpy as np
import sympy as sp
from scipy.stats import norm

from tokcx_lib.check.kinds import Choice, Expression, Numbers, Parts, by_label

_n, _N, _eta, _m = sp.symbols("n N eta m")


def _critical(height):
    """Critical distance of a competitor at that height."""
    return math.sqrt(2 - 2 * math.sqrt(1 - height**2))


def _one_key(n, N, eta):
    """Mean square error over draws of n of N keys, exact and to first order, of a head that looks at one key."""
    out = 1 - eta
    hit = out / (out + (n - 1) * eta / (N - 1))
    exact = n / N * (hit - out) ** 2 + (1 - n / N) * out**2
    return exact, (1 / n - 1 / N) * N**3 * (out * eta / (N - 1)) ** 2


def _alike(height, count=8):
    """Chance that one of `count` competitors wins, the components having correlation 1/2."""
    nodes, mass = np.polynomial.hermite_e.hermegauss(60)
    return 1 - mass @ norm.cdf(math.sqrt(2) * height + nodes) ** count / mass.sum()


_exact, _first = _one_key(_n, _N, _eta)
_schemes = ("kept", "weighted", "drawn")

CHECKS = {
    "ex-average-draws": Parts(
        average=Expression(
            "c + (e2 - c) / R",
            "Expand the square of a mean of R errors: how many of the products are squares, and how many are not?",
            misses=[
                ("e2 / R", "That holds for errors that have nothing in common; products of different draws count too."),
                ("c + e2 / R", "Squares take the place of products there: count both again."),
            ],
            symbols="R e2 c",
        ),
        left=Numbers(
            0.43,
            "Divide the mean of `common` by the mean of `square`.",
            misses=[(0.66, "That is the share of the error. Asked is that of the squared error.")],
            atol=0.06,
            rtol=0,
        ),
    ),
    "ex-weighted": Parts(
        error=Numbers(
            [0.93, 1.01, 1.19],
            "The root of the mean of `square`, over queries and draws, with the seeds of the live table; mind the "
            "order.",
            misses=[
                ([0.87, 1.02, 1.41], "Those are mean squares; take the root."),
                ([0.93, 1.19, 1.01], "The order is: special tokens always read, weighted, drawn."),
            ],
            atol=0.04,
            rtol=0,
        ),
        common=Numbers(
            [0.66, 0.62, 0.79],
            "The root of the mean of `common`, for the same three runs.",
            misses=[([0.44, 0.38, 0.62], "Those are mean products; take the root.")],
            atol=0.05,
            rtol=0,
        ),
        least_error=Choice("kept", "Compare the three errors.", options=_schemes),
        least_common=Choice(
            "weighted",
            "Compare the three common parts. Which scheme restores what special tokens get, on average?",
            options=_schemes,
        ),
    ),
    "ex-one-layer": Parts(
        layer=Numbers(
            6,
            "Compare the errors of the embedding with one layer subsampled at a time.",
            misses=[(5, "Layers are counted from 1 here; the library counts from 0.")],
        ),
        sum=Numbers(
            0.68,
            "Add the means of `square` over the six runs.",
            misses=[(1.84, "That is the sum of the errors; if anything adds, it is their squares.")],
            atol=0.05,
            rtol=0,
        ),
        together=Numbers(
            0.62,
            "The live experiment subsampled all layers: the mean of `square` in `live[16]`.",
            misses=[(0.79, "That is its root.")],
            atol=0.03,
            rtol=0,
        ),
    ),
    "ex-tight": Parts(
        distance=Numbers(
            lambda: _critical(0.05),
            "First the height above the plane, for which you need the distance of the two articles; then the theorem.",
            misses=[
                (0.05, "That is the height. Embeddings move on the sphere; give six decimals."),
                (_critical(0.1), "Divide by the distance of the two articles, not by their cosine."),
            ],
            rtol=1e-5,
        ),
        excess=Expression(
            _m**3 / 8,
            "Expand the inner root first, to the order m^4.",
            misses=[
                (-(_m**3) / 8, "Which of c(m) and m is larger?"),
                (_m**4 / 4, "That is the excess of the square; take the root of the whole."),
            ],
            symbols="m",
        ),
    ),
    "ex-one-key": Parts(
        exact=Expression(
            _exact,
            "There are two kinds of draws, those that hold the key and those that do not. What does each return, and "
            "how likely is it?",
            misses=[
                ((1 - _n / _N) * (1 - _eta) ** 2, "Draws that hold the key err as well: the others lose weight."),
                (1 - _n / _N, "That is the limit for small eta."),
            ],
            symbols="n N eta",
        ),
        first=Expression(
            _first,
            "Put the weights and the values into the sum, the one key first, then the N - 1 others, which are alike.",
            misses=[
                (_first * (_N - 1) / _N, "The mean of squares has N - 1 in its denominator, not N."),
                ((1 / _n) * _N**3 * ((1 - _eta) * _eta / (_N - 1)) ** 2, "Draws are without replacement."),
            ],
            symbols="n N eta",
        ),
        factor=Numbers(
            lambda: _one_key(32, 128, 0.1)[0] / _one_key(32, 128, 0.1)[1],
            "Divide the exact mean square error by the first order.",
            misses=[
                (math.sqrt(24.67), "That is the factor of the root mean square errors."),
                (1 / 24.67, "The other way round."),
            ],
        ),
    ),
    "ex-alike": Parts(
        cosine=Numbers(
            0.5,
            "Write q for the common cosine and expand the inner product of a - b and a - b'.",
            misses=[(0.0, "Both directions start from a. Expand their inner product.")],
            atol=0.001,
        ),
        chances=Numbers(
            lambda: [_alike(h) for h in (1, 2, 3)],
            "Normal variables with that correlation are differences of independent ones over the root of 2, with one "
            "of them in common; average over that one.",
            misses=[
                ([1 - norm.cdf(h) ** 8 for h in (1, 2, 3)], "That is the forecast for independent competitors."),
                ([norm.sf(h) for h in (1, 2, 3)], "That is the chance of one competitor, or of eight that are one."),
            ],
            rtol=0.02,
        ),
    ),
}

exercise = by_label(CHECKS)
