"""Several processes, started by ``torchrun``, at work on one thing: who am I, my share, wait for the others.

Without ``torchrun`` there is one process, and everything here does nothing. The process group is made on first use
from the environment that torchrun sets: gloo for tensors on the CPU, nccl for tensors on CUDA.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as group

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


def shard(items: Sequence[Item]) -> list[Item]:
    """This rank's share of a list: every world()-th item, so that shares differ by one item at most."""
    return list(items[rank() :: world()])


def barrier() -> None:
    """Wait until every rank has come here."""
    if world() > 1:
        _join()
        group.all_reduce(torch.zeros(1))


def _join() -> None:
    if not group.is_initialized():
        group.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
