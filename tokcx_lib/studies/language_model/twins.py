"""The Gaussian twin of a head: keys and values of the same covariance, as many of them, read by the same queries.

What a head shares with its twin follows from covariances and from the end of the past; what it does not share is due to
the shape of its laws. A second twin has logits of the measured skewness besides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.validation import as_tensor, finite_answer

MOST_SKEW = 2.0  # beyond it the approximation of Wilson and Hilferty is none
LEAST_SKEW = 1e-3  # below it the law is normal


class Twin(NamedTuple):
    """Gaussian `keys` (m, d) and `values` (m, d_v), and the `mean` (d,) and `cov` (d, d) of the keys they were drawn
    from."""

    keys: Tensor
    values: Tensor
    mean: Tensor
    cov: Tensor


def gaussian_twin(keys: Tensor, values: Tensor, generator: int | torch.Generator) -> Twin:
    """As many Gaussian keys and values, independent from position to position, with the joint covariance of some.

    Parameters
    ----------
    keys : (m, d), values : (m, d_v), of one key head; generator : a random stream, or a seed.

    Raises
    ------
    ValueError
        If they are not finite matrices with as many rows.
    """
    keys = as_tensor("keys", keys, ndim=2)
    values = as_tensor("values", values, ndim=2)
    if len(values) != len(keys):
        raise ValueError(f"values: expected {len(keys)} rows, as keys have, got {len(values)}")
    both = torch.cat([keys, values], 1).double()
    mean = both.mean(0)
    cov = finite_answer("keys, values", torch.cov(both.mT, correction=0).reshape(len(mean), -1))
    spectrum, basis = torch.linalg.eigh(cov)
    factor = basis * spectrum.clamp(min=0).sqrt()
    drawn = torch.randn(both.shape, generator=runtime.generator(generator)).to(keys) @ factor.mT.to(keys) + mean.to(
        keys
    )
    split = keys.shape[1]
    return Twin(drawn[:, :split], drawn[:, split:], mean[:split].to(keys), cov[:split, :split].to(keys))


def skewed(z: Tensor, skewness: Tensor) -> Tensor:
    """Standard normal numbers turned into ones of mean 0, variance 1 and some skewness, of a shifted gamma law.

    By the cube of Wilson and Hilferty (1931), good to a few per cent of a standard deviation up to skewness 2, which is
    where it is cut.

    Parameters
    ----------
    z : of any shape; skewness : broadcasts with it, of either sign.

    Raises
    ------
    ValueError
        If they are not finite, or do not broadcast.
    """
    z, skewness = as_tensor("z", z), as_tensor("skewness", skewness)
    if not _broadcast(z, skewness):
        shapes = f"{tuple(z.shape)} and {tuple(skewness.shape)}"
        raise ValueError(f"z, skewness: expected shapes that broadcast, got {shapes}")
    g = skewness.clamp(-MOST_SKEW, MOST_SKEW)
    g = torch.where(g.abs() < LEAST_SKEW, LEAST_SKEW, g)
    return finite_answer("z", 2 / g * ((1 + g * z / 6 - g.square() / 36).clamp(min=0) ** 3 - 1))


def _broadcast(*tensors: Tensor) -> bool:
    try:
        torch.broadcast_shapes(*(each.shape for each in tensors))
    except RuntimeError:
        return False
    return True
