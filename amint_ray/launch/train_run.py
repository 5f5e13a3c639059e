"""The main job: from a configuration to a registered model and its figures, on Ray Train."""

from __future__ import annotations

import importlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from amint_ray.config.schema import Config
from amint_ray.contracts import RunError
from amint_ray.data.loading import check_roles
from amint_ray.data.roles import Manifest, build_manifest
from amint_ray.data.sources import ImageSet, load_source
from amint_ray.launch.cluster import address_of, check_address, connect, local_cores, plan_workers
from amint_ray.model.joint import Architecture, plan_architecture
from amint_ray.storage import writable_folder
from amint_ray.tracking.run_log import RunLog, Status, check_tracking, tracking_uri

_SECONDS_BETWEEN_POLLS = 0.2


class Watcher(Protocol):
    """Whoever follows a run on a screen."""

    def phase(self, text: str) -> None:
        """The run begins something new."""

    def event(self, event: Mapping[str, Any]) -> None:
        """News from the training loop, as `RunContext.progress` got them."""


@dataclass(frozen=True)
class Prepared:
    """What is settled before Ray starts."""

    config: Config
    run_name: str
    images: ImageSet
    manifest: Manifest
    architecture: Architecture
    storage: Path
    tracking_uri: str


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, phase: str, seconds: float) -> None:
        """Count seconds towards a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time within towards a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)


def run_training(config: Config, watcher: Watcher, *, verbose: bool = False) -> dict[str, Any]:
    """Train, measure, record and register.

    Args:
        config: the whole configuration.
        watcher: is told how far the run is.
        verbose: let Ray talk.

    Returns:
        The run's document: `run_id`, `model_uri`, `recipe`, `task`, `membership`, `loss_threshold`,
        `counts`, `seconds` and more; figures are `{value, low, high}`.

    Raises:
        UserError: a mistake of the user's, found before anything was recorded.
        RunError: a worker failed for good; the MLflow run is marked failed.
        KeyboardInterrupt: or whatever else a signal raises; the MLflow run is marked killed.
    """
    clock = Clock()
    with clock.phase("data"):
        prepared = prepare(config, watcher)
    with recording(prepared, watcher) as log:
        with _timed(
            connect(address_of(config.cluster), verbose=verbose), clock, "ray", watcher
        ) as cluster:
            workers, use_gpu = plan_workers(
                config.cluster,
                rows=config.train.batch_size,
                cores=cluster.get("CPU", 0),
                gpus=cluster.get("GPU", 0),
            )
            checkpoint = _fit(prepared, workers, use_gpu, log, watcher, clock)
        with clock.phase("log"):
            watcher.phase("recording")
            from amint_ray.launch.record import record

            document = record(prepared, checkpoint, log())
    return {**document, "workers": workers, "seconds": clock.seconds}


def prepare(config: Config, watcher: Watcher) -> Prepared:
    """Everything that can be found wrong before Ray starts, cheapest first.

    Raises:
        UserError: something was found.
    """
    watcher.phase("checking the configuration")
    address = address_of(config.cluster)
    if address is None:
        plan_workers(
            config.cluster,
            rows=config.train.batch_size,
            cores=local_cores(),
            gpus=torch.cuda.device_count(),
        )
    else:
        check_address(address)
    storage = writable_folder(config.storage.path, "storage.path")
    uri = tracking_uri()
    check_tracking(uri)
    # Two classes stand for any number: taps and head do not depend on it, and a wrong tap should
    # not wait for a large source to be decoded.
    architecture = plan_architecture(config, num_classes=2)
    watcher.phase(f"reading {config.data.source}")
    images = load_source(config.data, lambda done, total: watcher.event(_reading(done, total)))
    manifest = build_manifest(
        images.sample_id,
        images.content,
        images.label,
        images.official_test,
        shares=config.data.shares,
        seed=config.data.split_seed,
    )
    check_roles(manifest, config)
    return Prepared(
        config=config,
        run_name=f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}",
        images=images,
        manifest=manifest,
        architecture=replace(architecture, num_classes=len(images.class_names)),
        storage=storage,
        tracking_uri=uri,
    )


@contextmanager
def recording(prepared: Prepared, watcher: Watcher) -> Iterator[Callable[[], RunLog]]:
    """An MLflow run around the body, ended as what the body ended as.

    It is opened in a thread: importing MLflow and making its database takes seconds in which the
    start of Ray only waits. What is yielded waits for it.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
    opening: Future[RunLog] = executor.submit(
        RunLog,
        prepared.tracking_uri,
        prepared.config,
        run_name=prepared.run_name,
        tags={"amint.manifest_fingerprint": prepared.manifest.fingerprint},
    )
    # SciPy and Matplotlib are for the end; now nobody waits for their import.
    executor.submit(importlib.import_module, "amint_ray.launch.record")
    try:
        yield opening.result
        opening.result().end("FINISHED")
    except BaseException as error:
        if opening.exception() is None:
            status: Status = "FAILED" if isinstance(error, Exception) else "KILLED"
            opening.result().end(status)
            watcher.phase(f"MLflow run {opening.result().run_id} is marked {status}")
        raise
    finally:
        executor.shutdown()


