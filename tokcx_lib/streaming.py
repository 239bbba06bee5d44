"""Streaming attention: softmax over part of the keys is a mergeable state, so one pass over the keys serves every n.

Softmax attention over a set of keys is described by its output o = sum_j w_j v_j and its log-sum-exp
l = log sum_j e^{q.k_j}. Two disjoint sets of keys merge without looking at a key again:

    w = sigmoid(l_b - l_a),   o = (1 - w) o_a + w o_b,   l = log(e^{l_a} + e^{l_b}).

The partial states come from PyTorch's fused kernels (flash attention on the CPU; memory-efficient attention in float32
and flash attention in half precision on CUDA), which return the log-sum-exp and never hold the matrix of weights. The
precision is that of the arguments. Logits are q.k as they are: scale the queries beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokcx_lib.validation import as_lengths, as_matrix, as_square, as_tensor, as_tokens, as_vectors, require_finite

KEY_BLOCK = 65_536  # keys handed to the kernel at once; bounds the copies made where head sizes are padded
QUERY_BLOCK = 8_192  # queries whose outputs are held at once while moments are accumulated


class Partial(NamedTuple):
    """Softmax attention over some keys: `output` (..., m, d_v) and `lse` (..., m), the log of the sum of weights."""

    output: Tensor
    lse: Tensor


class Moments(NamedTuple):
    """`mean` (lengths, ..., d_v) and `cov` (lengths, ..., d_v, d_v) of the transformed tokens, float64."""

    mean: Tensor
    cov: Tensor


def _check(q, k, v) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = as_tensor("q", q).detach(), as_tensor("k", k).detach(), as_tensor("v", v).detach()
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim < 2 or 0 in tensor.shape:
            raise ValueError(f"{name}: expected shape (..., tokens, dimension), none zero, got {tuple(tensor.shape)}")
        if tensor.shape[:-2] != q.shape[:-2]:
            raise ValueError(f"{name}: expected batch {tuple(q.shape[:-2])} as in q, got shape {tuple(tensor.shape)}")
        if (tensor.dtype, tensor.device) != (q.dtype, q.device):
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} as q, got {tensor.dtype} on {tensor.device}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: expected dimension {q.shape[-1]} as in q, got shape {tuple(k.shape)}")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"v: expected {k.shape[-2]} tokens as in k, got shape {tuple(v.shape)}")
    return q, k, v


def partial_attention(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """Softmax attention of queries over a block of keys, by a fused kernel, with its log-sum-exp.

    Parameters
    ----------
    q : (..., m, d); k : (..., n, d); v : (..., n, d_v), of one precision, on one device, the same batch axes.

    Returns
    -------
    Partial
        output (..., m, d_v) and lse (..., m). Logits are q.k as they are.

    Raises
    ------
    ValueError
        If shapes, precisions or devices do not match, a side is empty, or there are NaN or infinite entries.
    """
    return _kernel(*_check(q, k, v))


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    m, d_v = q.shape[-2], v.shape[-1]
    if q.device.type not in ("cpu", "cuda") or (q.device.type == "cuda" and q.dtype == torch.float64):
        return _plain(q, k, v)
    # The kernels want one head size for keys and values (on CUDA a multiple of 8); zeros change no logit or output.
    width = max(q.shape[-1], d_v)
    width += -width % 8 if q.device.type == "cuda" else 0
    q4, k4, v4 = (_four_axes(x, width) for x in (q, k, v))
    if q.device.type == "cpu":
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q4, k4, v4, scale=1.0)
    elif q.dtype == torch.float32:
        output, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q4, k4, v4, None, True, scale=1.0)[:2]
    else:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention(q4, k4, v4, scale=1.0)[:2]
    shape = q.shape[:-1]
    # The kernels pad queries of their log-sum-exp, and return it in at least float32.
    return Partial(output[..., :d_v].to(lse.dtype).reshape(*shape, d_v), lse[..., :m].reshape(shape))


def _four_axes(x: Tensor, width: int) -> Tensor:
    x = pad(x, (0, width - x.shape[-1])) if width > x.shape[-1] else x
    return x.reshape(1, -1, *x.shape[-2:])


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """Attention with the whole matrix of logits, in the precision of q."""
    logits = q @ k.mT
    lse = torch.logsumexp(logits, -1)
    return Partial(torch.softmax(logits, -1) @ v, lse)


def reference_attention(q, k, v) -> Partial:
    """Full softmax attention in float64 with the whole matrix of logits: the yardstick of the fast version."""
    return _plain(*(x.double() for x in _check(q, k, v)))


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint sets of keys, from the states of the parts (same queries).

    Raises
    ------
    ValueError
        If the two states are not of the same queries and value dimension.
    """
    if a.output.shape != b.output.shape or a.lse.shape != b.lse.shape:
        raise ValueError(f"b: expected output of shape {tuple(a.output.shape)} as in a, got {tuple(b.output.shape)}")
    # The weight comes from the difference of the two log-sum-exps, so both weights add up to 1 however large they are.
    weight = torch.sigmoid(b.lse - a.lse)[..., None]
    return Partial(torch.lerp(a.output, b.output, weight), torch.logaddexp(a.lse, b.lse))


def _extend(state: Partial | None, q: Tensor, k: Tensor, v: Tensor, start: int, stop: int) -> Partial:
    """The state after keys start..stop have been read as well, in blocks of KEY_BLOCK."""
    for low in range(start, stop, KEY_BLOCK):
        high = min(low + KEY_BLOCK, stop)
        block = _kernel(q, k[..., low:high, :], v[..., low:high, :])
        state = block if state is None else merge(state, block)
    return state


