"""What is known of a search's trials; a file each, so that nothing that ended is ever repeated."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from amint_ray.contracts import RunError, few_samples, first_line
from amint_ray.launch.kept import read_kept
from amint_ray.storage import Location, list_files, open_input, write_atomically

State = Literal["waiting", "running", "done", "stopped", "failed"]
ENDED = ("done", "stopped", "failed")
PLAIN = "plain-"
"""What the ids of plain models begin with."""
_IDENTITY = re.compile(rf"t\d{{4,}}|{PLAIN}\d+")


@dataclass
class TrialRecord:
    """One trial.

    Attributes:
        id: `t0000`, `t0001`, …; of the plain models of a constraint, `plain-0`, …
        configuration: its number; the trials of one differ by seed alone.
        seed: of training.
        parameters: as they were picked.
        settings: what they set, by key of the configuration.
        baseline: whether it is a plain model.
        state: `waiting` until Ray begins it; `stopped`: by the scheduler or for lack of time.
        epoch: of the last look.
        epochs: that it has in all.
        seconds: that it ran.
        figures: of the last look: `{value, low, high}` by name.
        violation: of the constraint at the last look; None: there is none, or nothing is known.
        reason: why it failed, or was stopped.
        history: one entry a look: epoch and the value of every figure.
        run_id: MLflow's.
        tries: how often it was begun.
        training: name of the training that it is at; None: it has not reported yet.
        attributes: what the sampler noted of its configuration, and needs to know again.
    """

    id: str
    configuration: int
    seed: int
    parameters: dict[str, Any]
    settings: dict[str, Any]
    baseline: bool = False
    state: State = "waiting"
    epoch: int = 0
    epochs: int = 0
    seconds: float = 0.0
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    violation: float | None = None
    reason: str | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    run_id: str | None = None
    tries: int = 0
    training: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in ENDED

    def looked(self, epoch: int, metrics: Mapping[str, float], violation: float | None) -> None:
        """Take in what a look found; one that was taken before is taken once.

        Args:
            epoch: of the look.
            metrics: `name`, `name.low` and `name.high` of each figure.
            violation: of the constraint.
        """
        if epoch <= self.epoch:
            return
        names = [name for name in metrics if f"{name}.low" in metrics]
        self.epoch, self.violation = epoch, violation
        self.figures = {
            name: {
                "value": metrics[name],
                "low": metrics[f"{name}.low"],
                "high": metrics[f"{name}.high"],
            }
            for name in names
        }
        entry = {"epoch": epoch, **{name: metrics[name] for name in names}}
        self.history.append(entry if violation is None else {**entry, "violation": violation})


class Ledger:
    """All trials of a search, by id; every thread may call it.

    Args:
        folder: where they are kept; None: nowhere.
    """

    def __init__(self, folder: Location | None) -> None:
        self._folder = folder
        self._lock = threading.RLock()
        self._writing = threading.RLock()
        self._unwritten: dict[str, OSError] = {}
        self._started: dict[str, float] = {}
        self.trials: dict[str, TrialRecord] = {}

    def load(self) -> dict[str, str]:
        """Read what an earlier driver left.

        A damaged file was being written when the machine died, or by another version: its trial is
        forgotten, as if it had never begun.

        Returns:
            what is wrong with the files of those trials, by id.

        Raises:
            OSError: storage cannot be read.
        """
        assert self._folder is not None
        damaged = {}
        for entry in list_files(self._folder, ".json"):
            identity = entry.name.removesuffix(".json")
            if not _IDENTITY.fullmatch(identity):
                continue
            try:
                with open_input(self._folder, entry.name) as file:
                    record = read_kept(TrialRecord, file.read())
                if (record.id, record.baseline) != (identity, identity.startswith(PLAIN)):
                    raise ValueError(f"it is of trial {record.id}, baseline = {record.baseline}")
            except ValueError as error:
                damaged[identity] = first_line(error)
            else:
                self.trials[identity] = record
        return damaged

    @contextlib.contextmanager
    def changing(self, trial: str) -> Iterator[TrialRecord]:
        """A trial, to be changed and then written down."""
        with self._writing:
            with self._lock:
                yield self.trials[trial]
            self._write(trial)

    def add(self, record: TrialRecord) -> None:
        """A new trial."""
        with self._writing:
            with self._lock:
                self.trials[record.id] = record
            self._write(record.id)

    def begin(self, trial: str) -> None:
        """It runs from now on."""
        with self.changing(trial) as record:
            record.seconds += self._since(trial)
            self._started[trial] = time.monotonic()
            record.state, record.reason = "running", None
            record.tries += 1

    def end(self, trial: str, state: State, reason: str | None = None) -> None:
        """It runs no longer; what is said of one that has ended before is not heard."""
        with self.changing(trial) as record:
            if record.ended:
                return
            record.state, record.reason = state, reason
            record.seconds += self._since(trial)
            self._started.pop(trial, None)

    def _since(self, trial: str) -> float:
        started = self._started.get(trial)
        return 0.0 if started is None else time.monotonic() - started

    def _write(self, trial: str) -> None:
        """Write a trial down, or remember that it could not be: storage may be away for a while.

        Others can read meanwhile: a screen must not wait for storage.
        """
        if self._folder is None:
            return
        with self._lock:
            text = json.dumps(asdict(self.trials[trial]))
        try:
            with write_atomically(self._folder, f"{trial}.json") as file:
                file.write(text.encode())
        except OSError as error:
            self._unwritten[trial] = error
        else:
            self._unwritten.pop(trial, None)

    def catch_up(self) -> None:
        """Write down what could not be.

        Raises:
            OSError: it still cannot.
        """
        with self._writing:
            for trial in list(self._unwritten):
                self._write(trial)
            for error in self._unwritten.values():
                raise error

    def documents(self, *, history: bool = True) -> list[dict[str, Any]]:
        """All trials as plain dicts, in the order of their ids.

        Args:
            history: with their looks, which may be many.
        """
        with self._lock:
            return [
                {
                    **vars(record),
                    "seconds": record.seconds + self._since(name),
                    "history": list(record.history) if history else [],
                    "parameters": dict(record.parameters),
                    "settings": dict(record.settings),
                }
                for name, record in sorted(self.trials.items())
            ]

    def where(self, wanted: Callable[[TrialRecord], bool]) -> list[TrialRecord]:
        """Those trials, in the order of their ids; not to be changed."""
        with self._lock:
            return [self.trials[name] for name in sorted(self.trials) if wanted(self.trials[name])]


def common_reason(records: list[TrialRecord]) -> str:
    """What most of the failed trials say; of several such, the first."""
    reasons = Counter(record.reason or "unknown" for record in records)
    ((reason, _),) = reasons.most_common(1)
    return first_line(Exception(reason))


def check_outcome(ledger: Ledger) -> None:
    """Whether anything was found.

    Raises:
        RunError: nothing was; the text says why, once.
    """
    if failed := ledger.where(lambda trial: trial.baseline and trial.state == "failed"):
        raise RunError(
            "search: the plain model (loss.lambda_mint = 0), which the constraint refers to, "
            f"failed: {common_reason(failed)}"
        )
    failed = ledger.where(lambda trial: not trial.baseline and trial.state == "failed")
    looked = ledger.where(lambda trial: not trial.baseline and bool(trial.history))
    if failed and not looked:
        alike = len({record.reason for record in failed}) == 1
        raise RunError(
            f"search: all {len(failed)} trials failed{'' if alike else ', most of them so'}: "
            f"{few_samples(common_reason(failed))}; failed trials are not tried again: put right "
            "what it was and begin anew with --new, or under another name (name=OTHER)"
        )
