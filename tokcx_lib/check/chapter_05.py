"""Checks for chapter 5, Gaussian tokens at scale."""

import math

import sympy as sp

from tokcx_lib.check.kinds import Choice, Expression, Numbers, Parts, by_label

_b, _d, _h, _n, _r = sp.symbols("b d h n r")

_FROZEN = [1.56, 0.82]  # random heads differ: their effective ranks by some per cent

CHECKS = {
    "ex-gaussian-sign": Parts(
        difference=Expression(
            4 * _h,
            "Only odd powers of h change sign with the head: which term of the constant is odd?",
            misses=[
                (2 * _h, "The term changes sign; what is it minus its opposite?"),
                (-4 * _h, "Take the positive head's constant first."),
            ],
            symbols="h",
        ),
        smaller=Choice(
            "negative",
            "Does a token's report of itself add to its pull on the others, or work against it?",
            options=("positive", "negative"),
        ),
    ),
    "ex-gaussian-spread": Parts(
        variance=Expression(
            2 * _b**4,
            "The square of a standard normal has mean 1 and fourth moment 3.",
            misses=[
                (3 * _b**4, "That is the mean square; subtract the square of the mean."),
                (_b**4 / 2, "In the lemma theta stands beside one half: mind that factor when you differentiate."),
            ],
            symbols="b",
        ),
        **{
            "rank one": Numbers(
                math.sqrt(2),
                "Divide the standard deviation by the mean, both of one term.",
                misses=[(2.0, "That is the variance over the squared mean.")],
            ),
            "flat": Expression(
                sp.sqrt(2 / _d),
                "Variances of independent terms add, and so do their means.",
                misses=[
                    (2 / _d, "That is the variance over the squared mean."),
                    (sp.sqrt(2 * _d), "Divide by the mean of all d terms, not of one."),
                ],
                symbols="d",
            ),
        },
    ),
    "ex-gaussian-same-load": Parts(
        sharp=Numbers(
            [1 / 5, 1 / 2],
            "The sharp exponent is a formula in the square of the horizon, and never above that of a mean.",
            misses=[
                ([1 / 10, 25 / 54], "Those are values of the reference curve."),
                ([1 / 2, 1 / 5], "The rank-one head comes first."),
            ],
        ),
        slopes=Numbers(
            [0.19, 0.63],
            "Use `sweeps.MomentSweep` with both forms scaled to their horizons, and fit `cov_error` against n on "
            "logarithmic axes.",
            misses=[
                ([0.63, 0.19], "The rank-one head comes first."),
                ([-0.19, -0.63], "Give the exponents: positive where the error falls."),
            ],
            atol=0.12,
            rtol=0,
        ),
    ),
    "ex-gaussian-second-order": Parts(
        slope=Expression(
            sp.Rational(1, 2) + _r / (2 * (_n + _r)),
            "The slope is that of the root of the mean square error: minus half of d log / d log n.",
            misses=[
                (1 + _r / (_n + _r), "That is the slope of the square; the error is its root."),
                (
                    sp.Rational(1, 2) - _r / (2 * (_n + _r)),
                    "Does the second term make the error fall faster or more slowly?",
                ),
            ],
            symbols="n r",
        ),
        r=Numbers(
            79.4,
            "Divide n times the mean of cov_error squared by the squared constant of the covariance, at the shortest "
            "length; what exceeds 1 is r/n.",
            misses=[
                (0.0794, "That is r/n; multiply by n."),
                (1079.4, "Subtract the one first."),
            ],
            rtol=0.02,
        ),
    ),
    "ex-gaussian-freeze": Parts(
        frozen=Numbers(
            _FROZEN,
            "A head of horizon H has the typical load H times the root of its effective rank; set that equal to "
            "sqrt(2 log n).",
            misses=[
                ([value / math.sqrt(2) for value in _FROZEN], "Queries freeze where s^2 is twice log n."),
                (_FROZEN[::-1], "The smaller dimension comes first."),
            ],
            rtol=0.1,
        ),
        limit=Numbers(
            [value / 2 for value in _FROZEN],
            "Central-limit behaviour asks for a reduced load below one half.",
            misses=[(_FROZEN, "That is where they freeze.")],
            rtol=0.1,
        ),
    ),
    "ex-gaussian-units": Parts(
        **{
            "A": Numbers(
                1 / 100,
                "A logit holds a query and a key: what happens to each?",
                misses=[
                    (1 / 10, "A logit holds two tokens, and both are in the new unit."),
                    (100.0, "Is the new A larger or smaller?"),
                ],
            ),
            "V": Numbers(
                1 / 10,
                "An output is V times a weighted mean of tokens.",
                misses=[(1 / 100, "An output holds one token, not two."), (10.0, "Is the new V larger or smaller?")],
            ),
            "one-sided": Numbers(
                1 / 10,
                "H_1 is the norm of Sigma^{1/2} A; the root of the covariance takes the factor of a token.",
                misses=[
                    (1.0, "That is true of the two-sided horizon."),
                    (10.0, "A has changed too."),
                    (1 / 100, "The root of the covariance has changed too."),
                ],
            ),
        },
        exponents=Numbers(
            [1 / 2, 1 / (1 + 16 * 0.8**2)],
            "All matrices are diagonal: compute B and Sigma^{1/2} A, take the largest entries, square; the reach is "
            "the largest variance.",
            misses=[
                ([1 / (1 + 0.8**2), 1 / (1 + 16 * 0.8**2)], "No exponent of a mean is above one half."),
                ([1 / 2, 1 / (1 + 0.8**2)], "The one-sided coupling carries the reach."),
                ([1 / (2 * (1 + 0.8**2)), 1 / (2 * (1 + 16 * 0.8**2))], "Those are values of the reference curve."),
            ],
        ),
    ),
    "ex-gaussian-blind": Parts(
        blind=Expression(
            (1 - _h**4) ** sp.Rational(-1, 2),
            "Across the axis only R(z) z_2 is left of the influence; z_2 is independent of R.",
            misses=[
                (sp.Integer(1), "A blind head is no plain average: its weights still follow z_1."),
                (
                    (1 - _h**4) ** sp.Rational(-3, 2),
                    "That has the factor of the leading direction, where z_1 squared stands under the integral.",
                ),
            ],
            symbols="h",
        ),
        along=Expression(
            _h**2 + 2 * _h + (1 - _h**4) ** sp.Rational(-3, 2),
            "Along the axis the head is one-dimensional: the page has its constant.",
            misses=[
                (_h**2 - 2 * _h + (1 - _h**4) ** sp.Rational(-3, 2), "That is the constant of the negative head."),
                ((1 - _h**4) ** sp.Rational(-3, 2), "A token is also a query, and reports itself."),
            ],
            symbols="h",
        ),
        exponent=Expression(
            1 / (1 + _h**2),
            "Find the power with which P(R > r) falls; what does an independent factor with all moments do to it?",
            misses=[
                (1 / (2 * (1 + _h**2)), "That is the reference curve; read the index off the tail of R."),
                (
                    sp.Rational(1, 2),
                    "The variance of R is infinite beyond horizon one, whatever it is multiplied with.",
                ),
                (_h**2 / (1 + _h**2), "That is one over the index of the tail; what does it say of a mean of n terms?"),
            ],
            symbols="h",
        ),
    ),
}

exercise = by_label(CHECKS)
