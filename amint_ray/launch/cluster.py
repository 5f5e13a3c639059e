"""The Ray cluster that a run works on: one of its own, or one that is there."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from amint_ray.config.schema import Cluster
from amint_ray.contracts import RunError, UserError, first_line
from amint_ray.launch.time_limit import InOrder

_REPLACED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
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


def job_tags(workers: int | tuple[int, int]) -> dict[str, str]:
    """Which Ray job this process is, and what its cluster has; for the MLflow run.

    Args:
        workers: how many the run has, or the fewest and most.
    """
    import ray
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    sent = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR) or "{}").get("metadata", {})
    submission = sent.get("job_submission_id")
    return {
        "amint.ray_job_id": ray.get_runtime_context().get_job_id(),
        **({} if submission is None else {"amint.ray_submission_id": submission}),
        "amint.ray_nodes": str(len(machines)),
        "amint.ray_cpus": f"{sum(machine.get('CPU', 0) for machine in machines):g}",
        "amint.ray_gpus": f"{sum(machine.get('GPU', 0) for machine in machines):g}",
        "amint.workers": " to ".join(map(str, [workers] if isinstance(workers, int) else workers)),
    }


def local_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Give signals back to whoever had them.

    Ray's compiled code replaces the handler of SIGTERM; one that comes meanwhile sets an alarm that
    would abort this process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signum: signal.getsignal(signum) for signum in _REPLACED}
    try:
        yield
    finally:
        signal.alarm(0)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def connect(address: str | None, *, verbose: bool) -> Iterator[None]:
    """Start or join the cluster; on leaving, stop or leave it.

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
    # Tune tells of each failure in its own words, and of checkpoints of a population, which it
    # lists twice, that it cannot delete them twice.
    logging.getLogger("ray.tune").setLevel(logging.INFO if verbose else logging.CRITICAL)
    options = {"logging_level": level, "log_to_driver": verbose, "configure_logging": verbose}
    # What a signal raises must not come in the middle of Ray's start, which forks: Python drops it
    # in a callback of the fork and leaves a lock of every logger held. One thread, which lives on,
    # since what it starts ends with it.
    rays_own = InOrder()
    try:
        with _own_signal_handlers():
            rays_own.submit(lambda: _start(address, options)).result()
        yield
    finally:
        rays_own.submit(ray.shutdown).result()


def _start(address: str | None, options: dict[str, Any]) -> None:
    import ray

    where: dict[str, Any] = {"address": address}
    if address is None:
        where = {"address": "local", "num_cpus": local_cores(), "include_dashboard": False}
    try:
        ray.init(**where, **options)
    except Exception as error:  # wrong token, another version, another program at the port …
        if address is None:
            raise RunError(f"Ray does not start on this machine: {first_line(error)}") from error
        raise UserError(
            f"cluster.address = {address!r}: cannot join: {first_line(error)}; a cluster with a "
            "token needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH, and Ray's version must match"
        ) from error
