"""BatchNorm over all workers' rows: torch's on GPUs, and the same computation for CPUs."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise_norms(module: nn.Module, device: torch.device) -> nn.Module:
    """Every BatchNorm made to take its statistics over all workers' rows.

    Weights, buffers and their names stay, so that checkpoints fit either way.
    """
    if device.type != "cpu":
        converted: nn.Module = convert_sync_batchnorm(module)
        return converted
    for norm in module.modules():  # torch's `SyncBatchNorm` refuses CPUs, and so does DDP for it
        if isinstance(norm, BatchNormAct2d):
            norm.__class__ = _CpuSyncBatchNormAct
        elif isinstance(norm, _BatchNorm):
            norm.__class__ = _CpuSyncBatchNorm
    return module


class _CpuSyncBatchNorm(_BatchNorm):
    def _check_input_dim(self, input: torch.Tensor) -> None:
        """As `nn.SyncBatchNorm`: whatever has channels will do."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if _alone(self):
            return super().forward(input)
        return _normalised(self, input)


class _CpuSyncBatchNormAct(BatchNormAct2d):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if _alone(self):
            return cast("torch.Tensor", super().forward(x))
        return cast("torch.Tensor", self.act(self.drop(_normalised(self, x))))


class _FromAllWorkers(torch.autograd.Function):
    """Every worker's values, one row each; every worker's loss depends on every worker's row."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        rows = values.new_zeros(distributed.get_world_size(), len(values))
        rows[distributed.get_rank()] = values
        distributed.all_reduce(rows)
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous().clone()
        distributed.all_reduce(total)
        return total[distributed.get_rank()]


def _alone(norm: _BatchNorm) -> bool:
    """Whether there is nobody to share statistics with, or the running ones are used."""
    together = distributed.is_available() and distributed.is_initialized()
    return not (norm.training and together)


def _normalised(norm: _BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """BatchNorm (Ioffe and Szegedy, 2015) with the moments of all workers' rows.

    The workers' moments are put together as Chan, Golub and LeVeque (1979) do: the difference of a
    mean square and a squared mean would leave little of a small variance about a large mean.

    Args:
        norm: its weights and running statistics are used, the latter brought up to date.
        x: (n, channels, …); n may differ from worker to worker. Of any precision; what is computed
            is float32 at least.

    Returns:
        As `x`, in shape and precision.
    """
    others, channels = [0, *range(2, x.ndim)], x.shape[1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rows = wide.new_full((1,), x.numel() / channels)
    own_mean = wide.sum(others) / rows.clamp(min=1)
    own_squares = (wide - _along(own_mean, x)).square().sum(others)
    moments = _FromAllWorkers.apply(torch.cat([own_mean, own_squares, rows]))
    means, squares, counts = torch.split(moments, [channels, channels, 1], dim=1)
    count = counts.sum()
    mean = (means * counts).sum(0) / count
    variance = (squares + (means - mean).square() * counts).sum(0) / count
    with torch.no_grad():
        unbiased = variance * count / (count - 1).clamp(min=1)
        if norm.running_mean is not None and norm.running_var is not None:
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
            share = norm.momentum
            share = 1.0 / float(norm.num_batches_tracked) if share is None else share
            norm.running_mean.lerp_(mean, share)
            norm.running_var.lerp_(unbiased, share)
    normal = (wide - _along(mean, x)) * _along((variance + norm.eps).rsqrt(), x)
    if norm.affine:
        normal = normal * _along(norm.weight, x) + _along(norm.bias, x)
    return normal.to(x.dtype)


def _along(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One value a channel, to be computed with `x`."""
    return values.view(1, -1, *[1] * (x.ndim - 2))
