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


class _SumOverWorkers(torch.autograd.Function):
    """Every worker's loss depends on every worker's summand, hence the sum backwards, too."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous().clone()
        distributed.all_reduce(total)
        return total


def _alone(norm: _BatchNorm) -> bool:
    """Whether there is nobody to share statistics with, or the running ones are used."""
    together = distributed.is_available() and distributed.is_initialized()
    return not (norm.training and together)


def _normalised(norm: _BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """BatchNorm (Ioffe and Szegedy, 2015) with the moments of all workers' rows.

    Args:
        norm: its weights and running statistics are used, the latter brought up to date.
        x: (n, channels, …); n may differ from worker to worker.
    """
    others = [0, *range(2, x.ndim)]
    rows = x.new_full((1,), x.numel() / x.shape[1])
    sums = torch.cat([x.sum(others), x.square().sum(others), rows])
    sums = cast("torch.Tensor", _SumOverWorkers.apply(sums))
    mean, square, count = torch.split(sums, [x.shape[1], x.shape[1], 1])
    mean = mean / count
    variance = square / count - mean.square()
    with torch.no_grad():
        unbiased = variance * count / (count - 1).clamp(min=1)
        if norm.running_mean is not None and norm.running_var is not None:
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
            share = norm.momentum
            share = 1.0 / float(norm.num_batches_tracked) if share is None else share
            norm.running_mean.lerp_(mean, share)
            norm.running_var.lerp_(unbiased, share)
    shape = (1, -1, *[1] * (x.ndim - 2))
    normal = (x - mean.view(shape)) * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        normal = normal * norm.weight.view(shape) + norm.bias.view(shape)
    return normal
