"""Whether a cluster has room, and is one; tests/launch/test_on_a_cluster.py asks a real one."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from amint_ray.cli import main
from amint_ray.config.schema import Cluster
from amint_ray.contracts import UserError
from amint_ray.launch.room import Machine, lacks, plan_workers

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


def test_another_program_at_the_port_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("amint_ray.launch.train_run.connect", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process keeps its own
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
        assert main(["train", "digits", f"cluster.address={address}"]) == 2
    assert time.monotonic() - started < 60
    shown = capfd.readouterr()
    assert f"cluster.address = '{address}'" in shown.err.splitlines()[-1]
    assert shown.out == ""
