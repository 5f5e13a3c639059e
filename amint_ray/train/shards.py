"""Sharded checkpoints: every worker writes its share, and any number of workers can read them.

`torch.distributed.checkpoint` does the work. Its own readers unpickle whatever the files hold; the
ones here take tensors and plain values alone.
"""

from __future__ import annotations

import io
import pickle
import socket
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from amint_ray.contracts import first_line
from amint_ray.train.reduce import gather_lists

_METADATA = ".metadata"
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    *(
        (_METADATA_MODULE, name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata"),
            *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


def save_shards(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write this worker's share; every worker calls this at the same time.

    Args:
        model: sharded, or whole where there is one worker.
        optimizer: over its parameters.
        folder: this worker's own, or one for all.

    Raises:
        OSError: some worker could not write its share; all raise it. Its text begins with that
            worker's folder and machine.
    """
    weights, moments = get_state_dict(model, optimizer)
    try:
        save(
            {"model": weights, "optimizer": moments},
            storage_writer=FileSystemWriter(folder, sync_files=False),
        )
    except CheckpointException as error:  # on all workers, whosever failure it is
        places = gather_lists([f"{folder} of {socket.gethostname()}"])
        rank = min(error.failures, default=0)
        raise OSError(f"{places[rank]}: {_cause(error)}") from error


def load_shards(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Take back what `save_shards` wrote, with however many workers; all call it together.

    Args:
        model: as it was, sharded over any number of workers.
        optimizer: likewise.
        folder: with every worker's files.

    Raises:
        ValueError: a file holds more than tensors and plain values, or is not what it was.
    """
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    try:
        load(state, storage_reader=_Reader(folder), planner=_Planner())
    except CheckpointException as error:
        raise ValueError(f"{folder}: {_cause(error)}") from error
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def _cause(error: CheckpointException) -> str:
    """The first worker's failure; the exception itself is no `Exception`, and long."""
    return next((first_line(cause) for _, (cause, _) in sorted(error.failures.items())), "unknown")


class _Unpickler(pickle.Unpickler):
    """Builds what describes the shards, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and _is_dtype(name)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{_METADATA} asks for {module}.{name}: not taken")


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / _METADATA).open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # refuses all but tensors and plain values
        value.seek(0)
        super().load_bytes(read_item, value)
