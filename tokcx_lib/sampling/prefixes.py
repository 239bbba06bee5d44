"""Scalar causal attention: every query over the keys before it, in time n times the number of tilts in a table.

In one dimension a prefix enters through two functions of the tilt, the sums of e^{ty} and of y e^{ty}. They are summed
along the sequence on a grid of tilts, and read off at each query's own tilt by polynomials of degree 7 between eight
points of the grid. Chapter 13.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tokcx_lib.validation import as_positive, as_tokens, finite_answer

MESH = 0.6  # step of the tilts in units of 1 / max |y|: relative error of the sums of e^{ty} below 2e-5
_ORDER = 8
_CELLS = 2**22  # of the table at a time
_MOST = 600.0  # largest logit: beyond it the sums overflow


class CausalOutputs(NamedTuple):
    """Outputs of scalar attention, V = 1, float64: `before` (n - 1,), of queries 2 … n over the keys before them, and
    `whole` (n,), of all queries over all keys."""

    before: Tensor
    whole: Tensor


def scalar_outputs(tokens, slope: float, mesh: float = MESH) -> CausalOutputs:
    """Causal and full scalar self-attention over a sequence, logits slope x y.

    Parameters
    ----------
    tokens : (n, 1), n >= 2, in the order of the sequence; slope : a > 0.
    mesh : step of the table of tilts, in units of 1 / max |y|; the error falls with its eighth power.

    Raises
    ------
    ValueError
        If there are fewer than two tokens, all are zero, the slope or the mesh is not positive, or logits exceed 600.

    Source: chapter 13.
    """
    y = as_tokens("tokens", tokens, 1).detach().double()[:, 0]
    slope, mesh = as_positive("slope", slope), as_positive("mesh", mesh)
    if len(y) < 2:
        raise ValueError(f"tokens: expected at least 2, got {len(y)}")
    widest = as_positive("tokens: the largest |y|", y.abs().max().item())
    if slope * widest**2 > _MOST:
        raise ValueError(f"slope: expected logits up to {_MOST:g}, got {slope * widest**2:.3g}")
    step = mesh / widest
    outermost = math.ceil(slope * widest / step) + _ORDER
    nodes = step * torch.arange(-outermost, outermost + 1, dtype=torch.float64)
    place = slope * y / step + outermost
    first = place.floor().long() - (_ORDER // 2 - 1)
    index = first[:, None] + torch.arange(_ORDER)
    shares = _lagrange(place - first)

    mass, pull = nodes.new_zeros(2, len(nodes))
    parts, rows = [], max(1, _CELLS // len(nodes))
    for start in range(0, len(y), rows):
        part = y[start : start + rows]
        lift = torch.exp(part[:, None] * nodes)
        sums = torch.cat([mass[None], lift]).cumsum(0)  # row i: over the keys before token i of the part
        pulls = torch.cat([pull[None], lift * part[:, None]]).cumsum(0)
        mass, pull = sums[-1], pulls[-1]
        here, share = index[start : start + rows], shares[start : start + rows]
        above, below = ((table[:-1].gather(1, here) * share).sum(1) for table in (pulls, sums))
        parts.append(above / below)
    whole = (pull[index] * shares).sum(1) / (mass[index] * shares).sum(1)
    return CausalOutputs(finite_answer("tokens", torch.cat(parts)[1:]), finite_answer("tokens", whole))


def _lagrange(at: Tensor) -> Tensor:
    """Shares (n, 8) of eight equidistant points 0 … 7 in the polynomial through them at the places `at` (n,)."""
    points = torch.arange(_ORDER, dtype=at.dtype)
    columns = []
    for k in range(_ORDER):
        others = points[points != k]
        columns.append(((at[:, None] - others) / (k - others)).prod(1))
    return torch.stack(columns, 1)
