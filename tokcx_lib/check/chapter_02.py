"""Checks for chapter 2, the uniform rate."""

import math

import sympy as sp
import torch
from scipy.optimize import brentq
from scipy.stats import chi2

from tokcx_lib.check.kinds import Expression, Numbers, Parts, by_label
from tokcx_lib.theory import rates

_t, _p, _y, _d = sp.symbols("t p y d")
_up, _down = _p * sp.exp(_t), (1 - _p) * sp.exp(-_t)


def _proven(spread):
    """Constants for projections on 1, 4 and 8 coordinates."""
    masks = [torch.diag((torch.arange(8) < k).double()) for k in (1, 4, 8)]
    return [rates.uniform_constant(2.0, mask, support=1.0, spread=spread) for mask in masks]


def _beyond():
    """Where the constant of the contraction for several forms becomes the smaller one."""
    return [
        brentq(lambda y: 4 * (1 + 2 * y) * math.exp(y) - rates.uniform_constant(y, torch.eye(k), support=1.0), 0.001, 3)
        for k in (1, 8, 64)
    ]


def _lapse():
    """Squared load at which e^{2 s^2} is the number of tokens for an error of 10% in d = 8."""
    return brentq(lambda q: math.exp(q) - 100 * (8 + q) / q, 0.1, 20)


_PROVEN = _proven(0.8**0.5)

CHECKS = {
    "ex-uniform-signs": Parts(
        map=Expression(
            (_up - _down) / (_up + _down),
            "Softmax weighs a token +1 by e^t and a token -1 by e^{-t}; how many of each are there?",
            misses=[
                (sp.tanh(_t), "That is the limit. The sample holds a share p of tokens +1."),
                (_up - _down, "Weights must sum to one."),
            ],
            symbols="p t",
        ),
        slope=Expression(
            2 / sp.cosh(_t) ** 2,
            "Differentiate by p, then put one half.",
            misses=[
                (1 / sp.cosh(_t) ** 2, "That is the derivative by t. What is random here is p."),
                (1 / sp.cosh(_t) ** 4, "That is S, the squared slope times the variance of one sign's share."),
            ],
            symbols="t",
        ),
    ),
    "ex-uniform-rank": Parts(
        proven=Numbers(
            _PROVEN,
            "Use `rates.uniform_constant` with the radius, the projection, and both `support` and `spread`.",
            misses=[
                (_proven(1.0), "The tokens are not all at the edge: what is their mean square distance?"),
                (_proven(0.8), "The spread is the root of the mean square distance."),
            ],
        ),
        measured=Numbers(
            1.42,
            "`uniform.uniform_sweep` takes the projection as A; average its error over replicates, for each rank.",
            misses=[
                (8**0.5, "That is what the square root of the rank would give. Measure it."),
                (_PROVEN[2] / _PROVEN[0], "That is the ratio of the proven constants."),
            ],
            atol=0.25,
            rtol=0,
        ),
    ),
    "ex-uniform-quantile": Parts(
        lemma=Numbers(
            math.sqrt(12.5 + 2 * math.sqrt(50 / 16 * math.log(1000)) + math.log(1000) / 2),
            "M has fifty equal eigenvalues. Set e^{-u} to one in a thousand.",
            misses=[
                (
                    12.5 + 2 * math.sqrt(50 / 16 * math.log(1000)) + math.log(1000) / 2,
                    "The lemma bounds the square of the load.",
                ),
                (math.sqrt(12.5), "That is the root of the trace, a typical load."),
            ],
        ),
        simulated=Numbers(
            lambda: math.sqrt(chi2.isf(0.001, 50) / 4),
            "Draw many queries z, and take the quantile of the root of z'Mz that one in a thousand exceeds.",
            misses=[
                (chi2.isf(0.001, 50) / 4, "That is the square of the load."),
                (math.sqrt(chi2.isf(0.001, 50)), "The horizon of this head is one half."),
            ],
            rtol=0.015,
        ),
    ),
    "ex-uniform-maurer": Parts(
        numerator=Expression(
            2 * (1 + _y) * sp.exp(_y),
            "Write <u, Y> e^{<t, Y>} as a function of <u, Y>/rho and <t, Y>. How long can its gradient be?",
            misses=[
                (sp.sqrt(2) * (1 + _y) * sp.exp(_y), "The gradient has two entries, and the lemma a root of its own."),
                (4 * (1 + _y) * sp.exp(_y), "That is the numerator after the factor of symmetrisation."),
                (2 * sp.exp(_y), "Both linear forms have a supremum of their own."),
            ],
            symbols="y",
        ),
        beyond=Numbers(
            _beyond,
            "Compare with `rates.uniform_constant` for an identity matrix of size k, and find the root of the "
            "difference.",
            misses=[([1.0, 1.0, 1.0], "Where the new constant is smaller depends on the rank.")],
            rtol=0.02,
        ),
    ),
    "ex-uniform-boundary": Numbers(
        [0.84, 1.0, 1.0],
        "Group the column `depth` of the table of each dimension by the radius.",
        misses=[
            ([0.16, 0.0, 0.0], "That is the share inside."),
            ([1.0, 1.0, 1.0], "In one dimension the boundary has two points only. Are both always the worst?"),
        ],
        atol=0.08,
        rtol=0,
    ),
    "ex-uniform-lapse": Parts(
        cheapest=Expression(
            (sp.sqrt(_d**2 + 4 * _d) - _d) / 2,
            "Put q for the squared load, and differentiate the logarithm of n by q.",
            misses=[
                (sp.sqrt((sp.sqrt(_d**2 + 4 * _d) - _d) / 2), "That is the load; hand in its square."),
                (1, "That is the limit for many dimensions."),
            ],
            symbols="d",
        ),
        lapse=Numbers(
            lambda: math.sqrt(_lapse()),
            "Take logarithms of both numbers of tokens, and solve for q, the squared load.",
            misses=[
                (_lapse(), "That is the squared load."),
                (
                    math.sqrt(brentq(lambda q: math.exp(q) - 10 * (8 + q) / q, 0.1, 20)),
                    "The number of tokens falls with the square of the relative error.",
                ),
            ],
        ),
        tokens=Numbers(
            lambda: math.exp(2 * _lapse()),
            "At the lapse both counts agree, so that either gives the number.",
            misses=[(math.exp(_lapse()), "The normal limit needs the exponential of twice the squared load.")],
            rtol=0.05,
        ),
    ),
}

exercise = by_label(CHECKS)
