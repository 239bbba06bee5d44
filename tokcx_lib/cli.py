"""The command line: ``tokcx probe``, ``tokcx run``, ``tokcx verify``, ``tokcx bench``, ``tokcx --version``.

Bad input ends with one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import tokcx_lib
from tokcx_lib import runtime


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``tokcx``; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.action(options)
    except ValueError as error:
        print(f"tokcx: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"tokcx: {error.strerror or error}: {error.filename or 'no file named'}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokcx", description="Token sample complexity of attention.")
    parser.add_argument("--version", action="version", version=f"tokcx {tokcx_lib.__version__}")
    actions = parser.add_subparsers(required=True, metavar="COMMAND")

    probe = actions.add_parser("probe", help="how many tokens does each head of a model need, on a text")
    probe.add_argument("--model", default="minilm", help="minilm (packaged), a folder or a hub name (default: minilm)")
    probe.add_argument("--text", required=True, help="a file, or a known corpus such as wikitext2-test")
    probe.add_argument("--layers", "--layer", type=_layers, help="for example 0,3-5 (default: all)")
    probe.add_argument("--tokens", type=int, default=100_000, help="tokens of the text to use (default: 100000)")
    probe.add_argument("--queries", type=int, default=2048, help="queries drawn to stand for all (default: 2048)")
    probe.add_argument("--seed", type=int, default=0)
    probe.add_argument("--device", help="cpu, cuda, cuda:1 … (default: TOKCX_DEVICE or cpu)")
    probe.add_argument("--out", type=Path, help="folder for heads.csv and heads.png")
    probe.set_defaults(action=_probe)

    run = actions.add_parser("run", help="run a named experiment and keep its record")
    run.add_argument("name", help="the experiment")
    run.add_argument("--profile", choices=runtime.PROFILES, help="quick or full (default: TOKCX_PROFILE or quick)")
    run.add_argument("--device", help="cpu, cuda, cuda:1 …")
    run.add_argument("--replicates", type=int, help="how many (default: those of the profile)")
    run.add_argument("--resume", action="store_true", help="go on from the units that an earlier run left")
    run.add_argument("--out", type=Path, help="folder of the record (default: the book's for full, quick-records for quick)")
    run.set_defaults(action=_run)

    verify = actions.add_parser("verify", help="check a record: its checksum, its schema, and some units run again")
    verify.add_argument("name", help="the record")
    verify.add_argument("--device", help="cpu, cuda, cuda:1 …")
    verify.add_argument("--seconds", type=float, default=60.0, help="time for units, roughly; 0: checksum only (default: 60)")
    verify.add_argument("--out", type=Path, help="folder of the record (default: the book's)")
    verify.set_defaults(action=_verify)

    bench = actions.add_parser("bench", help="time streaming attention against the plain algorithm and others")
    bench.add_argument("--profile", choices=runtime.PROFILES, default="full", help="full (default), or quick: a trial")
    bench.add_argument("--only", type=lambda names: names.split(","), help="parts, such as moments,rate (default: all)")
    bench.add_argument("--device", help="cpu, cuda, cuda:1 …")
    out = Path("quick-records")
    bench.add_argument("--out", type=Path, default=out, help=f"folder of the record (default: {out})")
    bench.set_defaults(action=_bench)
    return parser


def _layers(text: str) -> list[int]:
    """'0,3-5' as [0, 3, 4, 5]."""
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit() or int(last or first) < int(first):
            raise argparse.ArgumentTypeError(f"expected layers such as 0 or 0,3-5, got {text!r}")
        layers.update(range(int(first), int(last or first) + 1))
    return sorted(layers)


def _probe(options: argparse.Namespace) -> None:
    from tokcx_lib.corpora import open_corpus
    from tokcx_lib.heads import load_model
    from tokcx_lib.probe import probe

    corpus = open_corpus(options.text)
    model = load_model(options.model, options.device)
    table = probe(model, corpus.text, options.layers, options.tokens, options.queries, options.seed)
    shown = table.drop(columns=["value_spread", "value_cov"]).rename(columns=lambda name: name.replace("_one_sided", "_1").replace("effective_", "eff@"))
    print(f"{options.model} on {corpus.name}: {options.tokens} tokens, device: {model.model.device}")
    print(shown.to_string(index=False, float_format=lambda number: f"{number:.4g}"))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        table.to_csv(options.out / "heads.csv", index=False, float_format="%.6g")
        _draw(table, options.out / "heads.png")
        print(f"wrote {options.out / 'heads.csv'} and {options.out / 'heads.png'}")


def _draw(table, path: Path) -> None:
    from matplotlib.figure import Figure

    from tokcx_lib import plots

    plots.use_style()
    effective = table.columns[-1]
    layers = table["layer"].nunique()
    figure = Figure(figsize=(8.5, 2 * (1.1 + 0.42 * layers)), facecolor="white")
    upper, lower = figure.subplots(2, 1)
    plots.head_map(upper, table, "horizon", "attention horizon $H$ (two-sided)")
    number = int(effective.removeprefix("effective_"))
    plots.head_map(lower, table, effective, f"effective tokens $1/\\Sigma w^2$ among {number:,}")
    figure.savefig(path)


def _run(options: argparse.Namespace) -> None:
    from tokcx_lib import records, runs
    from tokcx_lib.experiments import EXPERIMENTS

    if options.name not in EXPERIMENTS:
        raise ValueError(f"experiment: expected one of {', '.join(EXPERIMENTS)}, got {options.name!r}")
    profile = options.profile or runtime.profile()
    # A quick run is not what the book's records are.
    out = options.out or (records.folder() if profile == "full" else Path("quick-records"))
    experiment = EXPERIMENTS[options.name]
    path = runs.run(options.name, experiment, profile, options.device, options.replicates, options.resume, out)
    if path is not None:
        print(f"wrote {path}: {records.load(options.name, out)}")


def _verify(options: argparse.Namespace) -> None:
    from tokcx_lib import runs
    from tokcx_lib.experiments import EXPERIMENTS

    experiment = EXPERIMENTS.get(options.name) if options.seconds > 0 else None
    meta, units, difference = runs.verify(options.name, experiment, options.device, options.out, options.seconds)
    print(f"{options.name}: {meta['rows']} rows, sha256 {meta['sha256'][:12]} matches, device: {meta['device']}")
    if units:
        print(f"units {', '.join(map(str, units))} run again: no number differs by more than {difference:.1e} of the largest")


def _bench(options: argparse.Namespace) -> None:
    from tokcx_lib import bench, records

    path = bench.run(options.profile, options.device, options.only, options.out)
    table, meta = records.load(path.stem, options.out)
    shown = table.drop(columns=["low", "high"])
    print(shown.to_string(index=False, float_format=lambda number: f"{number:.3g}"))
    print(*meta["notes"], sep="\n", end="\n" if meta["notes"] else "")
    print(f"wrote {path}, device: {meta['device']}")
