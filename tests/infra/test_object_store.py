"""The local S3 server: keys, state, and that nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import boto3
import pytest

from infra.local import object_store
from infra.local.object_store import ObjectStore

ROOT = Path(__file__).resolve().parents[2]


def running(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def buckets(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    answer = boto3.session.Session().client("s3").list_buckets()
    return [bucket["Name"] for bucket in answer["Buckets"]]


def test_it_answers_at_once_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RCLONE_AUTH_KEY", "somebody,else")
    with ObjectStore(tmp_path / "state") as store:
        pid, address = store.pid, store.address
        assert pid is not None
        assert running(pid)
        store.start()
        assert store.pid == pid
        with pytest.raises(HTTPError):  # without a signature
            urlopen(address)
        store.make_bucket("first")
        assert buckets(store, monkeypatch) == ["first"]
    assert store.pid is None
    assert not running(pid)
    store.stop()


def test_it_can_be_started_again_with_its_keys_and_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStore(tmp_path)
    with store:
        store.make_bucket("kept")
        before = store.environment["AWS_SECRET_ACCESS_KEY"]
    with store:
        assert buckets(store, monkeypatch) == ["kept"]
        assert store.environment["AWS_SECRET_ACCESS_KEY"] == before


def test_its_keys_are_its_own_and_not_in_its_command_line_or_log(tmp_path: Path) -> None:
    with ObjectStore(tmp_path) as store:
        secrets = [store.environment[f"AWS_{n}"] for n in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")]
        shown = Path(f"/proc/{store.pid}/cmdline").read_text() + store.log.read_text()
        assert not any(secret in shown for secret in secrets)
        assert ObjectStore(tmp_path).environment["AWS_ACCESS_KEY_ID"] not in secrets


def test_a_server_that_does_not_start_tells_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "rclone"
    fake.write_text("#!/bin/sh\necho no such luck\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setattr(object_store, "_rclone", lambda: str(fake))
    store = ObjectStore(tmp_path / "state")
    with pytest.raises(RuntimeError, match="no such luck"):
        store.start()
    assert store.pid is None


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_it_ends_with_the_process_that_started_it(tmp_path: Path, how: int | None) -> None:
    code = (
        "import sys\nfrom infra.local.object_store import ObjectStore\n"
        f"store = ObjectStore({str(tmp_path)!r})\nstore.start()\n"
        "print(store.pid, flush=True)\nsys.stdin.readline()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert running(pid)
    if how is not None:
        os.kill(parent.pid, how)
    parent.communicate("\n")
    deadline = time.monotonic() + 5
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(pid)
