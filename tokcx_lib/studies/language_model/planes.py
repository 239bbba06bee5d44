"""Planes of rotary positions in the heads of a language model: what each adds to the logits, and what stilling it does.

A head of dimension 2M turns queries and keys in M planes, plane m by the angle theta_m a token. A logit is a sum over
planes, and in each the key is seen turned by its distance times theta_m. Turned back, a key is its mean over the window
and a rest. The mean makes the *pattern* of a plane, which depends on the query and on distance alone; the rest
makes its *content* (theory: chapter 13).

A plane that is *still* does not turn: its part of the logit is that of one fixed distance, whatever the distance is. A
plane that is *gone* adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokcx_lib.models import architectures
from tokcx_lib.models.capture import Attention
from tokcx_lib.studies.language_model.answering import Answer
from tokcx_lib.validation import as_choice, as_indices

CHANGES = ("still", "gone")
TINY = 1e-30  # in place of a variance of 0


class Shares(NamedTuple):
    """Shares of the variance of logits, each (heads, M); `pattern` and `content` of all planes sum to 1."""

    pattern: Tensor
    content: Tensor


def angles(model: nn.Module) -> Tensor:
    """Radians a token by which a model turns its planes, (M,), fastest first.

    Raises
    ------
    ValueError
        If the model has no rotary positions, or they turn a part of each head only.
    """
    found, _ = architectures.rotary(model)
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if found is None or 2 * len(found) != size:
        turned = 0 if found is None else 2 * len(found)
        raise ValueError(f"model: expected heads that turn all of their {size} dimensions, got {turned}")
    return found


def turned(x: Tensor, theta: Tensor, places: Tensor) -> Tensor:
    """Vectors (..., n, 2M) turned by theta (M,) times their place (n,): plane m has coordinates m and M + m."""
    first, second = x.chunk(2, -1)
    angle = places[:, None].double() * theta.double()
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([cos * first - sin * second, cos * second + sin * first], -1)


def shares(q: Tensor, k: Tensor, theta: Tensor, rows: Tensor) -> Shares:
    """What the planes add to the variance of the logits of some queries over their pasts.

    Of a part of a logit, its covariance with the whole logit over the keys of a query, summed over queries, in units of
    the summed variances: parts that work against each other have shares of either sign. The first position is left
    out, as in the load.

    Parameters
    ----------
    q : (heads, n, 2M), scaled, and k : (groups, n, 2M), as the attention reads them, turned by their positions.
    theta : (M,); rows : (r,), positions of the queries, 2 or more.
    """
    places = torch.arange(k.shape[1], device=k.device)
    back = turned(k, theta, -places)
    seen = (places <= rows[:, None]) & (places > 0)
    means = turned(back[:, 1:].mean(1, keepdim=True).expand_as(back), theta, places)
    per_group = len(q) // len(k)
    found = []
    for head, asked in enumerate(q[:, rows].double()):
        key, mean = k[head // per_group].double(), means[head // per_group].double()
        parts = torch.stack([_by_plane(asked, mean), _by_plane(asked, key - mean)])  # (2, M, r, n)
        parts = _centred(parts, seen)
        whole = parts.sum((0, 1))
        found.append((parts * whole).sum((-2, -1)) / whole.square().sum().clamp(min=TINY))
    return Shares(*torch.stack(found, 1))


def _by_plane(q: Tensor, k: Tensor) -> Tensor:
    """(M, r, n), the part of each plane in the logits of q (r, 2M) and k (n, 2M)."""
    (a, b), (c, d) = q.chunk(2, -1), k.chunk(2, -1)
    return a.mT[:, :, None] * c.mT[:, None] + b.mT[:, :, None] * d.mT[:, None]


def _centred(parts: Tensor, seen: Tensor) -> Tensor:
    """Parts (..., r, n) minus their mean over the keys that are seen, 0 elsewhere."""
    mean = (parts * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
    return (parts - mean) * seen


def changed(
    q: Tensor, k: Tensor, theta: Tensor, planes: Sequence[int], change: str, distance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Queries and keys whose logits have some planes still, or gone.

    Parameters
    ----------
    q : (heads, n, 2M), k : (groups, n, 2M), turned by their positions; theta : (M,).
    planes : which ones, numbered from the fastest, or none; change : one of CHANGES.
    distance : at which a still plane sees every key, in tokens.

    Raises
    ------
    ValueError
        If there is no such plane or change.
    """
    as_choice("change", change, CHANGES)
    chosen = torch.zeros(len(theta), dtype=torch.bool, device=q.device)
    if len(planes):
        chosen[as_indices("planes", planes, most=len(theta) - 1).to(q.device)] = True
    both = torch.cat([chosen, chosen])
    if change == "gone":
        return q.masked_fill(both, 0.0), k
    places = torch.arange(k.shape[1], device=q.device)
    asked = turned(q, theta, distance - places[len(places) - q.shape[1] :])
    return torch.where(both, asked, q), torch.where(both, turned(k, theta, -places), k)


def without_turning(theta: Tensor, planes: Sequence[int], change: str, distance: float = 0.0) -> Answer:
    """Attention with some planes `changed` in every head, for `answering.answering`."""
    as_choice("change", change, CHANGES)

    def answer(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = changed(q, k, theta, planes, change, distance)
        attend = nn.functional.scaled_dot_product_attention
        return attend(q[None], k[None], v[None], is_causal=True, scale=1.0, enable_gqa=True)[0]

    return answer


def output_errors(attention: Attention, theta: Tensor, planes: Sequence[int], change: str, rows: Tensor) -> Tensor:
    """How far the outputs of some queries move when planes are `changed` in one layer: (heads,), root mean squares.

    In units of the spread of the values over the past of a query, the first position left out, as in the probe.
    """
    q, k, v = attention.q[0], attention.k[0], attention.v[0]
    places = torch.arange(k.shape[1], device=k.device)
    seen = places <= rows[:, None]
    outputs = []
    for asked, keys in ((q, k), changed(q, k, theta, planes, change)):
        logits = (asked[:, rows].unflatten(0, (len(k), -1)) @ keys[:, None].mT).flatten(0, 1)
        weights = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1).unflatten(0, (len(k), -1))
        outputs.append((weights @ v[:, None]).flatten(0, 1))
    rest = (seen & (places > 0)).to(v.dtype)
    count = rest.sum(-1)[:, None]
    centred = v - v.mean(1, keepdim=True)
    spread = (rest @ centred.square() / count - (rest @ centred / count).square()).sum(-1)  # (groups, r)
    squares = (outputs[0] - outputs[1]).square().sum(-1).unflatten(0, (len(k), -1)) / spread[:, None].clamp(min=TINY)
    return squares.flatten(0, 1).mean(-1).sqrt()
