"""An object store of which some objects cannot be read, each in its own way."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

import numpy as np
from pyarrow import fs

from amint_ray.data.folder import Files, FileSource
from amint_ray.storage import Location
from amint_ray.storage.s3 import Objects

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_EC2_METADATA_DISABLED": "true",
}
WHOLE = bytes(range(256)) * 20
"""The bytes of an object that can be read."""
Answer = int | str | None
"""How reading an object ends: an HTTP status without a word, as HEAD has it; one of S3's words that
its content is refused with; None: never, the server keeps silent."""


class OddObjects:
    """A server on this machine that speaks just enough of S3; a context manager.

    Attributes:
        odd: answers by name; what is not named can be read.
        asked: how often each name was asked for.
    """

    def __init__(self, odd: Mapping[str, Answer]) -> None:
        self.odd = dict(odd)
        self.asked: Counter[str] = Counter()
        self._ended = threading.Event()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                store._answer(self)

            def do_GET(self) -> None:
                store._answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def source(self, names: list[str], *, seconds: float) -> FileSource:
        """Image files of these names, for which the storage's client waits so long."""
        address = f"http://127.0.0.1:{self._server.server_port}"
        objects = Objects(address, "us-east-1", seconds, attempts=3)
        assert objects.filesystem  # made now: pyarrow waits for requests of others that hang
        zeros = np.zeros(len(names), np.int64)
        return FileSource(
            Location("s3://odd/x", fs.PyFileSystem(objects), "odd/x"),
            Files(names, zeros.astype(np.int32), zeros.astype(np.bool_), zeros, zeros),
            class_names=["a", "b"],
            limit=None,
            notes=[],
            seconds=seconds,
        )

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        name, head = request.path.removeprefix("/odd/x/"), request.command == "HEAD"
        self.asked[name] += 1
        status, content = 200, WHOLE
        if name in self.odd:
            odd = self.odd[name]
            if odd is None:
                self._ended.wait(60)
                return
            if isinstance(odd, int):
                status, content = odd, b""
            elif not head:
                status, content = 403, f"<Error><Code>{odd}</Code></Error>".encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(content)))
        request.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        request.end_headers()
        if not head:
            request.wfile.write(content)
