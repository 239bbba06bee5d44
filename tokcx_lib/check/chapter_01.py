"""Checks for chapter 1, attention on measures."""

import sympy as sp
import torch

from tokcx_lib.check.kinds import Choice, Expression, Function, Numbers, Parts, by_label
from tokcx_lib.theory import laws
from tokcx_lib.theory.attention import attention_map

_t, _tau, _A, _x, _m = sp.symbols("t tau A x m")
_stream = torch.Generator().manual_seed(1)


def _normal(*shape):
    return torch.randn(*shape, generator=_stream, dtype=torch.float64)


def _cache(size, dim, queries):
    """Keys, their counts, and queries."""
    counts = torch.randint(1, 50, (size,), generator=_stream).double()
    return _normal(size, dim), counts, _normal(queries, dim)


def _merged(keys, counts, queries):
    return attention_map(laws.Empirical(keys, counts / counts.sum()), queries, None)


def _centred(W_Q, b_Q, W_V, b_V, W_O, b_O, m):
    return torch.cat([b_Q + W_Q @ m, b_O + W_O @ (b_V + W_V @ m)])


def _layer(dim):
    """Arguments of `_centred`."""
    return tuple(_normal(*shape) for shape in ((dim, dim), (dim,)) * 3) + (_normal(dim),)


CHECKS = {
    "ex-exponential": Parts(
        K=Expression(
            -sp.log(1 - _t),
            "Integrate e^{ty} against the density and take the logarithm.",
            misses=[
                (sp.log(1 - _t), "Which sign has the logarithm of a reciprocal?"),
                (1 / (1 - _t), "That is the moment generating function; K is its logarithm."),
            ],
            symbols="t",
        ),
        map=Expression(
            1 / (1 - _t),
            "Differentiate your K.",
            misses=[(-1 / (1 - _t), "Tokens are positive. Can their tilted mean be negative?")],
            symbols="t",
        ),
        edge=Numbers(
            1,
            "For which t does the integral of e^{ty} against the density diverge?",
            misses=[(0, "There the tilt does nothing, and the mean token is the answer.")],
        ),
        beyond=Choice(
            "largest",
            "Compute attention at x = 2 for growing n, beside a few statistics of the sample.",
            options=("mean", "largest", "nearest"),
        ),
    ),
    "ex-shift": Parts(
        added=Expression(
            _m,
            "Put Y + m into the definition of K, and differentiate.",
            misses=[
                (0, "The values move as well."),
                (2 * _m, "The values move once; what the queries do belongs into the tilt."),
            ],
            symbols="A x m",
        ),
        tilt=Expression(
            _A * (_x + _m),
            "Write down the logit of the moved query and a moved key; then drop what is the same for all keys.",
            misses=[
                (_A * _x, "The move of the keys cancels. Does that of the query?"),
                (_A * (_x - _m), "The moved query is further along m, not less far."),
            ],
            symbols="A x m",
        ),
        ignored=Choice(
            "keys",
            "Which part of the move adds the same number to all logits of a query?",
            options=("queries", "keys", "values"),
        ),
    ),
    "ex-mixture": Parts(
        share=Expression(
            1 / (1 + sp.exp(-2 * _t)),
            "The tilt multiplies the mass of each cluster by its own moment generating function.",
            misses=[
                (1 / (1 + sp.exp(-_t)), "How far apart are the two centres?"),
                (sp.tanh(_t), "That is the difference of the two shares."),
            ],
            symbols="t tau",
        ),
        variance=Expression(
            _tau**2 + 1 - sp.tanh(_t) ** 2,
            "The second derivative of K.",
            misses=[
                (1 - sp.tanh(_t) ** 2, "That is the variance of the sign alone."),
                (_tau**2, "That is the variance within a cluster. The tilted tokens are in both."),
            ],
            symbols="t tau",
        ),
    ),
    "ex-flat": Numbers(
        [0.5705, 0.753, 0.8125],  # between those of steps of 0.05 and of fine ones
        "Average the maps over the samples of the exercise first, and then look for the first x at which the average "
        "is "
        "below 0.9 x. Logarithms are natural.",
        misses=[
            ([1.75, 2.8, 3.5], "Those are the places themselves; divide by the size of the largest token."),
            ([0.8155, 1.0653, 1.1533], "There is a 2 under the root."),
            ([0.6, 0.7, 0.8], "Measure them, and hand in two digits or more."),
        ],
        atol=0.0115,  # two digits pass
        rtol=0,
    ),
    "ex-repeats": Function(
        _merged,
        "Write the weight of m equal keys as one exponential.",
        misses=[
            (
                lambda keys, counts, queries: attention_map(keys, queries, None),
                "The counts have no effect on your answer.",
            ),
            (
                lambda keys, counts, queries: torch.softmax(counts * (queries @ keys.mT), -1) @ keys,
                "Equal keys add their weights; your counts multiply the logits.",
            ),
            (
                lambda keys, counts, queries: torch.softmax(counts + queries @ keys.mT, -1) @ keys,
                "A count multiplies a weight. What does that add to the logit?",
            ),
        ],
        inputs=[_cache(6, 2, 3), _cache(40, 5, 4)],
        rtol=1e-4,
        atol=1e-6,
    ),
    "ex-centred": Function(
        _centred,
        "Put y = (y - m) + m into the projected query, key and value, and follow what does not depend on the token.",
        misses=[
            (
                lambda W_Q, b_Q, W_V, b_V, W_O, b_O, m: torch.cat([b_Q - W_Q @ m, b_O + W_O @ (b_V - W_V @ m)]),
                "The tokens lost m; the biases have to give it back.",
            ),
            (
                lambda W_Q, b_Q, W_V, b_V, W_O, b_O, m: torch.cat([b_Q + W_Q @ m, b_O + W_O @ W_V @ m]),
                "The new layer has no value bias. Where does the old one go?",
            ),
            (
                lambda W_Q, b_Q, W_V, b_V, W_O, b_O, m: torch.cat([b_Q + W_Q @ m, b_O + b_V + W_V @ m]),
                "Values pass the output matrix.",
            ),
        ],
        inputs=[_layer(3), _layer(6)],
        rtol=1e-4,
        atol=1e-6,
    ),
}

exercise = by_label(CHECKS)
