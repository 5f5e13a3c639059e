"""One model over several workers: whole on each (DDP), or a share on each (FSDP2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from amint_ray.contracts import RunContext, ScoreBatch
from amint_ray.model.blocks import blocks
from amint_ray.model.joint import AuditedModel
from amint_ray.train.reduce import sum_over_ranks


def shard(model: AuditedModel, device: torch.device, workers: int) -> None:
    """Leave each worker its share of every parameter; a block's are put together as it runs.

    Args:
        model: still on the CPU, so that no more than one block at a time is whole on the device.
        device: of this worker.
        workers: how many there are.
    """
    mesh = init_device_mesh(device.type, (workers,))
    for name in blocks(model.backbone):
        fully_shard(model.backbone.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.sharded = True


def replicate(model: nn.Module, context: RunContext) -> nn.Module:
    """DDP around a model; the model itself where there is nobody to share it with, or it is."""
    if context.world_size == 1 or isinstance(model, FSDPModule):
        return model
    return DistributedDataParallel(
        model, device_ids=[context.device] if context.device.type == "cuda" else None
    )


@contextlib.contextmanager
def ranks_meet(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Workers exchange gradients once a step, after its last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif last or not isinstance(model, DistributedDataParallel):
        yield
    else:
        with model.no_sync():
            yield


def in_step(
    batches: Iterable[ScoreBatch], model: nn.Module, context: RunContext
) -> Iterator[ScoreBatch]:
    """This worker's batches; where the model is shared out, as many passes as the others make.

    A worker that has no more goes on with one black image that counts for nothing.
    """
    shared_out = isinstance(model, FSDPModule)
    if not shared_out:
        yield from batches
        return
    assert isinstance(model, AuditedModel)
    nothing = np.empty(0, np.str_)
    black = ScoreBatch(
        images=torch.zeros(1, *model.architecture.input_shape),
        labels=torch.zeros(1, dtype=torch.int64),
        sample_id=nothing,
        role=nothing,
    )
    mine = iter(batches)
    while True:
        batch = next(mine, None)
        going_on = torch.tensor(float(batch is not None), device=context.device)
        if not sum_over_ranks(going_on)[0]:
            return
        yield black if batch is None else batch
