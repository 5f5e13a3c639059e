"""The local stack as a user has it: up, used, a node lost, down, up again; nothing stays."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest

from infra.local.processes import Server, start_server, stop_server, wait_until_ready
from infra.local.stack import LocalStack, shown

MARK = "AMINT_TEST_STACK"
ROOT = Path(__file__).resolve().parents[2]


def command(verb: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "infra.local", verb, "--folder", str(folder), *options],
        cwd=ROOT,
        env={**os.environ, MARK: str(folder)},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.ray
@pytest.mark.slow
def test_up_used_and_down(tmp_path: Path) -> None:
    folder = tmp_path / "a stäck"
    up = command("up", folder, "--cpus", "1")
    try:
        assert up.returncode == 0, up.stderr
        stack = LocalStack(folder)
        parts = stack.status()
        names = {"s3", "postgres", "mlflow", "ray-head", "ray-worker-1", "ray-worker-2"}
        assert set(parts) == names
        assert all(part["running"] for part in parts.values())
        assert {part["pid"] for part in parts.values()} <= {p.pid for p in processes(folder)}
        environment = dict(stack.environment)
        for secret in (environment["AWS_SECRET_ACCESS_KEY"], (folder / "ray_token").read_text()):
            assert secret not in up.stderr
            assert not any(secret in " ".join(p.cmdline()) for p in processes(folder))
        for name in ("env", "state.json", "keys.json", "ray_token"):
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
        again = command("up", folder, "--json")
        assert again.returncode == 0
        assert "is up already" in again.stderr
        assert json.loads(again.stdout) == parts
        ray_wants_its_token(environment)
        all_nodes_work(environment)
        mlflow_keeps_artifacts_in_s3(folder, environment)
    finally:
        down = command("down", folder)
    assert down.returncode == 0
    assert processes(folder) == []
    assert not (folder / "ray").exists()
    assert command("status", folder).returncode == 1
    assert "was not up" in command("down", folder).stderr


def processes(folder: Path) -> list[psutil.Process]:
    """Whatever was started by a command for that folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(folder):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def ray_wants_its_token(environment: dict[str, str]) -> None:
    url = f"{environment['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    with pytest.raises(HTTPError, match="401"):
        urlopen(url)
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    urlopen(Request(url, headers={"Authorization": f"Bearer {token}"})).close()


def all_nodes_work(environment: dict[str, str]) -> None:
    code = (
        "import os, ray\n"
        "ray.init(address=os.environ['RAY_ADDRESS'], logging_level='ERROR')\n"
        "@ray.remote(num_cpus=1, scheduling_strategy='SPREAD')\n"
        "def work():\n"
        "    import time; time.sleep(1)\n"
        "    return ray.get_runtime_context().get_node_id(), os.environ['AWS_ENDPOINT_URL']\n"
        "found = ray.get([work.remote() for _ in range(3)])\n"
        "print(len({node for node, _ in found}), len({url for _, url in found}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.split() == ["3", "1"], done.stderr


def mlflow_keeps_artifacts_in_s3(folder: Path, environment: dict[str, str]) -> None:
    """The client has no S3 keys: the server hands artifacts on."""
    import mlflow

    client = mlflow.MlflowClient(environment["MLFLOW_TRACKING_URI"])
    run = client.create_run(client.create_experiment("probe"))
    before = {name: os.environ.get(name) for name in environment}
    assert not before["AWS_SECRET_ACCESS_KEY"]  # conftest.py drops those of the shell
    os.environ["MLFLOW_TRACKING_URI"] = environment["MLFLOW_TRACKING_URI"]
    try:
        client.log_text(run.info.run_id, "kept", "note.txt")
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
    (kept,) = (folder / "s3/buckets/mlflow").rglob("note.txt")
    assert kept.read_text() == "kept"
    assert (folder / "postgres/PG_VERSION").is_file()


def test_a_server_that_ends_at_once_tells_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = [sys.executable, "-c", "print('no such luck'); raise SystemExit(3)"]
    server = start_server(program, log=log, environment=os.environ, detached=True)
    with pytest.raises(RuntimeError, match=r"it ended.*no such luck"):
        wait_until_ready("it", server, lambda: False, log=log, seconds=20)
    stop_server(server)


def test_stopping_ends_what_the_server_started_and_nobody_else(tmp_path: Path) -> None:
    """Not even one that has its pid by now, and whatever becomes of the clock."""
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "log"
    server = start_server(
        [sys.executable, "-c", code], log=log, environment=os.environ, detached=True
    )
    wait_until_ready("it", server, lambda: bool(log.read_text()), log=log, seconds=20)
    child = psutil.Process(int(log.read_text()))
    stop_server(Server(server.pid, server.created - 5), how=signal.SIGKILL)
    assert server.process is not None
    stop_server(server, seconds=0.2)
    assert server.process is None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_secrets_are_not_shown() -> None:
    assert shown("AWS_SECRET_ACCESS_KEY", "x") == shown("AWS_ACCESS_KEY_ID", "x") == "***"
    assert shown("RAY_AUTH_TOKEN_PATH", "/a/token") == "/a/token"
    assert shown("MLFLOW_TRACKING_URI", "http://x") == "http://x"
