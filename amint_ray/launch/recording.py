"""What a run has to tell MLflow: kept on the local disk first, and sent by a thread of its own.

Training then waits for no server, a signal that stops the run never comes in the middle of a
transaction, and what a server that is down was to be told is sent when it is back
(`tracking/spool.py`).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from amint_ray.config.schema import Config, Tracking
from amint_ray.contracts import RunError, UserError, Watcher, first_line, leaves
from amint_ray.data.roles import Manifest
from amint_ray.launch.beside import StorageSender
from amint_ray.launch.dataset import Dataset
from amint_ray.launch.prepare import Prepared
from amint_ray.launch.records import RunRecords
from amint_ray.launch.runs import RunRecord
from amint_ray.launch.time_limit import InOrder
from amint_ray.storage import Location, without_secrets
from amint_ray.tracking.run_log import (
    NewRun,
    OpenedRun,
    Status,
    open_run,
    run_of,
    without_password,
)
from amint_ray.tracking.sending import MLflowSender
from amint_ray.tracking.spool import (
    InUseError,
    NoSpoolError,
    Spool,
    SpooledRun,
    set_aside,
)

_SECONDS_TO_MARK = 30.0
"""That a run that ends waits for MLflow, only to tell it that it has ended."""
_SECONDS_TO_STOP = 5.0

T = TypeVar("T")


class Recording:
    """A run's MLflow run, perhaps still being opened; what it is told is told in order."""

    def __init__(self, begin: Callable[[], RunRecords]) -> None:
        self._calls = InOrder()
        self._opening = self._calls.submit(begin)
        self._told: list[Future[object]] = []
        self._ended = False

    def check(self, watcher: Watcher) -> None:
        """See how it goes.

        Args:
            watcher: is told where MLflow does not answer, and when it does again.

        Raises:
            UserError: the run could not be opened.
            Exception: whatever a record met on its way to the disk.
        """
        if self._opening.done():
            for text in self._opening.result().delivery.news():
                watcher.notice(text)
        while self._told and self._told[0].done():
            self._told.pop(0).result()

    def _tell(self, call: Callable[[RunRecords], object]) -> None:
        self._told.append(self._calls.submit(lambda: call(self._opening.result())))

    def _ask(self, call: Callable[[RunRecords], T]) -> T:
        return self._calls.submit(lambda: call(self._opening.result())).result()

    def hear(self, event: Mapping[str, Any]) -> None:
        """News from the workers, of which MLflow is told what it wants to know."""
        match event["phase"]:
            case "steps":
                self._tell(lambda run: run.steps(event["first"], event["sums"]))
            case "machine":
                self._tell(lambda run: run.machine(event["node"], event["values"]))
            case "epoch":
                self._tell(lambda run: run.epoch(event))

    def tell_figures(self, figures: Mapping[str, Any], *, step: int) -> None:
        """Every `{value, low, high}` of a nested document, as `path`, `path.low`, `path.high`."""
        self._tell(lambda run: run.figures(leaves(figures), step=step))

    def new_folder(self) -> Path:
        """An empty folder for `tell_files` or `tell_model`."""
        return self._ask(lambda run: run.spool.new_folder())

    def tell_files(self, folder: Path) -> None:
        """Every file in a folder, as artifacts."""
        self._tell(lambda run: run.tell("files", folder=folder.name))

    def tell_model(
        self, folder: Path, name: str, *, tags: Mapping[str, str], description: str
    ) -> None:
        """A model to be registered as the next version of `name`."""
        fields = {"name": name, "tags": dict(tags), "description": description}
        self._tell(lambda run: run.tell("model", folder=folder.name, **fields))

    @property
    def run_id(self) -> str:
        """MLflow's; waits for the run to be opened."""
        return self._ask(lambda run: run.run_id)

    def finish(
        self, watcher: Watcher, *, wait_seconds: float
    ) -> tuple[dict[str, str], Path | None]:
        """Close the run, and wait for all of it to arrive.

        Args:
            watcher: is told of the wait, and can end it.
            wait_seconds: how long an MLflow that does not answer is waited for.

        Returns:
            The versions of the models that were registered, by name; and where records wait that
            MLflow did not take, if there are some.

        Raises:
            RunError: MLflow is told nothing, and storage does not take the files.
        """
        run = self._ask(_finished)
        self._ended = True
        watcher.phase("bringing what was recorded to its place")
        while run.spool.waiting() and run.delivery.failing[0] <= wait_seconds:
            watcher.heartbeat()
            self.check(watcher)
            time.sleep(0.05)
        reason = run.delivery.failing[1] or "it does not answer"
        self.check(watcher)
        if run.close():
            return run.versions, None
        if not run.run_id:
            raise RunError(f"storage.path does not take the run's files: {reason}")
        if not run.spool.durable:
            watcher.notice(f"WARNING: {run.spool.folder.parent} has no room for what waits")
        watcher.notice(
            f"WARNING: MLflow did not take all records ({reason}): the model is trained and not "
            f"yet registered; send what waits with `amint sync {run.spool.folder}`"
        )
        return run.versions, run.spool.folder

    def end(self, status: Status, tags: Mapping[str, str]) -> None:
        """Say how the run ended, and wait for nothing; `arrived` tells when MLflow has it all."""
        self._ended = True

        def tell(run: RunRecords) -> None:
            run.tell("tags", values=dict(tags))
            run.tell("status", status=status, time=run.now())

        self._tell(tell)

    def arrived(self) -> bool:
        """Whether all that was told has arrived, or never will; the run is closed then."""
        if not self._opening.done() or not all(call.done() for call in self._told):
            return False
        if self._opening.exception() is not None:
            return True
        run = self._opening.result()
        if run.spool.waiting() or not run.close():
            return False
        self._calls.close()
        return True

    def waiting(self) -> Path | None:
        """Where records wait that MLflow did not take; the run is closed, if it was opened."""
        if not self._opening.done() or self._opening.exception() is not None:
            return None
        run = self._opening.result()
        self._calls.close()
        return None if run.close() else run.spool.folder

    def mark(self, status: Status, watcher: Watcher) -> None:
        """Tell MLflow how the run ended; that it cannot be told must not hide why."""
        try:
            run = self._calls.submit(self._opening.result).result(_SECONDS_TO_MARK)
        except TimeoutError:
            watcher.notice(f"MLflow does not answer: its run is not marked {status}")
            return
        except Exception:  # it was never opened, which has been told
            return
        if self._ended:
            status = "FINISHED"  # which it is told already
        else:
            run.tell("status", status=status, time=run.now())
        deadline = time.monotonic() + _SECONDS_TO_MARK
        while run.spool.waiting() and time.monotonic() < deadline:
            if run.delivery.failing[0] > _SECONDS_TO_STOP:
                break
            time.sleep(0.05)
        if run.close():
            if run.run_id:
                watcher.notice(f"MLflow run {run.run_id} is marked {status}")
        elif run.run_id:
            watcher.notice(
                f"MLflow run {run.run_id} is not marked {status} "
                f"({run.delivery.failing[1] or 'it does not answer'}); "
                f"`amint sync {run.spool.folder}` sends what waits, and so does going on with it"
            )


