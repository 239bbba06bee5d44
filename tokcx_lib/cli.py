"""The command line: ``tokcx probe``, ``compare``, ``predict``, ``run``, ``verify``, ``bench`` and ``--version``.

Bad input ends with one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import tokcx_lib
from tokcx_lib import runtime

MOST_OVERRUN = 3  # times the seconds that `verify` is given, before it leaves a long unit alone
TINY, HUGE = 1e-100, 1e100  # of loads and horizons: their squares are numbers


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


class _Parser(argparse.ArgumentParser):
    """One whose complaints are one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"tokcx: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tokcx", description="Token sample complexity of attention.")
    parser.add_argument("--version", action="version", version=f"tokcx {tokcx_lib.__version__}")
    actions = parser.add_subparsers(required=True, metavar="COMMAND")

    probe = actions.add_parser("probe", help="how many tokens does each head of a model need, on a text")
    probe.add_argument(
        "--model",
        default="minilm",
        help="minilm or smollm2 (packaged), a folder, a GGUF file or a hub name (default: minilm)",
    )
    probe.add_argument("--text", required=True, help="a file, or a known corpus such as wikitext2-test")
    probe.add_argument("--layers", "--layer", type=_layers, help="for example 0,3-5 (default: all)")
    seen = "tokens the model sees at once (default: 2048, with --tokens 256, or as many as it can)"
    probe.add_argument("--context", type=_count(1), help=seen)
    read = "in context: how many windows of the text to read, each query its own past (default: 4)"
    probe.add_argument("--windows", type=_count(1), help=read)
    budgets = "in context: root mean square error of a head's output that the budgets are for (default: 0.1)"
    probe.add_argument("--error", type=_number, help=budgets)
    count = "pooled: how many tokens of the text are the keys of every query, such as 5000 or 1e6"
    probe.add_argument("--tokens", type=_count(2), help=count)
    asked = "queries that stand for all (default: 32 late ones of each window; pooled: 1024)"
    probe.add_argument("--queries", type=_count(1), help=asked)
    probe.add_argument("--seed", type=_count(0, 2**63 - 2), default=0)
    probe.add_argument("--device", help="cpu, cuda, cuda:1 … (default: TOKCX_DEVICE or cpu)")
    probe.add_argument("--dtype", help="precision: float32 (default), bfloat16, float16, or auto, as it is stored")
    probe.add_argument(
        "--out",
        type=Path,
        help="folder for the table, report.html, report.json, figures; a stopped probe resumes there",
    )
    probe.add_argument("--force", action="store_true", help="replace what another probe left in that folder")
    probe.set_defaults(action=_probe)

    compare = actions.add_parser("compare", help="two probes side by side, and the heads that changed most")
    compare.add_argument("a", type=Path, metavar="A", help="the folder of a probe, or its report.json")
    compare.add_argument("b", type=Path, metavar="B", help="that of the other")
    compare.set_defaults(action=_compare)

    predict = actions.add_parser("predict", help="what the exact law says of a load, or of a horizon")
    predict.add_argument("--load", type=_number, help="standard deviation of a query's logits")
    predict.add_argument("--error", type=_number, help="with --load: the relative error to reach")
    predict.add_argument("--horizon", type=_number, help="attention horizon H of a head with scalar Gaussian tokens")
    predict.add_argument("--tokens", type=_number, help="number of tokens n, such as 1e6")
    predict.set_defaults(action=_predict)

    run = actions.add_parser("run", help="run a named experiment and keep its record")
    run.add_argument("name", help="the experiment")
    run.add_argument("--profile", choices=runtime.PROFILES, help="quick or full (default: TOKCX_PROFILE or quick)")
    run.add_argument("--device", help="cpu, cuda, cuda:1 …")
    run.add_argument("--replicates", type=_count(1, 10**6), help="how many (default: those of the profile)")
    run.add_argument("--resume", action="store_true", help="go on from the units that an earlier run left")
    run.add_argument(
        "--out", type=Path, help="folder of the record (default: the book's for full, quick-records for quick)"
    )
    run.set_defaults(action=_run)

    verify = actions.add_parser("verify", help="check a record: its checksum, its schema, and some units run again")
    verify.add_argument("name", help="the record")
    verify.add_argument("--device", help="cpu, cuda, cuda:1 …")
    spent = "time for units, kept to roughly; 0: checksum only (default: 60, and at least one unit)"
    verify.add_argument("--seconds", type=_number, help=spent)
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


