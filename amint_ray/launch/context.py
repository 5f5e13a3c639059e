"""The `RunContext` of a Ray Train worker."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from amint_ray.launch.progress import Sender


class RayContext:
    """Rank, device, progress and checkpoints inside a Ray Train worker."""

    def __init__(self, run: str) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._sender = Sender(run)

    def progress(self, event: Mapping[str, Any]) -> None:
        """Rank 0 speaks for all."""
        if self.rank == 0:
            self._sender.send(event)

    def report(self, metrics: Mapping[str, Any], write_checkpoint: Callable[[Path], None]) -> None:
        """Commit a checkpoint to the run's storage; returns when it is there, on every rank."""
        if self.rank != 0:
            ray.train.report(dict(metrics))
            return
        with tempfile.TemporaryDirectory(prefix="amint-checkpoint-") as folder:
            write_checkpoint(Path(folder))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(dict(metrics), checkpoint=checkpoint)

    @contextlib.contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """The newest committed checkpoint of this run; fetched to this node if it is elsewhere."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)
