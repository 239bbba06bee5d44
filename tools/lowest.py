"""The lowest versions of what the library runs on, and the rest as the book has it: what `make check-lowest` installs.

    python tools/lowest.py

prints requirements: the dependencies that pyproject.toml declares with >=, each at that version, and everything else
that requirements.txt pins (what runs the tests, among them).
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def requirements(root: Path = ROOT) -> list[str]:
    """One line a package; those of the library come first."""
    declared = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    lowest = [each.replace(">=", "==") for each in declared]
    names = {each.partition("==")[0] for each in lowest}
    pinned = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return lowest + [line for line in pinned if re.match(r"\w", line) and line.partition("==")[0] not in names]


if __name__ == "__main__":
    print(*requirements(), sep="\n")
