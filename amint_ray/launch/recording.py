"""The MLflow run of a training, written to by a thread of its own.

What goes to MLflow then waits for nobody, and a signal that stops the run never comes in the
middle of a transaction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from amint_ray.config.schema import Config
from amint_ray.contracts import RunError, UserError, Watcher, first_line
from amint_ray.launch.prepare import Prepared
from amint_ray.launch.runs import RunRecord
from amint_ray.launch.time_limit import InOrder
from amint_ray.tracking.run_log import RunLog, Status

_SECONDS_TO_MARK = 30.0
"""That a run that ends waits for MLflow, only to tell it that it has ended."""

T = TypeVar("T")


class Recording:
    """A run's MLflow run, perhaps still being opened; calls reach it one after the other."""

    def __init__(self, open_run: Callable[[], RunLog]) -> None:
        self._calls = InOrder()
        self._opening = self._calls.submit(open_run)
        self._told: list[Future[object]] = []

    def check(self) -> None:
        """See whether what was told so far arrived.

        Raises:
            Exception: what the first call met that failed.
        """
        if self._opening.done():
            self._opening.result()
        while self._told and self._told[0].done():
            self._told.pop(0).result()

    def tell(self, call: Callable[[RunLog], object]) -> None:
        """Have the run told something, whenever its turn comes."""
        self._told.append(self._calls.submit(lambda: call(self._opening.result())))

    def ask(self, call: Callable[[RunLog], T]) -> T:
        """What a call gives, after all that came before it; the caller can be interrupted.

        Raises:
            Exception: what this call met, or one before it.
        """
        asked = self._calls.submit(lambda: call(self._opening.result()))
        answer = asked.result()
        self.check()
        return answer

    def mark(self, status: Status, watcher: Watcher) -> None:
        """Tell MLflow how the run ended; that it cannot be told must not hide why."""
        self._calls.forget()
        marked = self._calls.submit(lambda: self._end(status))
        try:
            if (run_id := marked.result(_SECONDS_TO_MARK)) is not None:
                watcher.notice(f"MLflow run {run_id} is marked {status}")
        except TimeoutError:
            watcher.notice(f"MLflow does not answer: its run is not marked {status}")
        except Exception as error:
            watcher.notice(f"the MLflow run could not be marked {status}: {first_line(error)}")

    def _end(self, status: Status) -> str | None:
        if self._opening.cancelled() or self._opening.exception() is not None:
            return None
        log = self._opening.result()
        log.end(status)
        return log.run_id


@contextlib.contextmanager
def recording(prepared: Prepared, asked: Config, watcher: Watcher) -> Iterator[Recording]:
    """An MLflow run around the body, ended as what the body ended as.

    It is opened while the workers start, since making a database takes seconds.
    """
    run = Recording(lambda: _open(prepared, asked))
    try:
        yield run
        run.ask(lambda log: log.end("FINISHED"))
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


def _open(prepared: Prepared, asked: Config) -> RunLog:
    """The MLflow run; and, beside the checkpoints, what is needed to go on with it."""
    earlier = prepared.earlier
    log = RunLog(
        prepared.tracking_uri,
        prepared.config,
        run_name=prepared.run_name,
        tags=data_tags(prepared),
        resume=None if earlier is None else earlier.mlflow_run_id,
    )
    if earlier is None or earlier.mlflow_run_id != log.run_id:
        RunRecord(
            run_name=prepared.run_name,
            mlflow_run_id=log.run_id,
            manifest_fingerprint=prepared.dataset.index.manifest.fingerprint,
            asked=asked.model_dump(mode="json"),
            settled=prepared.config.model_dump(mode="json"),
        ).write(prepared.storage)
    return log


def data_tags(prepared: Prepared) -> dict[str, str]:
    """What a reader of the run must know of its data."""
    tags = {
        "amint.manifest_fingerprint": prepared.dataset.index.manifest.fingerprint,
        "amint.data_mode": prepared.config.data.mode,
        "amint.quarantined": str(len(prepared.dataset.index.quarantine)),
    }
    if prepared.confounders is not None and prepared.confounders["clean"] is not None:
        tags["amint.confounded"] = str(not prepared.confounders["clean"]).lower()
    return tags
