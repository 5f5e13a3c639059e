"""Joining a cluster that refuses, is another version, is too small, or is used by others."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch.commands import Command, on_own_disk, train_workers

from amint_ray.config.schema import Cluster
from amint_ray.contracts import UserError
from amint_ray.launch.room import Machine, lacks, plan_workers
from infra.local.stack import LocalStack

CORES = [Machine(4, 0), Machine(3, 0)]
GPUS = [Machine(16, 2), Machine(16, 1), Machine(8, 0)]


@pytest.mark.parametrize(
    ("settings", "machines", "expected"),
    [
        ({}, CORES, (2, False)),  # by default two, where there are no GPUs
        ({"workers": 7}, CORES, (7, False)),
        ({"workers": 3, "cpus_per_worker": 2}, CORES, (3, False)),
        ({"workers": (1, 12)}, CORES, ((1, 10), False)),  # no more than the batch has rows for
        ({}, GPUS, (3, True)),
        ({"device": "cpu"}, GPUS, (2, False)),
        ({"device": "cuda", "workers": 2}, GPUS, (2, True)),
    ],
)
def test_workers_that_a_run_has(
    settings: dict[str, object], machines: list[Machine], expected: object
) -> None:
    assert plan_workers(Cluster.model_validate(settings), machines, rows=10) == expected


@pytest.mark.parametrize(
    ("settings", "machines", "words"),
    [
        # Seven cores, but none of the two machines has room for two of these.
        ({"workers": 3, "cpus_per_worker": 2.5}, CORES, ["7 cores", "2 nodes", "room for 2"]),
        ({"workers": 4}, GPUS, ["40 cores and 3 GPUs", "room for 3", "and a GPU"]),
        ({"device": "cuda", "workers": 1}, CORES, ["0 GPUs", "room for 0", "cluster.device"]),
        ({"workers": 11, "cpus_per_worker": 0.1}, CORES, ["more workers than images"]),
    ],
)
def test_a_cluster_that_is_too_small_is_described(
    settings: dict[str, object], machines: list[Machine], words: list[str]
) -> None:
    with pytest.raises(UserError) as raised:
        plan_workers(Cluster.model_validate(settings), machines, rows=10)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    ("settings", "machines", "free", "fewest", "words"),
    [
        # Four free cores, but no machine has room for a worker of four.
        (
            {"cpus_per_worker": 4, "workers": 1},
            [Machine(4, 0), Machine(4, 0)],
            [Machine(2, 0), Machine(2, 0)],
            1,
            ["workers = 1: others use", "of its 8 cores and 0 GPUs only 4 cores", "room for 0"],
        ),
        # All GPUs are planned with, but not all are free; and a free one needs a free core.
        ({}, GPUS, [Machine(14, 0), *GPUS[1:]], 3, ["3 (by default)", "only", "1 GPUs", "for 1"]),
        ({}, GPUS, [Machine(0, 2), *GPUS[1:]], 3, ["room for 1 worker of 1 cores"]),
        ({"workers": 9}, CORES, CORES, 9, ["the cluster has 7 cores", "room for 7 workers"]),
        ({}, GPUS, GPUS, 3, None),
        ({"workers": 3, "cpus_per_worker": 2}, CORES, CORES, 3, None),
    ],
)
def test_room_is_looked_for_node_by_node(
    settings: dict[str, object],
    machines: list[Machine],
    free: list[Machine],
    fewest: int,
    words: list[str] | None,
) -> None:
    missing = lacks(Cluster.model_validate(settings), machines, free, fewest)
    if words is None:
        assert missing is None
    else:
        assert missing is not None and all(word in missing for word in words), missing


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    with LocalStack(tmp_path_factory.mktemp("stack"), workers=1, cpus=1) as running:
        yield running


QUICK = ["train", "digits", "train.epochs=1", "data.confounder_check=false"]


def refused(stack: LocalStack, folder: Path, *settings: str, **other: str) -> str:
    """The line with which a run ends that could not join."""
    environment = {**stack.environment, **other}
    command = Command(folder, [*QUICK, *settings], environment=environment)
    assert command.wait() == 2, command.stderr
    assert command.stdout == ""
    assert "Traceback" not in command.stderr
    assert command.leftovers() == []
    return command.stderr.splitlines()[-1]


@pytest.mark.ray
@pytest.mark.slow
def test_what_does_not_let_us_in_is_told_in_seconds(stack: LocalStack, tmp_path: Path) -> None:
    started = time.monotonic()
    token = tmp_path / "token"
    token.write_text("0" * 32)
    line = refused(stack, tmp_path, RAY_AUTH_TOKEN_PATH=str(token))
    assert "the cluster refuses the token (the token shown is not its own)" in line
    line = refused(stack, tmp_path, RAY_AUTH_TOKEN_PATH=str(tmp_path / "nothing"))
    assert "RAY_AUTH_TOKEN_PATH is set but file cannot be opened" in line
    line = refused(stack, tmp_path, RAY_AUTH_MODE="disabled")
    assert "RAY_AUTH_MODE=disabled" in line
    assert time.monotonic() - started < 90


_CLIENT = """
import json, sys
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._raylet import GcsClient
ensure_token_if_auth_enabled(None, create_token_if_missing=False)
client = GcsClient(address=sys.argv[1])
"""


def on_the_cluster(stack: LocalStack, code: str, *arguments: str) -> str:
    """The last word that a piece of code prints which has a `client` of the cluster's store."""
    command = [sys.executable, "-c", _CLIENT + code, stack.environment["RAY_ADDRESS"], *arguments]
    environment = {**os.environ, **stack.environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


# What a head of another version would have written; the cluster's own answer is put back after it.
_VERSION = """
key, namespace = b"CLUSTER_METADATA", b"cluster"
said = json.loads(client.internal_kv_get(key, namespace))
print(said["ray_version"])
said["ray_version"] = sys.argv[2]
client.internal_kv_put(key, json.dumps(said).encode(), True, namespace)
"""


# What a worker leaves that found another try to be of no use.
_GIVEN_UP = """
key, namespace = sys.argv[2].encode() + b"/given-up", b"amint_ray"
if sys.argv[3:] == ["put"]:
    client.internal_kv_put(key, b"because", True, namespace)
print(client.internal_kv_get(key, namespace))
"""


@contextlib.contextmanager
def another_version(stack: LocalStack, version: str) -> Iterator[None]:
    own = on_the_cluster(stack, _VERSION, version)
    try:
        yield
    finally:
        on_the_cluster(stack, _VERSION, own)


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_of_another_ray_is_told_with_both_versions(
    stack: LocalStack, tmp_path: Path
) -> None:
    import ray

    with another_version(stack, "2.9.3"):
        line = refused(stack, tmp_path)
    assert f"the cluster has Ray 2.9.3, this machine {ray.__version__}" in line


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_is_too_small_is_waited_for(stack: LocalStack, tmp_path: Path) -> None:
    line = refused(stack, tmp_path, "cluster.workers=3", "cluster.wait_seconds=2")
    assert "cluster.workers = 3: the cluster has 2 cores and 0 GPUs on 2 nodes, room for 2" in line
    assert line.endswith("waited 2 s (cluster.wait_seconds)")

    grows = [*QUICK, "cluster.workers=3", "cluster.wait_seconds=300", "--json"]
    command = Command(tmp_path, grows, environment=stack.environment)
    command.wait_until(lambda: "waiting up to 300 s for it" in command.stderr)
    stack.add_node("worker-2")
    assert command.document()["workers"] == 3


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_others_use_is_waited_for_and_ctrl_c_ends_the_waiting(
    stack: LocalStack, tmp_path: Path
) -> None:
    if "worker-2" not in stack.nodes:
        stack.add_node("worker-2")
    long = ["train", "digits", "train.epochs=10000", "data.confounder_check=false"]
    busy = Command(tmp_path, [*long, "cluster.workers=2"], environment=stack.environment)
    busy.wait_until(lambda: "epoch 1 " in busy.stderr)
    workers = train_workers(stack.folder)
    for worker in workers:  # they hold their cores for Ray, and need not use this machine's
        worker.suspend()
    try:
        line = refused(stack, tmp_path, "cluster.workers=2", "cluster.wait_seconds=2")
        assert "cluster.workers = 2: others use the cluster: of its " in line
        assert "only 1 cores and 0 GPUs are free, room for 1 worker of 1 cores" in line
        assert line.endswith("waited 2 s (cluster.wait_seconds)")
        # Ray itself would wait without end and a word, for what it was told to start by default.
        command = Command(tmp_path, QUICK, environment=stack.environment)
        command.wait_until(lambda: "waiting up to 60 s for it" in command.stderr)
        assert "cluster.workers = 2 (by default): others use the cluster" in command.stderr
        command.interrupt(signal.SIGINT)
        assert command.wait() == 130
        (run,) = (tmp_path / "amint_runs").glob("digits-*")
        on_the_cluster(stack, _GIVEN_UP, run.name, "put")
    finally:
        for worker in workers:
            worker.resume()
        busy.interrupt(signal.SIGINT)
    assert busy.wait() == 130
    # Else the same command would end at once with this word of an earlier try.
    assert on_the_cluster(stack, _GIVEN_UP, run.name) == "None"
    assert busy.leftovers() == command.leftovers() == []


@pytest.mark.ray
@pytest.mark.slow
def test_a_folder_that_only_the_driver_sees_is_told_before_training(
    stack: LocalStack, tmp_path: Path
) -> None:
    disk = tmp_path / "disk of my own"
    disk.mkdir()
    within = on_own_disk(disk)
    command = Command(
        tmp_path, [*QUICK, f"storage.path={disk}"], environment=stack.environment, within=within
    )
    assert command.wait() == 2, command.stderr
    here = re.escape(socket.gethostname())
    assert re.search(
        rf"storage.path = .*: node {here} does not see what {here} keeps in {re.escape(str(disk))};"
        r" name a folder that all nodes share, or s3://BUCKET/PREFIX$",
        command.stderr.splitlines()[-1],
    )
    assert command.stderr.count("starting 2 workers") == 1
    assert "epoch 1 " not in command.stderr and "Traceback" not in command.stderr
    assert command.leftovers() == []


def test_another_program_at_the_port_is_told_apart(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        answers = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(answers)

        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        started = time.monotonic()
        command = Command(tmp_path, [*QUICK, f"cluster.address={address}"])
        assert command.wait() == 2
    assert time.monotonic() - started < 60
    assert f"cluster.address = '{address}'" in command.stderr.splitlines()[-1]
    assert command.stdout == ""
