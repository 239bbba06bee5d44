"""The command line: every bad input ends in one line and exit code 2, in time, and says what is accepted."""

import json
import os
import re

import pytest
import torch

from tokcx_lib import cli, records, runtime
from tokcx_lib.models import loading
from tokcx_lib.models.loading import TextModel
from tokcx_lib.models.tokens import tokenize
from tokcx_lib.probe import pages, plan, pooled, report
from tokcx_lib.studies import runs
from tokcx_lib.studies.registry import EXPERIMENTS

BIG = str(2**70)
DIGITS = "9" * 20
THREE = "\N{ARABIC-INDIC DIGIT THREE}"


@pytest.fixture
def quick(monkeypatch, minilm, tmp_path):
    """A probe of the packaged model that takes no time: it is loaded once, and no figures are drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_model", lambda name, device, dtype: (runtime.device(device), minilm)[1])
    monkeypatch.setattr(pages, "drawn", lambda *arguments, **options: b"")
    (tmp_path / "text.txt").write_text("Attention over a law of tokens, and what a head makes of it. " * 60)
    return ["probe", "--text", "text.txt", "--layers", "0", "--tokens", "300", "--queries", "8"]


def end(arguments, capsys):
    """Exit code, standard output, and the lines on standard error."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    return code, said.out, said.err.splitlines()


