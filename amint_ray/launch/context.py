"""The `RunContext` of a Ray Train worker."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from amint_ray.contracts import first_line
from amint_ray.launch.machine import watched
from amint_ray.launch.progress import Sender
from amint_ray.launch.staging import Staging
from amint_ray.train.reduce import gather_lists, together
from amint_ray.train.state import DamagedCheckpointError, check_checkpoint

_MOST_AHEAD = 2
_SECONDS_WORTH_A_WORD = 10.0
_TAKEN = "the one before it is taken"


class RayContext:
    """Rank, device, progress and checkpoints inside a Ray Train worker."""

    def __init__(self, run: str) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._sender = Sender(run)
        self._staging = Staging()
        self._told_to_be_slow = False

    def progress(self, event: Mapping[str, Any]) -> None:
        """Rank 0 speaks for all."""
        if self.rank == 0:
            self._sender.send(event)

    def machine_watched(self, seconds: float) -> AbstractContextManager[None]:
        """Tell every so many seconds what this machine and its GPUs do; 0: never."""
        context = ray.train.get_context()
        node = context.get_node_rank()

        def tell(values: Mapping[str, float]) -> None:
            self._sender.send({"phase": "machine", "node": node, "values": values})

        return watched(seconds, tell, device=self.device, local_rank=context.get_local_rank())

    def report(
        self,
        metrics: Mapping[str, Any],
        write_checkpoint: Callable[[Path], None],
        *,
        everywhere: bool = False,
    ) -> bool:
        """Write a checkpoint to the local disk and have it brought to storage meanwhile.

        It counts once all of it is there. A second one waits for the first, and the run for all of
        them where a third would have to wait, or the disk would fill up.
        """
        if self.rank != 0 and not everywhere:
            ray.train.report(dict(metrics))
            return True
        disk, folder = Path(tempfile.gettempdir()), None
        try:
            if everywhere:
                folder = together(self._staging.new_folder, where=disk)
            else:
                folder = self._staging.new_folder()
            write_checkpoint(folder)
        except OSError as error:  # a full disk, mostly: no reason to lose what was trained
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            # What all wrote may have failed on another machine, which the error then names.
            where = "" if everywhere else f"{disk} of {socket.gethostname()}: "
            text = (
                f"WARNING: a checkpoint could not be written to {where}{first_line(error)}; make "
                "room there, or set TMPDIR"
            )
            self.progress({"phase": "notice", "text": text})
            ray.train.report(dict(metrics))  # which the other ranks do, too
            return False
        # Ray would queue any number of uploads. One that is not to be queued waits for those before
        # it; an upload that fails has Ray end this process, however it waits.
        full, started = self._staging.waiting > _MOST_AHEAD, time.monotonic()
        modes = ray.train.CheckpointUploadMode
        ray.train.report(
            dict(metrics),
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=modes.SYNC if full else modes.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
        waited = time.monotonic() - started
        if full and waited > _SECONDS_WORTH_A_WORD and not self._told_to_be_slow:
            self._told_to_be_slow = True
            text = (
                f"the run waited {waited:.0f} s for checkpoints to be brought to storage; write "
                "fewer (train.checkpoint_every, train.checkpoint_steps)"
            )
            self.progress({"phase": "notice", "text": text})
        return True

    @contextlib.contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """The newest checkpoint of this run that is whole; fetched if it is not on this node.

        Raises:
            DamagedCheckpointError: there are some, and none is whole; on all ranks.
        """
        newest = ray.train.get_checkpoint()
        if newest is None:
            yield None
            return
        reported = [found.checkpoint for found in ray.train.get_all_reported_checkpoints()]
        earlier = [checkpoint for checkpoint in reported if checkpoint.path != newest.path]
        # Their names are dates. Ray has them in the order of `storage.keep_best`, if that is set.
        earlier.sort(key=lambda checkpoint: str(checkpoint.path), reverse=True)
        for place, checkpoint in enumerate([newest, *earlier], start=1):
            with contextlib.ExitStack() as stack:
                try:
                    folder = _opened(checkpoint, stack)
                except DamagedCheckpointError as error:
                    after = "none is before it" if place > len(earlier) else _TAKEN
                    self.progress({"phase": "notice", "text": f"{error}; {after}"})
                    continue
                yield folder
                return
        raise DamagedCheckpointError("no checkpoint of the run can be used; begin anew with --new")

    @contextlib.contextmanager
    def inherited(self, checkpoint: ray.train.Checkpoint | None) -> Iterator[Path | None]:
        """Another run's checkpoint as a local folder; None where this run has one of its own.

        It may be gone by then: the run that it is of keeps the last few.

        Raises:
            DamagedCheckpointError: it is not whole; on all ranks.
        """
        with contextlib.ExitStack() as stack:
            needed = checkpoint is not None and ray.train.get_checkpoint() is None
            yield _opened(checkpoint, stack) if needed else None


def _opened(checkpoint: ray.train.Checkpoint, stack: contextlib.ExitStack) -> Path:
    """Fetch a checkpoint, if it is not on this node, until the stack is left.

    Raises:
        DamagedCheckpointError: some rank cannot read it, hence none may take it: they must all go
            on from the same.
    """
    folder, faults = Path(), []
    try:
        folder = Path(stack.enter_context(checkpoint.as_directory()))
        check_checkpoint(folder)
    except (DamagedCheckpointError, OSError) as error:
        faults = [first_line(error)]
    if faults := gather_lists(faults):
        name = checkpoint.path.rpartition("/")[2]
        raise DamagedCheckpointError(f"{name} cannot be used: {faults[0]}")
    return folder
