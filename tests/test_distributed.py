"""Attention over keys shared out over two ranks gives the numbers of one; without torchrun there is one rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokcx_lib.sampling import distributed, streaming
from tokcx_lib.theory.laws import Gaussian

ROOT = Path(__file__).resolve().parent.parent
# Some shares are empty: of one key, one rank has none, in the first stretch and later on.
LENGTHS = [1, 2, 1000, 1001, 40_000]
WORK = """
import sys, time
from functools import partial
import torch
from tokcx_lib.sampling import distributed, streaming
from tokcx_lib.theory.laws import Gaussian

if distributed.rank() == 0:
    time.sleep(0.5)
distributed.barrier()
law = Gaussian(torch.eye(3, dtype=torch.float64))
blocks = partial(streaming.drawn_blocks, law, 5, dtype=torch.float64)
q = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(2, 4, 3)
states = list(distributed.sharded_states(q, blocks, {lengths}))
found = [torch.stack(part) for part in zip(*states)]
share = distributed.shard(range(5))
torch.save([*found, distributed.rank(), distributed.local_rank(), distributed.world(), share],
           f"{folder}/{{distributed.rank()}}.pt")
"""


def on_ranks(count: int, folder: Path) -> list:
    script = folder / "work.py"
    script.write_text(WORK.format(lengths=LENGTHS, folder=folder))
    start = ["-m", "torch.distributed.run", f"--nproc-per-node={count}"] if count > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *start, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(tmp_path):
    first, second = on_ranks(2, tmp_path)
    law = Gaussian(torch.eye(3, dtype=torch.float64))
    blocks = streaming.drawn_blocks(law, 5, 0, LENGTHS[-1], dtype=torch.float64)
    q = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(2, 4, 3)
    for i, state in enumerate(streaming.stream_states(q, blocks, LENGTHS)):
        assert torch.allclose(first[0][i], state.output, rtol=0, atol=1e-13)
        assert torch.allclose(first[1][i], state.lse, rtol=0, atol=1e-13)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert [ranks[2:5] for ranks in (first, second)] == [[0, 0, 2], [1, 1, 2]]
    assert first[5] == [0, 2, 4] and second[5] == [1, 3]


def test_without_torchrun_there_is_one_rank():
    assert (distributed.rank(), distributed.local_rank(), distributed.world()) == (0, 0, 1)
    assert distributed.shard([3, 1, 2]) == [3, 1, 2]
    distributed.barrier()
    q, k, v = torch.randn(4, 2), torch.randn(50, 2), torch.randn(50, 3)
    outputs = distributed.sharded_attention(q, lambda start, stop: [(k[start:stop], v[start:stop])], [7, 50])
    assert torch.allclose(outputs, streaming.prefix_attention(q, k, v, [7, 50]), atol=1e-6)


def test_each_rank_reads_its_part_and_all_parts_make_the_whole(monkeypatch):
    read = []

    def blocks(start, stop):
        read.append((start, stop))
        return [(torch.ones(stop - start, 1), torch.ones(stop - start, 1))]

    monkeypatch.setattr(distributed, "world", lambda: 3)
    monkeypatch.setattr(distributed, "merge_ranks", lambda state, q: state)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        list(distributed.sharded_states(torch.ones(1, 1), blocks, [1, 10, 31]))
    assert sorted(i for start, stop in read for i in range(start, stop)) == list(range(31))
    assert all(start < stop for start, stop in read)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="^lengths: .*increasing"):
        distributed.sharded_attention(torch.ones(1, 1), lambda start, stop: [], [3, 2])
    with pytest.raises(ValueError, match="^blocks: expected 3 keys, got 0"):
        distributed.sharded_attention(torch.ones(1, 1), lambda start, stop: [], [3])
