"""The horizon sweep of chapter 5 against the plain algorithm, on one machine, in one run.

The plain algorithm is what an experimenter writes first: draw tokens for each n, compute the whole softmax for each
head, keep nothing. ``python -m tokcx_lib.bench.peer`` makes the record `peer_table` with the full grid (some minutes).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from tokcx_lib import records, runtime
from tokcx_lib.sampling import forms, sweeps
from tokcx_lib.theory.laws import Gaussian
from tokcx_lib.theory.limits import Moments, gaussian_limit
from tokcx_lib.validation import as_count, as_square

ROWS = 2_000  # queries whose weights the plain algorithm holds at once: all of them would not fit into memory


def plain_moments(tokens: Tensor, A, V) -> Moments:
    """Mean (d_v,) and covariance (d_v, d_v), divisor n, of self-attention over tokens (n, d), by the whole softmax.

    In the precision of the tokens throughout. A : (d, d), logit <A x, y>; V : (d_v, d).

    Raises
    ------
    ValueError
        If A does not match the tokens.
    """
    query = tokens @ as_square("A", A, tokens.shape[1]).to(tokens).mT
    values = tokens @ V.to(tokens).mT
    output = torch.cat([torch.softmax(part @ tokens.mT, -1) @ values for part in query.split(ROWS)])
    return Moments(output.mean(0), torch.cov(output.mT, correction=0))


def compare(
    dim: int, variance: float, scales: Sequence[float], lengths: Sequence[int], repeats: int, seed: int, device=None
) -> pd.DataFrame:
    """Seconds for one replicate of the sweep over scales and lengths, by both ways, by turns.

    Both take a random head (`forms.random_head`), float32, and as many threads as torch has. Returns a table with one
    row per repeat and method: method (``stream`` or ``plain``), repeat, seconds.
    """
    place = runtime.device(device)
    law = Gaussian(variance * torch.eye(dim, dtype=torch.float64))
    A, V = forms.random_head(dim, seed)
    rows = []
    for repeat in tqdm(range(as_count("repeats", repeats)), desc="repeats", disable=None):
        start = time.perf_counter()
        sweeps.MomentSweep(law, A, lengths, V, scales, dtype=torch.float32, device=place).errors(repeat, seed)
        rows.append(("stream", repeat, time.perf_counter() - start))
        start = time.perf_counter()
        limits = [gaussian_limit(law, scale * A, V) for scale in scales]
        for number, n in enumerate(lengths):
            tokens = law.sample(n, runtime.stream(seed, repeat, number)).to(place, torch.float32)
            for scale, limit in zip(scales, limits):
                errors = plain_moments(tokens, scale * A, V).errors(limit)
                assert torch.isfinite(torch.stack(errors)).all()
        rows.append(("plain", repeat, time.perf_counter() - start))
    return pd.DataFrame(rows, columns=["method", "repeat", "seconds"])


def main(arguments: list[str] | None = None) -> Path:
    """Compare on the grid of the record `gaussian_horizon`, and save the record `peer_table`."""
    parser = argparse.ArgumentParser(prog="python -m tokcx_lib.bench.peer", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--most", type=int, help="longest length to use (default: all)")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, help="folder of the record (default: the book's)")
    options = parser.parse_args(arguments)
    grid = records.load("gaussian_horizon").meta["config"]
    config = {key: grid[key] for key in ("dim", "variance", "scales", "lengths", "seed")}
    config["lengths"] = [n for n in config["lengths"] if options.most is None or n <= options.most]
    place = runtime.device(options.device)
    table = compare(**config, repeats=options.repeats, device=place)
    meta = {**records.provenance(place), "config": config, "threads": torch.get_num_threads()}
    return records.save("peer_table", table, meta, options.out)


if __name__ == "__main__":
    print(main())
