"""Ray Train's list of a run's checkpoints, made good where it was cut or names what is gone.

Ray writes it in place: a machine that dies then leaves half of it. It refuses to go on with such a
list, or with one that names a checkpoint that somebody deleted, whatever lies beside it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileType
from ray.train import Checkpoint
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _CheckpointManagerState,
    _TrainingResultState,
)

from amint_ray.contracts import Watcher
from amint_ray.storage import Location, delete, open_input, write_atomically
from amint_ray.train.state import STATE, DamagedCheckpointError, check_checkpoint


def mend_snapshot(run: Location, watcher: Watcher, *, keep_best: str | None) -> None:
    """See to it that Ray finds a list of checkpoints that are there, or none.

    Args:
        run: the run's folder; no other process may be at work in it.
        watcher: is told where something had to be mended.
        keep_best: `storage.keep_best`, by which the list is sorted.

    Raises:
        OSError: storage cannot be read or written.
    """
    selector = FileSelector(run.path, allow_not_found=True)
    there = {
        info.base_name
        for info in run.filesystem.get_file_info(selector)
        if info.type == FileType.Directory and info.base_name.startswith("checkpoint_")
    }
    try:
        state = _read(run)
    except FileNotFoundError:
        if not there:
            return  # the run was cut off before its first checkpoint
        state = None
    text = "the list of checkpoints is damaged; it is made anew from those that are whole"
    if state is not None:
        gone = {result.checkpoint_dir_name for result in state.checkpoint_results} - there
        if not gone:
            return
        state = _without(state, gone)
        text = f"{', '.join(sorted(gone))} is gone; the run goes on from what is left"
    if state is None:
        state = _made_anew(run, there, keep_best)
    if state is None:
        text = "no checkpoint of the run is whole; it begins anew"
        delete(run, CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)
    else:
        with write_atomically(run, CHECKPOINT_MANAGER_SNAPSHOT_FILENAME) as file:
            file.write(state.model_dump_json().encode())
    watcher.notice(text)


def _read(run: Location) -> _CheckpointManagerState | None:
    """The list as it is; None where Ray could not take it.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
    """
    with open_input(run, CHECKPOINT_MANAGER_SNAPSHOT_FILENAME) as file:
        text = file.read()
    try:
        state = _CheckpointManagerState.model_validate(json.loads(text))
    except (ValueError, TypeError):
        return None
    latest = state.latest_checkpoint_result
    listed = {result.checkpoint_dir_name for result in state.checkpoint_results}
    sound = len(state.checkpoint_results) == len(state.checkpoint_report_indices)
    return state if sound and (latest is None or latest.checkpoint_dir_name in listed) else None


def _without(state: _CheckpointManagerState, gone: set[str]) -> _CheckpointManagerState | None:
    """The list without some of its checkpoints; None where no other is in it."""
    numbered = zip(state.checkpoint_report_indices, state.checkpoint_results, strict=True)
    kept = [(n, result) for n, result in numbered if result.checkpoint_dir_name not in gone]
    return _list_of(kept, state.current_report_index) if kept else None


def _made_anew(
    run: Location, folders: set[str], keep_best: str | None
) -> _CheckpointManagerState | None:
    """A list of the checkpoints that are whole; None where none is."""
    found = []
    for name in folders:
        checkpoint = Checkpoint(path=f"{run.path}/{name}", filesystem=run.filesystem)
        # What cannot be read is no better than what is not whole.
        with (
            contextlib.suppress(DamagedCheckpointError, OSError, LookupError, ValueError),
            checkpoint.as_directory() as folder,
        ):
            check_checkpoint(Path(folder))
            state = json.loads((Path(folder) / STATE).read_text())
            place = {"epoch": state["epoch"], "step": state["step"]}
            metrics = place if state["step"] else state["history"][-1]
            found.append((*place.values(), name, metrics))
    results = [
        _TrainingResultState(checkpoint_dir_name=name, metrics=metrics)
        for _, _, name, metrics in sorted(found, key=lambda each: each[:3])
    ]
    numbered = list(enumerate(results))
    if keep_best is not None:
        numbered.sort(key=lambda each: _score(each[1].metrics, keep_best))
    return _list_of(numbered, len(results)) if results else None


def _score(metrics: Mapping[str, Any], keep_best: str) -> float:
    """The larger the better; a checkpoint within an epoch was not measured."""
    if keep_best not in metrics:
        return -math.inf
    return float(metrics[keep_best]) * (1 if keep_best.endswith("accuracy") else -1)


def _list_of(
    numbered: list[tuple[int, _TrainingResultState]], reports: int
) -> _CheckpointManagerState:
    """What Ray writes of these checkpoints, none of which it was asked to validate.

    Args:
        numbered: with the number of each one's report, worst first.
        reports: how many there were.
    """
    return _CheckpointManagerState(
        checkpoint_results=[result for _, result in numbered],
        checkpoint_report_indices=[number for number, _ in numbered],
        latest_checkpoint_result=max(numbered, key=lambda each: each[0])[1],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=reports,
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
