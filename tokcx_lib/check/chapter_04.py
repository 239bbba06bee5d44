"""Checks for chapter 4, hardmax."""

import math

import numpy as np
import sympy as sp
import torch
from scipy.optimize import brentq
from scipy.special import lambertw

from tokcx_lib.check.kinds import Choice, Expression, Numbers, Parts, by_label
from tokcx_lib.studies import extremes
from tokcx_lib.theory import hardmax
from tokcx_lib.theory.attention import attention_map

_n, _delta, _d, _R = sp.symbols("n delta d R")
_CORNERS = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
_INNER = [0.5, math.atan2(3, 4) / math.pi, math.atan2(4, 3) / math.pi]  # angles over pi


def _half():
    """Power of ten at which the exact error is half of that of a thousand tokens."""
    target = hardmax.expected_abs_midrange(1e3) / 2
    return brentq(lambda power: hardmax.expected_abs_midrange(10.0**power) - target, 3, 20)


def _equal(variance):
    """Tokens at which variance / (4 L^2) is L^2 / n, where L^2 = 2 log n."""
    return brentq(lambda n: variance * n - 16 * math.log(n) ** 2, 20, 1e4)


def _off():
    """Worst misfit of a power of n and of a power of log n to the exact law, 1e2 to 1e5 tokens in eight dimensions."""
    n = 10.0 ** np.arange(2, 6)
    exact = np.log([hardmax.expected_square_hardmax(count, 8) ** 0.5 for count in n])
    axes = np.log(n), np.log(np.log(n))
    return [np.abs(np.polyval(np.polyfit(axis, exact, 1), axis) - exact).max() for axis in axes]


def _one():
    """Mean over directions at kappa = 1."""
    angle = torch.arange(3600, dtype=torch.float64) * (2 * math.pi / 3600)
    return attention_map(_CORNERS, torch.stack([angle.cos(), angle.sin()], 1), None).mean(0)


