"""Checks for chapter 12, depth and heads."""

import math

import numpy as np
import sympy as sp

from tokcx_lib import records
from tokcx_lib.check.kinds import Choice, Expression, Numbers, Parts, by_label

_Psi, _h, _V, _c, _w = sp.symbols("Psi h V c w")


def _shares() -> tuple[np.ndarray, float]:
    """Shares of the squared error of MiniLM at 32 keys by the layer that made it, and predicted over measured error."""
    table = records.load("depth_model").table
    table = table[table["n"] == 32]
    rms = (table.drop(columns="layer") ** 2).groupby(table["layer"]).mean() ** 0.5
    squares = np.zeros(6)
    for i, (_, row) in enumerate(rms.iterrows()):
        squares *= (row["inherited"] / row["before"]) ** 2 if i else 0
        squares[i] = row["fresh"] ** 2
    return squares / squares.sum(), math.sqrt(squares.sum()) / rms["error"].iloc[-1]


def _right_angles(load: float) -> float:
    """Sum over quadrature of twelve heads at right angles, in 32 dimensions."""
    return math.sqrt(1 + 11 * math.exp(-(load**2)) * 32 / (32 + load**2))


def _square(load: float) -> float:
    return math.exp(load**2) * (32 + load**2)


CHECKS = {
    "ex-how-deep": Parts(
        layers=Numbers(
            3,
            "Add up the powers of the coupling, layer by layer, and watch when the sum passes 1.",
            misses=[
                (2, "That layer is still safe: its effective coupling is below 1."),
                (1, "One layer alone averages at the full rate as long as its coupling is below 1."),
            ],
        ),
        limit=Expression(
            1 - _Psi,
            "Sum the geometric series, and put it in the place of the coupling in the exponent.",
            misses=[
                (_Psi / (1 - _Psi), "That is the coupling of an endless stack. Which exponent does it give?"),
                (1 / (1 + _Psi), "That is the exponent of one layer."),
            ],
            symbols="Psi",
        ),
    ),
    "ex-take-shift": Numbers(
        0.46,
        "Both runs on the same draws; centre the tokens before the first layer and after every one, then divide root "
        "mean squares.",
        misses=[
            (0.46**2, "That is what is left of the squared error; root mean squares are asked."),
            (1 / 0.46, "The other way round: with means taken out, over without."),
            (0.62, "Are the tokens of the limit centred too? Both start from the same centred draw."),
        ],
        rtol=0.11,
    ),
    "ex-no-residual": Numbers(
        [15.0458, 1.0],
        "Start at the identity; `both['steady'].covs` has the covariances with a residual. The scale of the "
        "covariance does not matter.",
        misses=[
            ([1.0, 15.0458], "The order is with a residual, then without."),
            ([15.2509, 1.0], "That is the rank with a residual one layer earlier."),
        ],
        rtol=0.005,
    ),
    "ex-one-look": Parts(
        ratio=Numbers(
            0.896,
            "Divide the sum of all entries of the matrix by the sum of its diagonal, and take the root.",
            misses=[
                (0.896**2, "That is the ratio of the squares; take the root."),
                (1 / 0.896, "The other way round: the sum over quadrature."),
                (math.sqrt(12), "That would be so if all errors agreed after the output projections."),
            ],
            rtol=0.03,
        ),
        apart=Choice(
            "writing",
            "You have made one of the two factors the same for all heads. Did that make the errors agree?",
            options=("looking", "writing"),
        ),
    ),
    "ex-shift-stretch": Parts(
        shift=Expression(
            1 + _V / (1 + _V * _h),
            "The mean has a map of its own: what comes on top of M? Put the gain in.",
            misses=[
                (sp.Integer(1), "That is the own part alone. The keys are shifted too."),
                (1 + _V, "Where is the gain?"),
            ],
            symbols="h V",
        ),
        stretch=Expression(
            1 + 2 * _V * _h / (1 + _V * _h),
            "The covariance under the tilt changes with the square of the stretch; a query at x has the tilt h x.",
            misses=[
                (
                    1 + _V * _h / (1 + _V * _h),
                    "The keys and their weights both move: the variance changes twice as fast as the deviation.",
                ),
                (1 + 2 * _V * _h, "Where is the gain?"),
                (sp.Integer(1), "That is the own part alone. The keys are stretched too."),
            ],
            symbols="h V",
        ),
        equal=Numbers(
            0.5,
            "Set the two factors equal; the values drop out.",
            misses=[
                (1.0, "Does the stretch come in with the factor of its square?"),
                (2.0, "Check the side of the factor 2."),
            ],
        ),
    ),
    "ex-weak-layer": Parts(
        **{
            "stop": Expression(
                _c * (1 + _w * (1 + _c)),
                "Start with the bracket of the third layer and go down to the first.",
                misses=[
                    (_c * (1 + _w), "The layer above the weak one is in the bracket too."),
                    (_w * (1 + _c), "That is the pull of the weak layer itself; the first layer's is asked."),
                ],
                symbols="c w",
            ),
            "pass": Expression(
                _c * (1 + _c),
                "Leave the layer that is passed by out of the chain.",
                misses=[
                    (_c, "That is a pull that stops in no later layer but the one that looks."),
                    (2 * _c, "The layers do not add up: the upper one stands in the bracket of the lower one."),
                ],
                symbols="c w",
            ),
            "below": Expression(
                _c / (1 + _c),
                "Set the two couplings equal and solve for w.",
                misses=[
                    (1 / (1 + _c), "A factor is lost: divide both couplings by what they share."),
                    (_c, "What is in the bracket of the weak layer?"),
                ],
                symbols="c w",
            ),
            "exponents": Numbers(
                [1 / 3, 0.4],
                "Take the largest coupling of all that are allowed; with a residual these are more.",
                misses=[
                    ([0.4, 1 / 3], "The order is with a residual, then without."),
                    ([2.0, 1.5], "Those are the couplings. Which exponents belong to them?"),
                    ([0.4, 0.4], "With a residual, the second layer may be passed by."),
                ],
            ),
        }
    ),
    "ex-made-where": Parts(
        shares=Numbers(
            lambda: _shares()[0],
            "Multiply what is there by the square of what a layer hands on, then add its fresh square; divide by the "
            "sum at the end.",
            misses=[
                (
                    [0.140, 0.318, 0.262, 0.160, 0.053, 0.067],
                    "Those are the fresh squares alone; the layers above still hand them on.",
                ),
                ([0.211, 0.087, 0.122, 0.191, 0.269, 0.121], "First layer first."),
            ],
            rtol=0,
            atol=0.006,
        ),
        ratio=Numbers(
            lambda: _shares()[1],
            "The root of the sum of the squares, over `error` of the last layer, from the same root mean squares.",
            misses=[
                (1.06, "That is the ratio of the squares."),
                (0.9713, "The other way round: predicted over measured."),
            ],
            rtol=0.004,
        ),
    ),
    "ex-right-angles": Parts(
        ratios=Numbers(
            [_right_angles(load) for load in (0.5, 1.0, 2.0)],
            "Take the trace of S at one tilt twice, and at two tilts at right angles; there are eleven others for "
            "each head.",
            misses=[
                ([_right_angles(load) ** 2 for load in (0.5, 1.0, 2.0)], "Those are ratios of squares; take the root."),
                ([1.0, 1.0, 1.0], "Is the trace of S(t, u) zero when t and u are at right angles?"),
            ],
        ),
        share=Numbers(
            _square(2) / (_square(2) + 11 * _square(0.5)),
            "Each head has the trace of S at its own tilt; divide that of the coldest by the sum over all twelve.",
            misses=[
                (_square(2) / (_square(2) + _square(0.5)), "There are eleven of the others."),
                (
                    math.sqrt(_square(2)) / (math.sqrt(_square(2)) + 11 * math.sqrt(_square(0.5))),
                    "Quadrature adds squares.",
                ),
            ],
        ),
    ),
}

exercise = by_label(CHECKS)
