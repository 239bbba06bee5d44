"""What needs a GPU, part by part, the most valuable first: each calls the library with a device, and writes a folder.

`tiny` is the same with little of everything, to prove on a CPU that a part runs. Long runs write their record early,
from fewer replicates, and again when there are more: what is out of time has the smaller one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from tokcx_lib import records
from tokcx_lib.sampling import fits


class Missing(Exception):
    """What a part needs and this machine lacks."""


class Work(NamedTuple):
    """A part: `do(place, out, tiny)`, and the seconds that it may take."""

    do: Callable[[torch.device, Path, bool], None]
    seconds: float


def named(name: str, place: torch.device) -> str:
    """A record's name: on a GPU, that of the CPU's with its kind of device after it."""
    return name if place.type == "cpu" else f"{name}_{place.type}"


# ---- a: is it right? ----


def smoke(place: torch.device, out: Path, tiny: bool) -> None:
    """Every path of attention, and a probe's notes of two small models, against the CPU's float64."""
    from tokcx_lib.bench.agreement import agreement

    table = pd.concat([agreement(place), probe_agreement(place)], ignore_index=True)
    table.to_csv(out / "agreement.csv", index=False)
    wrong = table[~table["agrees"]]
    if len(wrong):
        print(wrong.to_string())
        raise SystemExit(
            f"{len(wrong)} of {len(table)} answers differ from the CPU's: {', '.join(set(wrong['check']))}"
        )
    worst = table.loc[(table["difference"] / table["allowed"]).idxmax()]
    said = f"{worst['check']} in {worst['precision']}: {worst['difference']:.1e} of {worst['allowed']:g} allowed"
    print(f"{len(table)} answers agree; the nearest to its limit is {said}")


def probe_agreement(place: torch.device) -> pd.DataFrame:
    """What a probe notes of a decoder with grouped keys and of an encoder, random weights, in float32."""
    from transformers import AutoConfig, AutoModel

    from tokcx_lib.models.capture import capture
    from tokcx_lib.probe.policies import lengths_up_to
    from tokcx_lib.probe.queries import layer_notes

    common = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"intermediate_size": 64, "max_position_embeddings": 300}
    rows, size = [], 150
    draws = torch.rand(8, size, generator=torch.Generator().manual_seed(2))
    ids = torch.randint(3, 99, (1, size), generator=torch.Generator().manual_seed(1))

    def notes(model, device) -> list[dict[str, np.ndarray]]:
        found = []

        def read(attention) -> None:
            found.append(layer_notes(attention, range(size), draws.to(device), lengths_up_to(size), [16, 64]))

        with torch.inference_mode(), capture(model, read):
            model(ids.to(device))
        return found

    for kind, more in (("llama", {"num_key_value_heads": 2}), ("bert", {})):
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.for_model(kind, **common, **more)).eval()
        expected = notes(model.double(), torch.device("cpu"))
        answers = notes(model.float().to(place), place)
        for layer, (one, other) in enumerate(zip(answers, expected, strict=True)):
            for note, truth in other.items():
                if not np.isnan(truth).all():
                    gap = np.abs(one[note] - truth).max() / max(np.abs(truth).max(), 1e-6)
                    rows.append((f"probe, {note}", f"{kind}, layer {layer}", "float32", gap, 1e-3))
    table = pd.DataFrame(rows, columns=["check", "setting", "precision", "difference", "allowed"])
    return table.assign(agrees=table["difference"] <= table["allowed"])


# ---- b, c: how fast, and the sweeps of Gaussian and bounded tokens ----


def benchmarks(place: torch.device, out: Path, tiny: bool) -> None:
    """The tables of the benchmarks page; each is in the record before the next is measured."""
    from tokcx_lib.bench import suite

    for name in ("moments", "rate", "attention", "memory", "precision"):
        suite.run("quick" if tiny else "full", place, only=[name], path=out)
        print(f"{name} measured", flush=True)


def gaussian_horizon(place: torch.device, out: Path, tiny: bool) -> None:
    """The grid of the record: twelve scales, n to 30,000, 200 replicates."""
    study("gaussian_horizon", place, out, {"lengths": [1000, 1362], "replicates": 3} if tiny else {}, 2 if tiny else 20)
    beside("gaussian_horizon", place, out, "scale")


def sphere_horizon(place: torch.device, out: Path, tiny: bool) -> None:
    """The grid of the record, then the lengths of the paper, to 100,000 with 200 replicates."""
    change = {"lengths": [1000, 1459], "replicates": 3, "points": 2**8} if tiny else {}
    study("sphere_horizon", place, out, change)
    beside("sphere_horizon", place, out, "scale")
    study("sphere_horizon_long", place, out, change, 2 if tiny else 20)


def study(name: str, place: torch.device, out: Path, change: dict, first: int | None = None) -> None:
    """Run an experiment at full size, but for what `change` says; with `first`, so many replicates before all."""
    from tokcx_lib.studies import runs
    from tokcx_lib.studies.registry import EXPERIMENTS

    experiment = EXPERIMENTS[name]._replace(full={**EXPERIMENTS[name].full, **change})
    most = experiment.full.get("replicates")
    counts = [None] if first is None or first >= most else [first, most]
    for count in counts:
        path = runs.run(named(name, place), experiment, "full", place, count, resume=True, path=out)
        print(records.load(path.name.partition(".")[0], out), flush=True)


def beside(name: str, place: torch.device, out: Path, by: str) -> None:
    """Exponents of a new record beside those of the book's, over the lengths that both have: a table, and its sum in
    the record, under `beside`."""
    new, old = records.load(named(name, place), out), records.load(name)
    shared = sorted(set(new.table["n"]) & set(old.table["n"]))
    if len(shared) < 2 or new.meta["replicates"] < 2:
        print(f"{name}: no lengths in common with the book's record")
        return
    found = []
    for error in ("mean_error", "cov_error"):
        slopes = [fits.fit_slopes(each.table[each.table["n"].isin(shared)], error, by) for each in (new, old)]
        both = slopes[0].merge(slopes[1], on=by, suffixes=("", "_book"))
        found.append(both.assign(error=error))
    table = pd.concat(found, ignore_index=True)
    gap = table["exponent"] - table["exponent_book"]
    within = (table["low_book"] <= table["exponent"]) & (table["exponent"] <= table["high_book"])
    table.assign(within=within).to_csv(out / f"{name}_beside.csv", index=False)
    summary = {"record": name, "exponents": len(table), "within": int(within.sum()), "largest": float(gap.abs().max())}
    if place.type != "cpu":  # on a CPU the record is of the same name as the book's, and there is nothing to compare
        records.save(named(name, place), new.table, {**new.meta, "beside": summary}, out)
    print(f"{name}: {within.sum()} of {len(table)} exponents within the book's intervals, gap {gap.abs().max():.4f}")


# ---- d: real heads ----


def heads_maps(place: torch.device, out: Path, tiny: bool) -> None:
    """The map of all 72 heads at 4,096 queries: over the stream of the record, then over 20 million tokens."""
    need("minilm", "wikipedia-en", tiny)
    if tiny:
        tiny_ids(out / "data.parts")
    small = {"lengths": [100, 300], "segments": 2, "queries": 64, "query_windows": 2} if tiny else {}
    study("real_heads_maps", place, out, small)
    study("real_heads_maps_long", place, out, small)


def heads_moments(place: torch.device, out: Path, tiny: bool) -> None:
    """Moments of all 72 heads over a pool of a million tokens, n to 100,000."""
    need("minilm", "wikipedia-en", tiny)
    if tiny:
        tiny_ids(out / "data.parts")
    small = {"pool": 508, "queries": 32, "lengths": [50, 150], "replicates": 2} if tiny else {}
    study("real_heads_moments_long", place, out, small)


def need(name: str, text: str, tiny: bool) -> None:
    """Raise Missing unless a packaged model is here, and, but for a tiny run, the ids of a text, or Wikipedia."""
    from tokcx_lib.models.corpora import open_corpus
    from tokcx_lib.models.loading import PACKAGES
    from tokcx_lib.models.token_files import path_of

    if importlib.util.find_spec(PACKAGES[name].replace("-", "_")) is None:
        raise Missing(f"no package {PACKAGES[name]}")
    folder = os.environ.get("TOKCX_DATA")
    if tiny or folder and path_of(Path(folder), text, name).is_file():
        return
    try:
        open_corpus("wikipedia-en")
    except ValueError as error:
        raise Missing(f"neither {text} nor its ids for {name}: {error}") from error


def need_docstrings() -> None:
    """Raise Missing unless the fixed text of the chapters, the docstrings of the book's scipy, is here."""
    import scipy

    from tokcx_lib.models.corpora import SCIPY_DOCS_SHA256

    if scipy.__version__ not in SCIPY_DOCS_SHA256:
        raise Missing(f"another scipy than the book's, whose docstrings are the text: {scipy.__version__}")


