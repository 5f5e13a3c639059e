"""A search's runs in MLflow: one for itself, and below it one for each trial.

The driver alone talks to MLflow, also for the trials: one that Tune ends has no time left to say
how it ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amint_ray.config.schema import Config
from amint_ray.contracts import UserError, Watcher, first_line
from amint_ray.launch.ledger import Ledger, State
from amint_ray.launch.recording import Recording, open_records
from amint_ray.launch.records import RunRecords
from amint_ray.storage import Location
from amint_ray.tracking.run_log import OpenedRun, Status, run_of, runs_below
from amint_ray.tracking.spool import find_spools
from amint_ray.tracking.sync import sync

TRIAL, STATE = "amint.trial", "amint.trial_state"
"""Tags: which trial of a search, and how it ended."""
_STATUS: dict[State, Status] = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_SECONDS_TO_MARK = 30.0
_SECONDS_TO_OPEN_AGAIN = 5.0


@dataclass(frozen=True)
class Where:
    """Where the trials' runs are kept.

    Attributes:
        uri: of MLflow.
        parent: id of the search's own run; empty where MLflow is told nothing.
        search: unique name of the search; begins the runs' names.
        spool: folder of all spools.
        files: where a run's files would be kept without MLflow.
        dataset: that all are trained on (`recording.dataset_fields`).
        tags: that every run gets.
    """

    uri: str
    parent: str
    search: str
    spool: Path
    files: Location
    dataset: Mapping[str, str]
    tags: Mapping[str, str]


class Children:
    """The MLflow runs of the trials under way, and of those of which not all has arrived."""

    def __init__(self, where: Where, ledger: Ledger) -> None:
        self._where, self._ledger = where, ledger
        self._open: dict[str, Recording] = {}
        self._ending: dict[str, Recording] = {}
        self._enough = threading.Event()

    def catch_up(self, watcher: Watcher) -> None:
        """Do what an earlier driver, which was killed, had no time to do.

        Records of ended trials are sent; a run that was not told how its trial ended is told; and
        one that was opened, and is not in the ledger yet, is taken down.
        """
        from mlflow import MlflowClient  # seconds

        where = self._where
        trials = self._ledger.where(lambda trial: trial.tries > 0)
        if not where.parent or not trials:
            return
        folders = [where.spool / f"{where.search}-{trial.id}" for trial in trials if trial.ended]
        try:
            if waiting := [folder for folder in folders if find_spools(folder)]:
                sync(waiting, watcher)
            known = runs_below(where.uri, where.parent, TRIAL)
            client = MlflowClient(where.uri)
            for trial in trials:
                run_id, status = known.get(trial.id, (None, None))
                if trial.ended and run_id is not None and status == "RUNNING":
                    client.set_tag(run_id, STATE, trial.state)
                    client.set_terminated(run_id, _STATUS[trial.state])
                elif trial.run_id is None and run_id is not None:
                    with self._ledger.changing(trial.id) as record:
                        record.run_id = run_id
        except Exception as error:  # MLflow's own, the network's; the search does not need it
            watcher.notice(f"MLflow was not told how all trials ended: {first_line(error)}")

    def begin(self, trial: str, config: Config) -> None:
        """Open a trial's run, or go on with it."""
        if self._enough.is_set() or not self._where.parent or trial in self._open:
            return
        if (ended := self._ending.pop(trial, None)) is not None:
            ended.waiting()  # closed: one process may have a spool once
        self._open[trial] = Recording(lambda: self._opened(trial, config))

    def _opened(self, trial: str, config: Config) -> RunRecords:
        where, record = self._where, self._ledger.trials[trial]
        tags = {**where.tags, TRIAL: trial, "amint.configuration": str(record.configuration)}
        tracking = config.tracking.model_copy(update={"parent_run": where.parent})

        def opened(run: OpenedRun) -> None:
            with self._ledger.changing(trial) as changing:
                changing.run_id = run.run_id

        name = f"{where.search}-{trial}"
        new = run_of(config.model_copy(update={"tracking": tracking}), run_name=name, tags=tags)
        while True:
            try:
                return open_records(
                    tracking,
                    new,
                    uri=where.uri,
                    files=where.files.below(name),
                    spool=where.spool / name,
                    dataset=where.dataset,
                    resume=record.run_id,
                    tags=tags,
                    opened=opened,
                )
            except UserError:  # MLflow is away; runs that were open would not mind either
                if self._enough.wait(_SECONDS_TO_OPEN_AGAIN):
                    raise

    def hear(self, trial: str, entry: Mapping[str, Any]) -> None:
        """An epoch's entry of a trial."""
        if trial in self._open:
            self._open[trial].hear({"phase": "epoch", **entry})

    def end(self, trial: str, state: State, reason: str | None) -> None:
        """Mark how a trial ended."""
        if (run := self._open.pop(trial, None)) is None:
            return
        tags = {STATE: state} | ({} if reason is None else {"amint.reason": reason})
        run.end(_STATUS[state], tags)
        self._ending[trial] = run

    def check(self, watcher: Watcher) -> None:
        """Forget runs of which all has arrived.

        Raises:
            Exception: whatever a record met on its way to the disk.
        """
        for run in (*self._open.values(), *self._ending.values()):
            run.check(watcher)
        self._forget()

    def _forget(self) -> None:
        # Tune's thread adds others meanwhile.
        for trial, run in list(self._ending.items()):
            if run.arrived():
                del self._ending[trial]

    def finish(self, watcher: Watcher, *, wait_seconds: float) -> None:
        """Wait for all to arrive, and say what has not.

        Args:
            watcher: is told of the wait, and can end it.
            wait_seconds: how long.
        """
        deadline = time.monotonic() + wait_seconds
        while self._ending and time.monotonic() < deadline:
            watcher.heartbeat()
            self.check(watcher)
            time.sleep(0.05)
        self._enough.set()
        left = len(self._ending)
        folders = [found for run in self._ending.values() if (found := run.waiting()) is not None]
        self._ending = {}
        if folders:
            watcher.notice(
                f"WARNING: MLflow did not take all records of {len(folders)} trials; send what "
                f"waits with `amint sync {folders[0].parent}`"
            )
        if lost := left - len(folders):
            watcher.notice(f"WARNING: MLflow took no run for {lost} trials; searches/ has them")

    def kill(self, watcher: Watcher) -> None:
        """Mark all that are under way as killed; from now on none is begun."""
        self._enough.set()
        for trial in list(self._open):
            if (run := self._open.pop(trial, None)) is not None:
                run.end("KILLED", {STATE: "killed"})
                self._ending[trial] = run
        number = len(self._ending)
        deadline = time.monotonic() + _SECONDS_TO_MARK
        while self._ending and time.monotonic() < deadline:
            self._forget()
            time.sleep(0.05)
        if marked := number - len(self._ending):
            watcher.notice(f"{marked} MLflow runs of trials are marked KILLED")
        if self._ending:
            watcher.notice(
                f"{len(self._ending)} MLflow runs of trials are not marked KILLED: MLflow does not "
                "answer; going on with the search sends it"
            )
