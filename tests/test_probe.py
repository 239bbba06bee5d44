"""The probe as a stream, its checkpoints, its report and its command."""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from test_probe_report import Page

from tokcx_lib import cli, records, runtime
from tokcx_lib.models import corpora, heads, tokenization
from tokcx_lib.models.tokens import RunningMoments, collect_tokens, first_ids, layer_streams, token_moments, tokenize
from tokcx_lib.probe import layers as probe_layers
from tokcx_lib.probe import pooled, pooled_page, report, resuming
from tokcx_lib.probe.predictions import predictions
from tokcx_lib.sampling import distributed, streaming
from tokcx_lib.theory import budgets, rates

TOKENS, QUERIES = 6000, 48


@pytest.fixture(scope="module")
def text():
    return corpora.open_corpus("scipy-docs").text[:120_000]


@pytest.fixture(scope="module")
def ids(minilm, text):
    return tokenize(minilm, text)


@pytest.fixture(scope="module")
def table(minilm, ids):
    return pooled.pooled_probe(minilm, ids, [0, 1], TOKENS, QUERIES)


def test_moments_merge_to_those_of_all_tokens_far_from_zero():
    x = torch.randn(5000, 7, generator=runtime.generator(0), dtype=torch.float64) * torch.logspace(-2, 1, 7) + 1e5
    running = RunningMoments(7)
    for block in x.split([1, 999, 3, 2997, 1000]):
        running.add(block)
    direct = torch.cov(x.mT, correction=0)
    scale = direct.diag().sqrt()
    assert running.count == 5000 and torch.allclose(running.mean, x.mean(0), rtol=1e-14)
    assert ((running.cov - direct).abs() / (scale[:, None] * scale)).max() < 1e-8


def test_the_stream_finds_what_all_tokens_at_once_would(minilm, ids, table):
    width = 254
    whole = TOKENS // width
    order = torch.randperm(whole, generator=runtime.generator(0))
    asked = torch.randperm(TOKENS, generator=runtime.generator(1))[:QUERIES]
    inputs = collect_tokens(minilm, ids[:TOKENS], [0, 1])
    lengths = [1000, TOKENS]
    for head in heads.heads(minilm)[1:24:6]:
        x = inputs[head.layer]
        windows = x[: whole * width].reshape(whole, width, -1)[order].reshape(whole * width, -1)
        q, k, _ = head.project(torch.cat([windows, x[whole * width :]]))
        effective = streaming.effective_tokens(head.project(x[asked])[0], k, lengths).median(-1).values
        row = table[(table["layer"] == head.layer) & (table["head"] == head.head)].iloc[0]
        assert [row[f"effective_{n}"] for n in lengths] == pytest.approx(effective.tolist(), rel=1e-3)
        _, cov = token_moments(x)
        for name, value in heads.head_geometry(head, x[asked], cov).items():
            assert row[name] == pytest.approx(value, rel=1e-4), name


def test_columns_and_predictions(table):
    assert list(table.columns[:3]) == ["layer", "head", "causal"] and not table["causal"].any()
    assert list(table.columns[-2:]) == ["effective_1000", f"effective_{TOKENS}"]
    levels = table[["load_05", "load_25", "load_median", "load_75", "load_95"]].to_numpy()
    assert (np.diff(levels) > 0).all()
    hard = table.loc[table["load_median"].idxmax()]
    assert (hard["layer"], hard["head"], hard["phase"]) == (0, 2, "frozen")
    assert hard["exponent_sharp"] == rates.exponent(hard["coupling"], "gaussian")
    budget = budgets.token_budget(hard["load_median"])
    assert (hard["tokens_unfrozen"], hard["tokens_clt"]) == budget
    assert hard["tokens_mean_square"] == budget.mean_square
    load = hard["load_median"]
    logs = [np.log(hard[f"tokens_{name}"]) / load**2 for name in ("unfrozen", "mean_square", "clt")]
    assert logs == pytest.approx([0.5, 1.5, 2])
    said = predictions(0.0, 40.0, 100)
    assert said["exponent_sharp"] == said["exponent_reported"] == 0.5
    assert said["tokens_10_percent"] == np.inf and said["phase"] == "frozen"
    n = 1000
    edge = np.sqrt(2 * np.log(n))
    found = [budgets.phase(edge * share, n) for share in (0.49, 0.51, 0.99, 1.01)]
    assert found == ["averaging", "extremal", "extremal", "frozen"]


