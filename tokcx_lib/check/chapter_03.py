"""Checks for chapter 3, the moment rate."""

import math

import sympy as sp
from scipy.stats import norm

from tokcx_lib.check.kinds import Choice, Expression, Numbers, Parts, by_label

_c, _lam, _epsilon, _tau = sp.symbols("c lambda epsilon tau")

CHECKS = {
    "ex-moment-heavy": Parts(
        balance=Expression(
            1 / (2 * (1 + _c * _lam)),
            "Find the r at which e^{cr}/sqrt(n) and e^{-r/lambda} are equal, and read off the power of n there.",
            misses=[
                (
                    1 / (2 * (1 + 2 * _c * _lam)),
                    "That is the answer for squares in both exponents; here there are none.",
                ),
                (1 / (2 * _c * _lam), "That is what integrating gives; balancing pays for the error and for the mass."),
            ],
            symbols="c lambda",
        ),
        integral=Expression(
            1 / (2 * _c * _lam),
            "Past the r at which the error reaches 1 it grows no more. What mass lies beyond that r?",
            misses=[(1 / (4 * _c * _lam), "That is the answer for squares in both exponents; here there are none.")],
            symbols="c lambda",
        ),
        changes=Choice(
            "neither",
            "Compare both with the forms that the page derives: which has another shape, not only another constant?",
            options=("balance", "integral", "both", "neither"),
        ),
    ),
    "ex-moment-rank": Parts(
        horizon=Numbers(
            math.sqrt((4 * 0.5**2 + 1.2**2 / 4) * (4 + 1 / 4)),
            "A matrix of rank one has one singular value: the product of two lengths. Which, once whitened?",
            misses=[
                (
                    math.sqrt((4 * 0.5**2 + 1.2**2 / 4) * 2),
                    "That is the one-sided horizon; the query too is measured in units of its standard deviation.",
                ),
                (math.sqrt((0.5**2 + 1.2**2) * 2), "That is the norm of A; where is the covariance?"),
            ],
        ),
        ratio=Numbers(
            4 * 2 / (4 + 1 / 4),
            "Write both couplings with p and q; the key side cancels.",
            misses=[
                (
                    math.sqrt(4 * 2 / (4 + 1 / 4)),
                    "That is the ratio of the horizons times the square root of the reach.",
                ),
                (
                    2 / (4 + 1 / 4),
                    "The one-sided coupling carries the reach, the largest eigenvalue of the covariance.",
                ),
            ],
        ),
    ),
    "ex-moment-rare": Parts(
        variance=Expression(
            _tau**2,
            "The bound K(t) <= v t^2 / 2 has to hold for every t, the large ones included.",
            misses=[(_epsilon * _tau**2, "That is the variance, which K obeys near t = 0 only.")],
            symbols="epsilon tau",
        ),
        ratio=Expression(
            1 / _epsilon,
            "Divide by the variance, which is the second derivative of K at 0.",
            misses=[(_epsilon, "The other way round: how many times the variance is it?")],
            symbols="epsilon tau",
        ),
    ),
    "ex-moment-fresh": Parts(
        fresh=Numbers(
            0.17,
            "Average the distance of the variance from its limit H^2 = 4 over replicates, at both lengths; the slope "
            "is log(ratio) / log(16), positive.",
            misses=[(-0.17, "Give the exponent: positive where the error falls.")],
            atol=0.05,
            rtol=0,
        ),
        own=Numbers(
            0.17,
            "As for fresh queries, with the keys themselves as queries.",
            misses=[(-0.17, "Give the exponent: positive where the error falls.")],
            atol=0.05,
            rtol=0,
        ),
    ),
    "ex-moment-constants": Numbers(
        [3.5, 3.7, 8.7, 19.4],
        "Evaluate `bounds(H, n)[0]` on powers of ten in steps of 0.1 or less, and take the first n below 0.1.",
        misses=[([2.0] * 4, "That is the ordinary mean. What does the theorem promise?")],
        atol=0.15,
        rtol=0,
    ),
    "ex-moment-supremum": Parts(
        share=Numbers(
            lambda: 2 * norm.sf(4),
            "The token may lie on either side.",
            misses=[(norm.sf(4), "That is one side; a query may point either way.")],
            rtol=0.02,
        ),
        tokens=Numbers(
            lambda: 1 / (2 * norm.sf(4)),
            "n tokens hold n times the share of them.",
            misses=[(1 / norm.sf(4), "That is one side; a query may point either way.")],
            rtol=0.02,
        ),
        edge=Numbers(
            lambda: norm.isf(1 / 2000),
            "Solve 1000 P(|X| > t) = 1.",
            misses=[(norm.isf(1 / 1000), "That is one side; a query may point either way.")],
            rtol=0.005,
        ),
    ),
}

exercise = by_label(CHECKS)