def _finished(run: RunRecords) -> RunRecords:
    run.point()
    run.tell("status", status="FINISHED", time=run.now())
    return run


@contextlib.contextmanager
def recording(
    prepared: Prepared, asked: Config, watcher: Watcher, *, tags: Mapping[str, str]
) -> Iterator[Recording]:
    """The MLflow run of a training around the body, as from `recorded`.

    Args:
        prepared: the run's settings and data.
        asked: the configuration as it was asked for.
        watcher: is told how the MLflow run was marked where the body raised.
        tags: what is known of where it runs; told to a run that goes on, too.
    """
    with recorded(lambda: _open(prepared, asked, tags), watcher) as run:
        yield run


@contextlib.contextmanager
def recorded(begin: Callable[[], RunRecords], watcher: Watcher) -> Iterator[Recording]:
    """An MLflow run around the body, which finishes it; ended as what the body ended as if not.

    It is opened while the workers start, since making a database takes seconds.

    Args:
        begin: opens it.
        watcher: is told how it was marked where the body raised.
    """
    run = Recording(begin)
    try:
        yield run
    except BaseException as raised:
        error = _stopped_by(watcher) or raised
        run.mark("FAILED" if isinstance(error, Exception) else "KILLED", watcher)
        if error is not raised:
            raise error from raised
        if isinstance(error, Exception) and not isinstance(error, UserError | RunError):
            raise RunError(
                f"the run failed: {type(error).__name__}: {first_line(error)}"
            ) from error
        raise


def _stopped_by(watcher: Watcher) -> BaseException | None:
    """What a signal raised, where there was one: Ray's compiled code makes another error of it."""
    try:
        watcher.heartbeat()
    except BaseException as stopped:
        return stopped
    return None


