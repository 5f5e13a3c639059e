"""What usually goes wrong before a cluster job does, looked for at once: `amint doctor`."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from amint_ray.config.load import load_config
from amint_ray.config.schema import Config
from amint_ray.contracts import UserError, Watcher
from amint_ray.launch import doctor_node, no_secrets, time_limit
from amint_ray.launch.cluster import address_of, connect
from amint_ray.launch.doctor_driver import checks_of_driver
from amint_ray.launch.doctor_node import Finding, Wrong, checks_of_machine, run_checks
from amint_ray.launch.knock import check_address, other_versions
from amint_ray.launch.no_secrets import scrub
from amint_ray.launch.room import machines_of_cluster
from amint_ray.launch.submit_job import open_client, parse_runtime_env, refuse_secrets

_MOST_SKEW = 2.0
_DRIVER = "driver"


def diagnose(
    overrides: Sequence[str],
    watcher: Watcher,
    *,
    address: str | None = None,
    runtime_env: str | None = None,
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Check everything.

    Args:
        overrides: of the configuration; `cluster.address`, `storage`, `data` and `tracking` matter.
        watcher: is told what goes on.
        address: of the cluster, in place of `cluster.address`.
        runtime_env: file with what a job is to have; None: what this process has got, if anything.
        seconds: that a check may take.

    Returns:
        `checks`, a list of `name`, `where`, `ok`, `said`, without any secret; and `ok`.

    Raises:
        UserError: an override or the file is wrong, or an override holds a secret.
    """
    refuse_secrets(overrides)
    given = [f"cluster.address={address}"] if address else []
    keys = {override.partition("=")[0] for override in overrides}
    if "data.path" in keys and "data.source" not in keys:
        given.append("data.source=folder")  # the default takes no path
    config = load_config(None, (*given, *overrides))
    environment = None if runtime_env is None else parse_runtime_env(runtime_env)
    return _diagnose(config, environment, watcher, seconds)


def _diagnose(
    config: Config, runtime_env: Mapping[str, Any] | None, watcher: Watcher, seconds: float
) -> dict[str, Any]:
    found: list[Finding] = []

    def add(findings: list[Finding], where: str) -> None:
        for finding in findings:
            said = scrub(finding["said"])
            found.append({**finding, "where": where, "said": said})

    watcher.phase("checking the cluster")
    address = address_of(config.cluster)
    with contextlib.ExitStack() as stack:
        (cluster,) = run_checks({"cluster": lambda: _reach(address, seconds)}, 2 * seconds)
        nodes: list[_Nodes] = []

        def join(address: str) -> str:
            said = _join(stack, address)
            nodes.append(_Nodes(config, seconds))
            return said

        if cluster["ok"] and address is not None and not _is_dashboard(address):
            (cluster,) = run_checks({"cluster": partial(join, address)}, 3 * seconds)
        add([cluster], scrub(address) if address else _DRIVER)
        watcher.phase("checking this machine" + (" and the nodes" if nodes else ""))
        asked = _asked(config, seconds)
        checks = {**checks_of_machine(asked), **checks_of_driver(config, runtime_env, seconds)}
        with contextlib.suppress(Exception):  # whatever it is, the check tells
            importlib.import_module("mlflow")  # which alone may take longer than a check should
        add(run_checks(checks, seconds), _DRIVER)
        for cluster_nodes in nodes:
            for where, findings in cluster_nodes.findings():
                add(findings, where)
    return {"checks": found, "ok": all(finding["ok"] for finding in found)}


def _is_dashboard(address: str) -> bool:
    return address.startswith(("http://", "https://"))


def _reach(address: str | None, seconds: float) -> str:
    """Whether a cluster answers and takes the token, in seconds.

    Raises:
        Wrong: it does not.
    """
    if address is None:
        return "no address (cluster.address, RAY_ADDRESS): a run would use this machine alone"
    try:
        if _is_dashboard(address):
            version = getattr(open_client(address), "_server_ray_version", None)
            if other := other_versions({"ray_version": version}):
                raise Wrong(other)
            return (
                f"Ray {version}'s dashboard takes the token; to check the nodes, run "
                "`ray job submit -- amint doctor`"
            )
        check_address(address, seconds)
    except UserError as error:
        raise Wrong(str(error)) from None
    if address == "auto" or address.startswith("ray://"):
        return "Ray finds out by itself"
    return "takes the token"


def _join(stack: contextlib.ExitStack, address: str) -> str:
    import ray

    try:
        stack.enter_context(connect(address, verbose=False))
    except UserError as error:
        raise Wrong(str(error)) from None
    machines = machines_of_cluster()
    cores, gpus = (sum(of) for of in zip(*machines, strict=True))
    return f"Ray {ray.__version__}, {len(machines)} nodes, {cores:g} CPUs, {gpus:g} GPUs"


def _asked(config: Config, seconds: float) -> dict[str, Any]:
    """What every machine is asked for (`doctor_node.checks_of_machine`)."""

    def on_s3(path: str | None) -> str | None:
        return path if path is not None and path.startswith("s3:") else None

    return {
        "versions": None,
        "gpus": None,
        "object_store": None,
        "storage": on_s3(config.storage.path),
        "data": on_s3(config.data.path),
        "seconds": seconds,
    }


class _Nodes:
    """The checks of all nodes that are alive, begun when this is made."""

    def __init__(self, config: Config, seconds: float) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for module in (doctor_node, no_secrets, time_limit):
            ray.cloudpickle.register_pickle_by_value(module)
        self._seconds = seconds
        self._versions = doctor_node.versions()
        self._running: list[tuple[str, Any, Any]] = []
        for node in ray.nodes():
            if not node["Alive"]:
                continue
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": strategy}
            asked = {
                **_asked(config, seconds),
                "versions": self._versions,
                "gpus": node["Resources"].get("GPU", 0.0),
                "object_store": node["Resources"].get("object_store_memory"),
            }
            running = ray.remote(**options)(doctor_node.look).remote(asked)
            clock = ray.remote(**options)(doctor_node.now)
            where = f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]})"
            self._running.append((where, running, clock))

    def findings(self) -> Iterator[tuple[str, list[Finding]]]:
        """What each node found, by node."""
        import ray

        # A worker process may have to be started first.
        limit = (doctor_node.SLOWER + 1) * self._seconds
        deadline = time.monotonic() + limit
        for where, running, clock in self._running:
            try:
                left = max(0.0, deadline - time.monotonic())
                yield where, ray.get(running, timeout=left)
            except Exception as error:
                timed_out = isinstance(error, ray.exceptions.GetTimeoutError)
                said = f"no answer within {limit:g} s" if timed_out else _last(error)
                yield where, [{"name": "node", "ok": False, "said": f"cannot run a task: {said}"}]
                continue
            yield where, run_checks({"clock": partial(_skew, clock)}, self._seconds)


def _skew(clock: Any) -> str:
    """Compare a node's clock with ours: the quickest of some calls tells most."""
    import ray

    best: tuple[float, float] | None = None
    for _ in range(5):
        before = time.time()
        there = ray.get(clock.remote())
        after = time.time()
        candidate = (after - before, there - (before + after) / 2)
        best = candidate if best is None else min(best, candidate)
    assert best is not None
    journey, ahead = best
    said = f"{abs(ahead):.2f} s {'ahead of' if ahead > 0 else 'behind'} the driver's"
    if abs(ahead) - journey / 2 > _MOST_SKEW:
        raise Wrong(f"{said}: S3 refuses requests of the wrong time; have NTP set both clocks")
    return f"{said}, ± {journey / 2:.2f} s"


def _last(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
