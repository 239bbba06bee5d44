"""Benchmarks of streaming attention against the plain algorithm, PyTorch's fused attention and KeOps, side by side.

Every comparison runs its variants in turn, again and again, and takes medians over the rounds: on a shared machine what
slows one variant slows them all. The parts, and what is compared in each:

- ``moments``: a sweep of self-attention moments over lengths; each length anew, or all in one pass.
- ``attention``: few queries over many keys.
- ``rate``: floating-point operations per second, as a share of what a matrix product reaches in the same rounds.
- ``memory``: peak memory of a process, against the number of keys.
- ``ranks``: keys shared out over two processes.
- ``precision``: how far half and single precision move the *errors* that a sweep estimates.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from tokcx_lib import records, runtime
from tokcx_lib.sampling import distributed
from tokcx_lib.sampling.forms import random_head
from tokcx_lib.sampling.streaming import (
    drawn_blocks,
    partial_attention,
    prefix_attention,
    self_attention_moments,
    stream_attention,
)
from tokcx_lib.theory.laws import Gaussian
from tokcx_lib.theory.limits import Moments, gaussian_limit

SEED = 4_004
VARIANCE = 0.1
THERE = 2**20  # keys drawn at once on a GPU
SAFE = 0.01  # a precision is safe as long as it changes the estimated errors by no more than this share of them
FULL = {
    "dim": 50,
    "rounds": 5,
    "moments": {"lengths": [500, 681, 928, 1265, 1723, 2347, 3197, 4355, 5932, 8081, 11_009, 15_000], "stack": 12},
    "attention": {"queries": 512, "keys": [10**5, 10**6, 10**7], "slow_keys": 10**6},
    "rate": {"dims": [32, 50, 64, 128], "tokens": 8192, "product": 2048},
    "memory": {"queries": 64, "dim": 16, "keys": [10**5, 10**6, 10**7, 10**8], "held": 10**7, "plain": 10**6},
    "ranks": {"queries": 512, "keys": 10**6},
    "precision": {"scales": [0.5, 5.0, 50.0], "lengths": [300, 1000, 3000, 10_000, 30_000], "replicates": 4},
}
QUICK = {
    "dim": 50,
    "rounds": 2,
    "moments": {"lengths": [50, 100, 200], "stack": 2},
    "attention": {"queries": 16, "keys": [1000, 10_000], "slow_keys": 1000},
    "rate": {"dims": [50], "tokens": 256, "product": 256},
    "memory": {"queries": 8, "dim": 4, "keys": [1000, 100_000], "held": 1000, "plain": 1000},
    "ranks": {"queries": 8, "keys": 10_000},
    "precision": {"scales": [5.0], "lengths": [50, 100], "replicates": 2},
}
# What a GPU needs to be busy, and has the memory for. Its keys that are only streamed are drawn where they are read.
GPU = {
    **FULL,
    "moments": {
        "lengths": [2000, 2724, 3711, 5055, 6886, 9379, 12_776, 17_404, 23_706, 32_292, 43_987, 60_000],
        "stack": 12,
    },
    "attention": {"queries": 16_384, "keys": [10**5, 10**6, 10**7], "slow_keys": 10**5},
    "rate": {"dims": [32, 50, 64, 128], "tokens": 65_536, "product": 8192},
    "memory": {"queries": 64, "dim": 16, "keys": [10**6, 10**8, 10**9], "held": 10**8, "plain": 10**8},
}
SIZES = {"full": FULL, "quick": QUICK}


def run(profile: str = "quick", device=None, only: list[str] | None = None, path=None) -> Path:
    """Run the benchmarks and write the record ``benchmarks`` (``benchmarks_cuda`` on a GPU).

    Parameters
    ----------
    profile : ``full``, or ``quick`` (tiny sizes, which show that it works and nothing else).
    only : names of parts; default all. Where the folder has a record from the same device, profile and versions, its
        other parts are kept, and it says under ``renewed`` which parts were measured later, and from which commit.
    path : folder of the record.

    Returns
    -------
    Path of the table. Its columns: part; variant; setting (what else was fixed); size (keys or tokens); quantity; value
    (median over the rounds); low, high (least and largest); unit.

    Raises
    ------
    ValueError
        If a part, the profile or the device is unknown.
    """
    chosen = list(PARTS) if only is None else list(only)
    for name in chosen:
        if name not in PARTS:
            raise ValueError(f"only: expected some of {', '.join(PARTS)}, got {name!r}")
    if profile not in SIZES:
        raise ValueError(f"profile: expected one of {', '.join(SIZES)}, got {profile!r}")
    place = runtime.device(device)
    made = records.provenance(place)
    start = time.perf_counter()
    sizes = GPU if profile == "full" and place.type == "cuda" else SIZES[profile]
    rows, notes = [], []
    for name in tqdm(chosen, desc="benchmarks", disable=None):
        found, more = PARTS[name](sizes, place)
        rows += [{"part": name, **row} for row in found]
        notes += more
    meta = {
        **made,
        "profile": profile,
        "sizes": {name: sizes[name] for name in chosen},
        "rounds": sizes["rounds"],
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "notes": notes,
        "wall_seconds": round(time.perf_counter() - start, 1),
    }
    name = "benchmarks" if place.type == "cpu" else f"benchmarks_{place.type}"
    table = pd.DataFrame(rows)
    if only is not None and (Path(records.folder(path)) / f"{name}.json").is_file():
        table, meta = _renewed(records.load(name, path), table, meta)
    return records.save(name, table, meta, path)


def _renewed(record: records.Record, table: pd.DataFrame, meta: dict) -> tuple[pd.DataFrame, dict]:
    """A record with some of its parts measured again."""
    old = record.meta
    same = ("device", "versions", "profile", "rounds", "processor", "instructions", "threads")
    if different := [key for key in same if old[key] != meta[key]]:
        raise ValueError(f"only: the record there is of another {', '.join(different)}; choose another folder")
    parts = list(meta["sizes"])
    kept = record.table[~record.table["part"].isin(parts)]
    whole = pd.concat([kept, table])
    whole = whole.sort_values("part", key=lambda column: column.map(list(PARTS).index), kind="stable")
    made = {"commit": meta["commit"], "created": meta["created"]}
    meta = {
        **old,
        "sizes": {**old["sizes"], **meta["sizes"]},
        "notes": list(dict.fromkeys(old["notes"] + meta["notes"])),
        "wall_seconds": round(old["wall_seconds"] + meta["wall_seconds"], 1),
        "renewed": {**old.get("renewed", {}), **{part: made for part in parts if part in old["sizes"]}},
    }
    return whole, meta


def _processor() -> str:
    """The processor's own name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _row(variant: str, size: int, quantity: str, values: list[float], unit: str, setting: str = "-") -> dict:
    return {
        "variant": variant,
        "setting": setting,
        "size": size,
        "quantity": quantity,
        "value": median(values),
        "low": min(values),
        "high": max(values),
        "unit": unit,
    }


