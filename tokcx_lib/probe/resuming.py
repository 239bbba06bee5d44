"""The checkpoint of a probe: the states of its layers, replaced every so often, so that a killed probe goes on.

States that are damaged, or those of another plan, are dropped, and the probe starts anew (`tokcx_lib.checkpoints`).
Under ``torchrun`` each rank keeps a state of what it has read, which only as many ranks can go on from.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tokcx_lib import checkpoints, records
from tokcx_lib.probe.layers import LayerState
from tokcx_lib.sampling import distributed

CHECKPOINT_SECONDS = 20.0  # of work between two checkpoints, or more where writing one takes long
STATE = 2  # the form of a state: those of another one are not read
_PLAN, _STATES = "plan.json", re.compile(r"state(-[0-9]+)?\.npz")


class Checkpoint:
    """A folder for the states of a plan; without a folder, nothing is found and nothing kept."""

    def __init__(self, folder: Path | None, plan: dict):
        self.folder = None if folder is None else Path(folder)
        ranks = distributed.world()
        self.plan = json.dumps({**plan, "ranks": ranks, "state": STATE}, sort_keys=True, indent=2).encode()
        self.file = "state.npz" if ranks == 1 else f"state-{distributed.rank()}.npz"
        self.cost, self.last = 0.0, time.monotonic()

    def load(self, states: dict[int, LayerState]) -> int:
        """How many tokens this rank has read in an earlier run of this plan, its states restored; 0 without one."""
        if self.folder is None:
            return 0
        if distributed.rank() == 0:
            self._open()
        distributed.barrier()
        state = self.folder / self.file
        if not state.is_file():
            return 0
        try:
            arrays = checkpoints.unpack(checkpoints.read(state, self.plan)[0])
        except (ValueError, OSError):
            tqdm.write(f"{state} is damaged: starting anew", file=sys.stderr)
            state.unlink()
            return 0
        for layer, each in states.items():
            mark = f"{layer}_"
            each.restore({k.removeprefix(mark): a for k, a in arrays.items() if k.startswith(mark)})
        return int(arrays["read"])

    def _open(self) -> None:
        """Make the folder, or take away what another plan has left in it."""
        plan = self.folder / _PLAN
        if not plan.is_file() or plan.read_bytes() != self.plan:
            discard_checkpoint(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            records.write_whole(plan, self.plan)

    def save(self, states: dict[int, LayerState], read: int, now: bool = False) -> None:
        """Write the states, unless the last time is less than CHECKPOINT_SECONDS, or 20 times its cost, ago."""
        start = time.monotonic()
        if self.folder is None or not now and start - self.last < max(CHECKPOINT_SECONDS, 20 * self.cost):
            return
        arrays = {f"{layer}_{name}": a for layer, each in states.items() for name, a in each.arrays().items()}
        content = checkpoints.pack({"read": np.array(read), **arrays})
        checkpoints.write(self.folder / self.file, content, self.plan, note=f"{read} tokens")
        self.last = time.monotonic()
        self.cost = self.last - start


def discard_checkpoint(folder: Path) -> None:
    """Remove a folder of checkpoints, with what a probe wrote there."""
    for path in folder.iterdir() if folder.is_dir() else ():
        name = path.name.removesuffix(".tmp")
        if name == _PLAN or _STATES.fullmatch(name):
            path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