def test_no_more_of_a_text_is_tokenised_than_it_takes(minilm, text, ids, monkeypatch):
    monkeypatch.setattr(tokenization, "PIECE", 3000)
    read = []
    encode = tokenization._encode

    def counted(tokenizer, parts):
        read.append(sum(map(len, parts)))
        return encode(tokenizer, parts)

    monkeypatch.setattr(tokenization, "_encode", counted)
    assert (first_ids(minilm, text, 5000) == ids[:5000]).all()
    assert len(read) > 3 and sum(read) < len(text) / 2
    with pytest.raises(ValueError, match=f"^text: expected at least {len(ids) + 1} tokens, got {len(ids)}"):
        first_ids(minilm, text, len(ids) + 1)


@pytest.mark.parametrize("layers", [[], [6], [-1]])
def test_unknown_layers_are_named(minilm, ids, layers):
    with pytest.raises(ValueError, match="^layers: expected some of 0 to 5"):
        pooled.pooled_probe(minilm, ids, layers, 100)


def test_ranks_that_share_the_windows_find_what_one_does(monkeypatch):
    """Three ranks, of which one meets no key before the first length, and one none at all."""
    width, lengths, queries = 5, [3, 10, 16], 8
    x = torch.randn(16, 6, generator=runtime.generator(0))
    forms = [torch.randn(4, 6, generator=runtime.generator(i)) for i in range(6)]
    layer = [heads.Head(0, h, *forms[3 * h : 3 * h + 3], None, 0.5) for h in range(2)]
    sent, shares = [], []

    def state(rank, world):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world", lambda: world)
        found, mine = probe_layers.LayerState(layer, queries), pooled._share(len(x), width)
        monkeypatch.setattr(distributed, "total", lambda asked: x[:queries])
        found.share_queries()
        own = np.cumsum(mine)[np.array(lengths) - 1].tolist()
        for part in x[mine].split(4) if mine.any() else ():
            found.add_keys(part, own)
        shares.append(mine)
        monkeypatch.setattr(distributed, "gather", lambda part: sent.append(part) or [])
        if rank == 0:
            others = [sent[i::4] for i in range(4)]  # four tensors from each rank
            monkeypatch.setattr(distributed, "gather", lambda part: [part, *others.pop(0)])
        found.gather(own)
        return pd.DataFrame(found.rows(lengths)) if rank == 0 else None

    one = state(0, 1)
    for world in (3, 5):
        sent.clear(), shares.clear()
        *_, several = [state(rank, world) for rank in range(world - 1, -1, -1)]
        assert np.sum(shares, axis=0).tolist() == [1] * len(x)
        pd.testing.assert_frame_equal(several, one, rtol=1e-6)


class Killed(Exception):
    pass


def dies_after(batches, counter):
    """`layer_streams` that ends with an exception once so many batches have been read, and counts them."""

    def streams(*arguments):
        for batch in layer_streams(*arguments):
            if len(batch[0]) > 254:  # not the look at a single window
                if counter[0] >= batches:
                    raise Killed
                counter[0] += 1
            yield batch

    return streams


