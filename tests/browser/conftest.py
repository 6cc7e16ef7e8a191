"""A headless Chromium, spoken to over its DevTools pipe: standard library only, and no port that others could reach."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
SECONDS = 120
"""After which something is wrong; nothing here is measured."""


class Browser:
    """One tab. Every request it makes and everything it logs is kept in `requests` and `complaints`."""

    def __init__(self, program, profile):
        to_browser, from_browser = os.pipe(), os.pipe()
        # Chromium reads commands from 3 and writes answers to 4; sources above 9 cannot be overwritten on the way
        reads, writes = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser[0], from_browser[1]))
        launch = f"import os, sys; os.dup2({reads}, 3); os.dup2({writes}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        arguments = [sys.executable, "-c", launch, program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            arguments, pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for end in (reads, writes, to_browser[0], from_browser[1]):
            os.close(end)
        self._write, self._read = to_browser[1], from_browser[0]
        self._buffer, self._sent, self._session = b"", 0, None
        self.requests, self.complaints, self._loaded = [], [], False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        """Call a DevTools method and return its result."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._sent:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def open(self, page, *, width, height, dark=False, media="screen"):
        """Open a file at a window size, as a person who prefers dark or light pages would see it."""
        self.open_address(Path(page).resolve().as_uri(), width=width, height=height, dark=dark, media=media)

    def open_address(self, address, *, width, height, dark=False, media="screen"):
        """Open an address in the same way."""
        phone = width < 600
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self._loaded = False
        self.send("Page.navigate", url=address)
        end = time.monotonic() + SECONDS
        while not self._loaded:
            assert time.monotonic() < end, "the page did not load"
            self._receive()

    def evaluate(self, expression):
        """Return the value of a JavaScript expression in the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self, path, *, whole=False):
        """Write a PNG of the first screen, or of the whole page."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        """End the browser that this object started."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for end in (self._write, self._read):
            os.close(end)

    def _receive(self):
        while b"\0" not in self._buffer:
            assert select.select([self._read], [], [], SECONDS)[0], "Chromium does not answer"
            part = os.read(self._read, 2**16)
            assert part, "Chromium ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method in {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}:
            self.complaints.append(params)
        elif method == "Page.loadEventFired":
            self._loaded = True
        return message


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """One Chromium for all tests; they are skipped where there is none."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    tab = Browser(program, tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()
