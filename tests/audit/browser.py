"""A headless Chromium that opens pages, over the DevTools protocol on two pipes."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 60.0
"""Seconds for any answer."""


def find_browser() -> str | None:
    """The program: `AMINT_BROWSER`, or what lies on the path."""
    return os.environ.get("AMINT_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Browser:
    """One tab."""

    into: int
    out: int
    log: Path
    session: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    _buffer: bytes = b""
    _asked: int = 0

    def ask(self, method: str, **params: Any) -> Any:
        """A command's result; what happens meanwhile goes to `events`."""
        self._asked += 1
        message: dict[str, Any] = {"id": self._asked, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.into, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._asked:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path) -> None:
        """Load a page and wait for its `load` event."""
        self.events.clear()
        self.ask("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def shape(self, *, width: int, dark: bool, media: str = "screen") -> None:
        """The window's width in pixels, the colours asked for, screen or print."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def value(self, expression: str) -> Any:
        """What JavaScript gives for an expression, as JSON would have it."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, path: Path) -> None:
        """The whole page as a PNG file."""
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self.out], [], [], max(0.0, until - time.monotonic()))
            part = os.read(self.out, 1 << 20) if ready else b""
            assert part, f"the browser says nothing or is gone: {self.log.read_text()[-2000:]}"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


_MOVE = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execvp(sys.argv[3], sys.argv[3:])"""
"""The protocol wants descriptors 3 and 4."""


def _pipe() -> tuple[int, int]:
    """Above those that the browser gets them as, so that none overwrites another."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]


@contextmanager
def browser(program: str) -> Iterator[Browser]:
    """Start a browser, of a profile of its own; it has ended when the body has."""
    to_it, into = _pipe()
    out, from_it = _pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-extensions", "--disable-background-networking"),
            *("--remote-debugging-pipe", "--hide-scrollbars", f"--user-data-dir={profile}"),
        ]
        log = Path(profile, "stderr")
        with log.open("wb") as told:
            process = subprocess.Popen(
                [sys.executable, "-c", _MOVE, str(to_it), str(from_it), program, *options],
                pass_fds=(to_it, from_it),
                stdout=subprocess.DEVNULL,
                stderr=told,
            )
        os.close(to_it)
        os.close(from_it)
        tab = Browser(into, out, log)
        try:
            made = tab.ask("Target.createTarget", url="about:blank")
            attached = tab.ask("Target.attachToTarget", targetId=made["targetId"], flatten=True)
            tab.session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                tab.ask(f"{domain}.enable")
            yield tab
        finally:
            tab.session = ""
            with contextlib.suppress(BrokenPipeError):
                os.write(into, b'{"id": 0, "method": "Browser.close"}\0')
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(into)
            os.close(out)
