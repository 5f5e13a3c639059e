"""Between the workers. A mean is a sum of numerators and of denominators, divided once."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed, nn

from amint_ray.contracts import first_line


def is_rank_zero() -> bool:
    """Whether this is the first worker, or the only one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_rank() == 0


def sum_over_ranks(values: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The elementwise sum of every rank's `values`, and the number of ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return values, 1
    total = values.clone()
    distributed.all_reduce(total)
    return total, distributed.get_world_size()


T = TypeVar("T")


def gather_lists(items: list[T]) -> list[T]:
    """Every rank's `items`, in the order of the ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return items
    parts: list[list[T]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def together(write: Callable[[], T], *, where: Path) -> T:
    """Do it on every worker; where it fails on one, it fails on all, and none waits for another.

    Args:
        write: what each does; may raise OSError.
        where: this worker's folder, to be named if it does.

    Returns:
        What this worker's `write` gave.

    Raises:
        OSError: what the first one met, in which folder of which machine.
    """
    failed, done = [], None
    try:
        done = [write()]
    except OSError as error:
        failed = [f"{where} of {socket.gethostname()}: {first_line(error)}"]
    if failures := gather_lists(failed):
        raise OSError(failures[0])
    assert done is not None
    return done[0]


def share_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's buffers.

    BatchNorm's running statistics differ between ranks after each step; DDP evens them out only
    before the next. What is scored, and what is stored, must be one model.
    """
    if distributed.is_available() and distributed.is_initialized():
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)
