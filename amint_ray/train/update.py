"""From gradients to an update: optimiser, schedule, precision, clipping."""

from __future__ import annotations

import contextlib
import difflib
import math
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from amint_ray.contracts import UserError, first_line

if TYPE_CHECKING:
    from amint_ray.config.schema import Train

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_SMALLEST_SCALE = 1e-4
# Arguments of timm's factory about groups of parameters, which `AuditedModel` does not name.
_OF_GROUPS = {"layer_decay", "layer_decay_min_scale", "layer_decay_no_opt_scale", "param_group_fn"}


class Update:
    """What is done with the gradients of one step.

    Args:
        model: its trainable parameters are updated.
        optimizer: over them.
        scheduler: timm's, stepped at each update; None: the learning rate stays.
        precision: `float32`, `bfloat16` or `float16`, the latter two under autocast.
        clip_grad: largest norm of the whole gradient.
        accumulate: micro-batches a step's batch is computed in.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler | None = None,
        *,
        precision: str = "float32",
        clip_grad: float | None = None,
        accumulate: int = 1,
    ) -> None:
        self.optimizer = optimizer
        self.accumulate = accumulate
        self._clipped = [[p for p in model.parameters() if p.requires_grad]]
        self._scheduler = scheduler
        self._clip_grad = clip_grad
        self._device = next(model.parameters()).device.type
        self._dtype = DTYPES.get(precision)
        self._scaler = torch.amp.GradScaler(self._device, enabled=precision == "float16")
        self._done = 0

    @property
    def done(self) -> int:
        """Updates so far."""
        return self._done

    def clip_apart(self, *modules: nn.Module) -> None:
        """From now on clip each module's gradient by its own norm: none shrinks another's."""
        self._clipped = [[p for p in m.parameters() if p.requires_grad] for m in modules]

    def autocast(self) -> AbstractContextManager[Any]:
        """What the forward pass runs in."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device, self._dtype)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one micro-batch."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Change the parameters and forget the gradients.

        Under `float16` a step whose gradients overflowed is left out, and the loss scale halved.

        Raises:
            FloatingPointError: gradients overflow however small the scale is.
        """
        if self._clip_grad is not None:
            self._scaler.unscale_(self.optimizer)
            for parameters in self._clipped:
                nn.utils.clip_grad_norm_(parameters, self._clip_grad)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._done += 1
        if self._scheduler is not None:
            self._scheduler.step_update(self._done)
        if self._scaler.is_enabled() and self._scaler.get_scale() < _SMALLEST_SCALE:
            raise FloatingPointError(
                f"float16 overflow in step {self._done}: the gradients are not finite at a loss "
                f"scale of {self._scaler.get_scale():.1g} either; use train.precision=bfloat16"
            )

    def state_dict(self) -> dict[str, Any]:
        """What moves beside the optimiser's own state, as plain numbers."""
        return {"scaler": self._scaler.state_dict(), "done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` gave."""
        self._scaler.load_state_dict(state["scaler"])
        self._done = state["done"]
        if self._scheduler is not None:
            self._scheduler.step_update(self._done)


def uncompiled() -> AbstractContextManager[Any]:
    """Within, compiled models run as they were written: no graph for a pass that is run once."""
    if (
        "torch._dynamo" not in sys.modules
    ):  # then nothing is compiled, and importing it takes a second
        return contextlib.nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def create_update(
    model: nn.Module,
    config: Train,
    steps_per_epoch: int,
    *,
    rows: tuple[int, int] | None = None,
) -> Update:
    """Optimiser and schedule from timm's factories.

    Args:
        model: to be trained.
        config: tells which.
        steps_per_epoch: updates in an epoch.
        rows: (fewest, most) of D that a worker has in a step; None: `train.batch_size`.

    Raises:
        UserError: timm has no such optimiser, or it does not take these options.
    """
    known = list_optimizers()
    if config.optimizer not in known:
        near = difflib.get_close_matches(config.optimizer, known, n=3, cutoff=0.5)
        hint = f"near names: {', '.join(near)}" if near else f"it has {', '.join(known)}"
        raise UserError(
            f"train.optimizer = {config.optimizer!r}: timm has no such optimiser; {hint}"
        )
    if settled := {"lr", "weight_decay", "opt"} & config.optimizer_options.keys():
        raise UserError(
            f"train.optimizer_options: {', '.join(sorted(settled))} stands in `train` itself"
        )
    if unknown := _OF_GROUPS & config.optimizer_options.keys():
        raise UserError(
            f"train.optimizer_options: {', '.join(sorted(unknown))} would have no effect here"
        )
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            **config.optimizer_options,
        )
    except Exception as error:  # whatever an optimiser makes of the user's options
        raise UserError(
            f"train.optimizer = {config.optimizer!r} with options {config.optimizer_options}: "
            f"{first_line(error)}"
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise UserError(
            f"train.optimizer = {config.optimizer!r} needs second derivatives, which the step does "
            "not compute; take another"
        )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.schedule,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.lr / 1000,
        min_lr=config.min_lr,
        decay_epochs=config.decay_epochs,
        decay_rate=1.0 if config.schedule == "poly" else config.decay_rate,  # of poly: the power
        step_on_epochs=False,
        updates_per_epoch=max(1, steps_per_epoch),
    )
    return Update(
        model,
        optimizer,
        scheduler,
        precision=config.precision,
        clip_grad=config.clip_grad,
        accumulate=micro_batches(config, *(rows or (config.batch_size,) * 2)),
    )


def micro_batches(config: Train, fewest: int, most: int) -> int:
    """Micro-batches that a worker computes its rows of D in, as many in every step.

    Args:
        config: tells how large they may be.
        fewest: rows of D that a worker has in a step.
        most: likewise.
    """
    if config.micro_batch is None:
        return config.accumulate
    possible = max(1, fewest // 2)  # a single row has no BatchNorm statistics
    return max(config.accumulate, min(possible, math.ceil(most / config.micro_batch)))
