"""Runs in units: killed, resumed, extended, shared out and verified, the table is that of one uninterrupted run."""

import errno
import fcntl
import importlib
import json
import os
import pkgutil
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tokcx_lib import cli, records, runtime, studies
from tokcx_lib.sampling import sweeps
from tokcx_lib.studies import registry, runs
from tokcx_lib.studies.registry import EXPERIMENTS
from tokcx_lib.theory import laws, limits

ROOT = Path(__file__).resolve().parent.parent


def plan(config, device):
    """Errors of self-attention in d = 2, with the error of the second moment kept beside the rows."""
    law = laws.Gaussian(torch.eye(2, dtype=torch.float64))
    heads = sweeps.MomentSweep(law, torch.eye(2), [20, 40], scales=[0.5, 1.0])

    def work(replicate):
        time.sleep(config["pause"])
        table, second = heads.errors(replicate, config["seed"])
        return runs.Part(table, {"second": second.flatten(-2).numpy()})

    def finish(table, arrays):
        dots = sweeps.leave_one_out(np.stack([each["second"] for each in arrays]))
        return table.assign(second_dot=dots.reshape(-1))

    def summary(arrays):
        return {"largest": max(float(np.abs(each["second"]).max()) for each in arrays)}

    return runs.Plan([(r,) for r in range(config["replicates"])], work, {"law": "N(0, I)"}, finish, summary)


SMALL = runs.Experiment(plan, ("replicate",), {"replicates": 12, "seed": 3, "pause": 0.0}, {"replicates": 3})


def table_of(path):
    return Path(path).read_bytes()


def test_every_study_with_experiments_is_in_the_registry():
    found = {}
    for module in pkgutil.walk_packages(studies.__path__, "tokcx_lib.studies."):
        if not module.name.endswith((".registry", ".runs")):
            found |= getattr(importlib.import_module(module.name), "EXPERIMENTS", {})
    assert found == EXPERIMENTS


def test_a_run_makes_a_record_that_verifies(tmp_path):
    path = runs.run("small", SMALL, path=tmp_path)
    table, meta = records.load("small", tmp_path)
    assert len(table) == 12 * 2 * 2 and meta["units"] == meta["replicates"] == 12 and meta["law"] == "N(0, I)"
    assert meta["config"] == SMALL.full and meta["largest"] > 0 and meta["wall_seconds"] >= 0 and "sessions" not in meta
    assert set(records.REQUIRED) <= set(meta)
    verified = runs.verify("small", SMALL, path=tmp_path)
    assert len(verified.units) == 5 and verified.difference < 1e-5
    assert len(runs.verify("small", SMALL, path=tmp_path, budget=0).units) == 1
    assert runs.verify("small", None, path=tmp_path).units == []
    before = table_of(path)
    assert table_of(runs.run("small", SMALL, path=tmp_path)) == before  # a finished run may be run anew
    quick = runs.run("quick", SMALL, "quick", path=tmp_path)
    assert len(pd.read_csv(quick)) == 3 * 4


def test_more_replicates_keep_those_that_are_there(tmp_path):
    whole = table_of(runs.run("small", SMALL, path=tmp_path / "whole"))
    runs.run("small", SMALL, replicates=5, path=tmp_path / "grown")
    kept = (tmp_path / "grown" / "small.parts" / "3.csv").stat().st_mtime_ns
    grown = runs.run("small", SMALL, resume=True, path=tmp_path / "grown")
    assert table_of(grown) == whole and records.load("small", tmp_path / "grown").meta["replicates"] == 12
    assert (tmp_path / "grown" / "small.parts" / "3.csv").stat().st_mtime_ns == kept
    fewer = runs.run("small", SMALL, replicates=4, resume=True, path=tmp_path / "grown")
    assert pd.read_csv(fewer)["replicate"].max() == 3