def tiny_ids(folder: Path) -> None:
    """Put other ids in the place of those of Wikipedia, which take a minute to make."""
    from tokcx_lib.models.loading import load_model
    from tokcx_lib.models.token_files import write_ids
    from tokcx_lib.models.tokens import tokenize

    model, words = load_model("minilm", "cpu"), prose()
    ids = np.resize(tokenize(model, words), 3000 * 254)
    write_ids(folder, "wikipedia-en", model, ids, {"docstrings of scipy, repeated": sha256(words)})
    os.environ["TOKCX_DATA"] = str(folder)


def prose(letters: int = 30_000) -> str:
    """The beginning of scipy's docstrings: English that is wherever this runs."""
    from tokcx_lib.models.corpora import scipy_articles

    return "\n".join(line for article in scipy_articles() for line in article.paragraphs)[:letters]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---- e: the language model ----

PASSAGES = "wikipedia-en-passages"  # 64 of 8,192 ids, spread over the text


def language_model(place: torch.device, out: Path, tiny: bool) -> None:
    """A probe in context of all 270 heads: four windows of 8,192 tokens first, then 64."""
    from tokcx_lib.models.loading import LANGUAGE, load_model
    from tokcx_lib.models.token_files import find_ids
    from tokcx_lib.models.tokens import tokenize
    from tokcx_lib.models.windows import spread_passages
    from tokcx_lib.probe.question import question

    need(LANGUAGE, PASSAGES, tiny)
    model = load_model(LANGUAGE, place)
    if tiny:
        words = prose()
        passages, texts = tokenize(model, words), {"docstrings of scipy": sha256(words)}
    else:
        passages, texts = find_ids(PASSAGES, model) or spread_passages(model, "wikipedia-en", 8192, 64)
    ids = np.asarray(passages).reshape(-1)
    context, options = (128, {"layers": [0], "queries": 4}) if tiny else (8192, {})
    for windows in (1, 2) if tiny else (4, 64):
        asked = question(model, ids, windows=windows, context=context, **options)
        table = asked.answer(out / "windows.parts")
        seconds = {key: value for key, value in table.attrs.items() if key.startswith("seconds")}
        meta = {
            **records.provenance(place),
            "texts": texts,
            **asked.plan,
            **seconds,
            "replicates": f"{windows} windows",
        }
        meta["device"] = records.provenance(place)["device"]
        table.attrs = {}
        records.save(named("language_model_heads_probe", place), table, meta, out)
        print(f"{len(table)} heads, {windows} windows of {context} tokens: {seconds}", flush=True)


