"""The Ray cluster that a run works on: one of its own, or one that is there."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

from amint_ray.config.schema import Cluster
from amint_ray.contracts import RunError, UserError, first_line

_SECONDS_TO_ANSWER = 5.0
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# For a cluster of our own, whose only job is ours: Ray Train looks after its workers every 2 s by
# default, and each report and the end of a run wait for the next look; nobody preempts a worker or
# reads metrics from a dashboard. Ray copies these to the controller and the workers.
_OWN_CLUSTER = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


def address_of(config: Cluster) -> str | None:
    """`host:port` of the cluster to join, or None to start one on this machine."""
    address = config.address or os.environ.get("RAY_ADDRESS") or None
    return None if address == "local" else address


def check_address(address: str) -> None:
    """Find out in seconds whether anybody listens there; Ray itself tries for minutes.

    Raises:
        UserError: nobody does, or the address has no port.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if address == "auto":
            return
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_ANSWER).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"cluster.address = {address!r}: no Ray cluster answers there ({error}); give "
            "host:port of a running one, or leave cluster.address and RAY_ADDRESS empty"
        ) from error


def local_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def plan_workers(
    config: Cluster, *, rows: int, cores: float, gpus: float
) -> tuple[int | tuple[int, int], bool]:
    """How many workers, or (fewest, most), and whether each has a GPU.

    Args:
        config: what is asked for.
        rows: workers that a global batch of D, or a micro-batch of it, has images for.
        cores: of the cluster.
        gpus: of the cluster.

    Raises:
        UserError: more are asked for than there is room or work.
    """
    use_gpu = gpus >= 1
    room = int(cores / config.cpus_per_worker)
    room = min(room, int(gpus)) if use_gpu else room
    by_default = max(1, min(rows, room if use_gpu else min(2, room)))
    wanted, most = (
        config.workers
        if isinstance(config.workers, tuple)
        else (config.workers or by_default, None)
    )
    if most is not None and wanted > most:
        raise UserError(f"cluster.workers = [{wanted}, {most}]: the first must be the smaller one")
    if wanted > room:
        raise UserError(
            f"cluster.workers = {wanted}: the cluster has {cores:g} cores and {gpus:g} GPUs, room "
            f"for {room} workers of {config.cpus_per_worker:g} cores (cluster.cpus_per_worker)"
            f"{' and a GPU' if use_gpu else ''}"
        )
    if wanted > rows:
        raise UserError(
            f"cluster.workers = {wanted}: more workers than images of D in a step or micro-batch "
            f"(train.batch_size / train.accumulate has enough for {rows}); ask for fewer workers, "
            "a larger batch or a smaller train.accumulate"
        )
    return (wanted if most is None else (wanted, min(most, rows))), use_gpu


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Give signals back to whoever had them: starting Ray replaces the handler of SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signum: signal.getsignal(signum) for signum in _STOPPING}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            if handler is not None:
                signal.signal(signum, handler)


@contextlib.contextmanager
def connect(address: str | None, *, verbose: bool) -> Iterator[dict[str, float]]:
    """Start or join the cluster; on leaving, stop or leave it.

    Yields:
        The cluster's resources, as Ray names them.

    Raises:
        UserError: no cluster answers at the address.
    """
    import ray

    if address is None:
        for name, value in _OWN_CLUSTER.items():
            os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(level)  # importing Ray set them to INFO
    options = {"logging_level": level, "log_to_driver": verbose, "configure_logging": verbose}
    try:
        _start(address, options)
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _start(address: str | None, options: dict[str, Any]) -> None:
    import ray

    where: dict[str, Any] = {"address": address}
    if address is None:
        where = {"address": "local", "num_cpus": local_cores(), "include_dashboard": False}
    try:
        with _own_signal_handlers():
            ray.init(**where, **options)
    except Exception as error:  # wrong token, another version, another program at the port …
        if address is None:
            raise RunError(f"Ray does not start on this machine: {first_line(error)}") from error
        raise UserError(
            f"cluster.address = {address!r}: cannot join: {first_line(error)}; a cluster with a "
            "token needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH, and Ray's version must match"
        ) from error
