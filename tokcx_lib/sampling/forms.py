"""Heads to try on synthetic tokens: a random one, and bilinear forms of given singular values.

Experiments name them by dimension and seed, and so all of them, and the chapters, run the same heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.validation import MOST_DIM, as_count, as_number


def power_law_form(dim: int, seed: int = 0, decay: float = 1.0) -> Tensor:
    """A bilinear form (dim, dim) with singular values k^-decay, k = 1, ..., dim, in two random bases, float64.

    For tokens of covariance I its horizon is 1 and its mean square load the sum of their squares: from 1 (rank one,
    where `decay` is infinite) to dim (flat, where it is 0).

    Raises
    ------
    ValueError
        If `dim` is not a positive integer or `decay` is negative.
    """
    decay = as_number("decay", decay, least=0, finite=False)
    stream = runtime.generator(seed)
    dim = as_count("dim", dim, most=MOST_DIM)
    shape = (2, dim, dim)
    bases, upper = torch.linalg.qr(torch.randn(shape, generator=stream, dtype=torch.float64))
    left, right = bases * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]  # one sign on every machine
    return left / torch.arange(1, dim + 1, dtype=torch.float64) ** decay @ right.mT


def random_head(dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """A = W_K' W_Q / sqrt(dim) and V of a head whose three matrices have independent entries N(0, 1 / dim), float64.

    Raises
    ------
    ValueError
        If `dim` is not a positive integer.
    """
    dim = as_count("dim", dim, most=MOST_DIM)
    shape = (3, dim, dim)
    query, key, value = torch.randn(shape, generator=runtime.stream(seed), dtype=torch.float64) / math.sqrt(dim)
    return key.mT @ query / math.sqrt(dim), value
