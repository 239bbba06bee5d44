"""The checkpoint of a probe: the states of its layers, replaced every so often, so that a killed probe goes on.

States that are damaged, or those of another plan, are dropped, and the probe starts anew (`tokcx_lib.checkpoints`).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tokcx_lib import checkpoints, records
from tokcx_lib.probe.layers import LayerState

CHECKPOINT_SECONDS = 20.0  # of work between two checkpoints, or more where writing one takes long
_FILES = ("plan.json", "state.npz")


class Checkpoint:
    """A folder for the states of a plan; without a folder, nothing is found and nothing kept."""

    def __init__(self, folder: Path | None, plan: dict):
        self.folder = None if folder is None else Path(folder)
        self.plan = json.dumps(plan, sort_keys=True, indent=2).encode()
        self.cost, self.last = 0.0, time.monotonic()

    def load(self, states: dict[int, LayerState]) -> int:
        """How many tokens an earlier run of this plan has read, with its states restored; 0 if there is none."""
        if self.folder is None:
            return 0
        plan, state = (self.folder / name for name in _FILES)
        if plan.is_file() and state.is_file() and plan.read_bytes() == self.plan:
            try:
                arrays = checkpoints.unpack(checkpoints.read(state, self.plan)[0])
            except (ValueError, OSError):
                tqdm.write(f"{state} is damaged: starting anew", file=sys.stderr)
            else:
                for layer, each in states.items():
                    mark = f"{layer}_"
                    each.restore({k.removeprefix(mark): a for k, a in arrays.items() if k.startswith(mark)})
                return int(arrays["read"])
        discard_checkpoint(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        records.write_whole(plan, self.plan)
        return 0

    def save(self, states: dict[int, LayerState], read: int, now: bool = False) -> None:
        """Write the states, unless the last time is less than CHECKPOINT_SECONDS, or 20 times its cost, ago."""
        start = time.monotonic()
        if self.folder is None or not now and start - self.last < max(CHECKPOINT_SECONDS, 20 * self.cost):
            return
        arrays = {f"{layer}_{name}": a for layer, each in states.items() for name, a in each.arrays().items()}
        content = checkpoints.pack({"read": np.array(read), **arrays})
        checkpoints.write(self.folder / _FILES[1], content, self.plan, note=f"{read} tokens")
        self.last = time.monotonic()
        self.cost = self.last - start


def discard_checkpoint(folder: Path) -> None:
    """Remove a folder of checkpoints, with what `probe` wrote there."""
    for name in _FILES:
        for path in (folder / name, folder / (name + ".tmp")):
            path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
