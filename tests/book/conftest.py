"""The book, built once for the tests of this folder, and a browser to look at it, where the machine has one."""

import functools
import os
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import browser as driven
import pytest

from tools.notebooks import ROOT

NAMES = ("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)
MISSING = "a browser test needs Chromium and its driver, which pip does not bring: apt install chromium chromium-driver"


def pytest_collection_modifyitems(items):
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


@pytest.fixture(scope="session")
def browser():
    """What opens a browser. Without one the test is skipped; under CI, where nobody would see, it fails.

    To be asked for before `html`, so that a test that is skipped does not build the book.
    """
    programs = [next(filter(None, map(shutil.which, names)), None) for names in NAMES]
    if None in programs:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(MISSING)
    return functools.partial(driven.browser, *programs)


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

        def do_GET(self):
            if self.path == "/favicon.ico":  # browsers ask for it on their own, where a page names no other
                self.send_response(204)
                self.end_headers()
            else:
                super().do_GET()

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=html))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
