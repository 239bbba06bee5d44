"""Checks for chapter 11, sparse attention."""

import math

import numpy as np
import sympy as sp
from scipy.special import gamma

from tokcx_lib.check.kinds import Choice, Expression, Numbers, Parts, by_label
from tokcx_lib.studies.sparse import theory

_M, _rest, _s, _d, _theta = sp.symbols("M rest s d theta")


def _stride() -> float:
    """Error of strided keys over that of random ones, to first order: correlation 0.99, load 1/2, 256 keys of 4,096."""
    whole, strided, single = (theory.mean_variance(0.5, 32, 0.99, *how) for how in ((4096,), (256, 16), (1,)))
    return math.sqrt((strided - whole) / ((single - whole) * (1 / 256 - 1 / 4096)))


def _exact_ranks() -> list[int]:
    """How many keys miss at most 5% in the frozen limit, at reduced loads 1.5 and 2."""
    ranks = np.arange(1, 300)
    return [int(ranks[theory.frozen_missing_mass(sigma, ranks) <= 0.05][0]) for sigma in (1.5, 2.0)]


def _power_ranks(constant: bool = True) -> list[float]:
    """The same by the power law; without the constant c, a known mistake."""
    fronts = (
        (sigma, sigma * gamma(sigma - 1) / (gamma(1 - 1 / sigma) ** sigma if constant else 1)) for sigma in (1.5, 2.0)
    )
    return [(front / 0.05) ** (1 / (sigma - 1)) for sigma, front in fronts]


def _softer(theta):
    """b times the mean square error of keys drawn in proportion to e^{theta <t, y>}."""
    left = (1 - theta) * _s
    return sp.exp(left**2) * (_d + left**2)


def _worth(theta: float) -> float:
    return float((_softer(0) / _softer(theta)).subs({_s: 2, _d: 32}))


CHECKS = {
    "ex-sparse-renormalise": Parts(
        difference=Expression(
            -(1 - _M) * _rest,
            "Write full attention as the merge of the kept and the other keys, and take it away.",
            misses=[
                ((1 - _M) * _rest, "That is full attention less the scheme; the sign is asked the other way round."),
                (-_rest, "The other keys hold a share of the attention. Which?"),
            ],
            symbols="M rest",
        ),
        ratios=Numbers(
            [0.165, 0.628, 0.646],
            "Scale the output of `schemes.top_k` by `schemes.kept_mass`, and divide the two values of "
            "`schemes.output_error`.",
            misses=[
                ([1 / 0.165, 1 / 0.628, 1 / 0.646], "The other way round: without renormalising, over with it."),
                ([0.165**2, 0.628**2, 0.646**2], "Root mean squares are asked, not mean squares."),
            ],
            rtol=0.05,
        ),
    ),
    "ex-sparse-projection": Parts(
        load=Numbers(
            math.sqrt(4096 / 128) / 2,
            "How much longer is a combined key than a key? Logits are linear in it.",
            misses=[
                (4096 / 128 / 2, "That is the factor of the variance; a load is a standard deviation."),
                (0.5, "That is the load with entries N(0, 1/n)."),
            ],
        ),
        thin=Numbers(
            0.102,
            "Project keys and values by the same matrix, run `schemes.full`, and divide by the square root of the "
            "dimension.",
            misses=[
                (0.102 * math.sqrt(32), "In spreads of the values: the root mean square length of a value is not 1.")
            ],
            rtol=0.3,
        ),
        thick=Numbers(
            3.45,
            "As with the other matrix; the values too are combined by it.",
            misses=[
                (3.45 * math.sqrt(32), "In spreads of the values: the root mean square length of a value is not 1."),
                (3.45 / math.sqrt(32), "The values are combined by the same matrix as the keys, and grow with them."),
            ],
            rtol=0.13,
        ),
    ),
    "ex-sparse-stride": Parts(
        told=Numbers(
            _stride(),
            "Take away from both what all keys share, the variance of the mean over the whole sequence.",
            misses=[
                (_stride() ** 2, "Errors are roots of the variances."),
                (1 / _stride(), "The other way round: strided over random."),
            ],
        ),
        measured=Numbers(
            0.197,
            "Run `schemes.strided` and `schemes.random_keys` on the same sequences; average squares before you divide.",
            misses=[
                (0.197**2, "Errors are roots of the mean squares."),
                (1 / 0.197, "The other way round: strided over random."),
            ],
            rtol=0.12,
        ),
    ),
    "ex-sparse-frozen": Parts(
        exact=Numbers(
            _exact_ranks,
            "Call `theory.frozen_missing_mass` on whole numbers of keys, and take the first that misses no more than "
            "asked.",
            misses=[
                ([146, 11], "That many still miss more than 5%."),
                ([12, 147], "In the order of the reduced loads as the exercise names them."),
            ],
            rtol=0,
            atol=0.2,
        ),
        power=Numbers(
            _power_ranks(),
            "Set the right-hand side of the proposition equal to 5% and solve for k; `scipy.special.gamma` has the "
            "constants.",
            misses=[
                (_power_ranks(constant=False), "The constant c, a Gamma function of the other argument, is missing."),
                (_power_ranks()[::-1], "In the order of the reduced loads as the exercise names them."),
            ],
            rtol=0.005,
        ),
    ),
    "ex-sparse-proportional": Parts(
        square=Expression(
            _softer(_theta),
            "The error is an average of (w/p)(v - o) over draws. Which density do its square and p make together?",
            misses=[
                (_softer(0), "That is the error of uniform draws: where did the probabilities go?"),
                (_softer(_theta / 2), "A drawn key enters the square with w/p twice, but it is drawn with p."),
                (_softer(_theta) / _d, "That is in squared spreads of the values."),
                (
                    sp.exp((1 - _theta) ** 2 * _s**2) * (_d + _s**2),
                    "The distance of a key from the output, under the density that the weights make: where is its "
                    "mean?",
                ),
            ],
            symbols="s d theta",
        ),
        worth=Numbers(
            _worth(0.5),
            "Divide the formula for uniform draws by that for the softer weight, at the same b.",
            misses=[
                (1 / _worth(0.5), "The other way round: how many uniform ones for one of these?"),
                (math.sqrt(_worth(0.5)), "Keys enter by the mean square error, not by its root."),
            ],
        ),
    ),
    "ex-sparse-ninth": Parts(
        half=Numbers(
            1.316,
            "Half of the keys of largest weight, half drawn from the others; these get a logit raised by the log of "
            "their count.",
            misses=[
                (2.94, "Do the random keys count for all those that they stand for? Their logits have to be raised."),
                (1 / 1.316, "The other way round: the ninth scheme over the other."),
            ],
            rtol=0,
            atol=0.06,
        ),
        two=Numbers(
            1.10,
            "Top-k has the whole budget of 128, the ninth scheme half of it; the same sequences and queries for both.",
            misses=[
                (1.30, "Do the random keys count for all those that they stand for? Their logits have to be raised."),
                (1 / 1.10, "The other way round: the ninth scheme over the other."),
            ],
            rtol=0,
            atol=0.06,
        ),
        verdict=Choice(
            "worse",
            "On which side of 1 does the interval of the ratio lie, both ends?",
            options=("better", "worse", "level"),
        ),
    ),
}

exercise = by_label(CHECKS)
