"""The joint training step. Read this first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from amint_ray.contracts import Batch
from amint_ray.train.objective import Objective

SUMS = ("task_loss", "task_correct", "task_rows", "mint_loss", "told_rows")


def train_step(
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
) -> torch.Tensor:
    """One update of M⁺ = (w, θ) on one joint batch.

    Args:
        model: `AuditedModel`, or DDP around one.
        batch: rows of D, then rows of E; E is empty where λ₂ = 0.
        objective: weighs the two losses.
        optimizer: over the trainable parameters of both.
        scheduler: stepped once a batch.

    Returns:
        (5,) float64, this rank's sums in the order of `SUMS`; to be summed over steps and ranks and
        divided once.
    """
    loss, sums = forward(model, batch, objective)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    scheduler.step()
    return sums


def forward(
    model: nn.Module, batch: Batch, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss to differentiate, and the sums that `train_step` returns.

    D and E pass the shared trunk in one concatenated pass. Two passes would let BatchNorm tell the
    network which of the two it sees, and rows of E have no business behind the last tap.
    """
    logits, membership = model(batch.images, n_task=batch.n_task, mint=objective.uses_mint)
    task_sum = F.cross_entropy(logits, batch.labels, reduction="sum")
    task_loss = task_sum / batch.task_per_worker
    mint_loss, mint_sum = None, task_sum.new_zeros(())
    if membership is not None:
        # Weights, not indexing: picking rows by a mask would make the host wait for a GPU.
        mint_sum = F.binary_cross_entropy_with_logits(
            membership,
            batch.membership.to(membership.dtype),
            weight=batch.told.to(membership.dtype),
            reduction="sum",
        )
        mint_loss = mint_sum / (batch.told_per_worker or 1.0)
    loss = objective(task_loss, mint_loss)
    sums = torch.stack(
        [
            task_sum.detach().double(),
            (logits.argmax(1) == batch.labels).sum().double(),
            torch.full_like(task_sum, batch.n_task, dtype=torch.float64),
            mint_sum.detach().double(),
            batch.told.sum().double()
            if membership is not None
            else task_sum.new_zeros(()).double(),
        ]
    )
    return loss, sums
