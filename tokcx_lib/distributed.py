"""Several processes that share out one piece of work: what ``torchrun`` starts.

Outside ``torchrun`` there is one rank, and all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


def world() -> int:
    """The number of ranks: ``WORLD_SIZE`` under torchrun, else 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this rank, from 0."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """The number of this rank on its machine, from 0: which of its devices to use."""
    return int(os.environ.get("LOCAL_RANK", 0))


def shard(items: Sequence[Item]) -> list[Item]:
    """This rank's share of a list that all ranks hold: every world-th item."""
    return list(items)[rank() :: world()]


def barrier() -> None:
    """Wait until every rank is here."""
    if world() > 1:
        _join()
        dist.barrier()


def _join() -> None:
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
