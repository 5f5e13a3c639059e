"""The main job: from a configuration to a registered model and its figures."""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from amint_ray.config.schema import Config
from amint_ray.contracts import RunError, Watcher, first_line
from amint_ray.data.loading import smallest_step
from amint_ray.data.roles import Manifest
from amint_ray.launch.cluster import address_of, connect, job_tags
from amint_ray.launch.codes import with_key
from amint_ray.launch.dataset import Dataset, find_source, index_on_ray, load_here
from amint_ray.launch.prepare import (
    Prepared,
    check,
    prepare,
    settle_streams,
    share,
    worker_rows,
)
from amint_ray.launch.recording import recording
from amint_ray.launch.room import machines_of_cluster, plan_workers, wait_for_room
from amint_ray.launch.runs import (
    RunRecord,
    alive,
    find_unfinished,
    finish,
    open_run,
    resumed_config,
)
from amint_ray.storage import Location


@dataclass(frozen=True)
class Resume:
    """Which run to go on with.

    Attributes:
        run_name: this one; None: the newest of the same configuration whose driver died, if any.
        force: let what does not touch the weights differ.
        never: begin a new run in any case.
    """

    run_name: str | None = None
    force: bool = False
    never: bool = False


def run_training(
    config: Config,
    watcher: Watcher,
    *,
    resume: Resume = Resume(),
    tags: Mapping[str, str] | None = None,
    check_data: Callable[[Manifest], None] = lambda manifest: None,
    register: bool = True,
    connected: bool = False,
    verbose: bool = False,
) -> dict[str, Any]:
    """Train, measure, record and register.

    Args:
        config: the whole configuration.
        watcher: is told how far the run is.
        resume: whether to go on with an earlier run.
        tags: of the MLflow run, beside its own.
        check_data: is shown all samples and their roles before anything is done with them, and may
            raise.
        register: the model, in MLflow.
        connected: whether the cluster is joined, or started, already.
        verbose: let Ray talk.

    Returns:
        The run's document: `run_id`, `model_uri`, `recipe`, `task`, `membership`, `loss_threshold`,
        `counts`, `flops`, `seconds` and more; figures are `{value, low, high}`. `waiting` is where
        records wait that MLflow did not take: the model is not registered then.

    Raises:
        UserError: a mistake of the user's.
        RunError: the run failed; the MLflow run is marked failed.
        BaseException: whatever a signal raises; the MLflow run is marked killed.
    """
    clock = Clock()

    def examined(dataset: Dataset) -> Prepared:
        check_data(dataset.index.manifest)
        return prepare(config, checked, dataset, watcher, earlier=earlier)

    with clock.phase("data"):
        config = with_key(config)
        checked = check(config, watcher)
        asked, earlier = config, _earlier_run(config, checked.storage, watcher, resume)
        if earlier is not None:
            asked = Config.model_validate(earlier.asked)
            config = resumed_config(config, earlier)
            watcher.notice(f"going on with run {earlier.run_name}")
        config, source = find_source(config, watcher)
        prepared = None
        if config.data.mode == "memory":
            prepared = examined(load_here(config, source, watcher))
    _import_meanwhile("mlflow", "amint_ray.launch.record")
    watcher.phase("starting Ray")
    address = address_of(config.cluster)
    joining = contextlib.nullcontext() if connected else connect(address, verbose=verbose)
    with clock.around("ray", joining):
        if address is not None:
            with clock.phase("wait"):
                wait_for_room(config.cluster, watcher)
        if prepared is None:
            with clock.phase("data"):
                prepared = examined(index_on_ray(config, source, checked.storage, watcher))
        smallest = smallest_step(prepared.dataset.index.manifest, config)
        rows = worker_rows(config, prepared.architecture, smallest)
        workers, use_gpu = (
            plan_workers(config.cluster, machines_of_cluster(), rows=rows)
            if address is None
            else wait_for_room(config.cluster, watcher, rows=rows)
        )
        most = workers if isinstance(workers, int) else workers[1]
        prepared = settle_streams(prepared, most)
        with (
            contextlib.ExitStack() as after_the_last_beat,
            alive(asked, prepared.storage, prepared.run_name) as sign,
            recording(prepared, asked, watcher, tags={**job_tags(workers), **(tags or {})}) as run,
        ):
            from amint_ray.launch import record
            from amint_ray.launch.fit import DivergedError, Job, fit

            data, prepared = share(prepared)
            job = Job(
                config=prepared.config,
                run_name=prepared.run_name,
                architecture=prepared.architecture,
                manifest=prepared.dataset.index.manifest.fingerprint,
                storage=prepared.storage,
                goes_on=prepared.earlier is not None,
            )
            try:
                fitted = fit(
                    job,
                    data,
                    run,
                    watcher,
                    workers=workers,
                    use_gpu=use_gpu,
                    sign=sign.path,
                )
            except DivergedError:
                # It would end the same way again.
                after_the_last_beat.callback(finish, asked, prepared.storage, prepared.run_name)
                raise
            for phase, seconds in fitted.seconds.items():
                clock.add(phase, seconds)
            watcher.phase("recording")
            assert fitted.checkpoint is not None
            with clock.phase("log"), fitted.checkpoint.as_directory() as folder:
                last = Path(folder)
                document = record.record(
                    prepared,
                    last,
                    run,
                    history=fitted.history,
                    lost=fitted.lost,
                    register=register,
                )
                recorded = record.finish(prepared, document, run, watcher)
            if document["no_program"] is not None:
                watcher.notice(
                    f"without amint_ray the model is of no use: {document['no_program']}"
                )
    finish(asked, prepared.storage, prepared.run_name)
    flops = {
        "joint_step": prepared.flops.joint,
        "task_step": prepared.flops.task,
        "ratio": prepared.flops.ratio,
        "per_second": prepared.flops.joint * fitted.steps_per_second,
    }
    return {
        **recorded,
        **document,
        "workers": fitted.workers,
        "resumed": earlier is not None,
        "flops": flops,
        "seconds": clock.seconds,
    }


def _earlier_run(
    config: Config, storage: Location, watcher: Watcher, resume: Resume
) -> RunRecord | None:
    if resume.never:
        return None
    try:
        if resume.run_name is not None:
            return open_run(config, storage, resume.run_name, watcher, force=resume.force)
        return find_unfinished(config, storage, watcher)
    except OSError as error:
        raise RunError(f"storage.path = {storage.uri!r}: {first_line(error)}") from error


T = TypeVar("T")


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

    @contextmanager
    def around(self, name: str, manager: contextlib.AbstractContextManager[T]) -> Iterator[T]:
        """Count only the entering and leaving of a context towards a phase."""
        with contextlib.ExitStack() as stack:
            with self.phase(name):
                entered = stack.enter_context(manager)
            leave = stack.pop_all()
        try:
            yield entered
        finally:
            with self.phase(name):
                leave.close()


def _import_meanwhile(*modules: str) -> None:
    """Import in the background what is needed later, while something else is waited for."""

    def work() -> None:
        for module in modules:
            importlib.import_module(module)

    threading.Thread(target=work, daemon=True, name="imports").start()
