"""Checks for chapter 14, how much of its past a head uses."""

import math

import numpy as np
import sympy as sp

from tokcx_lib import records
from tokcx_lib.check.kinds import Choice, Expression, Numbers, Parts, by_label
from tokcx_lib.probe import summary
from tokcx_lib.studies.language_model import tables

_n, _N, _m, _e = sp.symbols("n N m e")
RECORD = "language_model_heads"


def _load() -> float:
    """Median load over heads of queries that have all the keys of a window."""
    return tables.phases(records.load(RECORD).table)["load"].iloc[-1]


def _beaten() -> list[float]:
    """Measured over law at 1,024 keys, of heads with little and with much weight on the first position."""
    table = records.load(RECORD).table
    squares = table[table["n"] == 1024].groupby(["layer", "head"])[["rest", "law"]].agg(lambda x: np.mean(x**2))
    ratio = np.sqrt(squares["rest"] / squares["law"])
    first = tables.sinks(table).set_index(["layer", "head"])["share_first"]
    return [ratio[first < 0.1].median(), ratio[first > 0.3].median()]


def _cache(errors: tuple[float, ...], kind: str = "cache_own") -> list[float]:
    """Share of its keys that a cache keeps, for some errors."""
    record = records.load(RECORD)
    queries = record.meta["config"]["queries"]
    return [summary.summary(tables.budgets(record.table, queries, error), {})[kind] for error in errors]


CHECKS = {
    "ex-lm-read": Parts(
        group=Numbers(2, "Nine query heads share three key heads, in order.", rtol=0, atol=0.1),
        load=Numbers(
            3.041,
            "Queries carry their scale already: take the standard deviation of q.k over the keys but the first.",
            misses=[
                (9.247, "That is the variance of the logits."),
                (3.061, "The first position is among these keys."),
            ],
            rtol=0.002,
        ),
    ),
    "ex-lm-pool": Parts(
        **{
            "without": Expression(
                (_N - _n) / (_n * (_N - 1)),
                "Put equal weights into the proposition on drawn keys: the sum over the squares is 1/N.",
                misses=[
                    (
                        1 / _n - 1 / _N,
                        "That is so for values that are independent draws of variance 1; this pool is given.",
                    ),
                    (1 / _n, "That is with replacement: the last key of the pool would still make an error."),
                ],
                symbols="n N",
                low=2.1,
                high=9.7,
            ),
            "with": Expression(
                1 / _n,
                "Draws with replacement are independent.",
                misses=[((_N - _n) / (_n * (_N - 1)), "That is without replacement.")],
                symbols="n N",
                low=2.1,
                high=9.7,
            ),
        }
    ),
    "ex-lm-enough": Parts(
        formula=Expression(
            _N / (1 + _e**2 * _m),
            "Square the first-order error, set it equal to e squared, and solve for n.",
            misses=[
                (1 / (_e**2 * _m), "Where is N? The past ends."),
                (_N / (1 + _e * _m), "The error, and not its square, was set to e."),
                (_N / (_e**2 * _m), "What has become of the -1 in N/n - 1?"),
            ],
            symbols="N m e",
        ),
        keys=Numbers(7712 / 1.2, "Put the numbers into the formula; 10% is e = 0.1."),
        held=Numbers(
            20 / 1.2,
            "A random draw holds the same part of the effective keys as of all.",
            misses=[(20.0, "Those are the effective keys of the whole past.")],
        ),
    ),
    "ex-lm-thaw": Parts(
        digits=Numbers(
            lambda: 2 * _load() ** 2 / math.log(10),
            "The reduced load is s / sqrt(2 log n); set it to 1/2 and take the logarithm to the base 10.",
        ),
        growing=Choice(
            "never",
            "What is the reduced load of a load in proportion to sqrt(2 log n)?",
            options=("later", "sooner", "never"),
        ),
    ),
    "ex-lm-beat": Numbers(
        _beaten,
        "Mean squares over windows first, then the root of the ratio for each head, then medians over the two groups.",
        rtol=0.02,
    ),
    "ex-lm-cost": Numbers(
        lambda: _cache((0.05, 0.2)),
        "`tables.budgets(record.table, queries, error)` at both errors, then `cache_own` of the summary.",
        rtol=0.02,
    ),
    "ex-lm-twin": Parts(
        twin=Numbers(
            22.0,
            "Keys and values without their first position; logits of the last query on the twin's keys; softmax, and "
            "one over the sum of the squares.",
            rtol=0.12,
        ),
        more=Choice("more", "Compare with the same number over the real keys.", options=("more", "fewer")),
    ),
}
exercise = by_label(CHECKS)