@pytest.mark.parametrize("batches", [1, 3])  # among the queries, among the keys
def test_a_killed_probe_goes_on_with_the_same_numbers(minilm, ids, table, batches, monkeypatch, tmp_path):
    monkeypatch.setattr(resuming, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(pooled, "Checkpoint", _always(pooled.Checkpoint))
    arguments = (minilm, ids, [0, 1], TOKENS, QUERIES)
    folder = tmp_path / "kept"
    before, after = [0], [0]
    monkeypatch.setattr(pooled, "layer_streams", dies_after(batches, before))
    with pytest.raises(Killed):
        pooled.pooled_probe(*arguments, checkpoint=folder)
    monkeypatch.setattr(pooled, "layer_streams", dies_after(100, after))
    resumed = pooled.pooled_probe(*arguments, checkpoint=folder)
    assert resumed.to_csv() == table.to_csv()
    assert before[0] == batches and after[0] == 4 - batches  # two batches of either pass, none of them read twice
    resuming.discard_checkpoint(folder)
    assert not folder.exists()


def _always(checkpoint):
    """Checkpoints that cost nothing, so that each is written."""
    return type("Always", (checkpoint,), {"cost": property(lambda self: 0.0, lambda self, value: None)})


@pytest.mark.parametrize("damage", ["garbage", "cut", "no checksum", "another plan"])
def test_a_checkpoint_that_is_damaged_or_another_probes_is_not_used(minilm, ids, damage, tmp_path, capsys):
    other = {"seed": 1} if damage == "another plan" else {}
    pooled.pooled_probe(minilm, ids, [0], 1000, 16, checkpoint=tmp_path, **other)
    state = tmp_path / "state.npz"
    content = state.read_bytes()
    if damage == "garbage":
        middle = len(content) // 2
        state.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    elif damage == "cut":
        state.write_bytes(content[: len(content) // 2])
    elif damage == "no checksum":  # as states were before they had one
        state.write_bytes(content[: content.rindex(b"# ")])
    found = pooled.pooled_probe(minilm, ids, [0], 1000, 16, checkpoint=tmp_path)
    assert found.to_csv() == pooled.pooled_probe(minilm, ids, [0], 1000, 16).to_csv()
    assert ("damaged" in capsys.readouterr().err) == (damage != "another plan")


def test_heads_with_rotary_positions_are_described_at_distances_too(minilm, ids, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Rotary(heads.Head):
        causal: bool = True
        rotary: object = "rotations"

        def at(self, distance):
            return dataclasses.replace(self, W_Q=self.W_Q / (1 + distance), rotary=None)

    def rotary(model):
        return [Rotary(h.layer, h.head, h.W_Q, h.W_K, h.W_V, None, h.scale) for h in heads.heads(model)[:2]]

    monkeypatch.setattr(probe_layers, "heads", rotary)
    found = pooled.pooled_probe(minilm, ids, [0], 1000, 16)
    assert found["causal"].all()
    for distance in (64, 1024):
        for name in ("horizon", "load_median"):
            restored = found[f"{name}_{distance}"] * (1 + distance)
            assert restored.tolist() == pytest.approx(found[name].tolist(), rel=1e-5)
    meta = {"tokens": 1000, "queries": 16, "context": 256}
    said = " ".join(pooled_page.caveats(found, meta))
    assert "causal" in said and "rotary" in said and "1,024" in said


def test_the_command_line(tmp_path, capsys, text):
    file, out = tmp_path / "text <1>.txt", tmp_path / "out"
    file.write_text(text[:60_000])
    assert cli.main(["probe", "--text", str(file), "--layer", "0", "--tokens", "3000", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "horizon" in printed and "report.html" in printed
    written = {"heads.csv", "report.html", "report.json", "probe.json"}
    written |= {"horizon.png", "load.png", "effective.png", "phases.png"}
    assert {path.name for path in out.iterdir()} == written
    table = pd.read_csv(out / "heads.csv")
    assert len(table) == 12 and table["horizon"].idxmax() == 2
    assert {"coupling", "coupling_one_sided", "load_95", "effective_1000", "effective_3000"} <= set(table)

    page = Page((out / "report.html").read_text())
    links = [v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "srcset", "href")]
    assert len(links) == 7 and all(link.startswith("data:image/png;base64,") for link in links)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4 and all(len(image["alt"]) > 30 for image in images)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    words = " ".join(page.words)
    assert "url(" not in words and "@import" not in words and "text <1>.txt" in words
    assert sum(tag == "tr" for tag, _ in page.tags) == 13
    frozen = (table["phase"] == "frozen").sum()
    assert re.search(rf"\b{frozen} frozen", words) and "layer 0, head 2" in words


def test_a_report_needs_the_tokens_it_speaks_of(table, tmp_path):
    with pytest.raises(ValueError, match="^table: expected heads with column effective_7"):
        report.write(table, {"tokens": 7}, tmp_path)


META = {"tokens": TOKENS, "queries": QUERIES, "seed": 0, "context": 256, "model": "m", "model_sha256": None}
META |= {"text": "t", "text_sha256": "0" * 64, **records.provenance()}


def test_a_head_that_looks_at_nothing_is_drawn(table, tmp_path):
    nothing = table.copy()
    nothing.loc[0, ["horizon", "coupling", "load_median", "load_05", "load_25"]] = 0.0
    assert len(report.write(nothing, META, tmp_path)) == 8


CHILD = "import sys; from tokcx_lib import cli; from tokcx_lib.probe import resuming; resuming.CHECKPOINT_SECONDS = 0; "


@pytest.mark.slow
def test_a_command_killed_by_the_system_goes_on(tmp_path):
    file, killed, whole = tmp_path / "text.txt", tmp_path / "killed", tmp_path / "whole"
    file.write_text(corpora.open_corpus("scipy-docs").text[:400_000])
    arguments = ["probe", "--text", str(file), "--layers", "0", "--tokens", "40000", "--queries", "256", "--out"]
    code = CHILD + "cli.main(sys.argv[1:])"
    state = killed / ".probe" / "state.npz"
    with subprocess.Popen([sys.executable, "-c", code, *arguments, str(killed)], env=os.environ) as process:
        while not state.exists() and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and state.exists() and not (killed / "heads.csv").exists()
    assert cli.main([*arguments, str(killed)]) == 0 and cli.main([*arguments, str(whole)]) == 0
    assert (killed / "heads.csv").read_bytes() == (whole / "heads.csv").read_bytes()
    assert not (killed / ".probe").exists()


ONE = ["probe", "--layers", "0", "--tokens", "20000", "--queries", "64", "--text"]


def child(file, out):
    code = CHILD + "sys.exit(cli.main(sys.argv[1:]))"
    environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", code, *ONE, str(file), "--out", str(out)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_ten_times_at_random_moments_the_table_is_the_same_byte_for_byte(tmp_path):
    file, killed, whole = tmp_path / "text.txt", tmp_path / "killed", tmp_path / "whole"
    file.write_text(corpora.open_corpus("scipy-docs").text[:200_000])
    start = time.monotonic()
    assert child(file, whole).wait() == 0
    lasts, rng, kills = time.monotonic() - start, random.Random(6), 0
    while kills < 10:
        process = child(file, killed)
        time.sleep(rng.uniform(0, 0.9 * lasts))  # while it loads its model, reads, or writes what it found
        if process.poll() is None:
            kills += 1
        process.kill()
        process.wait()
    assert child(file, killed).wait() == 0
    assert (killed / "heads.csv").read_bytes() == (whole / "heads.csv").read_bytes()
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}


RANK = """
import itertools, os, signal, sys
from tokcx_lib import checkpoints, cli
from tokcx_lib.probe import resuming
from tokcx_lib.sampling import distributed

resuming.CHECKPOINT_SECONDS = 0
resuming.Checkpoint.cost = property(lambda self: 0.0, lambda self, value: None)  # each batch is followed by one
if sys.argv.pop(1) == "dies" and distributed.rank() == 1:
    write, numbers = checkpoints.write, itertools.count(1)

    def last_words(*arguments, **options):
        write(*arguments, **options)
        if next(numbers) == 3:  # the first batch of keys
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.write = last_words
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_ranks_make_the_table_of_one_and_go_on_when_one_is_killed(tmp_path):
    file, script = tmp_path / "text.txt", tmp_path / "rank.py"
    file.write_text(corpora.open_corpus("scipy-docs").text[:200_000])
    script.write_text(RANK)
    one, whole, killed = (tmp_path / name for name in ("one", "whole", "killed"))

    def ranks(how, folder):
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script), how]
        environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
        command = [*start, *ONE, str(file), "--out", str(folder)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    assert ranks("dies", killed).returncode != 0
    assert {"plan.json", "state-0.npz", "state-1.npz"} <= {path.name for path in (killed / ".probe").iterdir()}
    assert not (killed / "heads.csv").exists()
    for folder in (killed, whole):
        done = ranks("lives", folder)
        assert done.returncode == 0 and done.stdout.count("wrote heads.csv") == 1, done.stderr
    assert (killed / "heads.csv").read_bytes() == (whole / "heads.csv").read_bytes()
    assert not (killed / ".probe").exists()
    assert child(file, one).wait() == 0
    both, alone = (pd.read_csv(folder / "heads.csv") for folder in (whole, one))
    pd.testing.assert_frame_equal(both, alone, rtol=1e-4)


@pytest.mark.slow
def test_of_two_probes_at_once_in_a_folder_one_is_refused(tmp_path):
    file, shared, alone = tmp_path / "text.txt", tmp_path / "shared", tmp_path / "alone"
    file.write_text(corpora.open_corpus("scipy-docs").text[:200_000])
    both = [child(file, shared) for _ in range(2)]
    ends = [(process.communicate()[1], process.returncode) for process in both]
    refused, done = sorted(ends, key=lambda one: -one[1])
    assert (refused[1], done[1]) == (2, 0) and "is in use by another process" in refused[0]
    assert child(file, alone).wait() == 0
    assert (shared / "heads.csv").read_bytes() == (alone / "heads.csv").read_bytes()
