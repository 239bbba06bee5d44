"""The command for a GPU, on machines that have none: how parts end, tiny runs, and a GPU that is pretended."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pretend_gpu import KERNELS, aten, flash, pretend_gpu

from tokcx_lib import records, runtime
from tokcx_lib.bench import suite
from tokcx_lib.bench.agreement import agreement
from tokcx_lib.models import loading, token_files, windows
from tokcx_lib.sampling import streaming
from tools.gpu import cells, packs, parts, runner

ROOT = Path(__file__).resolve().parents[1]
RUN = [sys.executable, "-m", "tools.gpu", "run", "--device", "cpu", "--tiny", "--minutes", "14"]


# ---- how parts end ----


def script(name: str, code: str, seconds: float = 60) -> runner.Part:
    return runner.Part(name, [sys.executable, "-c", code], seconds)


WRITES = "open({!r}, 'w').write('found'); print('all is well')"
KILLED = "import os, signal; print('so far'); os.kill(os.getpid(), signal.SIGKILL)"
NO_MEMORY = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28)); bytearray(2**40)"
# Two processes that do not want to end: the part's own and one that it has started.
ENDLESS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """Seven parts: between three that end well one that crashes, is killed, has no memory, has no time."""
    monkeypatch.setattr(runner, "GRACE", 1.0)
    good = [script(name, WRITES.format(str(tmp_path / name / "result.txt"))) for name in ("first", "second", "last")]
    ill = [script("crashes", "1 / 0"), script("killed", KILLED), script("memory", NO_MEMORY)]
    ill += [script("endless", ENDLESS, 12)]
    said: list[str] = []
    found = runner.run_parts([good[0], *ill[:2], good[1], *ill[2:], good[2]], tmp_path, 5, said.append)
    return {each.name: each for each in found}, said


def test_what_goes_wrong_in_one_part_leaves_the_others(ended, tmp_path):
    found, said = ended
    states = {name: each.state for name, each in found.items()}
    assert states == {
        **dict.fromkeys(("first", "second", "last"), "ok"),
        "crashes": "failed",
        "killed": "killed",
        "memory": "out of memory",
        "endless": "out of time",
    }
    assert found["crashes"].note == "ZeroDivisionError: division by zero" and found["killed"].note == "by SIGKILL"
    assert 12 <= found["endless"].seconds < 60
    # What a part has started ends with it.
    child = int((tmp_path / "endless" / "log").read_text())
    status = Path(f"/proc/{child}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"
    # A line of progress as each begins and as it ends, and a summary of all.
    assert len(said) == 14 and re.match(r"killed: killed, \d+ s; 0\.\d of 5 min \(by SIGKILL\)", said[5])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [part["state"] for part in summary["parts"]] == [each.state for each in found.values()]
    # All results travel, and those of parts that went wrong say how far they came.
    runner.unpack_results(sorted(tmp_path.glob("results-*.tar.gz")), tmp_path / "there")
    for name in ("first", "second", "last"):
        assert (tmp_path / "there" / name / "result.txt").read_text() == "found"
    assert (tmp_path / "there" / "killed" / "log").read_text() == "so far\n"


def test_it_ends_within_its_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RESERVE", 1.0)
    monkeypatch.setattr(runner, "GRACE", 1.0)
    monkeypatch.setattr(runner, "LEAST", 2.0)
    sleeper = "import time; time.sleep(600)"
    found = runner.run_parts([script("one", sleeper), script("two", sleeper)], tmp_path, 6 / 60, lambda line: None)
    assert [each.state for each in found] == ["out of time", "not started"] and found[0].seconds < 20
    assert json.loads((tmp_path / "summary.json").read_text())["seconds"] < 25


@pytest.mark.parametrize(
    "said",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 107.29 GiB. GPU 0 has 139 GiB",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_memory_is_named_where_pytorch_says_so(said, tmp_path):
    code = f"import sys; print({said!r}, file=sys.stderr); print('later'); sys.exit(1)"
    found = runner.run_parts([script("a", code), script("b", "print('ok')")], tmp_path, 5, lambda line: None)
    assert [each.state for each in found] == ["out of memory", "ok"] and "allocate" in found[0].note


def test_a_part_that_lacks_something_is_no_failure(tmp_path):
    found = runner.run_parts([script("a", "print('no model'); raise SystemExit(75)")], tmp_path, 5, lambda line: None)
    assert (found[0].state, found[0].note) == ("lacks", "no model")


def test_results_come_back_in_files_of_a_size_that_travels(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ARCHIVE_BYTES", 60_000)
    monkeypatch.setattr(runner, "ARCHIVES", 3)
    noise = np.random.default_rng(0)
    for name in ("a", "b", "c", "d"):
        (tmp_path / name / "x.parts").mkdir(parents=True)
        (tmp_path / name / "log").write_text(name)
        (tmp_path / name / "table.csv").write_bytes(noise.bytes(40_000))
        (tmp_path / name / "x.parts" / "small.csv").write_text("1")
        (tmp_path / name / "x.parts" / "large.npz").write_bytes(noise.bytes(runner.LARGE_CHECKPOINT + 1))
    written = runner.pack_results(tmp_path)
    assert len(written) == 3 and all(path.stat().st_size <= 60_000 for path in written)
    runner.unpack_results(written, tmp_path / "there")
    for name in ("a", "b", "c"):
        assert (tmp_path / "there" / name / "table.csv").read_bytes() == (tmp_path / name / "table.csv").read_bytes()
        assert (tmp_path / "there" / name / "x.parts" / "small.csv").is_file()
    left = (tmp_path / "left-out.txt").read_text().split()
    assert set(left) == {*(f"{name}/x.parts/large.npz" for name in "abcd"), "d/table.csv"}


def test_an_unknown_part_is_named(tmp_path, capsys):
    from tools.gpu.__main__ import main

    assert main(["run", "--out", str(tmp_path), "--parts", "smoke,toast"]) == 2
    assert re.search("parts: expected some of smoke, .*, got toast", capsys.readouterr().err)


# ---- tiny runs on the CPU ----


def test_every_part_runs_tiny(tmp_path):
    done = subprocess.run([*RUN, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=900)
    summary = json.loads((tmp_path / "summary.json").read_text())
    states = {part["name"]: part["state"] for part in summary["parts"]}
    notes = {part["name"]: part["note"] for part in summary["parts"]}
    assert done.returncode == 0 and set(states) == set(parts.PARTS), (done.stdout, done.stderr)
    assert states.pop("loss") in ("ok", "lacks") and states.pop("chapter_14") in ("ok", "lacks")
    assert set(states.values()) == {"ok"}, (states, notes)
    table = pd.read_csv(tmp_path / "smoke" / "agreement.csv")
    assert table["agrees"].all() and {"float32", "bfloat16", "float16"} <= set(table["precision"])
    assert {"kernel, lse", "prefixes", "two streams of keys", "sweep, cov_error", "probe, load"} <= set(table["check"])
    bench = records.load("benchmarks", tmp_path / "benchmarks")
    assert set(bench.table["part"]) == {"moments", "attention", "rate", "memory", "precision"}
    assert "renewed" not in bench.meta or not bench.meta["renewed"]
    sweep = records.load("gaussian_horizon", tmp_path / "gaussian_horizon")
    assert sweep.meta["replicates"] == 3 and len(sweep.meta["heads"]) == 12
    beside = pd.read_csv(tmp_path / "gaussian_horizon" / "gaussian_horizon_beside.csv")
    assert len(beside) == 24 and beside[["exponent", "exponent_book", "within"]].notna().all().all()
    maps = records.load("real_heads_maps_long", tmp_path / "heads_maps").table
    assert len(maps[["layer", "head"]].drop_duplicates()) == 72
    probed = records.load("language_model_heads_probe", tmp_path / "language_model")
    assert len(probed.table) == 9 and probed.meta["windows"] == 2 and "keys_first_latest" in probed.table
    for number in (3, 5, 7, 9):
        found = json.loads((tmp_path / f"chapter_{number:02d}" / "chapter.json").read_text())
        assert not found["quick"]["failed"] and len(found["quick"]["cells"]) == 4


# ---- a pretended GPU: every branch for CUDA, with numbers ----


def test_all_paths_agree_on_the_pretended_gpu():
    with pretend_gpu() as used:
        table = agreement("cuda:0")
    assert table["agrees"].all(), table[~table["agrees"]]
    assert "two queues of work" in set(table["check"])
    for kernel in ("efficient", "flash"):
        assert used[f"aten._scaled_dot_product_{kernel}_attention.default"] > 20


@pytest.mark.parametrize("wrong", ["scale", "lse", "row"])
def test_a_kernel_that_is_wrong_is_noticed(wrong, monkeypatch):
    def spoiled(q, k, v, *rest, scale=None):
        output, lse, *others = flash(q, k, v, scale=1.03 * scale if wrong == "scale" else scale)
        if wrong == "lse":
            lse = lse + 0.03
        if wrong == "row":
            output[..., -1, :] = output[..., 0, :]
        return output, lse, *others

    monkeypatch.setitem(KERNELS, aten._scaled_dot_product_flash_attention.default, spoiled)
    with pretend_gpu():
        table = agreement("cuda:0")
    bad = table[~table["agrees"]]
    assert len(bad) > 5 and set(bad["precision"]) <= {"bfloat16", "float16"}


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    x = torch.ones(4, 3)
    with pretend_gpu():
        y = x.to("cuda:0")
        with pytest.raises(RuntimeError, match="same device"):
            x + y
        with pytest.raises(TypeError, match="can't convert cuda"):
            y.numpy()
        with pytest.raises(RuntimeError, match="indices should be either on cpu"):
            x[torch.tensor([1], device="cuda:0")]
        with pytest.raises(RuntimeError, match="misaligned"):
            wide = torch.ones(1, 1, 4, 9, device="cuda:0")[..., 1:]
            aten._scaled_dot_product_efficient_attention(wide, wide, wide, None, True, scale=1.0)
        with pytest.raises(RuntimeError, match="at most 256"):
            large = torch.ones(1, 1, 4, 264, device="cuda:0", dtype=torch.bfloat16)
            aten._scaled_dot_product_flash_attention(large, large, large, scale=1.0)
        assert (2 * y).device == torch.device("cuda", 0) and y[torch.tensor([1])].tolist() == [[1.0] * 3]
        assert (y.cpu() + x).tolist() == (2 * x).tolist() and (y + torch.tensor(1.0)).sum().item() == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel, more", [("efficient", (None, True)), ("flash", ())])
def test_the_pretended_kernels_answer_in_the_shapes_of_pytorchs_own(kernel, more, dtype):
    if kernel == "flash" and dtype == torch.float32:
        return  # it has none
    call = getattr(aten, f"_scaled_dot_product_{kernel}_attention").default
    shapes = (1, 3, 37, 16), (1, 3, 50, 16), (1, 3, 50, 16)
    real = call(*(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes), *more, scale=1.0)
    ours = KERNELS[call](*(torch.ones(shape, dtype=dtype) for shape in shapes), *more, scale=1.0)
    assert len(real) == len(ours)
    for one, other in zip(real[:2], ours[:2]):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_rows_that_do_not_begin_where_cuda_reads_are_copied():
    with pretend_gpu():
        x = torch.randn(20, 11, device="cuda:0")
        for y in (x[:, 3:11], x[::2, :8]):
            found = streaming.partial_attention(y, y, y).output
            z = y.cpu().double()
            assert torch.allclose(found.cpu().double(), torch.softmax(z @ z.T, -1) @ z, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["benchmarks", "gaussian_horizon", "sphere_horizon"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("smoke", "heads_maps", "heads_moments", "language_model")
    ],
)
def test_parts_run_on_the_pretended_gpu(name, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "_child", lambda kind, task, device: [suite._memory_child(task, device)])
    monkeypatch.delenv("TOKCX_DATA", raising=False)
    with pretend_gpu() as used:
        parts.PARTS[name].do(runtime.device("cuda:0"), tmp_path, True)
    assert sum(used.values()) > 500
    made = {path.stem for path in tmp_path.glob("*.json")}
    assert name == "smoke" or made and all(each.endswith("_cuda") for each in made)
    for each in made:
        assert records.load(each, tmp_path).meta["device"] == "a GPU that is none"


# ---- what travels ----


def test_packs_hold_what_was_packed_whatever_their_order(tmp_path):
    noise = np.random.default_rng(1)
    made = []
    for purpose, size in (("heads", 50_000), ("language", 30_000)):
        folder = tmp_path / purpose / "site" / purpose
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(noise.bytes(size))
        made.append(tmp_path / f"{purpose}.tar.gz")
        subprocess.run(["tar", "czf", str(made[-1]), "-C", str(tmp_path / purpose), "site"], check=True)
    folders = packs.cut(made, tmp_path / "packs", 24_000)
    assert len(folders) == 4
    assert all(sum(f.stat().st_size for f in folder.glob("*.gz.*")) <= 24_000 for folder in folders)
    for folder in (folders[2], folders[0], folders[3], folders[1]):
        said = packs.unpack(folder, tmp_path / "there")
    assert "unpacked" in said[-1]
    for purpose in ("heads", "language"):
        here, there = (tmp_path / place / "site" / purpose / "weights" for place in (purpose, "there"))
        assert here.read_bytes() == there.read_bytes()
    spoiled = next(folders[0].glob("*.gz.*"))
    spoiled.write_bytes(b"0" + spoiled.read_bytes()[1:])
    with pytest.raises(ValueError, match="expected sha256"):
        for folder in folders:
            packs.unpack(folder, tmp_path / "elsewhere")


def test_ids_in_a_file_stand_for_the_text(tmp_path, monkeypatch):
    model = loading.load_model("minilm", "cpu")
    ids = np.arange(1000, 1000 + 20 * 254) % 30_000
    path = token_files.write_ids(tmp_path, "wikipedia-en", model, ids, {"a text": "0" * 64})
    assert path.stat().st_size < 2 * len(ids) + 2000
    monkeypatch.setenv("TOKCX_DATA", str(tmp_path))
    found, texts = windows.wikipedia_windows(model, 20 * 254, 3)
    assert texts == {"a text": "0" * 64} and sorted(found.tolist()) == sorted(ids.tolist())
    for spoil, message in (
        ({"sha256": "1"}, "expected token ids of sha256 1"),
        ({"model_sha256": "2"}, "got .* for 2"),
    ):
        content = {**dict(np.load(path)), "about": None}
        about = {"sha256": token_files._digest(ids), "model_sha256": model.sha256, "texts": {}, **spoil}
        np.savez(tmp_path / "x.npz", ids=content["ids"], about=np.array(json.dumps(about)))
        (tmp_path / "x.npz").replace(path)
        with pytest.raises(ValueError, match=message):
            token_files.find_ids("wikipedia-en", model)
    path.write_bytes(b"no ids")
    with pytest.raises(ValueError, match="what cannot be read"):
        token_files.find_ids("wikipedia-en", model)
    with pytest.raises(ValueError, match="ids: expected numbers"):
        token_files.write_ids(tmp_path, "t", model, np.array([70_000]), {})


def test_records_of_a_run_come_into_the_book(tmp_path, monkeypatch):
    part = tmp_path / "out" / "sweep"
    table = pd.DataFrame({"n": [1, 2], "error": [0.5, 0.25]})
    records.save("sweep_cuda", table, {"device": "NVIDIA H200", "commit": "unknown"}, part)
    records.save("sweep", table, {}, part)
    (part / "log").write_text("")
    for ran, commit in (("other code", "unknown"), (packs.source_digest(), "a" * 40)):
        (part / "code.sha256").write_text(ran + "\n")
        monkeypatch.setattr(records, "_commit", lambda: "a" * 40)
        packs.collect(runner.pack_results(tmp_path / "out"), tmp_path / "book")
        assert [path.stem for path in (tmp_path / "book").glob("*.json")] == ["sweep_cuda"]
        assert records.load("sweep_cuda", tmp_path / "book").meta["commit"] == commit


# ---- chapters without Jupyter ----


def test_cells_run_in_turn_and_are_compared_with_what_is_stored(tmp_path):
    stored = [("x = 1\nprint('device: cpu, profile: quick')\n", "device: none, profile: full\n"), ("print(x)", "2\n")]
    stored += [("1 / 0", ""), ("print(x + 1)", "2\n")]
    book = {"cells": [{"cell_type": "markdown", "source": "text"}]}
    for code, text in stored:
        output = {"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}
        book["cells"].append({"cell_type": "code", "source": code.splitlines(keepends=True), "outputs": [output]})
    (tmp_path / "a.ipynb").write_text(json.dumps(book))
    assert cells.code_cells(tmp_path / "a.ipynb") == stored
    found = cells.run_cells(stored, {})
    assert [each["same"] for each in found] == [True, False, True, True]
    assert found[1]["difference"][-2:] == ["-2", "+1"] and found[2]["error"] == "ZeroDivisionError: division by zero"


def test_figures_can_be_drawn_where_there_is_no_ipython(tmp_path):
    """matplotlib asks an IPython that it finds for its version: the stand-in has one."""
    code = (
        "import importlib.util, sys\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name in ('IPython', 'myst_nb') else found(name)\n"
        "from tools.gpu.cells import stand_ins\n"
        "stand_ins()\n"
        "import matplotlib\n"
        "matplotlib.use('agg')\n"
        "import matplotlib.pyplot as plt\n"
        "plt.subplots()\n"
        "from IPython.display import display\n"
        "from myst_nb import glue\n"
        "display(1), glue('a', 1)\n"
        "import inspect\n"
        "inspect.getmodule(inspect.currentframe())\n"  # asks all modules for their file
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