def _race(variants: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each variant in each round. They take turns; the first round, which also warms up, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, call in variants.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ratios(seconds: dict[str, list[float]], size: int, setting: str = "-") -> list[dict]:
    """Time of every other variant over ours, round by round."""
    return [
        _row(name, size, "time over ours", [a / b for a, b in zip(values, seconds["ours"])], "ratio", setting)
        for name, values in seconds.items()
        if name != "ours"
    ]


def _timed(seconds: dict[str, list[float]], size: int, setting: str = "-") -> list[dict]:
    rows = [_row(name, size, "time", values, "s", setting) for name, values in seconds.items()]
    return rows + _ratios(seconds, size, setting)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What everybody writes first: all logits, all weights."""
    return torch.softmax(q @ k.mT, -1) @ v


def _fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own attention, which takes the same kernels but gives no log-sum-exp."""
    return scaled_dot_product_attention(q[None, None], k[None, None], v[None, None], scale=1.0)[0, 0]


def _keops_attention():
    """Attention as a softmax reduction of KeOps (None if it is not installed), and what the record says of it."""
    try:
        import pykeops
        from pykeops.torch import LazyTensor
    except ImportError as error:
        return None, f"KeOps was not run: {error} (requirements/bench.txt has it)."

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = (LazyTensor(q[:, None]) * LazyTensor(k[None])).sum(-1)
        return logits.sumsoftmaxweight(LazyTensor(v[None]), dim=1)

    return attend, f"KeOps {pykeops.__version__}."


def _each_length(attend: Callable, x: Tensor, A: Tensor, V: Tensor, lengths: list[int]) -> Moments:
    """The plain algorithm for a sweep: attention over the first n tokens from nothing, for each n."""
    means, covs = [], []
    for n in lengths:
        y = x[:n]
        outputs = attend(y @ A.mT, y, y @ V.mT)
        means.append(outputs.mean(0))
        covs.append(torch.cov(outputs.mT, correction=0))
    return Moments(torch.stack(means), torch.stack(covs))


def _blocks(start: int, stop: int, dim: int, device, dtype=torch.float32, replicate: int = 0):
    """Tokens N(0, VARIANCE I), block by block."""
    law = Gaussian(VARIANCE * torch.eye(dim, dtype=torch.float64))
    return drawn_blocks(law, SEED + replicate, start, stop, dtype, device)


def _tokens(count: int, dim: int, device, dtype=torch.float32, replicate: int = 0) -> Tensor:
    return torch.cat([block for block, _ in _blocks(0, count, dim, device, dtype, replicate)])


def _operations(pairs: int, dim: int) -> int:
    """Of attention: 2 d for a logit and 2 d for its share of the output. The softmax itself is not counted."""
    return 4 * dim * pairs


def moments(sizes: dict, device: torch.device) -> tuple[list[dict], list[str]]:
    """One pass over all lengths against each length from nothing: tokens N(0, 0.1 I), d = 50, random head."""
    lengths, dim = sizes["moments"]["lengths"], sizes["dim"]
    A, V = (matrix.float().to(device) for matrix in random_head(dim, SEED))
    x = _tokens(lengths[-1], dim, device)
    seconds = _race(
        {
            "ours": lambda: self_attention_moments(x, A, V, lengths),
            "fused, each length": lambda: _each_length(_fused_attention, x, A, V, lengths),
            "plain, each length": lambda: _each_length(_plain_attention, x, A, V, lengths),
        },
        sizes["rounds"],
        device,
    )
    rows = _timed(seconds, lengths[-1], f"{len(lengths)} lengths from {lengths[0]}")
    half = lengths[: len(lengths) // 2]
    y, stack = x[: half[-1]], torch.stack([A * scale for scale in range(1, sizes["moments"]["stack"] + 1)])
    seconds = _race(
        {
            "ours": lambda: self_attention_moments(y, stack, V, half),
            "one form at a time": lambda: [self_attention_moments(y, form, V, half) for form in stack],
            "fused, each length": lambda: [_each_length(_fused_attention, y, form, V, half) for form in stack],
            "plain, each length": lambda: [_each_length(_plain_attention, y, form, V, half) for form in stack],
        },
        sizes["rounds"],
        device,
    )
    return rows + _timed(seconds, half[-1], f"{len(half)} lengths from {half[0]}, {len(stack)} forms"), []


def attention(sizes: dict, device: torch.device) -> tuple[list[dict], list[str]]:
    """A few hundred queries over up to ten million keys."""
    wanted, rows = sizes["attention"], []
    keops, note = _keops_attention()
    x = _tokens(wanted["keys"][-1], sizes["dim"], device)
    q = _tokens(wanted["queries"], sizes["dim"], device, replicate=1)
    for n in wanted["keys"]:
        k = x[:n]
        variants = {
            "ours": lambda: prefix_attention(q, k, k, [n])[0],
            "fused": lambda: _fused_attention(q, k, k),
        }
        if n <= wanted["slow_keys"]:
            variants["plain"] = lambda: _plain_attention(q, k, k)
            if keops:
                variants["KeOps"] = lambda: keops(q, k, k)
        rows += _timed(_race(variants, sizes["rounds"], device), n, f"{len(q)} queries")
    return rows, [note]


def rate(sizes: dict, device: torch.device) -> tuple[list[dict], list[str]]:
    """Operations per second of the kernel, and of a whole sweep, against a large matrix product in float32.

    On a GPU there is a second yardstick, the same product in tf32.
    """
    wanted, rows = sizes["rate"], []
    side, lengths = wanted["product"], sizes["moments"]["lengths"]
    square = torch.randn(side, side, generator=runtime.stream(SEED)).to(device)
    for dim in wanted["dims"]:
        x = _tokens(max(wanted["tokens"], lengths[-1]), dim, device)
        y = x[: wanted["tokens"]]
        A, V = (matrix.float().to(device) for matrix in random_head(dim, SEED))
        variants = {
            "matrix product": (lambda: torch.mm(square, square), 2 * side**3),
            "kernel": (lambda: partial_attention(y, y, y), _operations(len(y) ** 2, dim)),
            "moments": (lambda: self_attention_moments(x, A, V, lengths), _operations(lengths[-1] ** 2, dim)),
        }
        if device.type == "cuda":
            variants["matrix product, tf32"] = (lambda: _in_tf32(torch.mm, square, square), 2 * side**3)
        seconds = _race({name: call for name, (call, _) in variants.items()}, sizes["rounds"], device)
        rates = {name: [variants[name][1] / s / 1e9 for s in values] for name, values in seconds.items()}
        size = {"matrix product": side, "matrix product, tf32": side, "kernel": len(y), "moments": lengths[-1]}
        # The yardstick is the best product of the rounds: what the unit can do when nothing is in its way.
        best = max(rates["matrix product"])
        for name, values in rates.items():
            rows.append(_row(name, size[name], "rate", values, "GFLOP/s", f"d = {dim}"))
            if not name.startswith("matrix product"):
                shares = [value / best for value in values]
                rows.append(_row(name, size[name], "share of the matrix product", shares, "ratio", f"d = {dim}"))
    return rows, []


def memory(sizes: dict, device: torch.device) -> tuple[list[dict], list[str]]:
    """Peak memory of a fresh process: keys that are streamed, that are held, and with all logits."""
    wanted = sizes["memory"]
    most = {"ours, streamed": wanted["keys"][-1], "ours, held": wanted["held"], "plain": wanted["plain"]}
    rows = []
    for n in wanted["keys"]:
        for variant in most:
            if n <= most[variant]:
                task = {"variant": variant, "keys": n, "queries": wanted["queries"], "dim": wanted["dim"]}
                (found,) = _child("memory", task, device)
                setting = f"{wanted['queries']} queries, d = {wanted['dim']}"
                rows += [
                    _row(variant, n, "peak memory", [found["megabytes"]], "MB", setting),
                    _row(variant, n, "time", [found["seconds"]], "s", setting),
                ]
    return rows, []


def _memory_child(task: dict, device: torch.device) -> dict:
    q = _tokens(task["queries"], task["dim"], device, replicate=1)
    start = time.perf_counter()
    blocks = _drawn_there(task["keys"], task["dim"], device)
    if task["variant"] == "ours, streamed":
        stream_attention(q, blocks, [task["keys"]])
    else:
        k = torch.empty(task["keys"], task["dim"], device=device)
        filled = 0
        for block, _ in blocks:
            k[filled : filled + len(block)] = block
            filled += len(block)
        if task["variant"] == "ours, held":
            prefix_attention(q, k, k, [len(k)])
        else:
            _plain_attention(q, k, k)
    _wait(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    return {"megabytes": peak / 1e6, "seconds": seconds}


def _drawn_there(count: int, dim: int, device: torch.device):
    """`_blocks`; on a GPU draws of its own, since the CPU takes minutes to draw for it what it reads in seconds."""
    if device.type != "cuda":
        yield from _blocks(0, count, dim, device)
        return
    torch.manual_seed(SEED)
    for start in range(0, count, THERE):
        block = VARIANCE**0.5 * torch.randn(min(THERE, count - start), dim, device=device)
        yield block, block


def peak_memory() -> int:
    """Most bytes that this process has held at once.

    On Linux from the kernel's account of the process's own memory. What `getrusage` gives there is inherited from the
    process that started this one, and so at least as large as that.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def ranks(sizes: dict, device: torch.device) -> tuple[list[dict], list[str]]:
    """The same keys read by one process and by two, each with one thread (or one GPU) of its own."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        return [], ["Two ranks were not run: they want a GPU each."]
    task = {**sizes["ranks"], "dim": sizes["dim"]}
    results: dict[int, list[list[dict]]] = {1: [], 2: []}
    for _ in range(sizes["rounds"]):
        for count, found in results.items():
            found.append(_child("ranks", task, device, count))
    seconds = {count: [max(r["seconds"] for r in each) for each in found] for count, found in results.items()}
    first = torch.tensor(results[1][0][0]["output"], dtype=torch.float64)
    differences = [
        ((torch.tensor(r["output"], dtype=torch.float64) - first).norm() / first.norm()).item()
        for each in results[2]
        for r in each
    ]
    n, setting = task["keys"], f"{task['queries']} queries"
    return [
        _row("1 rank", n, "time", seconds[1], "s", setting),
        _row("2 ranks", n, "time", seconds[2], "s", setting),
        _row("2 ranks", n, "gain", [a / b for a, b in zip(seconds[1], seconds[2])], "ratio", setting),
        _row("2 ranks", n, "relative difference", differences, "ratio", setting),
    ], []


def _ranks_child(task: dict, device: torch.device) -> dict:
    if device.type == "cuda":
        device = torch.device("cuda", distributed.local_rank())
    q = _tokens(task["queries"], task["dim"], device, replicate=1)
    # Each rank holds the keys it will be asked for, so that the race is about attention alone.
    share = [task["keys"] * part // distributed.world() for part in (distributed.rank(), distributed.rank() + 1)]
    held = torch.cat([block for block, _ in _blocks(*share, task["dim"], device)])

    def blocks(start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        return [(held[start - share[0] : stop - share[0]],) * 2]

    distributed.sharded_attention(q, blocks, [task["keys"]])  # the first call also makes the connections
    distributed.barrier()
    begin = time.perf_counter()
    output = distributed.sharded_attention(q, blocks, [task["keys"]])
    _wait(device)
    return {"seconds": time.perf_counter() - begin, "output": output[0].double().cpu().tolist()}


def _child(kind: str, task: dict, device: torch.device, count: int = 1) -> list[dict]:
    """Run a task in `count` fresh processes; what each of them found."""
    with TemporaryDirectory() as folder:
        task = {"kind": kind, "device": str(device), "folder": folder, **task}
        start = ["-m", "torch.distributed.run", f"--nproc-per-node={count}"] if count > 1 else []
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        if kind == "ranks":
            environment["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, *start, "-m", "tokcx_lib.bench.suite", json.dumps(task)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"benchmark process failed:\n{done.stderr}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]


def _be_child(text: str) -> None:
    task = json.loads(text)
    work = {"memory": _memory_child, "ranks": _ranks_child}[task["kind"]]
    found = work(task, torch.device(task["device"]))
    (Path(task["folder"]) / f"{distributed.rank()}.json").write_text(json.dumps(found))


def precision(sizes: dict, device: torch.device) -> tuple[list[dict], list[str]]:
    """Rounding against sampling: by how much a precision changes the errors |m_n - m| and |C_n - C| of a sweep.

    All precisions see the same tokens, rounded to theirs. A change of the estimated error by 1% of itself is of no
    consequence (SAFE); one of its own size means that the curve shows rounding and no longer the law of large numbers.
    """
    wanted, dim = sizes["precision"], sizes["dim"]
    lengths = wanted["lengths"]
    law = Gaussian(VARIANCE * torch.eye(dim, dtype=torch.float64))
    A, V = random_head(dim, SEED)
    variants = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    rows = []
    for scale in wanted["scales"]:
        form = scale * A
        limit = gaussian_limit(law, form, V)
        changes: dict[tuple[str, str, int], list[float]] = {}
        for replicate in range(wanted["replicates"]):
            x = _tokens(lengths[-1], dim, device, torch.float64, replicate)
            exact = _errors(self_attention_moments(x, form, V, lengths), limit)
            found = {
                name: _errors(self_attention_moments(x.to(dtype), form, V, lengths), limit)
                for name, dtype in variants.items()
            }
            if device.type == "cuda":
                found["tf32"] = _errors(_tf32(x.float(), form, V, lengths), limit)
            for name, errors in found.items():
                for quantity, values in errors.items():
                    for n, value, truth in zip(lengths, values, exact[quantity]):
                        changes.setdefault((name, quantity, n), []).append(abs(value - truth) / truth)
        setting = f"scale {scale:g}"
        for (name, quantity, n), values in changes.items():
            rows.append(_row(name, n, f"change of {quantity}", values, "ratio", setting))
        for name in dict.fromkeys(name for name, _, _ in changes):
            worst = [max(median(changes[name, quantity, n]) for quantity in exact) for n in lengths]
            safe = [n for i, n in enumerate(lengths) if max(worst[: i + 1]) <= SAFE]
            rows.append(_row(name, lengths[-1], "safe up to", [safe[-1] if safe else 0], "tokens", setting))
    return rows, [] if device.type == "cuda" else ["tf32 was not run: it is a precision of GPUs."]


def _errors(moments: Moments, limit: Moments) -> dict[str, list[float]]:
    return dict(zip(("mean_error", "cov_error"), (part.tolist() for part in moments.errors(limit))))


def _tf32(x: Tensor, A: Tensor, V: Tensor, lengths: list[int]) -> Moments:
    """The plain algorithm with matrix products in tf32; the fused kernel for float32 does not use it."""
    return _in_tf32(_each_length, _plain_attention, x, A.to(x), V.to(x), lengths)


def _in_tf32(call: Callable, *arguments):
    """A call whose matrix products of float32 are in tf32, where the device has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return call(*arguments)
    finally:
        torch.set_float32_matmul_precision(before)


PARTS = {part.__name__: part for part in (moments, attention, rate, memory, ranks, precision)}

if __name__ == "__main__":
    _be_child(sys.argv[1])