def test_what_does_not_fit_is_refused(tmp_path):
    runs.run("small", SMALL, replicates=3, path=tmp_path)
    parts = tmp_path / "small.parts"
    with pytest.raises(ValueError, match="resume: .* another seed"):
        runs.run("small", SMALL._replace(full={**SMALL.full, "seed": 4}), resume=True, path=tmp_path)
    state = json.loads((parts / "run.json").read_text())
    (parts / "run.json").write_text(json.dumps({**state, "finished": False}))
    with pytest.raises(ValueError, match="run: .* 3 units of an unfinished run; resume it"):
        runs.run("small", SMALL, path=tmp_path)
    (parts / "1.csv").write_text((parts / "1.csv").read_text().replace("0.5,1,20,0", "0.5,1,20,1"))
    with pytest.raises(ValueError, match="record 'small': its checkpoint .*1.csv was damaged"):
        runs.run("small", SMALL, replicates=3, resume=True, path=tmp_path)
    (parts / "1.csv").unlink()
    (parts / "0.npz").write_bytes((parts / "0.npz").read_bytes()[:-1])
    with pytest.raises(ValueError, match="0.csv was damaged"):
        runs.run("small", SMALL, replicates=3, resume=True, path=tmp_path)
    with pytest.raises(ValueError, match="profile: expected one of quick, full, got 'huge'"):
        SMALL.config("huge")
    with pytest.raises(ValueError, match="replicates: expected"):
        SMALL.config("full", 0)
    with pytest.raises(ValueError, match="replicates: this experiment has no"):
        EXPERIMENTS["real_heads_sinks"].config("full", 3)
    wrong = SMALL._replace(
        plan=lambda config, device: runs.Plan([(7,)], lambda r: runs.Part(plan(config, device).work(1).table))
    )
    with pytest.raises(ValueError, match="expected replicate = 7"):
        runs.run("wrong", wrong, path=tmp_path)


@pytest.mark.parametrize("column, change", [("mean_error", 1.01), ("n", 2), ("scale", 1.5)])
def test_numbers_that_were_not_measured_are_found_by_running_units_again(tmp_path, column, change):
    """A table edited together with its checksum: only a second measurement tells."""
    runs.run("small", SMALL, path=tmp_path)
    table, meta = records.load("small", tmp_path)
    table[column] = table[column] * change
    records.save("small", table, meta, tmp_path)
    records.verify("small", tmp_path)
    with pytest.raises(ValueError, match=f"record 'small': unit .*{column}"):
        runs.verify("small", SMALL, path=tmp_path)


def test_a_record_made_on_another_text_is_refused_before_units_are_compared(tmp_path):
    def on(**texts):
        return SMALL._replace(plan=lambda config, device: plan(config, device)._replace(meta={"texts": texts}))

    def other_numbers(config, device):
        return on(novel="aa11").plan({**config, "seed": 4}, device)

    runs.run("small", on(novel="aa11"), path=tmp_path)
    assert runs.verify("small", on(novel="aa11"), path=tmp_path, budget=0).difference < 1e-5
    message = "^record 'small': made on text 'novel' with sha256 aa11, here it has "
    with pytest.raises(ValueError, match=message + "sha256 bb22"):
        runs.verify("small", on(novel="bb22"), path=tmp_path)
    with pytest.raises(ValueError, match=message + "no such text"):
        runs.verify("small", SMALL, path=tmp_path)
    with pytest.raises(
        ValueError, match="record 'small': made on text 'atlas' with no such text, here it has sha256 cc33"
    ):
        runs.verify("small", on(novel="aa11", atlas="cc33"), path=tmp_path)
    with pytest.raises(ValueError, match="record 'small': unit"):
        runs.verify("small", SMALL._replace(plan=other_numbers), path=tmp_path)


CHILD = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import test_runs, torch
torch.set_num_threads(1)
from tokcx_lib.studies import runs
experiment = test_runs.SMALL._replace(full={{**test_runs.SMALL.full, "pause": {pause}}})
runs.run("small", experiment, resume=True, path={path!r})
"""


def child(path, pause, **options):
    code = CHILD.format(root=str(ROOT), tests=str(ROOT / "tests"), path=str(path), pause=pause)
    environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **options)


@pytest.mark.slow
def test_killed_ten_times_and_resumed_the_table_is_the_same_byte_for_byte(tmp_path):
    slow = SMALL._replace(full={**SMALL.full, "pause": 0.4})
    whole = table_of(runs.run("small", slow, path=tmp_path / "whole"))
    parts, rng, killed = tmp_path / "killed" / "small.parts", random.Random(5), 0
    while killed < 10:
        process = child(tmp_path / "killed", 0.4)
        # Each child gets as far as its first new unit, more or less, and dies at some moment of the next ones.
        start, seen = time.monotonic(), len(list(parts.glob("*.csv")))
        while len(list(parts.glob("*.csv"))) == seen and process.poll() is None and time.monotonic() - start < 120:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
    assert killed == 10 and not (tmp_path / "killed" / "small.csv").exists()
    assert child(tmp_path / "killed", 0.4).wait() == 0
    assert table_of(tmp_path / "killed" / "small.csv") == whole
    assert not list((tmp_path / "killed").rglob("*.tmp"))


def test_a_folder_is_kept_to_one_process_and_free_once_that_is_killed(tmp_path):
    code = "import sys, time; from pathlib import Path; from tokcx_lib import records\n"
    code += "with records.locked(Path(sys.argv[1])): print('mine', flush=True); time.sleep(300)"
    parts, environment = tmp_path / "small.parts", {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code, parts], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"mine\n"
        with pytest.raises(ValueError, match="^out: .*small.parts is in use by another process"):
            runs.run("small", SMALL, "quick", path=tmp_path)
        runs.run("other", SMALL, "quick", path=tmp_path)  # another record in the same folder
        process.send_signal(signal.SIGKILL)
    assert (parts / ".lock").exists()
    runs.run("small", SMALL, "quick", path=tmp_path)
    assert not (parts / ".lock").exists()


def test_a_lock_whose_file_was_taken_away_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """The holder ends between our opening of its file and our lock on it: that file is nobody's any more."""
    real, calls = fcntl.flock, []

    def flock(file, how):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(how)
        return real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with records.locked(tmp_path):
        assert len(calls) == 2 and (tmp_path / ".lock").exists()
        with pytest.raises(ValueError, match="in use"), records.locked(tmp_path):
            pass


