"""The training loop on Ray Train, and its news to whoever watches."""

from __future__ import annotations

import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ray
import ray.train
from pyarrow.fs import FileSelector
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)

from amint_ray.config.schema import Config, Storage
from amint_ray.contracts import RunError, UserError, Watcher
from amint_ray.launch.cluster import address_of
from amint_ray.launch.progress import Receiver
from amint_ray.launch.snapshot import mend_snapshot
from amint_ray.launch.waiting import Waiting
from amint_ray.launch.worker import train_worker
from amint_ray.model.joint import Architecture
from amint_ray.storage import Location

_SECONDS_BETWEEN_POLLS = 0.2


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Attributes:
        config: the whole configuration, settled.
        run_name: names the folder of its checkpoints, and its news.
        architecture: of the model.
        manifest: fingerprint of images and roles.
        storage: what the folder lies in.
        goes_on: whether the folder may hold checkpoints of the same training.
        score: whether all samples are scored at the end, which then has a checkpoint.
        inherit: checkpoint of another training to go on from, where the folder has none.
    """

    config: Config
    run_name: str
    architecture: Architecture
    manifest: str
    storage: Location
    goes_on: bool
    score: bool = True
    inherit: ray.train.Checkpoint | None = None


class Listener(Protocol):
    """Whoever is told of a training."""

    def hear(self, event: Mapping[str, Any]) -> None:
        """News from the workers, or an epoch's entry of their history, which may come twice."""

    def check(self, watcher: Watcher) -> None:
        """Called a few times a second; may raise to end the training."""


@dataclass(frozen=True)
class Fitted:
    """A finished training.

    Attributes:
        checkpoint: the last one, with weights and scores; None where there was to be none.
        seconds: of `workers` (started and stopped), `train` and `evaluate`.
        steps_per_second: median over the epochs.
        lost: images that could not be read when their turn came: the reason by sample id.
        history: one entry an epoch.
        workers: how many there were at the end.
    """

    checkpoint: ray.train.Checkpoint | None
    seconds: dict[str, float]
    steps_per_second: float
    lost: dict[str, str]
    history: list[dict[str, float]]
    workers: int