def _got(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _number(text: str) -> float:
    """A number in ASCII, finite or not."""
    try:
        if text.isascii():
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number, got {_got(text)}")


def _count(least: int, most: int = 10**15) -> Callable[[str], int]:
    """A reader of integers written 10000, 10_000 or 1e4."""

    def read(text: str) -> int:
        try:
            number = int(text) if text.isascii() else math.nan
        except ValueError:
            number = _number(text)
        if not (least <= number <= most and number == int(number)):
            raise argparse.ArgumentTypeError(f"expected an integer from {least} to {most}, got {_got(text)}")
        return int(number)

    return read


def _layers(text: str) -> list[int]:
    """'0,3-5' as [0, 3, 4, 5]."""
    layers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise argparse.ArgumentTypeError(f"expected layers such as 0 or 0,3-5, up to 9999, got {_got(text)}")
        layers.update(range(first, last + 1))
    return sorted(layers)


def _require_folder(out: Path) -> None:
    """Raise ValueError if something at a path, or on the way to it, is no folder: said before long work."""
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"out: expected a folder, got {out}" + (f": {path} is none" if path != out else ", which is none")
            )


def _probe(options: argparse.Namespace) -> None:
    from tokcx_lib import records
    from tokcx_lib.sampling import distributed

    if options.out:
        _require_folder(options.out)
    elif options.force:
        raise ValueError("force: expected together with --out, got no --out")
    # The ranks of one probe share the folder; nobody else does.
    with records.locked(options.out) if options.out and distributed.rank() == 0 else nullcontext():
        _probe_into(options)


def _probe_into(options: argparse.Namespace) -> None:
    from tokcx_lib import records
    from tokcx_lib.models.corpora import open_corpus
    from tokcx_lib.models.loading import load_model
    from tokcx_lib.probe import report
    from tokcx_lib.probe.question import discard, question
    from tokcx_lib.sampling import distributed

    began = time.monotonic()
    corpus = open_corpus(options.text)
    model = load_model(options.model, distributed.own_device(options.device), options.dtype)
    names = ("windows", "tokens", "context", "queries", "error", "layers", "seed")
    asked = question(model, corpus.pieces(), **{name: getattr(options, name) for name in names})
    checkpoint = options.out / ".probe" if options.out else None
    if options.out and not options.force and distributed.rank() == 0:
        report.require_unused(options.out, asked.plan)
    try:
        table = asked.answer(checkpoint)
    except KeyboardInterrupt:
        then = "; the same command goes on from its last checkpoint" if checkpoint else ""
        print(f"tokcx: stopped{then}", file=sys.stderr)
        raise SystemExit(130) from None
    if table is None:  # the first rank has it
        return
    # A file may be longer than what is read of it; the checksum of the ids, in the plan, stands for what was.
    meta = {"text": corpus.name, "text_sha256": corpus.known_sha256, **asked.plan}
    meta |= {name: value for name, value in table.attrs.items() if name.startswith("seconds")}
    meta |= {"seconds": time.monotonic() - began, "peak_memory_gb": runtime.peak_memory(model.model.device) / 1e9}
    read = "{tokens} tokens" if options.tokens else "{windows} windows of {context} tokens"
    print(f"{options.model} on {corpus.name}: {read.format(**meta)}, device: {model.model.device}")
    shown = _pooled_columns(table) if options.tokens else _context_columns(table)
    print(shown.to_string(index=False, float_format=lambda number: f"{number:.4g}"))
    print("", *report.sentences(table, meta), sep="\n")
    if options.out:
        paths = report.write(table, {**meta, **records.provenance(model.model.device)}, options.out)
        discard(checkpoint)
        print(f"wrote {', '.join(path.name for path in paths)} in {options.out}")


def _context_columns(table):
    """The columns of a probe in context that fit a terminal."""
    names = {"layer": "layer", "head": "head", "keys": "keys", "load": "load", "phase": "phase", "effective": "eff"}
    names |= {"window": "window"} if "window" in table else {}
    names |= {"share_first": "first", "share_near": "near"}
    names |= {f"keys_{policy}": policy for policy in ("drawn", "latest", "first_latest", "heaviest")}
    return table[list(names)].rename(columns=names)


def _pooled_columns(table):
    """The columns of a pooled probe that fit a terminal."""
    effective = [name for name in table if name.startswith("effective_")]
    names = {"layer": "layer", "head": "head", "horizon": "horizon", "coupling": "coupling", "load_median": "load"}
    names |= {"load_95": "load_95%", "exponent_sharp": "exponent", "tokens_10_percent": "n@10%", "phase": "phase"}
    if "window" in table:  # beyond it eff@N is empty
        names |= {"window": "window"}
    names |= {name: name.replace("effective_", "eff@") for name in effective}
    return table[list(names)].rename(columns=names)


def _compare(options: argparse.Namespace) -> None:
    from tokcx_lib.probe import compare

    print(*compare.lines(options.a, options.b), sep="\n")


