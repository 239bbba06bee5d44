"""Everything in this book that needs a GPU.

    python -m tools.gpu run --out OUT --minutes 8                    # on a machine that has one
    python -m tools.gpu run --out OUT --device cpu --tiny            # does it work? on any machine
    python -m tools.gpu pack --out PACKS                             # models and token ids, to be carried there
    python -m tools.gpu unpack PACKS/1 --into ASSETS                 # there, one by one; then run --assets ASSETS
    python -m tools.gpu collect OUT/results-*.tar.gz                 # records into the book, here

No part takes another with it; results are packed after each, and the last line says how many ended well.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="work through the parts")
    run.add_argument("--out", type=Path, required=True, help="folder for all results")
    run.add_argument("--minutes", type=float, default=8.0, help="all of it ends within these (default 8)")
    run.add_argument("--parts", type=lambda text: text.split(","), help="only these (default: all, in order)")
    part = actions.add_parser("part", help="one of them, in this process")
    part.add_argument("name")
    part.add_argument("--out", type=Path, required=True)
    for each in (run, part):
        each.add_argument("--device", default="cuda")
        each.add_argument("--tiny", action="store_true", help="little of everything: does it run?")
    run.add_argument("--assets", type=Path, help="folder of what was unpacked")
    pack = actions.add_parser("pack", help="prepare what has to be carried to a machine without a network")
    pack.add_argument("--out", type=Path, required=True)
    pack.add_argument("--mebibytes", type=float, default=38.0, help="largest size of one pack")
    unpack = actions.add_parser("unpack", help="take in packs; files are there once all of their packs are")
    unpack.add_argument("packs", type=Path, nargs="+")
    unpack.add_argument("--into", type=Path, required=True)
    collect = actions.add_parser("collect", help="records of a run into the book's")
    collect.add_argument("archives", type=Path, nargs="+")
    collect.add_argument("--into", type=Path, help="folder of records (default: the book's)")
    options = parser.parse_args(arguments)
    return {"run": _run, "part": _part, "pack": _pack, "unpack": _unpack, "collect": _collect}[options.action](options)


def _run(options: argparse.Namespace) -> int:
    from tools.gpu import runner
    from tools.gpu.parts import PARTS

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part does not outlive us
    chosen = options.parts or list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        print(f"parts: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    parts = []
    for name in chosen:
        command = [sys.executable, "-m", "tools.gpu", "part", name, "--out", str((options.out / name).absolute())]
        command += ["--device", options.device, *(["--tiny"] if options.tiny else [])]
        limit = PARTS[name].seconds * (3 if options.tiny else 1)  # a tiny run is one on a CPU, which may be busy
        parts.append(runner.Part(name, command, limit, _environment(options)))
    ended = runner.run_parts(parts, options.out, options.minutes)
    print(f"{sum(each.state == 'ok' for each in ended)} of {len(ended)} parts ended well")
    return 0 if all(each.state in ("ok", "lacks") for each in ended) else 1


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """Where parts find this code, packages and data."""
    paths = [str(ROOT)]
    found = {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    if options.assets:
        paths.append(str((options.assets / "site").absolute()))
        found["TOKCX_DATA"] = str((options.assets / "data").absolute())
    return found | {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _part(options: argparse.Namespace) -> int:
    from tokcx_lib import runtime
    from tools.gpu.packs import source_digest
    from tools.gpu.parts import PARTS, Missing
    from tools.gpu.runner import LACKS

    place = runtime.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "code.sha256").write_text(source_digest() + "\n")
    try:
        PARTS[options.name].do(place, options.out, options.tiny)
    except Missing as missing:
        print(missing)
        return LACKS
    return 0


def _pack(options: argparse.Namespace) -> int:
    from tools.gpu import packs

    for folder in packs.pack(options.out, int(options.mebibytes * 2**20)):
        print(folder)
    return 0


def _unpack(options: argparse.Namespace) -> int:
    from tools.gpu import packs

    for folder in options.packs:
        print(*packs.unpack(folder, options.into), sep="\n")
    return 0


def _collect(options: argparse.Namespace) -> int:
    from tools.gpu import packs

    for line in packs.collect(options.archives, options.into):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