def prefix_states(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Iterator[Partial]:
    """The state after each prefix of the keys, one after the other: one pass over the keys for all lengths.

    Parameters and errors as for `prefix_attention`.
    """
    q, k, v = _check(q, k, v)
    return _prefix_states(q, k, v, as_lengths("lengths", lengths, most=k.shape[-2]))


def _prefix_states(q, k, v, lengths):
    state = None
    for start, stop in zip([0] + lengths, lengths):
        state = _extend(state, q, k, v, start, stop)
        yield state


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Softmax attention over the first n keys, for every n in `lengths`, in one pass over the keys.

    Parameters
    ----------
    q : (..., m, d); k : (..., n, d); v : (..., n, d_v), of one precision, on one device, the same batch axes.
    lengths : increasing integers from 1 to n.

    Returns
    -------
    Tensor of shape (len(lengths), ..., m, d_v)
        Memory beyond the arguments is this result and one block of keys; the m x n weights are never held.

    Raises
    ------
    ValueError
        If shapes, precisions or devices do not match, lengths do not increase or exceed n, or entries are not finite.
    """
    return torch.stack([state.output for state in prefix_states(q, k, v, lengths)])


def effective_tokens(q: Tensor, k: Tensor, lengths: Sequence[int]) -> Tensor:
    """Effective number of tokens 1 / sum_j w_j^2 (inverse participation ratio) over each prefix of the keys.

    Since w_j = e^{l_j - L}, the sum of squares is e^{L(2q) - 2 L(q)}: two log-sum-exps, no matrix of weights.

    Parameters
    ----------
    q : (..., m, d); k : (..., n, d); lengths : increasing integers from 1 to n.

    Returns
    -------
    Tensor of shape (len(lengths), ..., m), between 1 and n
    """
    q, k = as_tensor("q", q), as_tensor("k", k)
    once = torch.stack([state.lse for state in prefix_states(q, k, k, lengths)])
    twice = torch.stack([state.lse for state in prefix_states(2 * q, k, k, lengths)])
    return torch.exp(2 * once - twice)


def prefix_moments(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Moments:
    """Mean and covariance of the outputs of self-attention over the first n tokens, for every n in `lengths`.

    For each n, all of the first n queries attend to the first n keys. A block of queries reads the keys up to its own
    end once, and then each later stretch of keys once: the work is that of the longest prefix alone.

    Parameters
    ----------
    q, k : (..., n, d) and v : (..., n, d_v): queries, keys and values of the same n tokens.
    lengths : increasing integers from 1 to n.

    Returns
    -------
    Moments
        mean (len(lengths), ..., d_v) and cov (len(lengths), ..., d_v, d_v) with divisor n, float64.

    Raises
    ------
    ValueError
        As `prefix_attention`, and if queries and keys differ in number.
    """
    q, k, v = _check(q, k, v)
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(f"q: expected {k.shape[-2]} tokens as in k, got shape {tuple(q.shape)}")
    lengths = as_lengths("lengths", lengths, most=k.shape[-2])
    # Attention commutes with a shift of the values. Around their mean, E[oo'] - E[o]E[o]' loses no digits.
    pivot = v[..., : lengths[-1], :].mean(-2, keepdim=True)
    v = v - pivot
    total = torch.zeros(len(lengths), *v.shape[:-2], v.shape[-1], dtype=torch.float64, device=v.device)
    square = torch.zeros(*total.shape, v.shape[-1], dtype=torch.float64, device=v.device)
    for first, (start, stop) in enumerate(zip([0] + lengths, lengths)):
        for low in range(start, stop, QUERY_BLOCK):
            block = q[..., low : min(low + QUERY_BLOCK, stop), :]
            for i, state in enumerate(_prefix_states(block, k, v, lengths[first:]), first):
                output = state.output.double()
                total[i] += output.sum(-2)
                square[i] += output.mT @ output
    # Row i holds the queries that joined at length i and earlier: every row is complete once the loop ends.
    count = torch.tensor(lengths, dtype=torch.float64, device=v.device)
    mean = total / count.reshape(-1, *[1] * (total.ndim - 1))
    cov = square / count.reshape(-1, *[1] * (square.ndim - 1)) - mean[..., :, None] * mean[..., None, :]
    return Moments(mean + pivot[..., 0, :].double(), cov)


def self_attention_moments(x: Tensor, A, V, lengths: Sequence[int], shift=None) -> Moments:
    """Moments of self-attention for a bilinear form: logits <A x_i + shift, x_j>, values V x_j.

    Parameters
    ----------
    x : (n, d), tokens; A : (d, d); V : (d_v, d) or None for the identity; shift : (d,) or None.
    lengths : increasing integers from 1 to n.

    Returns
    -------
    Moments
        mean (len(lengths), d_v) and cov (len(lengths), d_v, d_v), the covariance with divisor n, float64.

    Raises
    ------
    ValueError
        If shapes do not match, lengths do not increase or exceed n, or entries are not finite.
    """
    x = as_tokens("x", x)
    dim = x.shape[1]
    q = x @ as_square("A", A, dim).to(x).mT
    if shift is not None:
        q = q + as_vectors("shift", shift, dim).to(x)
    v = x if V is None else x @ as_matrix("V", V, columns=dim).to(x).mT
    require_finite("logits", q)
    return prefix_moments(q, x, v, lengths)
