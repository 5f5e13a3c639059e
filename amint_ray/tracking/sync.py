"""Sending what runs left behind that ended while MLflow did not answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from amint_ray.contracts import UserError, Watcher, first_line
from amint_ray.tracking.run_log import check_tracking, from_environment, without_password
from amint_ray.tracking.sending import MLflowSender
from amint_ray.tracking.spool import InUseError, NoSpoolError, Spool, find_spools

DEFAULT_FOLDERS = ("amint_runs/spool", "amint_spool")
"""Where runs leave what waits, unless `storage.path` or `tracking.spool` say otherwise."""
_PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before a record that did not arrive is sent again; then its run is left as it is."""


@dataclass(frozen=True)
class Synced:
    """What became of one run's records.

    Attributes:
        run_name: its name; its folder's where that could not be read.
        run_id: MLflow's.
        sent: records that arrived.
        left: records that still wait.
        models: URIs of models that were registered.
        problem: why some are left, or why it is not known.
        in_use: whether a run is at work on them, which sends them itself.
    """

    run_name: str
    run_id: str | None
    sent: int
    left: int
    models: list[str]
    problem: str | None
    in_use: bool = False


def sync(folders: list[Path], watcher: Watcher) -> dict[str, Any]:
    """Send all that waits, run by run.

    Args:
        folders: spools, or folders of such; where none is given, `DEFAULT_FOLDERS`.
        watcher: is told how far it is, and can end it: what was not sent then stays.

    Returns:
        `runs`, as `Synced` has them, and `left`, the records of all that still wait.

    Raises:
        UserError: a folder that was named holds nothing, or no MLflow server answers for any run.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"sync: {str(folder)!r} is no folder")
    spools = [spool for f in folders or map(Path, DEFAULT_FOLDERS) for spool in find_spools(f)]
    if folders and not spools:
        raise UserError(f"sync: no run's records wait in {', '.join(map(str, folders))}")
    runs, refused = [], None
    for folder in spools:
        try:
            runs.append(_sync(folder, watcher))
        except UserError as error:
            refused = error
            runs.append(Synced(folder.name, None, 0, 0, [], str(error)))
    if refused is not None and not any(run.run_id for run in runs):
        raise refused
    return {"runs": [asdict(run) for run in runs], "left": sum(run.left for run in runs)}


def _sync(folder: Path, watcher: Watcher) -> Synced:
    """One run's.

    Raises:
        UserError: its server does not answer.
    """
    try:
        spool = Spool(folder)
    except (InUseError, NoSpoolError, OSError) as error:
        in_use = isinstance(error, InUseError)
        return Synced(folder.name, None, 0, 0, [], first_line(error), in_use)
    try:
        run = spool.run
        uri = from_environment() or run.tracking_uri
        if not run.run_id:
            raise UserError(f"{folder}: of a run that was not to be recorded; delete it")
        if "***" in uri:
            raise UserError(f"{folder}: {uri} wants its password; set MLFLOW_TRACKING_URI")
        check_tracking(uri)
        watcher.phase(f"{run.run_name}: to {without_password(uri)}")
        total = len(spool.waiting())
        sender = MLflowSender(uri, spool)
        problem = _send(
            spool, sender, lambda left: watcher.phase(f"{run.run_name}: {left} records wait")
        )
        left = len(spool.waiting())
        models = [f"models:/{name}/{version}" for name, version in sender.versions.items()]
        return Synced(run.run_name, run.run_id, total - left, left, models, problem)
    finally:
        spool.close()


def _send(spool: Spool, sender: MLflowSender, tell: Callable[[int], None]) -> str | None:
    """Send until all has arrived, or one record did not: then why."""
    failures, looked = 0, False
    while records := spool.waiting():
        tell(len(records))
        try:
            if not looked:
                sender.be_careful_if_stale()
                looked = True
            count = sender(records)
        except Exception as error:  # whatever MLflow or the network does; the record stays
            if failures == len(_PAUSES):
                return first_line(error)
            time.sleep(_PAUSES[failures])
            failures += 1
            continue
        failures = 0
        spool.sent(count)
    return None
