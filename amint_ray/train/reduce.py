"""Between the workers. A mean is a sum of numerators and of denominators, divided once."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import distributed, nn


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


def share_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's buffers.

    BatchNorm's running statistics differ between ranks after each step; DDP evens them out only
    before the next. What is scored, and what is stored, must be one model.
    """
    if distributed.is_available() and distributed.is_initialized():
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)
