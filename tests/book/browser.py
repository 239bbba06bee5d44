"""A headless Chromium without network, driven over the WebDriver protocol with nothing but the standard library."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

FLAGS = [
    "--headless",
    # The only host that can be reached is this machine.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
]


class Browser:
    """One session: `open` a page, `run` a script in it, read its `log`."""

    def __init__(self, address: str, session: dict):
        self.address, self.session = address, ""
        self.session = "/session/" + self.post("/session", session)["sessionId"]

    def post(self, path: str, body: dict):
        request = urllib.request.Request(self.address + self.session + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.read().decode()[:500]}") from error

    def open(self, url: str) -> None:
        self.post("/url", {"url": url})

    def run(self, script: str, *arguments):
        """The value that a script returns; a promise is waited for."""
        return self.post("/execute/sync", {"script": script, "args": list(arguments)})

    def command(self, name: str, **parameters):
        """A command of the Chrome DevTools protocol."""
        return self.post("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def log(self, kind: str) -> list[dict]:
        """What has been logged since the last call: `browser` is the console, `performance` the network."""
        return self.post("/se/log", {"type": kind})

    def requests(self) -> Iterator[dict]:
        """Network events since the last call, as DevTools describes them."""
        for entry in self.log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"].startswith("Network."):
                yield message


@contextmanager
def browser(chromium: str, chromedriver: str) -> Iterator[Browser]:
    """A new browser with a profile of its own, from the paths of two programs; all is gone afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = FLAGS + [f"--user-data-dir={profile}"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # Chromium refuses to sandbox for root
        options = {
            "goog:chromeOptions": {"binary": chromium, "args": flags},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        with subprocess.Popen(
            [chromedriver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as driver:
            try:
                # "ChromeDriver was started successfully on port 12345."
                started = next(line for line in driver.stdout if "started successfully on port" in line)
                address = "http://127.0.0.1:" + started.rstrip().rstrip(".").rsplit(" ", 1)[1]
                session = Browser(address, {"capabilities": {"alwaysMatch": options}})
                try:
                    yield session
                finally:
                    request = urllib.request.Request(address + session.session, method="DELETE")
                    urllib.request.urlopen(request, timeout=30).close()
            finally:
                driver.terminate()


def typeset(session: Browser, seconds: float = 30) -> bool:
    """Wait until MathJax, where the page has it, is done; False if it never is."""
    end = time.monotonic() + seconds
    done = (
        "return !document.querySelector('.math') ||"
        "(window.MathJax?.startup?.promise ? MathJax.startup.promise.then(() => true) : false)"
    )
    while time.monotonic() < end:
        if session.run(done):
            return True
        time.sleep(0.1)
    return False


def network(session: Browser, address: str) -> Iterator[tuple]:
    """Requests since the last call that left the served book, and those that failed."""
    asked = {}
    for event in session.requests():
        data = event["params"]
        if event["method"] == "Network.requestWillBeSent":
            url = asked[data["requestId"]] = data["request"]["url"]
            if not url.startswith((address, "data:", "blob:")):
                yield "request to", url
        elif event["method"] == "Network.loadingFailed" and not data.get("canceled"):
            yield "request failed", asked.get(data["requestId"], "?"), data["errorText"]
        elif event["method"] == "Network.responseReceived" and data["response"]["status"] >= 400:
            yield "request failed", data["response"]["url"], data["response"]["status"]