def test_where_the_file_system_knows_no_locks_a_run_goes_on(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert len(pd.read_csv(runs.run("small", SMALL, "quick", path=tmp_path))) == 3 * 4


KILLS = """
import os, signal, sys, time; sys.path[:0] = [{root!r}, {tests!r}]
import test_runs
from tokcx_lib.studies import runs
experiment = test_runs.SMALL._replace(full={{**test_runs.SMALL.full, "pause": 0.1}})
for delay in {delays}:
    pid = os.fork()
    if pid == 0:
        runs.run("small", experiment, resume=True, path={path!r})
        os._exit(0)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    print(os.waitpid(pid, 0)[1], end=" ")
"""


def test_killed_at_any_moment_and_resumed_the_record_is_the_same(tmp_path):
    """Kills from before the folder is there until after the record is written; none of them needs a hand."""
    delays = np.random.default_rng(8).uniform(0, 0.25, 16).tolist()
    # However fast the machine: the run takes 12 pauses, so whoever is killed before it had so long is killed at work.
    least = int((np.cumsum(delays) < 12 * 0.1).sum())
    code = KILLS.format(root=str(ROOT), tests=str(ROOT / "tests"), delays=delays, path=str(tmp_path / "killed"))
    environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    # Python 3.12 and later warn of a fork beside threads, of which PyTorch has some that do not matter here.
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    fates = done.stdout.split()
    assert not done.stderr and len(fates) == 16 and fates.count(str(int(signal.SIGKILL))) >= least >= 8, (
        done.stdout + done.stderr
    )
    slow = SMALL._replace(full={**SMALL.full, "pause": 0.1})
    resumed, whole = (runs.run("small", slow, resume=True, path=tmp_path / name) for name in ("killed", "whole"))
    assert (
        table_of(resumed) == table_of(whole) and runs.verify("small", slow, path=tmp_path / "killed").difference < 1e-5
    )
    assert not list((tmp_path / "killed").rglob("*.tmp"))


@pytest.mark.slow
def test_two_runs_at_once_in_one_folder_make_the_record_of_one(tmp_path):
    """One works; the other is refused by name or, if it starts late, finds everything done."""
    whole = table_of(runs.run("small", SMALL._replace(full={**SMALL.full, "pause": 0.4}), path=tmp_path / "whole"))
    pair = [child(tmp_path / "shared", 0.4, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in pair:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0 or "small.parts is in use by another process" in said, said
    assert 0 in [process.returncode for process in pair]
    assert table_of(tmp_path / "shared" / "small.csv") == whole
    records.verify("small", tmp_path / "shared")


@pytest.mark.slow
def test_two_ranks_make_the_table_of_one(tmp_path):
    """torchrun deals the units out; the first rank writes the record."""
    arguments = ["run", "gaussian_horizon", "--profile", "quick", "--replicates", "3", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    python = [sys.executable, "-m"]
    for folder, start in (("one", python), ("two", [*python, "torch.distributed.run", "--nproc-per-node=2", "-m"])):
        command = [*start, "tokcx_lib", *arguments, str(tmp_path / folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote ") == 1
    assert table_of(tmp_path / "one" / "gaussian_horizon.csv") == table_of(tmp_path / "two" / "gaussian_horizon.csv")
    assert records.load("gaussian_horizon", tmp_path / "two").meta["ranks"] == 2


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path):
    """A small file system of its own, where the machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    try:
        before = table_of(runs.run("small", SMALL, replicates=3, path=disk))
        (disk / "ballast").write_bytes(
            b"0" * (64 * 1024 - sum(f.stat().st_blocks for f in disk.rglob("*")) * 512 - 4096)
        )
        with pytest.raises(OSError, match="No space left"):
            runs.run("small", SMALL, resume=True, path=disk)
        assert not list(disk.rglob("*.tmp")) and table_of(disk / "small.csv") == before
        records.verify("small", disk)
        (disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        grown = table_of(runs.run("small", SMALL, resume=True, path=disk))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert grown == table_of(runs.run("small", SMALL, path=tmp_path))


def test_a_file_that_cannot_be_written_is_named_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(registry.EXPERIMENTS, "small", SMALL)
    (tmp_path / "file").write_text("in the way")
    assert cli.main(["run", "small", "--profile", "quick", "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.rstrip().split("\n")[-1].startswith("tokcx: Not a directory: ")
    assert cli.main(["run", "small", "--profile", "quick", "--out", str(tmp_path / "out")]) == 0
    assert "wrote" in capsys.readouterr().out
    assert cli.main(["verify", "small", "--out", str(tmp_path / "out")]) == 0
    assert "run again" in capsys.readouterr().out
    assert cli.main(["verify", "small", "--out", str(tmp_path / "out"), "--seconds", "0"]) == 0
    assert "run again" not in capsys.readouterr().out


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_configurations_are_json_and_the_quick_one_is_part_of_the_full_one(name):
    experiment = EXPERIMENTS[name]
    assert set(experiment.quick) <= set(experiment.full)
    for profile in runtime.PROFILES:
        config = experiment.config(profile)
        assert json.loads(json.dumps(config, allow_nan=False)) == config


def test_leave_one_out_is_the_squared_norm_of_the_mean_without_its_noise():
    rng = np.random.default_rng(0)
    truth = np.array([0.3, -0.2, 0.1])
    draws = truth + rng.normal(size=(4000, 5, 3))  # 4000 sweeps of 5 replicates
    found = np.stack([sweeps.leave_one_out(sweep).mean() for sweep in draws])
    assert abs(found.mean() - truth @ truth) < 4 * found.std() / np.sqrt(len(found))
    brute = [draws[0, r] @ np.delete(draws[0], r, axis=0).mean(0) for r in range(5)]
    assert sweeps.leave_one_out(draws[0]) == pytest.approx(brute)
    with pytest.raises(ValueError, match="errors: expected two or more"):
        sweeps.leave_one_out(draws[0][:1])


def test_errors_of_one_replicate_are_those_of_the_table_and_of_the_definition():
    law = laws.Gaussian(torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64)))
    A, V = torch.tensor([[0.3, 0.1], [0.0, -0.4]]).double(), torch.tensor([[1.0, 2.0]]).double()
    heads = sweeps.MomentSweep(law, A, [10, 30], V, scales=[1.0, 2.0])
    (table, second), whole = heads.errors(1, seed=9), heads.table(3, seed=9)
    pd.testing.assert_frame_equal(table, whole[whole.replicate == 1].reset_index(drop=True))
    tokens = law.sample(30, runtime.stream(9, 1))
    outputs = torch.softmax(2 * tokens @ A.mT @ tokens.mT, -1) @ tokens @ V.mT
    limit = limits.gaussian_limit(law, 2 * A, V)
    assert second[1, 1] == pytest.approx((outputs.mT @ outputs / 30 - limit.cov).item(), rel=1e-9)


def test_a_record_verifies_whatever_the_order_of_the_names_in_a_setting(tmp_path):
    """The JSON of a record sorts them; the rows of a unit come in the order that the experiment has."""

    def opened(config, device):
        def work(replicate):
            rows = [(replicate, name, size) for name, size in config["sizes"].items()]
            return runs.Part(pd.DataFrame(rows, columns=["replicate", "name", "size"]))

        return runs.Plan([(0,), (1,)], work)

    named = runs.Experiment(opened, ("replicate",), {"replicates": 2, "sizes": {"large": 2.0, "a small one": 1.0}}, {})
    runs.run("named", named, path=tmp_path)
    assert runs.verify("named", named, path=tmp_path).difference == 0
