"""How many workers a run has, and whether the cluster has room for them; waiting until it has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from amint_ray.config.schema import Cluster
from amint_ray.contracts import RunError, UserError, Watcher

_SECONDS_BETWEEN_LOOKS = 0.5


class Machine(NamedTuple):
    """What a node has."""

    cores: float
    gpus: float


def plan_workers(
    config: Cluster, machines: Sequence[Machine], *, rows: int
) -> tuple[int | tuple[int, int], bool]:
    """How many workers, or (fewest, most), and whether each has a GPU.

    Args:
        config: what is asked for.
        machines: of the cluster.
        rows: workers that a global batch of D, or a micro-batch of it, has images for.

    Raises:
        UserError: more are asked for than there is room or work.
    """
    use_gpu = wants_gpus(config, machines)
    room = room_on(config, machines, use_gpu=use_gpu)
    by_default = max(1, min(rows, room if use_gpu else min(2, room)))
    fewest, most = (
        config.workers
        if isinstance(config.workers, tuple)
        else (config.workers or by_default, None)
    )
    if fewest > room:
        raise UserError(_too_small(config, machines, fewest, use_gpu=use_gpu))
    if fewest > rows:
        raise UserError(
            f"cluster.workers = {fewest}: more workers than images of D in a step or micro-batch "
            f"(train.batch_size / train.accumulate has enough for {rows}); ask for fewer workers, "
            "a larger batch or a smaller train.accumulate"
        )
    return (fewest if most is None else (fewest, min(most, rows))), use_gpu


def wants_gpus(config: Cluster, machines: Sequence[Machine]) -> bool:
    """Whether each worker is to have a GPU."""
    if config.device == "auto":
        return any(machine.gpus >= 1 for machine in machines)
    return config.device == "cuda"


def room_on(config: Cluster, machines: Sequence[Machine], *, use_gpu: bool) -> int:
    """Workers that the machines have room for; none is spread over two."""
    return sum(
        int(
            min(cores / config.cpus_per_worker, gpus) if use_gpu else cores / config.cpus_per_worker
        )
        for cores, gpus in machines
    )


def _too_small(config: Cluster, machines: Sequence[Machine], wanted: int, *, use_gpu: bool) -> str:
    cores, gpus = sum(m.cores for m in machines), sum(m.gpus for m in machines)
    room = room_on(config, machines, use_gpu=use_gpu)
    on = f" on {len(machines)} nodes" if len(machines) > 1 else ""
    return (
        f"cluster.workers = {wanted}: the cluster has {cores:g} cores and {gpus:g} GPUs{on}, room "
        f"for {room} workers of {config.cpus_per_worker:g} cores (cluster.cpus_per_worker)"
        f"{' and a GPU (cluster.device)' if use_gpu else ''}"
    )


def machines_of_cluster() -> list[Machine]:
    """Of the cluster that this process has joined."""
    import ray

    return [
        Machine(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def wait_for_room(config: Cluster, watcher: Watcher) -> list[Machine]:
    """Wait until the joined cluster has room for the fewest workers asked for, and has it free.

    An autoscaler is asked for what is missing.

    Returns:
        The cluster's machines.

    Raises:
        UserError: it stayed too small for `cluster.wait_seconds`.
        RunError: it is large enough, but others use it.
    """
    fewest = config.workers[0] if isinstance(config.workers, tuple) else config.workers or 1
    started, told = time.monotonic(), False
    try:
        while True:
            machines = machines_of_cluster()
            lacks, too_small = _lacks(config, machines, fewest)
            if lacks is None:
                return machines
            if time.monotonic() - started >= config.wait_seconds:
                waited = f"{lacks}; waited {config.wait_seconds:g} s (cluster.wait_seconds)"
                raise UserError(waited) if too_small else RunError(waited)
            if not told:
                told = True
                watcher.notice(f"{lacks}; waiting up to {config.wait_seconds:g} s for it")
                _ask_autoscaler(config, fewest, use_gpu=wants_gpus(config, machines))
            watcher.heartbeat()
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        if told:
            _ask_autoscaler(config, 0, use_gpu=False)


def _lacks(config: Cluster, machines: Sequence[Machine], fewest: int) -> tuple[str | None, bool]:
    """What there is too little of, in words; and whether the cluster itself is too small."""
    import ray

    use_gpu = wants_gpus(config, machines)
    if room_on(config, machines, use_gpu=use_gpu) < fewest:
        return _too_small(config, machines, fewest, use_gpu=use_gpu), True
    free: dict[str, Any] = ray.available_resources()
    for name, each, key in (("cores", config.cpus_per_worker, "CPU"), ("GPUs", 1.0, "GPU")):
        if (key == "CPU" or use_gpu) and free.get(key, 0.0) < fewest * each:
            has = sum(m.cores if key == "CPU" else m.gpus for m in machines)
            return (
                f"of the cluster's {has:g} {name} only {free.get(key, 0.0):g} are free, and "
                f"{fewest} workers need {fewest * each:g}: others use it",
                False,
            )
    return None, False


def _ask_autoscaler(config: Cluster, workers: int, *, use_gpu: bool) -> None:
    """Ask for nodes for so many workers; 0 takes back what was asked for."""
    from ray.autoscaler.sdk import request_resources

    worker = {"CPU": config.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    request_resources(bundles=[worker] * workers)
