"""A real MLflow server that can die and come back, and a door before it that fails now and then."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from infra.local.parts import free_port


class MlflowServer:
    """On loopback, on a SQLite file; its address and what it knows outlive its process.

    Artifacts go through it unless options say otherwise.
    """

    def __init__(self, folder: Path, *options: str, environment: Mapping[str, str] | None = None):
        self.uri = f"http://127.0.0.1:{free_port()}"
        self._folder, self._environment = folder, environment or {}
        here = ("--serve-artifacts", "--artifacts-destination", str(folder / "artifacts"))
        self._options = options or here
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        folder = self._folder
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
                *("--port", self.uri.rpartition(":")[2], "--workers", "1"),
                *("--backend-store-uri", f"sqlite:///{folder / 'server.db'}"),
                *self._options,
            ],
            cwd=folder,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self._environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                assert self._process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)

    def kill(self) -> None:
        """As the machine's end would; all of its processes."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None


@contextmanager
def door(server: str, *, forwarded: bool) -> Iterator[str]:
    """The address of a door to a server that answers every third call with 500.

    Args:
        server: its address.
        forwarded: whether the server gets those calls, too, and only its answer is lost.
    """
    calls = 0
    lock = threading.Lock()

    class Door(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            nonlocal calls
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                calls += 1
                fails = calls % 3 == 0
            status, answer, kind = 500, b'{"message": "out of order"}', "application/json"
            if not fails or forwarded:
                request = urllib.request.Request(f"{server}{self.path}", body, method=self.command)
                for name in ("Content-Type", "Authorization"):
                    if name in self.headers:
                        request.add_header(name, self.headers[name])
                try:
                    reply = urllib.request.urlopen(request)
                except urllib.error.HTTPError as error:
                    reply = error
                with reply:
                    content = reply.read()
                    if not fails:
                        status, answer = reply.status, content
                        kind = reply.headers.get("Content-Type") or kind
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on  # noqa: N815

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.server_port}"
        finally:
            listener.shutdown()
        assert calls >= 3, "no call failed"
