"""Streaming attention: softmax over part of the keys is a mergeable state, so one pass over the keys serves every n.

Softmax attention over a set of keys is described by its output o = sum_j w_j v_j and its log-sum-exp
l = log sum_j e^{q.k_j}. Two disjoint sets of keys merge without looking at a key again:

    w = sigmoid(l_b - l_a),   o = (1 - w) o_a + w o_b,   l = log(e^{l_a} + e^{l_b}).

The partial states come from PyTorch's fused kernels (flash attention on the CPU; memory-efficient attention in float32
and flash attention in half precision on CUDA), which return the log-sum-exp and never hold the matrix of weights. The
precision is that of the arguments; states of float64 are kept in float64, all others in float32. Logits are q.k as they
are: scale the queries beforehand.

Batch axes come first. Those of keys and values may be fewer than those of the queries, and then match the last of
them: queries (12, m, d) over keys (n, d) are 12 sets of queries that share their keys, which are not copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokcx_lib import runtime
from tokcx_lib.theory.laws import Law
from tokcx_lib.theory.limits import Moments
from tokcx_lib.validation import (
    HALF,
    as_attention,
    as_count,
    as_dtype,
    as_flag,
    as_kind,
    as_law,
    as_lengths,
    as_matrix,
    as_squares,
    as_tensor,
    as_vectors,
    finite_answer,
    naming,
    shown,
)

DRAW_BLOCK = 16_384  # tokens drawn at once from one random stream
KEY_BLOCK = 65_536  # keys handed to the kernel at once; bounds the copies made where head sizes are padded
QUERY_BLOCK = 16_384  # queries whose outputs are held at once while moments are accumulated
SMALL_BLOCK = 1_024  # least queries of each set in one call, however many sets there are: the kernels want many
CAUSAL_BLOCK = 1_024  # keys that come at once to queries which see only those before them
LOGITS = 2**26  # logits held at once where there is no fused kernel


class Partial(NamedTuple):
    """Softmax attention over some keys: `output` (..., m, d_v) and `lse` (..., m), the log of the sum of weights."""

    output: Tensor
    lse: Tensor


def partial_attention(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """Softmax attention of queries over a block of keys, by a fused kernel, with its log-sum-exp.

    Parameters
    ----------
    q : (..., m, d); k : (..., n, d); v : (..., n, d_v), of one precision, on one device. Keys and values have the batch
        axes of the queries, or the last of them, or none: then queries share keys.

    Returns
    -------
    Partial
        output (..., m, d_v) and lse (..., m). Logits are q.k as they are.

    Raises
    ------
    ValueError
        If shapes, precisions or devices do not match, a side is empty, or there are NaN or infinite entries.
    """
    return _kernel(*as_attention(q, k, v))


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    shared = q.ndim - k.ndim
    if shared:
        # Queries that share their keys are so many queries more: the keys are not copied.
        leading, inner = tuple(range(shared)), tuple(range(-2 - shared, -2))
        folded = q.movedim(leading, inner)
        state = _kernel(folded.reshape(*k.shape[:-2], -1, q.shape[-1]), k, v)
        sizes = folded.shape[:-1]
        output = state.output.reshape(*sizes, v.shape[-1]).movedim(inner, leading)
        return Partial(output, state.lse.reshape(sizes).movedim(tuple(i + 1 for i in inner), leading))
    m, d_v = q.shape[-2], v.shape[-1]
    if q.device.type not in ("cpu", "cuda") or (q.device.type == "cuda" and q.dtype == torch.float64):
        return _unfused(q, k, v)
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


def _unfused(q: Tensor, k: Tensor, v: Tensor, more: int | None = None) -> Partial:
    """Where there is no fused kernel: some queries at a time, so that LOGITS bounds the memory.

    With a number `more`, query i sees the keys 0, ..., i + more alone.
    """
    rows = max(1, LOGITS * q.shape[-2] // (q[..., 0].numel() * k.shape[-2]))
    parts = [_plain(part, k, v, None if more is None else more + i * rows) for i, part in enumerate(q.split(rows, -2))]
    return Partial(torch.cat([part.output for part in parts], -2), torch.cat([part.lse for part in parts], -1))


def _four_axes(x: Tensor, width: int) -> Tensor:
    """As the fused kernels take a tensor: (1, batch, rows, width), each row a run of neighbours in memory.

    They are called below the public interface (which does not give the log-sum-exp), where nothing looks at strides:
    of any other layout, such as a transposed or Fortran-ordered one, they read other numbers, without a word. Those of
    CUDA read 16 bytes at once, and rows have to begin at such places.
    """
    x = pad(x, (0, width - x.shape[-1])) if width > x.shape[-1] else x
    x = x.reshape(1, -1, *x.shape[-2:])
    apart = x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1]  # neighbours, and rows that do not overlap
    if x.device.type == "cuda":
        apart = apart and all(place * x.element_size() % 16 == 0 for place in (x.storage_offset(), *x.stride()[:-1]))
    return x if apart else x.clone(memory_format=torch.contiguous_format)


def _plain(q: Tensor, k: Tensor, v: Tensor, more: int | None) -> Partial:
    """Attention with the whole matrix of logits, in the precision of q."""
    logits = q @ k.mT
    if more is not None:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(more + 1)
        logits = logits.masked_fill(later, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    return Partial(torch.softmax(logits, -1) @ v, lse)


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint sets of keys, from the states of the parts (same queries).

    Raises
    ------
    ValueError
        If the two states are not of the same queries and value dimension.
    """
    as_kind("a", a, Partial), as_kind("b", b, Partial)
    if a.output.shape != b.output.shape or a.lse.shape != b.lse.shape:
        raise ValueError(f"b: expected output of shape {tuple(a.output.shape)} as in a, got {tuple(b.output.shape)}")
    return _merge(a, b)