def _patiently(
    opening: Callable[..., OpenedRun], seconds: float, *arguments: Any, **more: Any
) -> OpenedRun:
    """Open a run, also where the server that has just answered is away for some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return opening(*arguments, **more)
        except UserError as error:
            if "API request to" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(_SECONDS_TO_STOP)


def _open(prepared: Prepared, asked: Config, tags: Mapping[str, str]) -> RunRecords:
    """The MLflow run; and, beside the checkpoints, what is needed to go on with it."""
    earlier, storage = prepared.earlier, prepared.storage

    def opened(run: OpenedRun) -> None:
        if earlier is None or earlier.mlflow_run_id != run.run_id:
            RunRecord(
                run_name=prepared.run_name,
                mlflow_run_id=run.run_id,
                manifest_fingerprint=prepared.dataset.index.manifest.fingerprint,
                asked=asked.model_dump(mode="json"),
                settled=prepared.config.model_dump(mode="json"),
            ).write(storage)

    return open_records(
        prepared.config.tracking,
        run_of(
            prepared.config,
            run_name=prepared.run_name,
            tags={**data_tags(prepared.config, prepared.dataset, prepared.confounders), **tags},
        ),
        uri=prepared.tracking_uri,
        files=storage.below(prepared.run_name),
        spool=prepared.spool,
        dataset=dataset_fields(prepared.config, prepared.dataset.index.manifest),
        resume=None if earlier is None else earlier.mlflow_run_id or None,
        tags=tags,
        opened=opened,
    )


def open_records(
    tracking: Tracking,
    new: NewRun,
    *,
    uri: str,
    files: Location,
    spool: Path,
    dataset: Mapping[str, str],
    resume: str | None,
    tags: Mapping[str, str],
    opened: Callable[[OpenedRun], None] = lambda _: None,
) -> RunRecords:
    """An MLflow run that takes records, or what stands for it where MLflow is told nothing.

    Args:
        tracking: whether it is, and how.
        new: what a run that is created is told.
        uri: of MLflow.
        files: where files are kept where MLflow is told nothing.
        spool: folder in which records wait.
        dataset: as from `dataset_fields`; told to a run that is created.
        resume: id of the run to go on with.
        tags: told to a run that goes on, too.
        opened: called with the run before anything waits for it.

    Raises:
        UserError: MLflow takes no run, or another process has the spool.
    """
    said: list[str] = []
    if tracking.enabled:
        run = _patiently(
            open_run, tracking.wait_seconds, uri, new, resume=resume, notice=said.append
        )
    else:
        run = OpenedRun("", int(time.time() * 1000))
    opened(run)
    try:
        if (aside := set_aside(spool, run.run_id)) is not None:
            said.append(f"what waits for another MLflow run is now in {aside}")
        whose = SpooledRun(run.run_id, new.name, without_password(uri), run.attempt)
        waiting = Spool(spool, whose)
    except (InUseError, NoSpoolError) as error:
        raise UserError(f"tracking.spool: {error}; wait for it, or move the folder away") from error
    sender = MLflowSender(uri, waiting) if tracking.enabled else StorageSender(files, waiting)
    records = RunRecords(run, waiting, sender, steps_per_point=tracking.steps_per_point)
    for text in said:
        records.delivery.say(text)
    if run.resumed:
        records.tell("status", status="RUNNING", time=records.now())
        records.tell("tags", values=dict(tags))
    else:
        records.tell("dataset", fields=dict(dataset))
    return records


def dataset_fields(config: Config, manifest: Manifest) -> dict[str, str]:
    """The set that D, E and all that is measured on come from, as an MLflow dataset.

    Its digest is the first 32 digits of the manifest's fingerprint: over every image's content and
    role.
    """
    data = config.data
    path = None if data.path is None else without_secrets(data.path)
    kind = "code" if path is None else "s3" if path.startswith("s3://") else "local"
    return {
        "name": data.source,
        "digest": manifest.fingerprint[:32],
        "source_type": kind,
        "source": json.dumps({"source": data.source} if path is None else {"uri": path}),
        "profile": json.dumps({"images": sum(manifest.counts.values()), **manifest.counts}),
    }


def data_tags(
    config: Config, dataset: Dataset, confounders: Mapping[str, Any] | None
) -> dict[str, str]:
    """What a reader of the run must know of its data."""
    tags = {
        "amint.manifest_fingerprint": dataset.index.manifest.fingerprint,
        "amint.data_mode": config.data.mode,
        "amint.quarantined": str(len(dataset.index.quarantine)),
    }
    if confounders is not None and confounders["clean"] is not None:
        tags["amint.confounded"] = str(not confounders["clean"]).lower()
    return tags
