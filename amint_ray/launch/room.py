"""How many workers a run has, and whether the cluster has room for them; waiting until it has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from amint_ray.config.schema import Cluster
from amint_ray.contracts import UserError, Watcher

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_BE_FREE = 1.0
"""After which what tasks of our own had is told as free."""


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


def lacks(
    config: Cluster, machines: Sequence[Machine], free: Sequence[Machine], fewest: int
) -> str | None:
    """What there is too little of for so many workers, in words; None: nothing.

    Args:
        config: what each needs.
        machines: what the cluster's nodes have.
        free: what nobody uses of it, node by node.
        fewest: how many there must be.
    """
    use_gpu = wants_gpus(config, machines)
    if room_on(config, machines, use_gpu=use_gpu) < fewest:
        return _too_small(config, machines, fewest, use_gpu=use_gpu)
    if (room := room_on(config, free, use_gpu=use_gpu)) >= fewest:
        return None
    return (
        f"{_asked(config, fewest)}: others use the cluster: of its {_total(machines)} only "
        f"{_total(free)} are free, room for {_such(config, room, use_gpu=use_gpu)}"
    )


def _too_small(config: Cluster, machines: Sequence[Machine], wanted: int, *, use_gpu: bool) -> str:
    on = f" on {len(machines)} nodes" if len(machines) > 1 else ""
    room = room_on(config, machines, use_gpu=use_gpu)
    return (
        f"{_asked(config, wanted)}: the cluster has {_total(machines)}{on}, room for "
        f"{_such(config, room, use_gpu=use_gpu)}"
    )


def _asked(config: Cluster, workers: int) -> str:
    return f"cluster.workers = {workers}{' (by default)' if config.workers is None else ''}"


def _total(machines: Sequence[Machine]) -> str:
    return f"{sum(m.cores for m in machines):g} cores and {sum(m.gpus for m in machines):g} GPUs"


def _such(config: Cluster, workers: int, *, use_gpu: bool) -> str:
    gpu = " and a GPU (cluster.device)" if use_gpu else ""
    each = f"{config.cpus_per_worker:g} cores (cluster.cpus_per_worker)"
    return f"{workers} worker{'' if workers == 1 else 's'} of {each}{gpu}"


def machines_of_cluster() -> list[Machine]:
    """Of the cluster that this process has joined."""
    import ray

    return [
        Machine(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def free_machines() -> list[Machine]:
    """What nobody uses of each node of the cluster that this process has joined."""
    import ray
    from ray._private.state import available_resources_per_node  # the public one adds nodes up

    free = available_resources_per_node()
    alive = [free.get(node["NodeID"], {}) for node in ray.nodes() if node["Alive"]]
    return [Machine(node.get("CPU", 0), node.get("GPU", 0)) for node in alive]


def wait_for_room(
    config: Cluster, watcher: Watcher, *, rows: int | None = None
) -> tuple[int | tuple[int, int], bool]:
    """Wait until the joined cluster has room for the workers, and has it free.

    An autoscaler is asked for what is missing.

    Args:
        config: what is asked for.
        watcher: is told of the wait, and can end it.
        rows: as in `plan_workers`; None: not known yet, wait for the fewest that may be meant.

    Returns:
        As `plan_workers`.

    Raises:
        UserError: it stayed too small, or others used it, for `cluster.wait_seconds`; or as
            `plan_workers`.
    """
    started, told = time.monotonic(), False
    try:
        while True:
            machines, free = machines_of_cluster(), free_machines()
            fewest = config.workers[0] if isinstance(config.workers, tuple) else config.workers or 1
            missing = lacks(config, machines, machines, fewest)
            if missing is None:
                planned = plan_workers(config, machines, rows=rows or fewest)
                fewest = planned[0] if isinstance(planned[0], int) else planned[0][0]
                missing = lacks(config, machines, free, fewest)
                if missing is None:
                    return planned
            waited = time.monotonic() - started
            if waited >= config.wait_seconds:
                raise UserError(
                    f"{missing}; waited {config.wait_seconds:g} s (cluster.wait_seconds)"
                )
            if not told and waited >= _SECONDS_TO_BE_FREE:
                told = True
                watcher.notice(f"{missing}; waiting up to {config.wait_seconds:g} s for it")
                _ask_autoscaler(config, fewest, use_gpu=wants_gpus(config, machines))
            watcher.heartbeat()
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        if told:
            _ask_autoscaler(config, 0, use_gpu=False)


def _ask_autoscaler(config: Cluster, workers: int, *, use_gpu: bool) -> None:
    """Ask for nodes for so many workers; 0 takes back what was asked for."""
    from ray.autoscaler.sdk import request_resources

    worker = {"CPU": config.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    request_resources(bundles=[worker] * workers)


def trials_at_a_time(
    cluster: Cluster,
    machines: Sequence[Machine],
    workers: int | tuple[int, int],
    *,
    use_gpu: bool,
) -> int:
    """How many trainings of so many workers there is room for; one at least.

    Args:
        cluster: what each worker takes.
        machines: of the cluster.
        workers: of each training; of a range, as few as it can do with.
        use_gpu: whether each worker has one.
    """
    fewest = workers if isinstance(workers, int) else workers[0]
    return max(1, room_on(cluster, machines, use_gpu=use_gpu) // fewest)
