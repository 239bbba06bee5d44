"""Does a device compute what the CPU computes in float64? Every path of streaming attention once, at tiny size.

Before anything is measured on a GPU it has to be right there: fused kernels in three precisions, for head sizes that
they do and do not take as they are; log-sum-exps; merged prefixes; causal and grouped keys; sweeps. Seconds, not more.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import torch
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.sampling import streaming, sweeps
from tokcx_lib.sampling.forms import random_head
from tokcx_lib.theory.laws import Gaussian

SEED = 4_040
# Largest difference that is rounding, relative to the largest number of the answer.
ALLOWED = {torch.float64: 1e-11, torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SIZES = [(5, 5), (8, 3), (32, 32), (50, 50), (64, 64), (100, 7), (128, 128)]  # of keys and of values


def agreement(device=None) -> pd.DataFrame:
    """Answers of a device beside those of the CPU in float64, on the same numbers, rounded to the precision.

    Returns
    -------
    DataFrame
        check, setting, precision, difference (relative to the largest number of the answer), allowed, agrees.

    Raises
    ------
    ValueError
        If the device is unknown.
    """
    place = runtime.device(device)
    rows = [row for check in (_kernels, _layouts, _prefixes, _streams, _sweeps) for row in check(place)]
    names = ["check", "setting", "precision", "difference", "allowed"]
    table = pd.DataFrame(rows, columns=names)
    return table.assign(agrees=table["difference"] <= table["allowed"])  # NaN does not


def _row(check: str, setting: str, dtype: torch.dtype, found: Tensor, expected: Tensor) -> tuple:
    found, expected = found.cpu().double(), expected.double()
    difference = (found - expected).abs().max().item() / expected.abs().max().item()
    return check, setting, str(dtype).removeprefix("torch."), difference, ALLOWED[dtype]


def _drawn(number: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    stream = runtime.stream(SEED, number)
    return [torch.randn(shape, generator=stream, dtype=torch.float64) / shape[-1] ** 0.25 for shape in shapes]


def _kernels(place: torch.device) -> Iterator[tuple]:
    """One call of the kernel, whose number of queries is no multiple of what it reads at once."""
    for number, (d, d_v) in enumerate(SIZES):
        for dtype in ALLOWED:
            q, k, v = (x.to(dtype) for x in _drawn(number, (3, 37, d), (3, 300, d), (3, 300, d_v)))
            found = streaming.partial_attention(q.to(place), k.to(place), v.to(place))
            expected = streaming.partial_attention(q.double(), k.double(), v.double())
            for part in ("output", "lse"):
                values = getattr(found, part), getattr(expected, part)
                yield _row(f"kernel, {part}", f"d = {d}, d_v = {d_v}", dtype, *values)


def _layouts(place: torch.device) -> Iterator[tuple]:
    """Tensors that are no run of neighbours in memory: transposed, every other one, one column after the other."""
    (x,) = _drawn(20, (2, 65, 80))
    cases = {
        "transposed": lambda x: x.mT,
        "every other row": lambda x: x[:, ::2],
        "columns of a wider one": lambda x: x[..., 3:11],
        "rows of odd length": lambda x: x[..., :77].contiguous()[..., 1:65],
        "reversed axes": lambda x: x.permute(2, 0, 1),
    }
    for name, case in cases.items():
        for dtype in (torch.float32, torch.bfloat16):
            y = x.to(dtype)
            expected = streaming.partial_attention(*[case(y.double())] * 3)
            yield _row(
                "layout", name, dtype, streaming.partial_attention(*[case(y.to(place))] * 3).output, expected.output
            )


def _prefixes(place: torch.device) -> Iterator[tuple]:
    """States of parts of the keys, merged: prefixes, causal and grouped heads, effective numbers."""
    lengths = [1, 33, 700, 1500]
    q, k, v = _drawn(30, (4, 50, 16), (2, 1500, 16), (2, 1500, 9))
    cases = {
        "prefixes": lambda q, k, v: streaming.prefix_attention(q[:2], k, v, lengths),
        "shared keys": lambda q, k, v: streaming.prefix_attention(q, k[0], v[0], lengths),
        "causal": lambda q, k, v: streaming.prefix_attention(q[:2], k, v, [1460, 1480, 1500], causal=True),
        "grouped": lambda q, k, v: streaming.prefix_attention(q, k, v, lengths, grouped=True),
        "causal, grouped": lambda q, k, v: streaming.prefix_attention(q, k, v, [1500], causal=True, grouped=True),
        "effective tokens": lambda q, k, v: streaming.effective_tokens(q[:2], k, lengths).log(),
    }
    for name, case in cases.items():
        for dtype in ALLOWED:
            if name == "causal" or dtype in (torch.float64, torch.float32) or name == "prefixes":
                given = [x.to(dtype) for x in (q, k, v)]
                found = case(*(x.to(place) for x in given))
                later = slice(1, None) if name == "causal" else slice(None)  # no query has a key in the first prefix
                yield _row(name, "-", dtype, found[later], case(*(x.double() for x in given))[later])


def _streams(place: torch.device) -> Iterator[tuple]:
    """Keys in two streams of tokens, and, on a GPU, two queues of work at once."""
    law = Gaussian(torch.eye(10, dtype=torch.float64))
    (q,) = _drawn(40, (20, 10))
    expected = streaming.stream_attention(q, streaming.drawn_blocks(law, SEED, 0, 40_000, torch.float64), [40_000])[0]
    q = q.float().to(place)

    def part(start: int, stop: int) -> streaming.Partial:
        blocks = streaming.drawn_blocks(law, SEED, start, stop, torch.float32, place)
        (state,) = streaming.stream_states(q, blocks, [stop - start])
        return state

    merged = streaming.merge(part(0, 23_456), part(23_456, 40_000))
    yield _row("two streams of keys", "-", torch.float32, merged.output, expected)
    if place.type == "cuda":
        queues = [torch.cuda.Stream(place) for _ in range(2)]
        states = []
        for queue, ends in zip(queues, ((0, 23_456), (23_456, 40_000))):
            queue.wait_stream(torch.cuda.current_stream(place))
            with torch.cuda.stream(queue):
                states.append(part(*ends))
        torch.cuda.synchronize(place)
        yield _row("two queues of work", "-", torch.float32, streaming.merge(*states).output, expected)


def _sweeps(place: torch.device) -> Iterator[tuple]:
    """Errors of a sweep, in d = 7 and, by the table of the map, in one dimension."""
    for dim, precisions in ((7, (torch.float64, torch.float32)), (1, (torch.float64,))):
        A, V = random_head(dim, SEED)
        law = Gaussian(torch.eye(dim, dtype=torch.float64))
        options = {"V": V, "scales": [0.5, 2.0], "lengths": [20, 150, 700]}
        expected = sweeps.MomentSweep(law, A, device="cpu", **options).table(2, SEED)
        for dtype in precisions:
            found = sweeps.MomentSweep(law, A, device=place, dtype=dtype, **options).table(2, SEED)
            for error in ("mean_error", "cov_error"):
                values = (torch.tensor(table[error].tolist()) for table in (found, expected))
                yield _row(f"sweep, {error}", f"d = {dim}", dtype, *values)