def predict(*arguments):
    return ["predict", *arguments]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (predict("--load", "1e308"), "load: expected a number from 1e-100 to 1e.100"),
        (predict("--load", "5e-324", "--error", "1"), "load: expected"),
        (predict("--load", "nan"), "load: expected"),
        (predict("--load", "3,5"), "--load: expected a number, got '3,5'"),
        (predict("--load", THREE), "--load: expected a number"),
        (predict("--load", "1e5", "--error", "0.1"), "load: expected a number from 1e-100 to 300, got 100000"),
        (predict("--load", "1e4", "--tokens", "1e6"), "load: expected a number from 1e-100 to 300"),
        (predict("--load", "3", "--error", "0"), "error: expected a positive"),
        (predict("--load", "3", "--error", "5e-324"), "load, error: expected a pair that takes at most 1e.250 tokens"),
        (predict("--load", "3", "--tokens", "inf"), "tokens: expected a number from 1 to 1e.250, got inf"),
        (predict("--horizon", "0.76", "--tokens", "inf"), "tokens: expected"),
        (predict("--horizon", "0.76", "--tokens", "0"), "tokens: expected"),
        (predict("--horizon", "0.76", "--tokens", "-3"), "tokens: expected"),
        (predict("--horizon", "0.76", "--tokens", "nan"), "tokens: expected"),
        (predict("--horizon", "1e200", "--tokens", "1e5"), "horizon: expected"),
        (predict("--horizon", "1e10", "--tokens", "1e5"), "B: expected a horizon .* up to 300, got 1e.10"),
        (predict("--horizon", "100", "--tokens", "1e5"), "B, n: expected loads .* up to 300"),
        (predict("--horizon", "5e-324", "--tokens", "1e5"), "horizon: expected"),
        (["probe", "--text", "text.txt", "--layers", "0-99999999"], "--layers.*up to 9999, got '0-99999999'"),
        (["probe", "--text", "text.txt", "--layers", "5-2"], "--layers"),
        (["probe", "--text", "text.txt", "--layers", "0,,1"], "--layers"),
        (["probe", "--text", "text.txt", "--layers", "0-"], "--layers"),
        (["probe", "--text", "text.txt", "--layers", THREE], "--layers"),
        (["probe", "--text", "text.txt", "--layers", DIGITS], "--layers"),
        (["probe", "--text", "text.txt", "--tokens", "1"], "--tokens: expected an integer from 2 to .*, got '1'"),
        (["probe", "--text", "text.txt", "--tokens", "1.5"], "--tokens: expected an integer"),
        (["probe", "--text", "text.txt", "--tokens", "inf"], "--tokens: expected an integer"),
        (["probe", "--text", "text.txt", "--tokens", THREE], "--tokens: expected a"),
        (["probe", "--text", "text.txt", "--tokens", "9" * 5000], "--tokens: expected an integer .{,120}$"),
        (["probe", "--text", "text.txt", "--queries", "0"], "--queries: expected an integer from 1"),
        (["probe", "--text", "text.txt", "--context", "0"], "--context: expected an integer from 1"),
        (["probe", "--text", "text.txt", "--seed", "-1"], "--seed: expected an integer from 0"),
        (["probe", "--text", "text.txt", "--seed", BIG], "--seed: expected an integer from 0"),
        (["probe", "--text", "text.txt", "--force"], "force: expected together with --out"),
        (["run", "gaussian_horizon", "--replicates", DIGITS], "--replicates: expected an integer from 1 to 1000000"),
        (["run", "gaussian_horizon", "--replicates", "1e400"], "--replicates: expected an integer"),
        (["run", "gaussian_horizon", "--device", "meta"], "device: 'meta' is not available"),
        (["run", "../x"], "experiment: expected one of"),
        (["verify", "../x"], "record: expected one of"),
        (["verify", "gaussian_horizon", "--seconds", "nan"], "seconds: expected a finite number >= 0, got nan"),
        (["verify", "gaussian_horizon", "--seconds", "-1"], "seconds: expected"),
        (["verify", "gaussian_horizon", "--seconds", "inf"], "seconds: expected"),
        (["verify", "gaussian_horizon", "--seconds", "1", "--device", "meta"], "device: 'meta' is not available"),
        (["bench", "--only", "rate,nonsense"], "only: expected some of"),
        (["bench", "--only", "rate", "--device", "meta"], "device: 'meta' is not available"),
        (["bench", "--out", "/dev/null"], "out: expected a folder, got /dev/null"),
        (["nonsense"], "invalid choice"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_input_ends_in_one_line_and_code_2(arguments, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        loading, "load_model", lambda *_: pytest.fail("a model was loaded before the arguments were read")
    )
    (tmp_path / "text.txt").write_text("Some words.\n")
    code, _, lines = end(arguments, capsys)
    assert code == 2 and len(lines) == 1 and re.search(f"^tokcx: .*{named}", lines[0])


@pytest.mark.parametrize(
    "more, named",
    [
        (["--context", "1e9"], "context: expected 3 to 512 tokens, got 1000000000"),
        (["--layers", "3-9999"], "layers: expected some of 0 to 5, got 6, 7, .* …$"),
        (["--device", "meta"], "device: 'meta' is not available; this machine has cpu"),
        (["--device", "hpu"], "device: 'hpu' is not available"),
        (["--device", "mkldnn"], "device: 'mkldnn' is not available"),
        (["--out", "/dev/null"], "out: expected a folder, got /dev/null"),
        (["--out", "text.txt"], "out: expected a folder, got text.txt"),
        (["--out", "text.txt/deeper"], "out: expected a folder, got text.txt/deeper: text.txt is none"),
        (["--out", "pipe"], "out: expected a folder, got pipe"),
        (["--out", "taken"], "out: taken has a heads.csv, and nothing says of which probe"),
    ],
)
def test_a_probe_that_cannot_be_ends_in_one_line_and_code_2(more, named, quick, capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "taken" / "heads.csv").mkdir(parents=True)
    code, _, lines = end([*quick, *more], capsys)
    assert code == 2 and len(lines) == 1 and re.search(f"^tokcx: {named}", lines[0])


def test_a_place_that_is_closed_ends_in_one_line_and_code_1(quick, capsys):
    code, _, lines = end([*quick, "--out", "/proc/nowhere"], capsys)
    assert code == 1 and len(lines) == 1 and "/proc/nowhere" in lines[0]


@pytest.mark.parametrize(
    "text, number", [("10000", 10_000), ("1e4", 10_000), ("10_000", 10_000), ("2.0", 2), (" 7 ", 7)]
)
def test_counts_are_read_however_people_write_them(text, number):
    assert cli._count(2)(text) == number
    assert cli._count(0, 2**63)(str(2**63 - 1)) == 2**63 - 1  # no digit lost


def test_errors_of_one_and_more_are_reached_where_the_law_says(capsys):
    assert "relative error 2 (root mean square) at n = 1\n" in end(predict("--load", "3", "--error", "2"), capsys)[1]
    assert "relative error 2 (root mean square) at n = 26\n" in end(predict("--load", "0.1", "--error", "2"), capsys)[1]
    # Far below the rounding of the second moment: (1 + s^2) e^{s^2} / n of s^2.
    assert "relative error 1.65e-22 (root mean square)," in end(predict("--load", "10", "--tokens", "1e87"), capsys)[1]


def test_another_probe_is_not_overwritten_unless_forced(quick, capsys, tmp_path):
    out = ["--out", "out"]
    assert end([*quick, *out], capsys)[0] == 0
    first = (tmp_path / "out" / "heads.csv").read_bytes()
    made = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert made["model"] == "minilm" and made["text"] == "text.txt" and made["tokens"] == 300 and made["versions"]
    assert [path.name for path in (tmp_path / "out").glob("*.csv")] == ["heads.csv"]

    for more, what in ((["--seed", "1"], "seed"), (["--tokens", "200"], "tokens"), (["--layers", "1"], "layers")):
        code, _, lines = end([*quick, *out, *more], capsys)
        assert code == 2 and len(lines) == 1
        assert f"out: out holds a probe of another {what} (minilm on text.txt, 300 tokens)" in lines[0]
    (tmp_path / "other.txt").write_text("Other words, read by the same model. " * 100)
    code, _, lines = end([*quick, *out, "--text", "other.txt"], capsys)
    assert code == 2 and "a probe of another text" in lines[0]
    assert (tmp_path / "out" / "heads.csv").read_bytes() == first

    assert end([*quick, *out], capsys)[0] == 0 and (tmp_path / "out" / "heads.csv").read_bytes() == first
    assert end([*quick, *out, "--seed", "1", "--force"], capsys)[0] == 0
    second = (tmp_path / "out" / "heads.csv").read_bytes()
    assert second != first and json.loads((tmp_path / "out" / "probe.json").read_text())["seed"] == 1


def test_an_unfinished_probe_is_not_thrown_away_by_another(quick, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(
        report, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device", "out"))
    )
    assert end([*quick, "--out", "out"], capsys)[0] == 1
    state = (tmp_path / "out" / ".probe" / "state.npz").read_bytes()
    code, _, lines = end([*quick, "--out", "out", "--queries", "9"], capsys)
    assert code == 2 and "out holds an unfinished probe of another queries" in lines[0]
    assert (tmp_path / "out" / ".probe" / "state.npz").read_bytes() == state


def test_two_probes_at_once_in_one_folder_are_kept_apart(quick, capsys, tmp_path):
    with records.locked(tmp_path / "out"):
        code, _, lines = end([*quick, "--out", "out"], capsys)
        assert code == 2 and len(lines) == 1 and "out is in use by another process" in lines[0]
    assert end([*quick, "--out", "out"], capsys)[0] == 0
    assert not list((tmp_path / "out").glob(".*"))


def test_files_are_not_written_through_what_lies_in_their_way(tmp_path):
    target, victim = tmp_path / "heads.csv", tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "heads.csv.tmp").symlink_to(victim)
    target.symlink_to(victim)
    records.write_whole(target, b"new")
    assert victim.read_text() == "precious" and target.read_bytes() == b"new" and not target.is_symlink()
    os.mkfifo(tmp_path / "heads.csv.tmp")  # opening it would wait for a reader that never comes
    records.write_whole(target, b"newer")
    assert target.read_bytes() == b"newer" and {path.name for path in tmp_path.iterdir()} == {"heads.csv", "victim"}


def test_the_context_is_no_longer_than_the_model_sees_unless_asked_for(minilm, monkeypatch):
    assert plan.default_context(minilm) == 256
    short = TextModel(minilm.name, minilm.model, minilm.tokenizer, minilm.sha256)
    monkeypatch.setattr(plan.architectures, "most_positions", lambda config: 40)
    assert plan.default_context(short) == 40


def test_the_bars_of_a_probe_count_each_query_and_each_token_once(minilm, monkeypatch, tmp_path):
    counted = {}

    class Bar:
        def __init__(self, desc, total, **options):
            counted[desc] = [total, options.get("initial", 0)]
            self.desc = desc

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n=1):
            counted[self.desc][1] += n

    monkeypatch.setattr(pooled, "tqdm", Bar)
    ids = tokenize(minilm, "Attention over a law of tokens. " * 200)
    for _ in range(2):  # from the beginning, then from the checkpoint of all
        counted.clear()
        pooled.pooled_probe(minilm, ids, [0], 600, 4, context=64, checkpoint=tmp_path)
        assert counted == {"queries": [4, 4], "tokens": [600, 600], "heads": [12, 12]}


