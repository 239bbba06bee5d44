"""Checks for chapter 6, bounded tokens."""

import math

import sympy as sp
import torch
from scipy.optimize import brentq
from scipy.special import gamma, lambertw

from tokcx_lib.check.kinds import Choice, Expression, Numbers, Parts, by_label
from tokcx_lib.theory import laws

_a, _alpha, _b, _d, _kappa, _n, _nu, _q, _r, _t = sp.symbols("a alpha b d kappa n nu q r t")


def _log_budget(dim: int, r: float) -> float:
    """log G on the unit sphere at the tilt r."""
    t = torch.zeros(dim, dtype=torch.float64)
    t[0] = r
    sphere = laws.UniformSphere(dim)
    return (sphere.log_mgf(2 * t) - 2 * sphere.log_mgf(t)).item()


def _student(degrees: float) -> float:
    """Median of the largest of n Student-t tokens over n^(1/nu), for large n."""
    tail = gamma((degrees + 1) / 2) / gamma(degrees / 2) * degrees ** (degrees / 2 - 1) / math.sqrt(math.pi)
    return (tail / math.log(2)) ** (1 / degrees)


def _crossing(degrees: float, tilt: float, branch: int = -1) -> float:
    """log10 n where tilt times that median is log n."""
    return (-degrees * lambertw(-tilt * _student(degrees) / degrees, branch)).real / math.log(10)


