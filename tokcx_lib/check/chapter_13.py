"""Checks for chapter 13, causal and rotary attention."""

import math

import numpy as np
import sympy as sp
from scipy import optimize

from tokcx_lib.check.kinds import Choice, Expression, Numbers, Parts, by_label
from tokcx_lib.theory import rotary

_h, _k, _alpha, _r = sp.symbols("h kappa alpha r")
_away = _h**2 - 2 * _h + 2 * (1 - _h**4) ** sp.Rational(-3, 2)


def _least(times: int = 2) -> float:
    """The form -h for which the variance of the causal mean is least; of that without a mask, for one pull."""
    return float(optimize.brentq(lambda h: 2 * h - 2 + 6 * times * h**3 * (1 - h**4) ** -2.5, 0.01, 0.9))


def _odd_limit() -> list[float]:
    """Length of the limit of the head with angles 2 and 1, and with angles that have no relation."""
    phi = 2 * np.pi * np.arange(4096) / 4096
    x, y = 0.7 * np.cos(2 * phi), 0.7 * np.cos(phi)
    # Keys: first coordinates of the two planes with variances 2 and covariance 4/5, second ones with variance 1/2.
    form = 2 * x**2 + 1.6 * x * y + 2 * y**2 + 0.49 * (np.sin(2 * phi) ** 2 + np.sin(phi) ** 2) / 2
    weight = np.exp(form / 2)
    first, second = 2 * x + 0.8 * y, 0.8 * x + 2 * y
    return [float(np.hypot((weight * first).mean(), (weight * second).mean()) / weight.mean()), 0.0]


CHECKS = {
    "ex-causal-away": Parts(
        square=Expression(
            _away,
            "Three parts: the tokens as queries, the cross term, the pull of the keys. Which of them does the mask "
            "change, and which one the sign?",
            misses=[
                (_h**2 - 2 * _h + (1 - _h**4) ** sp.Rational(-3, 2), "That is without a mask."),
                (_h**2 + 2 * _h + 2 * (1 - _h**4) ** sp.Rational(-3, 2), "The sign of the head enters one part."),
                (_h**2 - 4 * _h + 2 * (1 - _h**4) ** sp.Rational(-3, 2), "The mean of the reading weights is 1."),
            ],
            symbols="h",
        ),
        least=Numbers(
            _least,
            "Differentiate in h, and solve numerically between 0 and 1.",
            misses=[(_least(1), "That is the least without a mask.")],
        ),
    ),
    "ex-window-share": Parts(
        square=Expression(
            1 + 7 * _k / 6,
            "Keys are of three kinds: near the beginning, in the middle, near the end. Integrate the square of the "
            "reading weight over each.",
            misses=[
                (sp.Integer(1), "That is the mean of the weight, or its square for keys in the middle."),
                (1 + 5 * _k / 6, "Do the first queries read fewer keys than a window holds?"),
                (2 - _k / 6, "The formula holds for short windows: at zero every key is read alike."),
            ],
            symbols="kappa",
            high=0.5,
        ),
        late=Expression(
            sp.Rational(1, 2),
            "How many queries are left to read that key, and what is the weight of each?",
            misses=[(sp.Integer(1), "A window that would hold it would reach beyond the end of the sequence.")],
            symbols="kappa",
        ),
    ),
    "ex-mask-price": Parts(
        tokens=Expression(
            sp.gamma(1 + _alpha) ** (1 / (_alpha - 1)),
            "The typical size falls with the power of n that the index sets. How much longer must the sequence be to "
            "make up for a factor?",
            misses=[
                (sp.gamma(1 + _alpha) ** (1 / _alpha), "That is the factor of the size, not of the number of tokens."),
                (sp.gamma(1 + _alpha), "Two powers are missing: of the scale, and of the rate."),
            ],
            symbols="alpha",
            low=1.1,
            high=1.9,
        ),
        sharp=Numbers(
            math.exp(1 - np.euler_gamma),
            "Take the logarithm; the limit is a derivative of log Gamma.",
            misses=[(1.0, "The base tends to 1 and the exponent to infinity: look at the logarithm.")],
        ),
    ),
    "ex-larger-base": Parts(
        base=Numbers(
            lambda: (1e6 / rotary.HALF) ** (128 / 64),
            "The plane in the middle decides: write its angle as a power of the base, and ask for half of its signal.",
            misses=[
                (1e6 / rotary.HALF, "That is the reciprocal of the angle. Which power of the base is it?"),
                (1e12, "A plane keeps half beyond one radian: where does its factor reach one half?"),
            ],
        ),
        planes=Numbers(
            lambda: rotary.slow_planes(5e5, 128, 1e6),
            "Count the angles that are small enough.",
            misses=[(64 - rotary.slow_planes(5e5, 128, 1e6), "Those are the planes that have turned.")],
            rtol=0.001,
        ),
    ),
    "ex-odd-relation": Parts(
        lengths=Numbers(
            _odd_limit,
            "With the relation the angles run along a curve on the torus: an average over one angle. Without it the "
            "proof of the theorem applies.",
            misses=[
                (_odd_limit()[::-1], "The order is with the relation, then without."),
                ([_odd_limit()[0] / 2, 0.0], "The output is a ratio: divide by the mean of the weights."),
            ],
            rtol=0.02,
            atol=0.02,
        ),
        relation=Choice(
            "odd",
            "Which relations let all angles be shifted by half a turn at once?",
            options=("odd", "even"),
        ),
    ),
    "ex-serial-pull": Parts(
        warm=Expression(
            (1 + _r) / (1 - _r),
            "As the coupling tends to zero a token's pull becomes the token itself: add up all "
            "correlations, on both sides.",
            misses=[
                (1 / (1 - _r), "There are neighbours on both sides."),
                ((1 - _r) / (1 + _r), "The other way round."),
            ],
            symbols="r",
            high=0.8,
        ),
        cold=Numbers(
            1.0,
            "Near coupling one the terms with large m carry the sum. What is their factor?",
            misses=[(3.0, "That is the factor of the first term, at the correlation one half.")],
        ),
    ),
}

exercise = by_label(CHECKS)
"""`exercise(label, answer)`: is the answer to an exercise of this chapter right? A `Verdict`, with a hint if not."""