def test_verify_starts_no_unit_that_would_overrun(tmp_path, monkeypatch):
    from test_runs import SMALL

    runs.run("small", SMALL, path=tmp_path)
    clock = [0.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: clock[0])

    def slow(config, device):
        clock[0] += 7.0  # to open it
        plan = SMALL.plan(config, device)

        def work(*unit):
            clock[0] += 6.0
            return plan.work(*unit)

        return plan._replace(work=work)

    for budget, units in ((1.0, 1), (20.0, 2), (26.0, 3), (1000.0, 5)):
        assert len(runs.verify("small", SMALL._replace(plan=slow), path=tmp_path, budget=budget).units) == units


def test_verify_leaves_a_unit_alone_that_takes_far_longer_than_it_may(tmp_path, capsys, monkeypatch):
    from test_runs import SMALL

    path = runs.run("small", SMALL, path=tmp_path)
    table, meta = records.load("small", tmp_path)
    records.save("small", table, {**meta, "unit_seconds": 343.2}, path.parent)
    monkeypatch.setitem(EXPERIMENTS, "small", SMALL)
    said = end(["verify", "small", "--out", str(tmp_path), "--seconds", "20"], capsys)
    assert said[0] == 0 and "no unit run again: one takes about 343 s (--seconds 344)" in said[1]
    assert "run again: no number differs" in end(["verify", "small", "--out", str(tmp_path)], capsys)[1]  # at least one


def test_a_device_computes():
    assert runtime.device("cpu") == torch.device("cpu")
    for name in ("meta", "privateuseone", "hpu", "vulkan"):
        with pytest.raises(ValueError, match=f"^device: '{name}' is not available"):
            runtime.device(name)
