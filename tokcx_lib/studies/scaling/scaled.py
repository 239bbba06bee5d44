"""What softmax makes of given logits when they are multiplied by a factor: effective tokens, outputs, largest keys."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokcx_lib.sampling.binned import BinnedTokens
from tokcx_lib.validation import as_kind, as_number, as_tensor, finite_answer


class Scaled(NamedTuple):
    """Of queries (..., r): `participation` sum w^2 over all keys, `rest` the same without the first key and renewed;
    `first`, the weight of the first key; and `output` (..., r, d_v)."""

    participation: Tensor
    rest: Tensor
    first: Tensor
    output: Tensor


def scaled_attention(logits, values, factors) -> Scaled:
    """Softmax of factors x logits over the keys that are seen.

    Parameters
    ----------
    logits : (..., r, m), -inf for keys that are not seen, the first of which is; values : (..., m, d_v).
    factors : (r,), or one for all queries; >= 0.

    Raises
    ------
    ValueError
        If the shapes do not fit, or a factor is negative or not finite.
    """
    logits, values = as_tensor("logits", logits, finite=False), as_tensor("values", values)
    factors = as_tensor("factors", factors).to(logits)
    fit = logits.ndim >= 2 and values.ndim >= 2 and logits.shape[:-2] == values.shape[:-2]
    if not fit or 0 in (*logits.shape, *values.shape) or not 2 <= logits.shape[-1] == values.shape[-2]:
        raise ValueError(
            f"logits, values: expected (..., r, m) with m >= 2 and (..., m, d_v), got {tuple(logits.shape)} and "
            f"{tuple(values.shape)}"
        )
    if torch.isnan(logits).any() or (logits == torch.inf).any() or not torch.isfinite(logits[..., :1]).all():
        raise ValueError("logits: expected numbers, -inf for keys not seen, and the first key seen, got others")
    if factors.ndim > 1 or (factors.ndim and len(factors) != logits.shape[-2]) or not (factors >= 0).all():
        raise ValueError(f"factors: expected {logits.shape[-2]} numbers >= 0, or one, got {tuple(factors.shape)}")
    # 0 x -inf is no number: a factor 0 is as good as a tiny one.
    scaled = factors.clamp(min=1e-12)[..., None] * logits
    weights = torch.softmax(scaled, -1)
    others = torch.softmax(scaled[..., 1:], -1)
    return Scaled(weights.square().sum(-1), others.square().sum(-1), weights[..., 0], weights @ values.to(weights))


def logit_spread(logits) -> Tensor:
    """Loads (..., r) of logits (..., r, m): standard deviation over the keys that are seen, the first one left out.

    Raises
    ------
    ValueError
        If a logit is NaN or +inf, or a query sees no key but the first.
    """
    logits = as_tensor("logits", logits, finite=False)
    seen = torch.isfinite(logits[..., 1:]) if logits.ndim > 1 else torch.zeros(1, 0)
    count = seen.sum(-1)
    if torch.isnan(logits).any() or (logits == torch.inf).any() or not (count > 0).all():
        raise ValueError("logits: expected numbers for keys that are seen, one besides the first, and -inf for others")
    rest = torch.where(seen, logits[..., 1:], 0.0)
    deviations = torch.where(seen, rest - (rest.sum(-1) / count)[..., None], 0.0)
    return finite_answer("logits", (deviations.square().sum(-1) / count).sqrt())


def binned_participation(tokens: BinnedTokens, load: float) -> float:
    """Sum of the squared weights of a query of some load over scalar tokens N(0, 1) in bins (`binned.draw`).

    Its mean over draws is carried by rare ones where the reduced load is large: see `mean_participation`.

    Raises
    ------
    ValueError
        If the tokens are of another kind, or the load is not a number from 0 to 300.
    """
    tokens, load = as_kind("tokens", tokens, BinnedTokens), as_number("load", load, 0, 300)
    return math.exp(_log_sum(tokens, load, 2) - 2 * _log_sum(tokens, load, 1))


def mean_participation(tokens: BinnedTokens, load: float) -> float:
    """An estimate of the *mean* of the sum of the squared weights over one token more than these, without rare draws.

    All n + 1 tokens being alike, E sum w^2 = (n + 1) E w_1^2, w_1 = e^{s y} / (e^{s y} + S), with S the sum over the n
    tokens that were drawn and y the other one. Over y the average is taken by quadrature, which finds the heavy tokens
    that few draws have; what is left varies little from draw to draw.

    Raises
    ------
    ValueError
        As `binned_participation`.
    """
    tokens, load = as_kind("tokens", tokens, BinnedTokens), as_number("load", load, 0, 300)
    total = _log_sum(tokens, load, 1)
    step = 1 / (32 * max(1.0, load))
    y = np.arange(-12, 2 * load + 12, step)
    heavy = np.exp(-(y**2) / 2 - 2 * np.logaddexp(0.0, total - load * y))
    return float((tokens.n + 1) * step * heavy.sum() / math.sqrt(2 * math.pi))


def _log_sum(tokens: BinnedTokens, load: float, power: int) -> float:
    """Logarithm of the sum of e^{power load y} over tokens."""
    top = power * load * max([tokens.points.abs().max().item(), *tokens.outer.abs().tolist()])
    return math.log(tokens.n * tokens.mean(lambda y: torch.exp(power * load * y - top))) + top
