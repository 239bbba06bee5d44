"""The book, built once for the tests of this folder."""

import functools
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tools.notebooks import ROOT


@pytest.fixture(scope="session")
def html() -> Path:
    """The folder of the built pages, from a strict build: a warning fails it, as in `make book`."""
    shutil.rmtree(ROOT / "_build", ignore_errors=True)
    program = str(Path(sys.executable).with_name("jupyter-book"))
    build = [program, "build", "-q", ".", "--all", "-W", "-n", "--keep-going"]
    answer = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return ROOT / "_build" / "html"


@pytest.fixture(scope="session")
def address(html):
    """The book, served on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=html))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