def _predict(options: argparse.Namespace) -> None:
    from tokcx_lib.theory.softmax_law import MOST_TILT, MOST_TOKENS

    given = {name for name in ("load", "error", "horizon", "tokens") if getattr(options, name) is not None}
    if not given or given not in ({"load"}, {"load", "error"}, {"load", "tokens"}, {"horizon", "tokens"}):
        shown = " ".join(f"--{name}" for name in sorted(given)) or "none"
        raise ValueError(f"predict: expected --load, with --error or --tokens, or --horizon and --tokens, got {shown}")
    loads = HUGE if given == {"load"} else MOST_TILT  # budgets are closed forms
    for name, least, most in (("load", TINY, loads), ("horizon", TINY, HUGE), ("tokens", 1.0, MOST_TOKENS)):
        if name in given and not least <= getattr(options, name) <= most:
            raise ValueError(f"{name}: expected a number from {least:g} to {most:g}, got {getattr(options, name)}")
    _predict_horizon(options.horizon, options.tokens) if "horizon" in given else _predict_load(options)


def _predict_load(options: argparse.Namespace) -> None:
    from tokcx_lib.theory import budgets, softmax_law

    load = options.load
    budget = budgets.token_budget(load)
    print(f"load {load:g}, Gaussian tokens, one query")
    print(f"  not frozen beyond                 n = e^(s²/2)  = {_tokens(budget.unfrozen, load**2 / 2)}")
    print(f"  mean square error like 1/n beyond n = e^(3s²/2) = {_tokens(budget.mean_square, 1.5 * load**2)}")
    print(f"  typical error like 1/√n beyond    n = e^(2s²)   = {_tokens(budget.clt, 2 * load**2)}")
    if options.error is not None:
        needed = budgets.sample_complexity(load, options.error)
        print(f"  relative error {options.error:g} (root mean square) at n = {needed:.4g}")
    if options.tokens is not None:
        error = float(budgets.relative_error(options.tokens, load))
        found = softmax_law.softmax_moments(options.tokens, load)
        print(
            f"  at n = {options.tokens:g}: reduced load {_reduced(load, options.tokens)}, "
            f"relative error {error:.3g} (root mean square),"
        )
        share = float(found.participation)
        print(f"    mean {float(found.mean):.4g} of {load:g}, 1 / participation {1 / share:.4g} tokens")


def _tokens(n: float, log_n: float) -> str:
    """A number of tokens, which may be beyond the range of a float."""
    return f"{n:.3g}" if math.isfinite(n) else f"10^{log_n / math.log(10):.1f}"


def _reduced(load: float, n: float) -> str:
    return f"{load / math.sqrt(2 * math.log(n)):.3f}" if n > 1 else "infinite"


def _predict_horizon(horizon: float, n: float) -> None:
    from tokcx_lib.theory import moment_bias, rates

    bias = moment_bias.second_moment_bias(n, [[horizon]]).item()
    print(f"horizon {horizon:g}, coupling {horizon**2:g}, scalar Gaussian tokens")
    for kind, what in (
        ("gaussian", "error of the moments"),
        ("bias", "bias of the second moment"),
        ("reported", "reported rate"),
    ):
        print(f"  {what:26s} n^-{rates.exponent(horizon**2, kind):.4f}")
    print(f"  at n = {n:g}: second moment {horizon**2 + bias:.4g}, limit {horizon**2:.4g} ({bias / horizon**2:+.2%})")


def _run(options: argparse.Namespace) -> None:
    from tokcx_lib import records
    from tokcx_lib.studies import runs
    from tokcx_lib.studies.registry import EXPERIMENTS

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
    from tokcx_lib import records
    from tokcx_lib.studies import runs
    from tokcx_lib.studies.registry import EXPERIMENTS

    budget = runs.BUDGET if options.seconds is None else options.seconds
    if not 0 <= budget < math.inf:
        raise ValueError(f"seconds: expected a finite number >= 0, got {budget}")
    runtime.device(options.device)  # wrong even where no unit runs
    takes = records.verify(options.name, options.out).get("unit_seconds", 0.0)
    # At least one unit is run again, unless that breaks what was asked for.
    affordable = options.seconds is None or takes <= MOST_OVERRUN * budget
    experiment = EXPERIMENTS.get(options.name) if budget > 0 and affordable else None
    meta, units, difference = runs.verify(options.name, experiment, options.device, options.out, budget)
    print(f"{options.name}: {meta['rows']} rows, sha256 {meta['sha256'][:12]} matches, device: {meta['device']}")
    if units:
        again = ", ".join(map(str, units))
        print(f"units {again} run again: no number differs by more than {difference:.1e} of the largest")
    elif budget > 0 and not affordable:
        print(f"no unit run again: one takes about {takes:.0f} s (--seconds {math.ceil(takes)})")


def _bench(options: argparse.Namespace) -> None:
    from tokcx_lib import records
    from tokcx_lib.bench import suite

    _require_folder(options.out)
    path = suite.run(options.profile, options.device, options.only, options.out)
    table, meta = records.load(path.stem, options.out)
    shown = table.drop(columns=["low", "high"])
    print(shown.to_string(index=False, float_format=lambda number: f"{number:.3g}"))
    print(*meta["notes"], sep="\n", end="\n" if meta["notes"] else "")
    print(f"wrote {path}, device: {meta['device']}")
