"""Scalar self-attention by a table: the map depends on one number, the tilt, and cubics join its values.

Every query reads the same map, so that n of them cost n places in a table, and not n sums over n keys. The slope of the
map is the tilted variance of the tokens, which comes with its value: a cubic with the right values and slopes at both
ends is off by the fourth power of the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokcx_lib.sampling.streaming import prefix_states, self_attention_moments
from tokcx_lib.theory.limits import Moments
from tokcx_lib.validation import (
    as_lengths,
    as_list,
    as_matrix,
    as_number,
    as_tensor,
    as_tokens,
    finite_answer,
    naming,
)

MESH = 0.15  # step of the table of a scalar map, in units of 1 / (largest token - smallest token)


def scalar_moments(tokens: Tensor, slopes: Sequence[float], V, lengths: Sequence[int]) -> list[Moments]:
    """Moments of scalar self-attention over the first n of some tokens, for logits a x y with each slope a.

    Parameters
    ----------
    tokens : (N, 1); slopes : numbers; V : (d_v, 1), values V y, or None for y.
    lengths : increasing integers from 1 to N.

    Returns
    -------
    list of Moments, one a slope: mean (lengths, d_v) and cov (lengths, d_v, d_v), float64, off by less than 1e-6 of the
    range of the tokens

    Raises
    ------
    ValueError
        If shapes do not match, or lengths do not increase or exceed N.
    """
    y = as_tokens("tokens", tokens, dim=1)[:, 0]
    slopes = [as_number("slopes", a) for a in as_list("slopes", slopes, "slopes")]
    values = None if V is None else as_matrix("V", V, columns=1).double()
    lengths = as_lengths("lengths", lengths, most=len(y))
    with naming("tokens, slopes, V"):
        return _tabulated(y, slopes, values, lengths)


def _tabulated(y: Tensor, slopes: list[float], values: Tensor | None, lengths: list[int]) -> list[Moments]:
    """`scalar_moments` of tokens (N,), once all is checked."""
    width = (y.max() - y.min()).clamp(min=torch.finfo(y.dtype).tiny)
    reach = (max(abs(a) for a in slopes) * y.abs().max()).clamp(min=torch.finfo(y.dtype).tiny)
    count = int((2 * reach * width / MESH).ceil().item()) + 2
    if count > len(y) * len(slopes):  # the queries themselves are fewer than the points of a table
        return [self_attention_moments(y[:, None], [[a]], values, lengths) for a in slopes]
    grid = torch.linspace(-reach.item(), reach.item(), count, dtype=y.dtype, device=y.device)
    step = grid[1] - grid[0]
    # Tilted first and second moments of the tokens; the variance is the slope of the map.
    pairs = torch.stack([y, y * y], -1)
    found: list[list[Moments]] = [[] for _ in slopes]
    for n, state in zip(lengths, prefix_states(grid[:, None], y[:, None], pairs, lengths)):
        first, second = state.output.unbind(-1)
        rise = (second - first**2) * step
        for a, moments in zip(slopes, found):
            output = between(first, rise, (a * y[:n] + reach) / step).double()
            here = Moments(output.mean()[None], output.var(correction=0)[None, None])
            moments.append(here if values is None else here.seen_through(values))
    return [Moments(*(torch.stack(parts) for parts in zip(*moments))) for moments in found]


def between(values: Tensor, rises: Tensor, place: Tensor) -> Tensor:
    """What a table holds at places (m, ...) between its rows, by cubics: values (rows, ...), and their rise per row.

    A place counts rows, from 0 to rows - 1; further axes of the places are those of the table.
    """
    left = place.long().clamp(0, len(values) - 2)
    ends = (table.gather(0, rows) for table in (values, rises) for rows in (left, left + 1))
    return hermite_cubic(place - left, *ends)


def hermite_cubic(u: Tensor, start: Tensor, end: Tensor, rise_start: Tensor, rise_end: Tensor) -> Tensor:
    """Cubic on [0, 1] with the given values and slopes at its ends (Hermite). Shapes broadcast."""
    # Not scipy's CubicHermiteSpline: it leaves precision and device, and takes one draw's table at a time.
    names = "u", "start", "end", "rise_start", "rise_end"
    given = [as_tensor(name, part) for name, part in zip(names, (u, start, end, rise_start, rise_end))]
    u, start, end, rise_start, rise_end = given
    try:
        torch.broadcast_shapes(*(part.shape for part in given))
    except RuntimeError as error:
        raise ValueError(f"{', '.join(names)}: expected shapes that broadcast ({error})") from error
    jump = end - start
    curved = u * (rise_start + rise_end - 2 * jump)
    return finite_answer(
        ", ".join(names), start + u * (rise_start + u * (3 * jump - 2 * rise_start - rise_end + curved))
    )