class DivergedError(RunError):
    """A loss that is not finite; the same run would end in it again."""


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Without the process that Ray starts beside each training to clean up after its controller.

    Where this process dies, Ray frees what the job had; where a trial dies, `orphans.py` does. That
    process costs seconds of a core and stays for minutes; without Ray's dashboard, for ever.
    """

    def _create_default_callbacks(self) -> list[Any]:
        usual = super()._create_default_callbacks()
        return [found for found in usual if not isinstance(found, PlacementGroupCleanerCallback)]


def fit(
    job: Job,
    data: Mapping[str, Any],
    listener: Listener,
    watcher: Watcher,
    *,
    workers: int | tuple[int, int],
    use_gpu: bool,
    sign: str,
) -> Fitted:
    """Train on `workers` processes.

    Args:
        job: what is to be trained.
        data: what the workers read (`worker.open_streams`), in Ray's object store: those of a node
            share it.
        listener: is told what is to be kept of the news.
        watcher: gets the loop's news.
        workers: how many; (fewest, most) where their number may change in mid-run.
        use_gpu: whether each has one.
        sign: path of a file in storage, which all nodes of a cluster must see.

    Raises:
        UserError: one does not see it.
        RunError: the training failed for good.
    """
    config, storage = job.config, job.storage
    joined = address_of(config.cluster) is not None
    fewest = workers if isinstance(workers, int) else workers[0]
    receiver = Receiver(job.run_name)
    for event in receiver.poll():  # of a driver that was killed before it looked
        listener.hear(event)
    receiver.close()  # a try of this run that was killed may have left word that it gave up
    if job.goes_on:
        run_folder = storage.below(job.run_name)
        mend_snapshot(run_folder, watcher, keep_best=config.storage.keep_best)
    trainer = _Trainer(
        train_worker,
        train_loop_config={
            "config": config,
            "run_name": job.run_name,
            # By reference: the controller reads this, and would import timm for what it has no use.
            "architecture": ray.put(job.architecture),
            "manifest": job.manifest,
            "data": data,
            "score": job.score,
            "inherit": job.inherit,
            # On object storage, and on one machine, there is nothing to be found out.
            "sign": sign if joined and not storage.remote else None,
        },
        torch_config=TorchConfig(
            backend=None if config.cluster.backend == "auto" else config.cluster.backend
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            elastic_resize_monitor_interval_s=config.cluster.resize_seconds,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.cluster.cpus_per_worker}
            | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=job.run_name,
            storage_path=storage.path,
            storage_filesystem=storage.filesystem if storage.remote else None,
            checkpoint_config=_checkpoint_config(config.storage),
            failure_config=ray.train.FailureConfig(max_failures=config.cluster.max_failures),
            callbacks=[Waiting(job.run_name, config.cluster, fewest)] if joined else [],
        ),
    )
    number = workers if isinstance(workers, int) else f"{workers[0]} to {workers[1]}"
    watcher.phase(f"starting {number} worker{'' if number == 1 else 's'}")
    called = time.time()
    running = _InThread(trainer.fit)
    try:
        _follow(running, receiver, listener, watcher)
    finally:
        with contextlib.suppress(Exception):  # which must not hide why this ends
            receiver.close()
    returned = time.time()
    result = running.result()
    home = result.return_value
    if "unseen" in home:
        nodes = ", ".join(home["unseen"])
        raise UserError(
            f"storage.path = {config.storage.path!r}: node {nodes} does not see what "
            f"{socket.gethostname()} keeps in {storage.path}; name a folder that all nodes share, "
            "or s3://BUCKET/PREFIX"
        )
    if "failed" in home:
        kind = DivergedError if home["diverged"] else RunError
        raise kind(f"training failed: {home['failed']}")
    if job.score:
        _remove_orphans(storage.below(job.run_name), result)
    for entry in home["history"]:  # news of some may have been lost with a worker
        listener.hear({"phase": "epoch", **entry})
    seconds = home["seconds"]
    start_and_stop = home["entered"] - called + seconds["setup"] + returned - home["left"]
    return Fitted(
        result.checkpoint if job.score else None,
        {"workers": start_and_stop, "train": seconds["train"], "evaluate": seconds["evaluate"]},
        statistics.median(entry["train/steps_per_second"] for entry in home["history"]),
        home["lost"],
        home["history"],
        home["workers"],
    )


def _follow(running: _InThread, receiver: Receiver, listener: Listener, watcher: Watcher) -> None:
    """Pass the workers' news on until they end."""
    done = False
    while not done:
        watcher.heartbeat()
        done = not running.is_alive()  # asked before the last poll, so that no news is missed
        listener.check(watcher)
        for event in receiver.poll():
            listener.hear(event)
            if event["phase"] == "notice":
                watcher.notice(event["text"])
            watcher.event(event)
        if not done:
            time.sleep(_SECONDS_BETWEEN_POLLS)


def _remove_orphans(run: Location, result: ray.train.Result) -> None:
    """Delete what workers brought to storage and died before Ray Train knew of it."""
    known = {checkpoint.path.rstrip("/") for checkpoint, _ in result.best_checkpoints or []}
    known.add(result.checkpoint.path.rstrip("/"))
    with contextlib.suppress(OSError):  # no reason to fail a run that is done
        for info in run.filesystem.get_file_info(FileSelector(run.path)):
            if info.base_name.startswith("checkpoint_2") and info.path not in known:
                run.filesystem.delete_dir(info.path)


def _checkpoint_config(storage: Storage) -> ray.train.CheckpointConfig:
    """The last few, or the best few and the last."""
    if storage.keep_best is None:
        return ray.train.CheckpointConfig(num_to_keep=storage.keep)
    better = "max" if storage.keep_best.endswith("accuracy") else "min"
    return ray.train.CheckpointConfig(
        num_to_keep=storage.keep,
        checkpoint_score_attribute=storage.keep_best,
        checkpoint_score_order=better,
    )


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
