"""Checks for chapter 10, the sharp exponent."""

import math

import sympy as sp

from tokcx_lib.check.kinds import Expression, Numbers, Parts, by_label

_h, _L, _Psi = sp.symbols("h L Psi")
_square = _h**2 - 2 * _h + (1 - _h**4) ** sp.Rational(-3, 2)

CHECKS = {
    "ex-sharp-negative": Parts(
        square=Expression(
            _square,
            "The closed form of the page holds for H of either sign.",
            misses=[
                (_square + 4 * _h, "That is the answer for A = h: which term changes its sign?"),
                (_square + 2 * _h, "A token is still both a query and a key; the product of the two parts counts."),
            ],
            symbols="h",
        ),
        least=Numbers(
            lambda: float(sp.nsolve(_square.diff(_h), _h, 0.5)),
            "Set the derivative to zero, and solve it by number.",
            misses=[(1.0, "Without the last term; its derivative counts too.")],
            rtol=0.005,
        ),
    ),
    "ex-sharp-fresh": Parts(
        alpha=Expression(
            1 + 1 / _Psi,
            "Which part of the influence decides its tail, and is it still there?",
            misses=[
                (1 / _Psi, "The probability of a token that far out is e^{-y^2/2}; and e^{q y^2/2} has q, not Psi."),
                (1 + _Psi, "The inverse of the exponent of the rate is 1 + Psi; the tail index is another."),
            ],
            symbols="Psi",
        ),
        variance=Expression(
            (1 - _Psi**2) ** sp.Rational(-3, 2),
            "A token is no query any more; square what is left and take its mean.",
            misses=[
                (
                    _Psi + 2 * sp.sqrt(_Psi) + (1 - _Psi**2) ** sp.Rational(-3, 2),
                    "That is self-attention, where a token is a query too.",
                ),
                ((1 - _Psi**2) ** sp.Rational(-1, 2), "The pull has a factor z; with it, the power is another."),
            ],
            symbols="Psi",
        ),
    ),
    "ex-sharp-blind": Parts(
        slope=Numbers(
            0.26,
            "Given the first coordinates the mean is normal; average its size, not its square, at both lengths.",
            misses=[
                (0.52, "That is the exponent of the variance."),
                (-0.26, "Give the exponent: positive where the error falls."),
            ],
            atol=0.06,
            rtol=0,
        ),
        limit=Numbers(
            1 / (1 + 2.0**2),
            "The second coordinate is an independent factor. What does it do to the tail index?",
            misses=[
                (0.1, "That is the reference curve; the sharp exponent is asked."),
                (0.5, "The influence has no finite variance at this coupling."),
            ],
        ),
    ),
    "ex-sharp-half": Parts(
        times=Expression(
            2 ** (1 + _Psi),
            "The error is a power of n; which n makes it half?",
            misses=[
                (4 ** (1 + _Psi), "That is what the reference curve says."),
                (2 ** (1 / (1 + _Psi)), "That is by how much the error falls if n doubles."),
            ],
            symbols="Psi",
        ),
        record=Numbers(
            [10.0, 36.0, 501.0],
            "Find the n at which the mean error is half of that at 10^6, and divide by 10^6.",
            misses=[
                ([9.5, 32.0, 1024.0], "Those are the factors of the theory; the record is asked."),
                ([1.0, 1.56, 2.7], "Those are powers of ten."),
            ],
            rtol=0.04,
        ),
    ),
    "ex-sharp-bounded": Parts(
        uniform=Numbers(
            0.52,
            "The mean over replicates of the size of the first moment; the slope is log(ratio) / log(16), positive.",
            misses=[(-0.52, "Give the exponent: positive where the error falls.")],
            atol=0.1,
            rtol=0,
        ),
        gaussian=Numbers(
            0.4,
            "As for uniform tokens, with standard normal ones.",
            misses=[(-0.4, "Give the exponent: positive where the error falls.")],
            atol=0.1,
            rtol=0,
        ),
        rule=Numbers(
            lambda: math.exp(6 * 1.5**2),
            "What is the largest load of a token, if the largest token is the root of 3?",
            misses=[
                (math.exp(2 * 1.5**2), "That is the rule at load H; the largest load is larger."),
                (math.exp(1.5 * 1.5**2), "That is the budget to thaw; the other one is asked."),
            ],
            rtol=0.02,
        ),
    ),
    "ex-sharp-lift": Parts(
        factor=Expression(
            1 + _Psi,
            "Integrate y e^{q y^2 / 2} against the density from L on, and divide by the probability and by the value "
            "at L.",
            misses=[
                ((1 + _Psi) / _Psi, "That is 1 / q; in the exponent stands 1 - q."),
                (1 / (1 + _Psi), "The average over tokens beyond L is larger than the value at L."),
            ],
            symbols="Psi",
        ),
        mild=Numbers(
            1.0,
            "Means with the token less means without it, times n, over the influence of the page at the token.",
            misses=[(1.015, "The token is a query as well: the influence has a part for that.")],
            atol=0.004,
            rtol=0,
        ),
        sharp=Numbers(
            0.89,
            "As for the small horizon. The others are conditioned to lie within L: use `limit`.",
            misses=[(1.0, "So says the first order. What does the measurement say?")],
            atol=0.035,
            rtol=0,
        ),
    ),
    "ex-sharp-border": Parts(
        pull=Expression(
            _L**3 / (12 * sp.sqrt(2 * sp.pi)),
            "Square the pull at H = 1 and multiply by the normal density: what happens to the exponentials?",
            misses=[
                (_L**3 / (24 * sp.sqrt(2 * sp.pi)), "Tokens lie on either side."),
                (_L**3 / (3 * sp.sqrt(2 * sp.pi)), "The pull has the factors 1 - q and det^(-1/2) too; square them."),
            ],
            symbols="L",
        ),
        power=Numbers(
            0.75,
            "The truncated variance is a power of L, and L^2 a multiple of log n; the mean error is its root.",
            misses=[
                (1.5, "That is the power in the variance; take the root."),
                (
                    0.25,
                    "That is the formula for Psi > 1, of the corollary, put at 1; at the border all tokens up to L "
                    "count, not the largest only.",
                ),
            ],
            rtol=0.001,
        ),
        growth=Numbers(
            1.43,
            "Use 400 draws or more, and the mean of the size, not the root of the mean square.",
            misses=[
                (1.0, "There is more than the root of n. Average enough draws to see it."),
                (1.68, "That is the power of the logarithm alone; measure it."),
            ],
            atol=0.2,
            rtol=0,
        ),
    ),
    "ex-sharp-inflate": Parts(
        sign=Numbers(1.0, "The limit is 0. Can a square be smaller in the mean?"),
        local=Numbers(
            0.2346,
            "The bias at 10^12 over that at 10^13: its logarithm to the base 10.",
            misses=[
                (-0.2346, "Give the exponent: positive where the bias falls."),
                (0.54, "That is the natural logarithm; divide by log 10."),
                (0.202, "That is the head that reports what it looks at; V = (0, 1) is asked."),
            ],
            rtol=0.01,
        ),
        limit=Numbers(
            (2**0.5 - 1) / 2,
            "The bounds on the participation are those of the theorem.",
            misses=[(0.2, "That is the exponent of the fluctuations; the bias has another one.")],
            rtol=0.001,
        ),
    ),
}

exercise = by_label(CHECKS)