CHECKS = {
    "ex-bounded-archimedes": Parts(
        K=Expression(
            sp.log(sp.sinh(_r) / _r),
            "Integrate e^{ru} over u uniform on [-1, 1], and take the logarithm.",
            misses=[
                (sp.sinh(_r) / _r, "That is the MGF; K is its logarithm."),
                (sp.log(2 * sp.sinh(_r) / _r), "The density of a uniform law on [-1, 1] is one half."),
            ],
            symbols="r",
        ),
        map=Expression(
            sp.coth(_r) - 1 / _r,
            "Differentiate K.",
            misses=[
                (sp.coth(_r), "The denominator of M depends on r as well."),
                (sp.cosh(_r) / _r - sp.sinh(_r) / _r**2, "That is the derivative of M; divide by M."),
            ],
            symbols="r",
        ),
        G=Expression(
            _r * sp.coth(_r),
            "Put M at twice the tilt over the square of M, and use the double angle.",
            misses=[
                (_r * sp.tanh(_r), "Which of the hyperbolic functions is left over in the numerator?"),
                (2 * _r * sp.coth(_r), "M carries a tilt in its denominator: at 2r that is 2r."),
            ],
            symbols="r",
        ),
        law=Choice(
            "cube",
            "One coordinate is uniform on an interval: of which body are all coordinates like that, and independent?",
            options=("cube", "ball", "signs"),
        ),
    ),
    "ex-bounded-edge": Parts(
        power=Expression(
            _alpha + 1,
            "M(t) is e^t times the Laplace transform of h^alpha at t; how often does its power of t appear in G?",
            misses=[
                (_alpha, "That is the power in the density, not in its integral."),
                (
                    2 * (_alpha + 1),
                    "The square in the denominator brings two such powers, and the numerator takes one back.",
                ),
                (-(_alpha + 1), "That is the power of M e^{-t}; G has M squared in its denominator."),
            ],
            symbols="alpha",
        ),
        alpha=Expression(
            (_d - 3) / 2,
            "Compare the density of one coordinate of the sphere with a power of 1 - |y| at the edge.",
            misses=[
                ((_d - 1) / 2, "That is the power of the budget."),
                (
                    _d - 3,
                    "The density of a coordinate is a power of 1 - u^2, which is about twice 1 - u at the edge: is "
                    "the power the whole of d - 3?",
                ),
            ],
            symbols="d",
        ),
    ),
    "ex-bounded-rmsnorm": Parts(
        sphere=Numbers(
            lambda: [brentq(lambda s: _log_budget(64, 8 * s) - p * math.log(10), 0.1, 50) for p in (3, 5, 7)],
            "On the sphere of radius 8 the tilt in units of the unit sphere is 8 s; find where log10 G is 3, 5 and 7.",
            misses=[
                ([math.sqrt(p * math.log(10)) for p in (3, 5, 7)], "Those are the loads for Gaussian tokens."),
                (
                    [8 * 3.14, 8 * 4.54, 8 * 6.03],
                    "Those look like tilts of the unit sphere; the load is the standard deviation of the logits.",
                ),
            ],
        ),
        Gaussian=Numbers(
            [math.sqrt(p * math.log(10)) for p in (3, 5, 7)],
            "For Gaussian tokens the budget is the exponential of the squared load.",
            misses=[
                ([math.sqrt(p) for p in (3, 5, 7)], "The budget is a power of ten, and the law has a power of e."),
                (
                    [math.sqrt(2 * p * math.log(10)) for p in (3, 5, 7)],
                    "That is the load at which e^{s^2/2} is the number; which is the budget?",
                ),
            ],
        ),
    ),
    "ex-bounded-effective": Parts(
        measured=Numbers(
            lambda: [math.exp(_log_budget(5, r)) for r in (5, 15, 50)],
            "Softmax of r times the first coordinate over the tokens; square the weights, sum, multiply by n.",
            misses=[
                ([math.exp(r**2 / 5) for r in (5, 15, 50)], "That is the budget of Gaussian tokens."),
                ([0.17, 0.024, 0.0023], "That is one over it, the share of the tokens that count."),
            ],
            rtol=0.15,
        ),
        largest=Expression(
            _n,
            "What is the largest that a sum of squared weights can be?",
            misses=[
                (sp.Integer(1), "That is the largest sum of squared weights; multiply by n."),
                (1 / _n, "That is the smallest sum of squared weights."),
            ],
            symbols="n",
        ),
    ),
    "ex-bounded-laplace": Parts(
        exponent=Expression(
            1 - _t,
            "Find the power of the tail of e^{tY}; a mean of n terms of tail index a between 1 and 2 errs by n^{-(1 "
            "- 1/a)}.",
            misses=[
                (sp.Rational(1, 2), "That asks for a finite variance."),
                (_t, "That is one over the tail index; what does the division by n leave of it?"),
                (1 - 1 / _t, "Is the index t, or its inverse?"),
            ],
            symbols="t",
        ),
        measured=Numbers(
            0.2,
            "Draw Laplace tokens, average e^{0.8 Y} over the first n, compare with its mean, and take medians over "
            "replicates.",
            misses=[(-0.2, "Give the exponent: positive where the error falls.")],
            atol=0.06,
            rtol=0,
        ),
    ),
    "ex-bounded-rank-two": Parts(
        large=Expression(
            _a / (_a + _b),
            "Put w for the root of (1 + 2 lambda b^2)/(1 + 2 lambda a^2) in the integral of the proposition.",
            misses=[
                (_a**2 / (_a**2 + _b**2), "The mean of a ratio is not the ratio of the means."),
                (_b / (_a + _b), "That is the other eigenvalue."),
                (sp.Rational(1, 2), "The direction of U is uniform, but a and b stretch it."),
            ],
            symbols="a b",
        ),
        small=Expression(
            _kappa**2 * _a**2 / _d**3,
            "At small tilt the map is linear: what is its slope, and the mean square of one coordinate?",
            misses=[
                (_kappa**2 * _a**2 / _d**2, "A coordinate of a point of the unit sphere has a mean square of its own."),
                (_kappa * _a / _d**3, "A covariance is quadratic in the scale."),
                (
                    _kappa**2 * _a**2 / _d,
                    "The map has a slope: the crossover is at tilts of the order of the dimension.",
                ),
            ],
            symbols="a d kappa",
        ),
        scale=Numbers(
            [20.16, 136.2],
            "Call `limits.bounded_limit` with the scaled form, take the trace, and solve for the scale on a "
            "logarithmic axis.",
            misses=[
                ([136.2, 20.16], "The smaller dimension comes first."),
                ([10.08, 68.1], "Is your larger singular value 2, and the smaller 1?"),
            ],
            rtol=0.02,
        ),
    ),
    "ex-bounded-quiet": Parts(
        log_n=Expression(
            -_nu * sp.LambertW(-_q, -1),
            "Put log n = nu M, and bring the equation to the form (-M) e^{-M} = something.",
            misses=[
                (-_nu * sp.LambertW(-_q), "That is the first crossing; the largest token takes over at the last."),
                (-sp.LambertW(-_q, -1), "That is log n over nu."),
            ],
            symbols="nu q",
            low=0.05,
            high=0.35,
        ),
        powers=Numbers(
            lambda: [_crossing(degrees, 0.3) for degrees in (3, 5, 8)],
            "Compute q with the constant c_nu of the page, the ln 2 included, and divide log n by ln 10.",
            misses=[
                (
                    [_crossing(degrees, 0.3) * math.log(10) for degrees in (3, 5, 8)],
                    "That is the natural logarithm.",
                ),
                ([_crossing(degrees, 0.3, 0) for degrees in (3, 5, 8)], "That is the first crossing; take the last."),
            ],
        ),
        tilt=Numbers(
            lambda: 5 / math.e / _student(5),
            "For which q do the two crossings meet?",
            misses=[
                (1 / math.e / _student(5), "That is the tilt over nu."),
                (5 / _student(5), "That is q = 1; the largest q for which q e^M = M has a solution is smaller."),
            ],
        ),
    ),
}

exercise = by_label(CHECKS)
