"""Which runs there are in a storage folder, and how one that was cut off goes on.

    RUN/run.json                       what the run is; written once, before training starts
    unfinished/FINGERPRINT/RUN.json    a number that rises while the run's driver lives; removed
                                       when the run has ended

A driver that was killed leaves the second file behind. Whoever then asks for the same configuration
finds it, sees that the number stands still, and goes on with that run: no clocks are compared, and
no locks are needed, which object storage does not have.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from amint_ray.config.load import ELSEWHERE, HARMLESS, fingerprint
from amint_ray.config.schema import Config
from amint_ray.contracts import UserError, Watcher, first_line
from amint_ray.storage import Location, delete, list_files, open_input, write_atomically

RECORD = "run.json"
_BEAT_SECONDS = 2.0
_DEAD_AFTER = 4 * _BEAT_SECONDS
"""Seconds without a beat, as seen by one observer who could read all the while, after which a
driver counts as dead."""
_SECONDS_FOR_A_BEAT = 3.0
"""On object storage: one that gets stuck is given up, and followed by the next well within
`_DEAD_AFTER`."""
_SECONDS_TO_STOP = 5.0
"""That the end of a run waits for a beat that is under way."""


@dataclass(frozen=True)
class RunRecord:
    """What a run is.

    Attributes:
        run_name: of its folder and of its MLflow run.
        mlflow_run_id: of the latter.
        manifest_fingerprint: of the split it trains on.
        asked: its configuration as it was asked for.
        settled: the same with all that was found out filled in (`data.mode`, `data.streams`).
    """

    run_name: str
    mlflow_run_id: str
    manifest_fingerprint: str
    asked: dict[str, Any]
    settled: dict[str, Any]

    def write(self, storage: Location) -> None:
        """Store it.

        Raises:
            OSError: it cannot be written.
        """
        with write_atomically(storage, f"{self.run_name}/{RECORD}") as file:
            file.write(json.dumps(asdict(self), indent=2).encode())

    @classmethod
    def read(cls, storage: Location, run_name: str) -> RunRecord:
        """Load it.

        Raises:
            FileNotFoundError: there is no such run.
            OSError: it cannot be read.
            ValueError: it is damaged.
        """
        with open_input(storage, f"{run_name}/{RECORD}") as file:
            try:
                return cls(**json.loads(file.read()))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{RECORD} is damaged: {first_line(error)}") from error


def find_unfinished(config: Config, storage: Location, watcher: Watcher) -> RunRecord | None:
    """The newest run of this very configuration whose driver has died, if there is one.

    Waits some seconds where one is found, to see whether its driver lives.

    Raises:
        OSError: storage cannot be read.
    """
    folder = storage.below(f"unfinished/{fingerprint(config)}")
    for name in sorted(standing_still(folder, beats(folder), watcher), reverse=True):
        try:
            return RunRecord.read(storage, name)
        except (FileNotFoundError, ValueError):  # it died before it was one, or while it became one
            delete(folder, f"{name}.json")
    return None


def standing_still(
    folder: Location, before: dict[str, bytes], watcher: Watcher, *, called: str | None = None
) -> set[str]:
    """Those runs whose drivers have died; waits until that is known of each.

    A driver cannot write while storage is away. The wait therefore begins anew after a look that
    took so long that storage may have been.

    Args:
        folder: of the runs' signs.
        before: their numbers.
        watcher: is told of the wait, and can end it.
        called: what it is told is looked for; None: the newest run's name.

    Raises:
        OSError: storage cannot be read.
    """
    still = set(before)
    if still:
        watcher.phase(f"looking whether {called or max(still)} is still running")
    since = looked = time.monotonic()
    while still and time.monotonic() < since + _DEAD_AFTER:
        watcher.heartbeat()
        time.sleep(min(0.2, _BEAT_SECONDS))
        if time.monotonic() - looked < _BEAT_SECONDS / 2:
            continue
        looked = time.monotonic()
        now = beats(folder)
        still = {name for name in still if now.get(name) == before[name]}
        if time.monotonic() - looked > _BEAT_SECONDS:
            since = time.monotonic()
    return still


def beats(folder: Location) -> dict[str, bytes]:
    """The number of each unfinished run."""
    found = {}
    for entry in list_files(folder, ".json"):
        with contextlib.suppress(FileNotFoundError), open_input(folder, entry.name) as file:
            found[entry.name.removesuffix(".json")] = file.read()
    return found


def open_run(
    config: Config, storage: Location, run_name: str, watcher: Watcher, *, force: bool
) -> RunRecord:
    """The run that was named, if this configuration may go on with it and nobody else does.

    Args:
        config: as asked for now.
        storage: where runs are kept.
        run_name: which one.
        watcher: is told where this has to wait, to see whether the run's driver lives.
        force: let what is harmless differ.

    Raises:
        UserError: there is no such run, its configuration differs, or its driver lives.
        OSError: storage cannot be read any more.
    """
    try:
        record = RunRecord.read(storage, run_name)
    except FileNotFoundError:
        raise UserError(
            f"--resume={run_name}: there is no such run in {storage.uri} (storage.path)"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"--resume={run_name}: {first_line(error)}") from error
    differing = _differences(record.asked, config.model_dump(mode="json"))
    harmless = [key for key in differing if key.startswith(HARMLESS)]
    if grave := [key for key in differing if key not in harmless]:
        raise UserError(
            f"--resume={run_name}: that run has {_told(grave, differing)}; what shapes the weights "
            "cannot change in mid-run: give it the old values, or start a new run"
        )
    if harmless and not force:
        raise UserError(
            f"--resume={run_name}: that run has {_told(harmless, differing)}; this does not touch "
            "the weights: --force-resume goes on with the new values"
        )
    folder = storage.below(f"unfinished/{fingerprint(Config.model_validate(record.asked))}")
    mine = {name: beat for name, beat in beats(folder).items() if name == run_name}
    if mine and not standing_still(folder, mine, watcher):
        raise UserError(
            f"--resume={run_name}: another process is at work on that run; wait until it has "
            "ended, or stop it first"
        )
    return record


def resumed_config(config: Config, record: RunRecord) -> Config:
    """What was found out for the run before, with what may differ as it is asked for now."""
    values = json.loads(json.dumps(record.settled))
    now = config.model_dump(mode="json")
    for key in (*HARMLESS, *ELSEWHERE):
        *sections, name = key.split(".")
        old, new = values, now
        for section in sections:
            old, new = old[section], new[section]
        old[name] = new[name]
    return Config.model_validate(values)


def _differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Keys that differ, but for where the run is computed and kept: (old, new)."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        path = f"{prefix}{key}"
        a, b = old.get(key), new.get(key)
        if path in ELSEWHERE or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found |= _differences(a, b, f"{path}.")
        else:
            found[path] = (a, b)
    return found


def _told(keys: list[str], differing: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{k} = {differing[k][0]!r} (now {differing[k][1]!r})" for k in sorted(keys))


@contextlib.contextmanager
def alive(config: Config, storage: Location, run_name: str) -> Iterator[Location]:
    """Let others see that this driver lives, while the body runs, by a file; gives its location.

    The sign stays when the body has ended; `finish` removes it where the next command of the same
    kind is not to go on with the run.
    """
    with beating(storage.below(f"unfinished/{fingerprint(config)}"), run_name) as sign:
        yield sign


@contextlib.contextmanager
def beating(folder: Location, name: str) -> Iterator[Location]:
    """While the body runs, let a number rise in `name`.json; gives the file's location."""
    hasty = folder.with_patience(seconds=_SECONDS_FOR_A_BEAT, attempts=1)
    stop = threading.Event()

    def beat(number: int) -> None:
        with contextlib.suppress(OSError), write_atomically(hasty, f"{name}.json") as file:
            file.write(f"{time.time()} {number}".encode())

    def go_on() -> None:
        number = 1
        while not stop.wait(_BEAT_SECONDS):
            number += 1
            beat(number)

    beat(1)  # at once: from now on this is a run that nobody else may take
    thread = threading.Thread(target=go_on, daemon=True, name="alive")
    thread.start()
    try:
        yield folder.below(f"{name}.json")
    finally:
        stop.set()
        thread.join(_SECONDS_TO_STOP)  # storage may be away


def finish(config: Config, storage: Location, run_name: str) -> None:
    """Mark the run as one that will not go on; to be called when `alive` has ended."""
    folder = storage.below(f"unfinished/{fingerprint(config)}")
    with contextlib.suppress(OSError):
        delete(folder, f"{run_name}.json")
    if not storage.remote:
        with contextlib.suppress(OSError):  # another run of the kind is under way
            Path(folder.path).rmdir()
            Path(folder.path).parent.rmdir()