def _merge(a: Partial, b: Partial, out: Tensor | None = None) -> Partial:
    # The weight comes from the difference of the two log-sum-exps, so both weights add up to 1 however large they are.
    weight = torch.sigmoid(b.lse - a.lse)[..., None]
    return Partial(torch.lerp(a.output, b.output, weight, out=out), torch.logaddexp(a.lse, b.lse))


def _join(state: Partial | None, q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """The state after some more keys have been read, in blocks of KEY_BLOCK."""
    for keys, values in zip(k.split(KEY_BLOCK, -2), v.split(KEY_BLOCK, -2)):
        block = _kernel(q, keys, values)
        state = block if state is None else _merge(state, block, out=block.output)
    return state


def _states(q: Tensor, blocks: Iterable[tuple[Tensor, Tensor]], lengths: list[int]) -> Iterator[Partial]:
    """The state at each length, from blocks that are cut where a length falls inside."""
    state, start, left = None, 0, list(lengths)
    for k, v in blocks:
        while k.shape[-2]:
            size = min(k.shape[-2], left[0] - start)
            state = _join(state, q, k[..., :size, :], v[..., :size, :])
            k, v, start = k[..., size:, :], v[..., size:, :], start + size
            if start == left[0]:
                yield state
                left.pop(0)
                if not left:
                    return
    raise ValueError(f"blocks: expected {lengths[-1]} keys, got {start}")


def _checked(q: Tensor, blocks) -> Iterator[tuple[Tensor, Tensor]]:
    d_v = None
    for block in blocks:
        if not isinstance(block, (tuple, list)) or len(block) != 2:
            raise ValueError(f"blocks: expected pairs of keys and values, got {shown(block)}")
        try:
            _, k, v = as_attention(q, *block)
        except ValueError as error:
            raise ValueError(f"{error}, in blocks") from error
        d_v = d_v or v.shape[-1]
        if v.shape[-1] != d_v:
            raise ValueError(f"v: expected dimension {d_v} as in the first of blocks, got shape {tuple(v.shape)}")
        yield k, v


def stream_states(q: Tensor, blocks: Iterable[tuple[Tensor, Tensor]], lengths: Sequence[int]) -> Iterator[Partial]:
    """The state after each prefix of a stream of keys, which come block by block and are never held together.

    Memory is that of two blocks and of the state, however many keys go by. Blocks may differ in size: they are cut
    where a length falls inside. Reading stops at the last length.

    Parameters
    ----------
    q : (..., m, d).
    blocks : pairs of keys (..., b, d) and values (..., b, d_v), as `partial_attention` takes them; for instance
        `drawn_blocks`.
    lengths : increasing integers >= 1.

    Raises
    ------
    ValueError
        At once if the lengths do not increase; while reading, as `partial_attention`, and if the blocks end too early.
    """
    q = as_tensor("q", q).detach()
    if not isinstance(blocks, Iterable) or hasattr(blocks, "ndim"):
        raise ValueError(f"blocks: expected pairs of keys and values, one after the other, got {shown(blocks)}")
    return _states(q, _checked(q, blocks), as_lengths("lengths", lengths, most=2**62))


def stream_attention(q: Tensor, blocks: Iterable[tuple[Tensor, Tensor]], lengths: Sequence[int]) -> Tensor:
    """`prefix_attention` over a stream of keys: outputs (len(lengths), ..., m, d_v). Arguments as `stream_states`."""
    return torch.stack([state.output for state in stream_states(q, blocks, lengths)])


def drawn_blocks(
    law: Law, seed: int, start: int, stop: int, dtype: torch.dtype = torch.float32, device=None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens start, ..., stop - 1 of an endless sequence of draws from a law, block by block, as keys and as values.

    Every DRAW_BLOCK tokens have a random stream of their own, `runtime.stream(seed, number of the block)`. So token i
    is the same whoever reads it, and whatever was read before.

    Parameters
    ----------
    law : of tokens in R^d; seed : names the sequence.
    dtype : of the blocks; draws are made in float64 on the CPU.

    Returns
    -------
    Iterator of pairs (tokens, tokens), of at most DRAW_BLOCK tokens each
    """
    start, stop = (as_count(name, i, least=0, most=2**62) for name, i in (("start", start), ("stop", stop)))
    place, dtype = runtime.device(device), as_dtype("dtype", dtype)
    as_law("law", law, "sample")
    for number in range(start // DRAW_BLOCK, -(-stop // DRAW_BLOCK) if start < stop else 0):
        first = number * DRAW_BLOCK
        tokens = law.sample(DRAW_BLOCK, runtime.stream(seed, number))
        tokens = tokens[max(start - first, 0) : stop - first].to(device=place, dtype=dtype)
        yield tokens, tokens


def prefix_states(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], causal: bool = False, grouped: bool = False
) -> Iterator[Partial]:
    """The state after each prefix of the keys, one after the other: one pass over the keys for all lengths.

    Parameters and errors as for `prefix_attention`.
    """
    causal, grouped = as_flag("causal", causal), as_flag("grouped", grouped)
    q, k, v = as_attention(_apart(q, k) if grouped else q, k, v)
    lengths = as_lengths("lengths", lengths, most=k.shape[-2])
    if causal and q.shape[-2] > k.shape[-2]:
        raise ValueError(
            f"q: expected at most {k.shape[-2]} tokens, the last of those in k, got shape {tuple(q.shape)}"
        )
    states = _causal_states(q, k, v, lengths) if causal else _states(q, [(k, v)], lengths)
    return map(_together, states) if grouped else states


def _apart(q: Tensor, k: Tensor) -> Tensor:
    """Queries (heads / groups, ..., groups, m, d) from (..., heads, m, d), to which each group of keys is common."""
    q, k = as_tensor("q", q), as_tensor("k", k)
    if min(q.ndim, k.ndim) < 3 or k.shape[-3] == 0 or q.shape[-3] % k.shape[-3]:
        expected = "(..., groups, n, d), with grouped queries (..., heads, m, d) of a multiple of the groups"
        raise ValueError(f"k: expected shape {expected}, got {tuple(k.shape)} and {tuple(q.shape)}")
    return q.unflatten(-3, (k.shape[-3], -1)).movedim(-3, 0)


def _together(state: Partial) -> Partial:
    """The heads of a state for queries from `_apart`, in one axis again."""
    return Partial(state.output.movedim(0, -3).flatten(-4, -3), state.lse.movedim(0, -2).flatten(-3, -2))


def _causal_states(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Iterator[Partial]:
    """As `_states`, for queries that are the last tokens and see keys up to their own."""
    state, start, first = None, 0, k.shape[-2] - q.shape[-2]  # first: the token of the first query
    for length in lengths:
        for low in range(start, length, CAUSAL_BLOCK):
            high = min(low + CAUSAL_BLOCK, length)
            keys, values = k[..., low:high, :], v[..., low:high, :]
            # Queries before `some` see none of these keys, those from `all_` on all of them: the last one does.
            some, all_ = max(low - first, 0), max(high - 1 - first, 0)
            block = _kernel(q[..., all_:, :], keys, values)
            if some < all_:
                wide = (x.float() if x.dtype in HALF else x for x in (q[..., some:all_, :], keys, values))
                block = _below(_unfused(*wide, first + some - low), block)
            if state is not None:
                seeing = Partial(state.output[..., some:, :], state.lse[..., some:])
                before = Partial(state.output[..., :some, :], state.lse[..., :some])
                block = _below(before, _merge(seeing, block))
            state = block
        start = length
        yield state


def _below(a: Partial, b: Partial) -> Partial:
    """The state of some queries, then of others."""
    return Partial(torch.cat([a.output, b.output], -2), torch.cat([a.lse, b.lse], -1))


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], causal: bool = False, grouped: bool = False
) -> Tensor:
    """Softmax attention over the first n keys, for every n in `lengths`, in one pass over the keys.

    Parameters
    ----------
    q : (..., m, d); k : (..., n, d); v : (..., n, d_v), as `partial_attention` takes them.
    lengths : increasing integers from 1 to n.
    causal : whether a query sees only keys up to its own; the m queries are those of the last m of the n tokens.
    grouped : whether heads share keys, as in grouped-query attention: of q (..., heads, m, d) and k, v (..., groups, n,
        d), query head h reads the keys of group h // (heads / groups), which are not copied.

    Returns
    -------
    Tensor of shape (len(lengths), ..., m, d_v)
        Memory beyond the arguments is this result and one block of keys; the m x n weights are never held.

    Raises
    ------
    ValueError
        If shapes, precisions or devices do not match, lengths do not increase or exceed n, or entries are not finite.
    """
    return torch.stack([state.output for state in prefix_states(q, k, v, lengths, causal, grouped)])


def effective_tokens(
    q: Tensor, k: Tensor, lengths: Sequence[int], causal: bool = False, grouped: bool = False
) -> Tensor:
    """Effective number of tokens 1 / sum_j w_j^2 (inverse participation ratio) over each prefix of the keys.

    Since w_j = e^{l_j - L}, the sum of squares is e^{L(2q) - 2 L(q)}: two log-sum-exps, no matrix of weights.

    Parameters
    ----------
    q : (..., m, d); k : (..., n, d); lengths : increasing integers from 1 to n; causal, grouped : as for
        `prefix_attention`.

    Returns
    -------
    Tensor of shape (len(lengths), ..., m), between 1 and n
    """
    q, k = as_tensor("q", q), as_tensor("k", k)
    once = torch.stack([state.lse for state in prefix_states(q, k, k, lengths, causal, grouped)])
    twice = torch.stack([state.lse for state in prefix_states(2 * q, k, k, lengths, causal, grouped)])
    return torch.exp(2 * once - twice)


def prefix_moments(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Moments:
    """Mean and covariance of the outputs of self-attention over the first n tokens, for every n in `lengths`.

    For each n, all of the first n queries attend to the first n keys. Queries that were there at the last length read
    the keys that have come since, and new ones all keys: the work is that of the longest prefix alone.

    Parameters
    ----------
    q, k : (..., n, d) and v : (..., n, d_v): queries, keys and values of the same n tokens, as `partial_attention`
        takes them: with q (s, n, d) and k (n, d), s heads look at the same tokens.
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
    q, k, v = as_attention(q, k, v)
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(f"q: expected {k.shape[-2]} tokens as in k, got shape {tuple(q.shape)}")
    lengths = as_lengths("lengths", lengths, most=k.shape[-2])
    # Attention commutes with a shift of the values. Around their mean, E[oo'] - E[o]E[o]' loses no digits.
    pivot = v[..., : lengths[-1], :].mean(-2, keepdim=True)
    v = v - pivot
    total = torch.zeros(len(lengths), *q.shape[:-2], v.shape[-1], dtype=torch.float64, device=v.device)
    square = torch.zeros(*total.shape, v.shape[-1], dtype=torch.float64, device=v.device)
    step = max(QUERY_BLOCK // q.shape[:-2].numel(), SMALL_BLOCK)
    for low in range(0, lengths[-1], step):
        block = q[..., low : low + step, :]
        for i, state in _growing_states(block, k, v, lengths, low):
            total[i] += state.output.sum(-2, dtype=torch.float64)
            square[i] += state.output.mT @ state.output
    count = torch.tensor(lengths, dtype=torch.float64, device=v.device)
    mean = total / count.reshape(-1, *[1] * (total.ndim - 1))
    cov = square / count.reshape(-1, *[1] * (square.ndim - 1)) - mean[..., :, None] * mean[..., None, :]
    return Moments(mean + pivot[..., 0, :].double(), finite_answer("v", cov))


def _growing_states(q, k, v, lengths, low) -> Iterator[tuple[int, Partial]]:
    """The number of each length and the state there, where query i, token low + i, is there once length exceeds it."""
    state, start, there = None, 0, 0
    for i, stop in enumerate(lengths):
        now = min(stop - low, q.shape[-2])
        if there:
            state = _join(state, q[..., :there, :], k[..., start:stop, :], v[..., start:stop, :])
        if now > there:
            new = _join(None, q[..., there:now, :], k[..., :stop, :], v[..., :stop, :])
            state = Partial(*(torch.cat(pair, axis) for pair, axis in zip(zip(state, new), (-2, -1)))) if there else new
            there = now
        if there:
            yield i, state
        start = stop


def self_attention_moments(x: Tensor, A, V, lengths: Sequence[int], shift=None) -> Moments:
    """Moments of self-attention for a bilinear form: logits <A x_i + shift, x_j>, values V x_j.

    Parameters
    ----------
    x : (..., n, d), tokens, for instance of several replicates.
    A : (d, d), or a stack (s, ..., d, d) of forms that look at the same tokens: one pass serves all of them.
    V : (d_v, d) or None for the identity; shift : (d,), or (s, ..., d) for a stack, or None.
    lengths : increasing integers from 1 to n.

    Returns
    -------
    Moments
        mean (len(lengths), s, ..., ..., d_v) and cov (len(lengths), s, ..., ..., d_v, d_v): the axes of the stack, then
        those of the tokens. The covariance has divisor n; float64.

    Raises
    ------
    ValueError
        If shapes do not match, lengths do not increase or exceed n, or entries are not finite.
    """
    x = as_tensor("x", x)
    if x.ndim < 2 or 0 in x.shape:
        raise ValueError(f"x: expected shape (..., n, d), none zero, got {tuple(x.shape)}")
    dim, ones = x.shape[-1], (1,) * (x.ndim - 2)
    A = as_squares("A", A, dim).to(x)
    q = x @ A.reshape(*A.shape[:-2], *ones, dim, dim).mT
    if shift is not None:
        shift = as_vectors("shift", shift, dim).to(x)
        if shift.shape[:-1] not in ((), A.shape[:-2]):
            raise ValueError(f"shift: expected shape {(dim,)} or {(*A.shape[:-1],)}, got {tuple(shift.shape)}")
        q = q + shift.reshape(*shift.shape[:-1], *ones, 1, dim)
    v = x if V is None else finite_answer("x, V", x @ as_matrix("V", V, columns=dim).to(x).mT)
    lengths = as_lengths("lengths", lengths, most=x.shape[-2])
    with naming("x, A, V, shift"):
        return prefix_moments(q, x, v, lengths)
