"""On a machine without Chromium the tests of the book skip, and say what to install; under CI they fail."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("ci", ["false", "true"])
def test_a_browser_that_is_not_there(ci, tmp_path):
    command = [sys.executable, "-m", "pytest", "-m", "browser", "-p", "no:cacheprovider", "--tb=line", "tests/book"]
    environment = {**os.environ, "PATH": str(tmp_path), "CI": ci}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    *_, summary = done.stdout.rstrip().splitlines()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}
    assert done.stdout.count("apt install chromium chromium-driver") >= 1, done.stdout
    (outcome,) = counts  # one outcome for all of them
    assert counts[outcome] >= 38 and outcome == ("skipped" if ci == "false" else "error"), summary
    assert (done.returncode == 0) == (ci == "false")
