"""Checks for chapter 9, the exact law at a finite number of tokens."""

import math
from functools import cache

import numpy as np
import sympy as sp
from scipy.optimize import brentq

from tokcx_lib import records
from tokcx_lib.check.kinds import Choice, Expression, Numbers, Parts, by_label
from tokcx_lib.theory import laws, softmax_law

_t, _d, _s = sp.symbols("t d s")
_a = sp.sqrt(3) * _s


@cache
def _spheres():
    """Participation at n = 1000 over spheres in 2, 8, 64 dimensions, of radius sqrt(d), at three tilts."""
    tilts = np.array([1.0, 3.0, 6.0])
    return [
        softmax_law.softmax_moments(1000, tilts, laws.UniformSphere(d, math.sqrt(d))).participation.tolist()
        for d in (2, 8, 64)
    ]


@cache
def _kept():
    """Loads at which a query has 50 effective tokens, at four lengths."""
    return [
        brentq(lambda load: softmax_law.softmax_moments(n, load).participation - 1 / 50, 0.1, 9)
        for n in (1e3, 1e5, 1e7, 1e9)
    ]


@cache
def _loads():
    """Median loads of the 72 heads, in order."""
    return np.sort(records.load("real_heads_english").table["load_median"].to_numpy())


@cache
def _between():
    """Heads whose effective number of tokens is between those of normal and of uniform tokens."""
    heads = records.load("real_heads_english").table
    load = heads["load_median"].to_numpy()
    normal = softmax_law.softmax_moments(1e5, load).participation
    flat = softmax_law.softmax_moments(1e5, math.sqrt(3) * load, laws.Uniform(1)).participation
    seen = heads["effective_100000"].to_numpy()
    return int(((1 / normal < seen) & (seen < 1 / flat)).sum())


