"""Several processes that share out one piece of work, started by ``torchrun``: lists, or the keys of attention.

Attention over keys that lie with several ranks needs no key moved: each rank reads its share, and the states of the
shares merge (`streaming`). Without ``torchrun`` there is one rank, and all of this still works. The process group is
made on first use from the environment that torchrun sets: gloo for tensors on the CPU, nccl for tensors on CUDA.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.sampling.streaming import Partial, merge, stream_states
from tokcx_lib.validation import as_kind, as_lengths, as_tensor, shown

Item = TypeVar("Item")

PATIENCE = timedelta(days=7)  # ranks wait for each other that long: shares of a long run may end hours apart


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """The number of this process on its machine: that of the GPU it should use."""
    return int(os.environ.get("LOCAL_RANK", 0))


def own_device(device: str | torch.device | None = None) -> torch.device:
    """The device that this rank runs on: that of `runtime.device`, but of several GPUs the one with its own number."""
    place = runtime.device(device)
    return torch.device("cuda", local_rank()) if place.type == "cuda" and world() > 1 else place


def shard(items: Sequence[Item]) -> list[Item]:
    """This rank's share of a list: every world()-th item, so that shares differ by one item at most."""
    return list(items[rank() :: world()])


def barrier() -> None:
    """Wait until every rank has come here."""
    if world() > 1:
        _start()
        dist.all_reduce(torch.zeros(1))


def total(part: Tensor) -> Tensor:
    """The sum over ranks of a tensor that has one shape on all of them, on every rank."""
    if world() == 1:
        return part
    _start()
    whole = part.clone()
    dist.all_reduce(whole)
    return whole


def gather(part: Tensor) -> list[Tensor]:
    """On the first rank, the tensors of all ranks, in order, which have one shape; elsewhere none."""
    if world() == 1:
        return [part]
    _start()
    parts = [torch.empty_like(part) for _ in range(world())] if rank() == 0 else []
    dist.gather(part.contiguous(), parts or None)
    return parts


def gather_objects(value: Item) -> list[Item]:
    """On the first rank, what each rank has, in order of rank; elsewhere none."""
    if world() == 1:
        return [value]
    _start()
    parts = [None] * world() if rank() == 0 else None
    dist.gather_object(value, parts)
    return parts or []


def merge_ranks(state: Partial | None, q: Tensor) -> Partial:
    """Attention over the keys of all ranks, on every rank, from the state that each has for its own.

    Parameters
    ----------
    state : of this rank's keys; None if it has none. At least one rank must have some.
    q : (..., m, d), the queries, the same on every rank.
    """
    if state is not None or world() == 1:
        as_kind("state", state, Partial)
    q = as_tensor("q", q)
    if world() == 1:
        return state
    _start()
    size = torch.tensor([0 if state is None else state.output.shape[-1]], device=q.device)
    dist.all_reduce(size, dist.ReduceOp.MAX)
    if state is None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        zeros = torch.zeros(*q.shape[:-1], size.item(), device=q.device, dtype=dtype)
        state = Partial(zeros, torch.full_like(zeros[..., 0], -torch.inf))
    # Weights relative to the largest log-sum-exp, and the outputs weighted, are sums over ranks.
    top = state.lse.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX)
    weight = torch.exp(state.lse - top)[..., None]
    sums = torch.cat([weight * state.output, weight], -1)
    dist.all_reduce(sums)
    return Partial(sums[..., :-1] / sums[..., -1:], top + torch.log(sums[..., -1]))


def sharded_states(
    q: Tensor, blocks: Callable[[int, int], Iterable[tuple[Tensor, Tensor]]], lengths: Sequence[int]
) -> Iterator[Partial]:
    """The state after each prefix of a sequence of keys that is shared out over the ranks; every rank gets all of them.

    Between one length and the next, each rank reads its part of the keys that have come since.

    Parameters
    ----------
    q : (..., m, d), the same on every rank.
    blocks : blocks(start, stop) gives keys start, ..., stop - 1 as pairs (k, v), as `streaming.stream_states` takes
        them: slices of a tensor, or `functools.partial(streaming.drawn_blocks, law, seed)`.
    lengths : increasing integers >= 1.

    Raises
    ------
    ValueError
        As `streaming.stream_states`.
    """
    q = as_tensor("q", q)
    lengths = as_lengths("lengths", lengths, most=2**62)
    if not callable(blocks):
        raise ValueError(f"blocks: expected a function of start and stop, got {shown(blocks)}")
    state = None
    for start, stop in zip([0, *lengths], lengths):
        first, last = (start + (stop - start) * part // world() for part in (rank(), rank() + 1))
        if first < last:
            (share,) = stream_states(q, blocks(first, last), [last - first])
            state = share if state is None else merge(state, share)
        yield merge_ranks(state, q)


def sharded_attention(
    q: Tensor, blocks: Callable[[int, int], Iterable[tuple[Tensor, Tensor]]], lengths: Sequence[int]
) -> Tensor:
    """`streaming.prefix_attention` over keys shared out over the ranks; every rank gets the outputs.

    Arguments as for `sharded_states`; shape (len(lengths), ..., m, d_v).
    """
    return torch.stack([state.output for state in sharded_states(q, blocks, lengths)])


def _start() -> None:
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        atexit.register(_stop)  # a process that ends with the group's threads at work may abort


def _stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
