"""What a step costs in arithmetic, counted rather than estimated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from amint_ray.model.joint import Architecture, AuditedModel


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of one step, forward and backward, without the optimiser.

    A multiplication and the addition that follows it count as two.

    Attributes:
        joint: of the joint step.
        task: of the same step without E and without the head.
    """

    joint: int
    task: int

    @property
    def ratio(self) -> float:
        """The joint step in units of the audited-only step."""
        return self.joint / self.task


def count_flops(
    architecture: Architecture, *, n_task: int, n_rows: int, head_from: int = 0, mint: bool = True
) -> StepFlops:
    """Count on the meta device: nothing is computed.

    Args:
        architecture: of the audited model.
        n_task: rows that train the task.
        n_rows: all rows.
        head_from: first row that the head reads.
        mint: False counts plain training.
    """
    with torch.device("meta"):
        model: nn.Module = AuditedModel(architecture).train()
        images = torch.zeros(n_rows, *architecture.input_shape)
        labels = torch.zeros(n_rows, dtype=torch.int64)

        def count(n: int, *, mint: bool) -> int:
            with FlopCounterMode(display=False) as counter:
                logits, membership = model(
                    images[:n], labels=labels[:n], n_task=n_task, head_from=head_from, mint=mint
                )
                loss = logits.sum() if membership is None else logits.sum() + membership.sum()
                loss.backward()
            return int(counter.get_total_flops())

        task = count(n_task, mint=False)
        return StepFlops(joint=count(n_rows, mint=True) if mint else task, task=task)