CHECKS = {
    "ex-exact-two": Parts(
        mean=Expression(
            sp.tanh(_t) / 2,
            "List the four draws. Which of them say nothing on average?",
            misses=[
                (sp.tanh(_t), "That is the output where the two tokens differ; how often do they?"),
                (_t * (sp.Rational(1, 2) - sp.tanh(_t) ** 2 / 4), "That is the identity for Gaussian tokens."),
            ],
            symbols="t",
        ),
        participation=Expression(
            sp.Rational(1, 2) + sp.tanh(_t) ** 2 / 4,
            "List the four draws, and the sum of squared weights in each.",
            misses=[
                (
                    (1 + sp.tanh(_t) ** 2) / 2,
                    "That is the participation where the two tokens differ; average over draws.",
                ),
                (sp.Rational(1, 2), "That is the participation where the two tokens agree; average over draws."),
            ],
            symbols="t",
        ),
        holds=Choice("no", "Put in some t.", options=("yes", "no")),
    ),
    "ex-exact-load-one": Parts(
        along=Numbers(
            1.0,
            "Write the square of the map as that of its error, plus a cross term with the bias of the map.",
            misses=[
                (1 / math.sqrt(3), "The cross term counts twice, not four times."),
                (0.0, "At load 0 the bias is not zero: what is reported scatters."),
            ],
        ),
        trace=Expression(
            sp.sqrt(_d),
            "Across u there are d - 1 directions, each with the bias P.",
            misses=[
                (sp.sqrt(_d - 1), "Along u the query scatters too."),
                (_d, "That is the square of the load."),
            ],
            symbols="d",
        ),
    ),
    "ex-exact-bounded": Numbers(
        _spheres,
        "Use `softmax_moments(1000, tilts, law)`, one law for each d; the radius is the root of d.",
        misses=[
            (
                [[0.00142, 0.00282, 0.0042], [0.00113, 0.0023, 0.00786], [0.00102, 0.00115, 0.00172]],
                "Your sphere has the radius 1.",
            ),
            (
                [[0.00173, 0.00214, 0.00258], [0.00347, 0.01812, 0.10647], [0.00505, 0.10789, 0.43725]],
                "Rows are dimensions, columns are tilts; yours are the other way round.",
            ),
        ],
        rtol=0.02,
    ),
    "ex-exact-scaling": Numbers(
        _kept,
        "Solve for the load at which the participation is the inverse of the number of tokens to be kept.",
        misses=[
            ([0.494, 0.645, 0.716, 0.760], "Those are reduced loads; multiply by the root of 2 log n."),
            ([0.834, 2.351, 3.300, 4.089], "That keeps ten times as many tokens."),
        ],
        atol=0.01,
        rtol=0,
    ),
    "ex-exact-debias": Parts(
        plain=Numbers(
            lambda: -2 * softmax_law.softmax_moments(100, 2).participation,
            "The mean of the outputs, less the load; thousands of lists are needed.",
            misses=[
                (0.252, "Is the output too large or too small?"),
                (-0.126, "That is the bias as a fraction of the load."),
            ],
            atol=0.025,
            rtol=0,
        ),
        own=Numbers(
            0.18,
            "Divide every output by one less the sum of its own squared weights, then average over lists.",
            misses=[(0.0, "That is what the average of the participation does. Here each list has its own.")],
            atol=0.08,
            rtol=0,
        ),
        averaged=Numbers(
            0.0,
            "First average the participation over all lists, then divide every output by one less it.",
            misses=[(0.18, "That is what each list's own participation does; average it first.")],
            atol=0.03,
            rtol=0,
        ),
    ),
    "ex-exact-between": Parts(
        normal=Expression(
            sp.exp(-(_s**2)),
            "Put K(t) = t^2 / 2 into the exponent; the share is the inverse of n P.",
            misses=[
                (sp.exp(_s**2), "That is n P; the share is its inverse."),
                (sp.exp(-2 * _s**2), "The square of the sum is in the denominator: subtract 2 K(t)."),
            ],
            symbols="s",
        ),
        uniform=Expression(
            sp.tanh(_a) / _a,
            "The moment generating function on [-1, 1] is sinh(a) / a. What is a, if the variance is to be 1?",
            misses=[
                (sp.tanh(_s) / _s, "Those tokens are uniform on [-1, 1]; their variance is not 1."),
                (_a / sp.tanh(_a), "That is n P; the share is its inverse."),
            ],
            symbols="s",
        ),
        between=Numbers(
            _between,
            "Uniform tokens on [-1, 1] have the tilt sqrt(3) s. Compare the record with the inverse of both "
            "participations.",
            misses=[(25, "That counts heads of load above 2 only."), (13, "That counts heads below the normal law.")],
        ),
    ),
    "ex-exact-most": Parts(
        most=Numbers(
            lambda: 2 * _loads()[64] ** 2 / math.log(10),
            "Which of the three budgets? Sort the loads; the phase is reached by the smallest loads first.",
            misses=[
                (2.41, "That thaws them; another budget is asked."),
                (7.22, "That is the budget of the mean square; the typical error is asked."),
                (22.17, "That is the natural logarithm."),
            ],
            atol=0.06,
            rtol=0,
        ),
        square=Numbers(
            lambda: 3 * _loads()[64] ** 2 / 2 / math.log(10),
            "Which of the three budgets? The same head as before decides.",
            misses=[
                (2.41, "That thaws them; another budget is asked."),
                (9.63, "That is the budget of the typical error; the mean square is asked."),
                (16.63, "That is the natural logarithm."),
            ],
            atol=0.06,
            rtol=0,
        ),
        last=Numbers(
            lambda: _loads()[-1] ** 2 / 2 / math.log(10),
            "Which of the three budgets? The largest load decides.",
            misses=[
                (221.1, "That is the budget of a typical error like 1/sqrt(n)."),
                (165.8, "That is the budget of a mean square error like 1/n."),
                (127.3, "That is the natural logarithm."),
            ],
            atol=0.1,
            rtol=0,
        ),
    ),
}

exercise = by_label(CHECKS)