def _fit(
    prepared: Prepared,
    workers: int,
    use_gpu: bool,
    log: Callable[[], RunLog],
    watcher: Watcher,
    clock: Clock,
) -> Path:
    """Run the training loop on Ray Train, passing its news on; gives the last checkpoint."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from amint_ray.launch.progress import Receiver
    from amint_ray.launch.worker import train_worker

    config = prepared.config
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config,
            "run_name": prepared.run_name,
            "architecture": prepared.architecture,
            # Decoded once, here; the workers of a node share the object store's copy.
            "images": ray.put(prepared.images.images),
            "manifest": ray.put(prepared.manifest),
        },
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.cluster.cpus_per_worker}
            | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=prepared.run_name,
            storage_path=str(prepared.storage),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
        ),
    )
    watcher.phase(f"starting {workers} worker{'s' if workers > 1 else ''}")
    receiver = Receiver(prepared.run_name)
    logged = 0
    called = time.time()
    running = _InThread(trainer.fit)
    while True:
        done = not running.is_alive()
        for event in receiver.poll():
            watcher.event(event)
            if event["phase"] == "epoch":
                log().log_epoch(event)
                logged = event["epoch"]
        if done:
            break
        time.sleep(_SECONDS_BETWEEN_POLLS)
    returned = time.time()
    result = running.result()
    home = result.return_value
    for entry in home["history"][logged:]:
        log().log_epoch(entry)
    clock.add("workers", home["entered"] - called + home["seconds"]["setup"])
    clock.add("train", home["seconds"]["train"])
    clock.add("evaluate", home["seconds"]["evaluate"])
    clock.add("workers", returned - home["left"])
    return Path(result.checkpoint.to_directory())


class _InThread(threading.Thread):
    """A call in a daemon thread: the main thread stays free for Ctrl-C, which Ray would swallow."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # handed to the main thread by `result`
            self._error = error

    def result(self) -> Any:
        """What the call returned.

        Raises:
            RunError: it raised.
        """
        if self._error is not None:
            raise RunError(f"training failed: {_cause(self._error)}") from self._error
        return self._value


def _cause(error: BaseException) -> str:
    """The line that says most: a worker's own error, or the controller's, without the traceback."""
    failures = getattr(error, "worker_failures", None) or {}
    controller = getattr(error, "controller_failure", None)
    where, inner = "", error
    if failures:
        rank, inner = min(failures.items())
        where, inner = f"worker {rank}: ", getattr(inner, "_base_exc", None) or inner
    elif controller is not None:
        where, inner = "Ray Train's controller: ", controller
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{where}{type(inner).__name__}: {lines[-1] if lines else 'no message'}"


def _reading(done: int, total: int) -> dict[str, Any]:
    return {"phase": "read", "done": done, "total": total}


@contextmanager
def _timed(cluster: Any, clock: Clock, phase: str, watcher: Watcher) -> Iterator[dict[str, float]]:
    """Enter and leave the cluster with only that on the clock."""
    watcher.phase("starting Ray")
    with clock.phase(phase):
        resources = cluster.__enter__()
    try:
        yield resources
    finally:
        with clock.phase(phase):
            cluster.__exit__(None, None, None)
