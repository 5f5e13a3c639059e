"""Sums over the workers. A mean is a sum of numerators and of denominators, divided once."""

from __future__ import annotations

import torch
from torch import distributed


def sum_over_ranks(values: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The elementwise sum of every rank's `values`, and the number of ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return values, 1
    total = values.clone()
    distributed.all_reduce(total)
    return total, distributed.get_world_size()
