"""The cells of an executed chapter, run again without Jupyter, on any device: what they print, and how long they take.

A plain loop over the code cells of the notebook, in one namespace, with stand-ins for what only a notebook has: first
in the quick profile, whose printed text is compared with the stored one, then in the full profile, for its time.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import json
import os
import re
import sys
import time
import types
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
ANY = re.compile(r"device: .+, profile: (quick|full)")  # as tests/nbval_sanitize.cfg has it


def code_cells(path: Path) -> list[tuple[str, str]]:
    """The code of each cell of a notebook, and the text that it printed when it was executed."""
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.strip():
            streams = (o["text"] for o in cell["outputs"] if o["output_type"] == "stream" and o["name"] == "stdout")
            found.append((source, "".join("".join(text) for text in streams)))
    return found


def run_cells(cells: list[tuple[str, str]], namespace: dict) -> list[dict]:
    """Run code cells in turn. Of each: seconds, whether it printed what is stored, the difference, and its error.

    A cell that fails does not end the run: the next ones show whether they need it.
    """
    found = []
    for number, (source, stored) in enumerate(cells, start=1):
        printed, error, start = io.StringIO(), "", time.perf_counter()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(source, f"cell {number}", "exec"), namespace)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"[:500]
        one, other = (ANY.sub("device: ANY", text).splitlines() for text in (stored, printed.getvalue()))
        lines = [line for line in difflib.unified_diff(one, other, "stored", "here", lineterm="", n=0)][:20]
        found.append({"cell": number, "seconds": round(time.perf_counter() - start, 3), "same": one == other})
        found[-1] |= {"difference": lines, "error": error}
    return found


def _anything(name: str):
    """A function that does nothing, under any name but those that Python itself asks a module for."""
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **kwargs: None


def stand_ins() -> None:
    """Modules of a notebook that are not here: what they do is not needed."""
    if importlib.util.find_spec("myst_nb") is None:
        module = types.ModuleType("myst_nb")
        module.glue = lambda name, value, display=False: None
        sys.modules["myst_nb"] = module
    if importlib.util.find_spec("IPython") is None:
        for name in ("IPython", "IPython.display"):
            module = types.ModuleType(name)
            module.__getattr__ = _anything
            sys.modules[name] = module
        # What matplotlib asks IPython, as soon as it finds it: a new one, and no session of it.
        sys.modules["IPython"].version_info, sys.modules["IPython"].get_ipython = (99, 0), lambda: None


def run_chapter(number: int, place: torch.device, out: Path, cells: int | None = None) -> None:
    """Run a chapter in both profiles, or so many cells of it in the quick one, and write chapter.json.

    Raises
    ------
    SystemExit
        If a cell fails in the quick profile.
    """
    paths = sorted((ROOT / "chapters").glob(f"{number:02d}_*.ipynb"))
    if not paths:
        from tools.gpu.parts import Missing

        raise Missing(f"chapter {number} is not there, or was never executed")
    stand_ins()
    os.environ |= {"MPLBACKEND": "agg", "TOKCX_DEVICE": str(place)}
    chosen, found = code_cells(paths[0])[:cells], {"chapter": paths[0].stem, "device": str(place)}
    for profile in ("quick", "full") if cells is None else ("quick",):
        os.environ["TOKCX_PROFILE"] = profile
        results = run_cells(chosen, {"__name__": "__main__"})
        failed = [each["cell"] for each in results if each["error"]]
        same = sum(each["same"] for each in results)
        found[profile] = {"seconds": round(sum(each["seconds"] for each in results), 1), "failed": failed, "same": same}
        found[profile]["cells"] = results
        (out / "chapter.json").write_text(json.dumps(found, indent=1) + "\n")
        said = f"{profile}: {found[profile]['seconds']:.0f} s, {same} of {len(results)} cells print the stored text"
        print(said + (f", cells {failed} failed" if failed else ""), flush=True)
    if found["quick"]["failed"]:
        raise SystemExit(
            f"cells {found['quick']['failed']} failed: {results[found['quick']['failed'][0] - 1]['error']}"
        )