def loss(place: torch.device, out: Path, tiny: bool) -> None:
    """Loss of the language model when every head reads some of its keys: the record's 8 articles, then 32."""
    from tokcx_lib.models.loading import LANGUAGE

    need(LANGUAGE, "wikipedia-en", tiny)
    change = {"replicates": 32}
    if tiny:
        need_docstrings()
        change = {"corpus": "scipy-docs", "context": 128, "edges": [64, 128], "keys": [16], "replicates": 2}
    study("language_model_loss", place, out, change, 1 if tiny else 8)


# ---- f: chapters ----


def chapter(number: int) -> Callable[[torch.device, Path, bool], None]:
    def do(place: torch.device, out: Path, tiny: bool) -> None:
        from tools.gpu.cells import run_chapter

        if number in READERS:
            need_docstrings()
        run_chapter(number, place, out, cells=4 if tiny else None)

    do.__doc__ = f"The cells of chapter {number}, quick and full."
    return do


CHAPTERS = (3, 5, 7, 9, 14)
READERS = (7, 14)  # of these, those that read the fixed text
PARTS: dict[str, Work] = {
    "smoke": Work(smoke, 60),
    "benchmarks": Work(benchmarks, 180),
    "gaussian_horizon": Work(gaussian_horizon, 100),
    "sphere_horizon": Work(sphere_horizon, 180),
    "heads_maps": Work(heads_maps, 200),
    "language_model": Work(language_model, 200),
    "loss": Work(loss, 120),
    "heads_moments": Work(heads_moments, 300),
    **{f"chapter_{number:02d}": Work(chapter(number), 90) for number in CHAPTERS},
}