CHECKS = {
    "ex-hardmax-bounded": Parts(
        error=Expression(
            1 / (_n + 1),
            "Integrate powers of F = (1 + r)/2 over both halves of the support.",
            misses=[
                (2 / (_n + 1), "The midrange is half of the sum of the two extremes."),
                (_n / (_n + 1), "That is the mean of the largest absolute value, one of the two terms."),
            ],
            symbols="n",
        ),
        blame=Choice(
            "tail",
            "The map and the queries are those of the chapter. What is different here?",
            options=("hardmax", "tail", "queries"),
        ),
    ),
    "ex-hardmax-laplace": Parts(
        limit=Numbers(
            math.log(2),
            "Put n Q(r) as the variable of integration; the integral is one that the page has done.",
            misses=[
                (2 * math.log(2), "That is the size of the sum of the extremes. The midrange is half of it."),
                (0, "Simulate it: does the error fall?"),
            ],
            rtol=1e-3,
        ),
        five=Numbers(
            667 / 960,
            "The theorem has an integral over each half of the line; on each, powers of F are sums of exponentials.",
            misses=[
                (137 / 60, "That is the mean of the largest absolute value; subtract that of the largest token."),
                (math.log(2), "That is the limit. At five tokens the error is a fraction."),
            ],
            rtol=1e-3,
        ),
    ),
    "ex-hardmax-half": Parts(
        asymptote=Numbers(
            12,
            "By which factor must the logarithm of n grow, so that the root of it doubles?",
            misses=[(6, "That doubles the logarithm, which is under a root.")],
            rtol=1e-3,
        ),
        exact=Numbers(
            _half,
            "Solve for the n at which `hardmax.expected_abs_midrange` is half of its value at a thousand.",
            misses=[(12, "That is the asymptote. The exact law asks for a little less.")],
            rtol=2e-3,
        ),
    ),
    "ex-hardmax-counting": Parts(
        equal=Numbers(
            lambda: _equal(math.pi**2 / 3),
            "Put L^2 = 2 log n into both variances, and solve for n above twenty.",
            misses=[(_equal(1), "What is the variance of the logistic law?")],
            rtol=0.02,
        ),
        within=Numbers(
            23_511,
            "Compute the ratio of `expected_abs_hardmax` and `expected_abs_midrange` for larger and larger n.",
            misses=[(_equal(math.pi**2 / 3), "Where the variances are equal, counting is half of the story.")],
            rtol=0.02,
        ),
    ),
    "ex-hardmax-sharp": Parts(
        gap=Expression(
            (_n - 1) * _delta * sp.exp(-_delta) / (1 + (_n - 1) * sp.exp(-_delta)),
            "Put the top logit to zero. The gap is then minus the mean of the logits under their softmax weights.",
            misses=[
                (
                    _n * _delta * sp.exp(-_delta) / (1 + _n * sp.exp(-_delta)),
                    "One of the n tokens is the top one.",
                ),
                ((_n - 1) * _delta * sp.exp(-_delta), "Weights must sum to one."),
            ],
            symbols="n delta",
        ),
        largest=Numbers(
            [lambertw((n - 1) / math.e).real for n in (1e2, 1e4, 1e8)],
            "Maximise your formula over delta, for each n.",
            misses=[
                (
                    [1 + lambertw((n - 1) / math.e).real for n in (1e2, 1e4, 1e8)],
                    "Those are the distances at which the gap is largest.",
                ),
                ([math.log(n) for n in (1e2, 1e4, 1e8)], "Those are the bounds."),
            ],
            rtol=5e-3,
        ),
        limit=Numbers(
            1,
            "At the best delta, write n through the gap, and take logarithms.",
            misses=[(0.5, "That is about the ratio at a hundred tokens. Go on.")],
        ),
    ),
    "ex-hardmax-triangle": Parts(
        hard=Numbers(
            lambda: extremes.steiner_point(_CORNERS),
            "Which share of the directions reports a corner? Look at the normals of its two edges.",
            misses=[
                (
                    np.array(_INNER) @ _CORNERS.numpy(),
                    "Those are the interior angles. A sharp corner is reported more often.",
                ),
                (_CORNERS.mean(0), "That is the mean of the corners. They are not reported equally often."),
            ],
            rtol=2e-3,
        ),
        soft=Numbers(
            lambda: _CORNERS.mean(0),
            "At zero logits, what are the weights?",
            misses=[(extremes.steiner_point(_CORNERS), "That is the other limit.")],
            rtol=2e-3,
        ),
        one=Numbers(
            _one,
            "Average `attention_map` over many directions on the unit circle.",
            misses=[
                (extremes.steiner_point(_CORNERS), "That is the limit. At a scale of one the head is not quite there."),
                (_CORNERS.mean(0), "Average over queries of length one, not of length zero."),
            ],
            rtol=4e-3,
        ),
        moves=Choice(
            "soft",
            "Is the fourth token a corner of the hull?",
            options=("hard", "soft", "both", "neither"),
        ),
    ),
    "ex-hardmax-tell": Parts(
        off=Numbers(
            _off,
            "Fit a straight line to the logarithm of the RMS, against log n and against log log n; take the largest "
            "residual of each.",
            misses=[
                (list(reversed(_off())), "The power of n comes first."),
                ([2 * value for value in _off()], "Those belong to the mean square; its root is half as far off."),
            ],
            rtol=0.02,
        ),
        noise=Expression(
            1 / sp.sqrt(2 * _d * _R),
            "Begin with the relative variance of one squared length, and end with the root.",
            misses=[
                (sp.sqrt(2 / (_d * _R)), "That is the relative error of the mean square; a root has half of it."),
                (1 / sp.sqrt(2 * _R), "That is for one dimension; the squares of d coordinates average."),
            ],
            symbols="d R",
        ),
        replicates=Numbers(
            lambda: [9 / (16 * value**2) for value in _off()],
            "Set three times your noise equal to each misfit, and solve for R.",
            misses=[
                ([1 / (16 * value**2) for value in _off()], "That is one standard error."),
                ([9 / (2 * value**2) for value in _off()], "How many dimensions are there?"),
            ],
            rtol=0.05,
        ),
    ),
}

exercise = by_label(CHECKS)
