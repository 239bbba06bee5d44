"""Checks for chapter 7, real heads."""

import math

import sympy as sp
from scipy.optimize import brentq

from tokcx_lib.check.kinds import Choice, Expression, Numbers, Parts, by_label

_c, _eta, _f, _n, _N, _p, _rho, _s, _v, _w = sp.symbols("c eta f n N p rho s v w")

_LONG = (1 + _rho) / (1 - _rho)
_DESIGN = _LONG - 2 * _rho * (1 - _rho**_w) / (_w * (1 - _rho) ** 2)
_TREND = math.sqrt(3 * 0.83) * 3.1


def _half_worth() -> float:
    """The correlation of neighbours for which the design effect of windows of 254 is 2."""
    return brentq(sp.lambdify(_rho, _DESIGN.subs(_w, 254) - 2), 0.1, 0.6)


CHECKS = {
    "ex-thaw": Parts(
        effective=Numbers(
            [0.97, 1.9, 3.25],
            "Scale the queries, count over the first 10,000 of shuffled keys, take medians over queries, then "
            "logarithms to base ten.",
            misses=[
                ([9.2, 90.0, 1800.0], "Those are the medians; give their logarithms to base ten."),
                ([2.2, 4.4, 7.5], "Those are natural logarithms."),
                ([3.25, 1.9, 0.97], "The unscaled logits come first."),
            ],
            atol=0.3,
            rtol=0,
        ),
        alpha=Numbers(
            0.1,
            "Compare with the column `effective_10000` of the table of layer 0, on a logarithmic scale.",
            misses=[
                (0.3, "Most heads of the layer have thousands of effective tokens."),
                (1.0, "That is the head itself."),
            ],
        ),
    ),
    "ex-bias": Parts(
        head=Numbers(
            9,
            "Compute the load with and without the shift, take medians over tokens, and compare on a logarithmic "
            "scale.",
            misses=[(10, "Heads are counted from 0.")],
            rtol=0,
            atol=0.1,
        ),
        ratio=Numbers(
            0.52,
            "Call `geometry.load` without the shift and with it, and divide the medians.",
            misses=[(1 / 0.52, "That is with over without."), (0.48, "That is the part that goes; which part stays?")],
            rtol=0,
            atol=0.015,
        ),
        keys=Numbers(
            1.0,
            "Which terms of the logit does softmax cancel?",
            misses=[(0.0, "Nothing would be left of the load then; give the factor.")],
        ),
    ),
    "ex-deeper": Parts(
        layer=Numbers(
            1,
            "Group the record by layer, and take means of `load_median`.",
            misses=[
                (0, "That layer has the largest single load, not the largest mean."),
                (2, "Layers are counted from 0."),
            ],
            rtol=0,
            atol=0.1,
        ),
        head=Numbers(
            [1, 8],
            "Leave out layer 0, and look for the largest `load_median`.",
            misses=[([0, 2], "That is the largest of all; leave out layer 0."), ([8, 1], "The layer comes first.")],
            rtol=0,
            atol=0.1,
        ),
        deep=Choice(
            "easier",
            "Compare the mean loads of both: a large load asks for many tokens.",
            options=("harder", "easier"),
        ),
    ),
    "ex-floor": Parts(
        part=Expression(
            (1 - _f) / _f * _v / _N,
            "Write the pool as f times the part plus 1 - f times the rest, which are independent averages.",
            misses=[
                (_v / (_f * _N), "That is the variance of the part; the pool contains it."),
                (_v / (_f * _N) + _v / _N, "Part and pool are not independent."),
                (
                    _v / (_f * _N) + _v / ((1 - _f) * _N),
                    "That is the distance of the part from the rest, not from the pool.",
                ),
            ],
            symbols="f N v",
        ),
        fraction=Numbers(
            1 / 3,
            "Two pools are independent, and their variances add; set your formula equal to that.",
            misses=[
                (1 / 2, "That is the distance between a pool and the law."),
                (2 / 3, "Is that the part, or the rest?"),
            ],
        ),
        pool=Numbers(
            3e6,
            "A tenth of a root mean square error is a smaller part of a mean square.",
            misses=[(3e5, "That is a tenth in mean square."), (300, "The pool has to be larger than the sample.")],
        ),
    ),
    "ex-trend": Parts(
        share=Expression(
            sp.tanh(_c) / _c * sp.exp(-_v),
            "The MGF of the trend is a hyperbolic sine; put it at 1, squared, over itself at 2, and do the scatter "
            "apart.",
            misses=[
                (_c / sp.tanh(_c) * sp.exp(_v), "That is the budget, one over the share."),
                (sp.tanh(_c) / _c, "The scatter has a share as well."),
                (sp.exp(-_v - _c**2 / 3), "That is the share of Gaussian logits of the same variance."),
            ],
            symbols="c v",
        ),
        kurtosis=Expression(
            -sp.Rational(6, 5) * _eta**2,
            "Fourth cumulants add, and that of a Gaussian is zero; divide by the square of the whole variance.",
            misses=[
                (-sp.Rational(6, 5) * _eta, "The kurtosis divides by the square of the variance."),
                (sp.Rational(9, 5) * _eta**2, "Subtract what a Gaussian would have: excess."),
            ],
            symbols="eta",
        ),
        times=Numbers(
            math.tanh(_TREND) / _TREND * math.exp(0.83 * 3.1**2),
            "The variance of a uniform law on [-c, c] is c^2/3: find c and v from the load and eta, then divide by "
            "the Gaussian share.",
            misses=[
                (
                    math.exp(0.83 * 3.1**2),
                    "That takes the trend for no variance at all: it still shares the attention out.",
                ),
                (
                    math.tanh(_TREND) / _TREND * math.exp(-0.17 * 3.1**2),
                    "That is the share; how many times the Gaussian one is it?",
                ),
            ],
            rtol=0.02,
        ),
    ),
    "ex-design": Parts(
        deff=Expression(
            _DESIGN,
            "Sum rho^k and k rho^k from 1 to w - 1, and check your formula at w = 2.",
            misses=[
                (_LONG, "That is the limit of long windows."),
                (
                    1 + 2 * _rho * (1 - _rho ** (_w - 1)) / (1 - _rho),
                    "Pairs at distance k are fewer, the further apart: a factor is missing.",
                ),
                (
                    1 + _rho / (1 - _rho) - _rho * (1 - _rho**_w) / (_w * (1 - _rho) ** 2),
                    "Every pair counts twice.",
                ),
            ],
            symbols="rho w",
        ),
        rho=Numbers(
            _half_worth,
            "Solve with the formula for w = 254 itself.",
            misses=[(1 / 3, "That is right for infinitely long windows.")],
            rtol=0.001,
        ),
        placed=Expression(
            (1 - _eta) * _LONG,
            "What is the variance, over windows, of the mean of a function of the place?",
            misses=[
                (_LONG, "Is the whole variance there when windows are averaged?"),
                (
                    (1 - _eta) * _LONG + _eta,
                    "A window has every place once: its places have no variance as independent tokens do.",
                ),
                (_eta * _LONG, "Which of the two parts does a window average away?"),
            ],
            symbols="eta rho",
        ),
    ),
    "ex-effective-load": Parts(
        load=Numbers(
            0.292,
            "Predict the exponent of each head at its median load, subtract the measured one, and take the median of "
            "absolute values.",
            misses=[(-0.292, "Take absolute values."), (0.161, "That is head 0.2; take the heads of load 2 to 5.")],
            rtol=0.05,
        ),
        effective=Numbers(
            0.0549,
            "The effective load is the root of minus the log of the share, and the share is the effective number "
            "among 200,000 over 200,000.",
            misses=[(-0.0549, "Take absolute values."), (0.000124, "That is head 0.2; take the heads of load 2 to 5.")],
            rtol=0.05,
        ),
        ratio=Numbers(
            1.08,
            "Divide the root mean square of `map_error` at 30,000 tokens by the spread of the values over the root "
            "of the effective tokens among 30,000.",
            misses=[
                (1 / 1.08, "That is predicted over measured."),
                (1.08 * math.sqrt(30 / 200), "Those are the effective tokens among the whole pool."),
                (1.08**2, "That is the ratio of mean squares."),
            ],
            rtol=0.02,
        ),
    ),
    "ex-sink": Parts(
        logit=Expression(
            _s**2 / 2 + sp.log(_n * _p / (1 - _p)),
            "Solve e^a = p (e^a + n e^{s^2/2}) for a.",
            misses=[
                (sp.log(_n * _p / (1 - _p)), "The ordinary keys' exponentials have a mean above one."),
                (_s**2 / 2 + sp.log(_p / (1 - _p)), "The sink is one key against n."),
                (_s**2 / 2 + sp.log(_n * _p), "The mass is of all weights, the sink's own included."),
            ],
            symbols="n p s",
        ),
        effective=Numbers(
            1 / (0.25 + 0.25 * math.e / 254),
            "Sum the squares: the sink's, and those of the others, whose weights have the mass 1 - p in all.",
            misses=[
                (254 / math.e, "That is without the sink."),
                (4.0, "That is the sink alone; the others have squares as well."),
                (127 / math.e, "Weights are squared: halving them does more."),
            ],
            rtol=0.003,
        ),
        error=Expression(
            1 - _p,
            "Write the output as p times the sink's value plus the rest, and subtract its limit.",
            misses=[
                (_p, "That is the part that does not err."),
                ((1 - _p) ** 2, "That is the factor of the mean square."),
                (1 / (1 - _p), "Does a part that is the same in every draw make the error larger?"),
            ],
            symbols="p",
        ),
    ),
}

exercise = by_label(CHECKS)
