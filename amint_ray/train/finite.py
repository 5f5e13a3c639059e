"""Noticing a loss that is not finite, one step later: reading it at once would idle a GPU."""

from __future__ import annotations

import math

import torch

from amint_ray.config.schema import Config
from amint_ray.contracts import Batch
from amint_ray.train.reduce import gather_lists
from amint_ray.train.step import SUMS

_NAMED = 32


class Step:
    """A step whose losses are still to be looked at; both counts from 1."""

    def __init__(self, number: int, epoch: int, batch: Batch) -> None:
        self.number, self.epoch, self.batch = number, epoch, batch

    def done(self, sums: torch.Tensor) -> None:
        """Take the step's sums, and have them sent to the host behind it on a GPU's queue."""
        self._sums = sums.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if sums.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def sums(self) -> dict[str, float]:
        """The step's `SUMS`; waits for this step, not for the one behind it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return dict(zip(SUMS, self._sums.tolist(), strict=True))


def check_finite(step: Step | None, config: Config) -> None:
    """Stop at the first loss that is not finite. The sums are the same on every rank, so all do.

    Raises:
        FloatingPointError: names the step, the losses and the batch's samples.
    """
    if step is None:
        return
    of = step.sums()
    if all(map(math.isfinite, of.values())):
        return
    task_loss = of["task_loss"] / of["task_rows"]
    mint_loss = of["mint_loss"] / max(of["told_rows"], 1)
    ids = list(dict.fromkeys(gather_lists(step.batch.sample_id.tolist())))
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    wide = "take train.precision=bfloat16, " if config.train.precision == "float16" else ""
    raise FloatingPointError(
        f"step {step.number} (epoch {step.epoch}): task loss {task_loss:.4g}, MINT loss "
        f"{mint_loss:.4g}; {wide}lower train.lr or set train.clip_grad; checkpoints written before "
        f"stay; samples of the batch: {', '.join(ids[:_NAMED])}{more}"
    )
