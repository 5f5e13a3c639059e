"""The joint training step. Read this first."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from amint_ray.contracts import Batch
from amint_ray.model.blocks import frozen_statistics
from amint_ray.train.objective import Objective
from amint_ray.train.parallel import ranks_meet
from amint_ray.train.reduce import sum_over_ranks
from amint_ray.train.update import Update, uncompiled

SUMS = (
    *("task_loss", "task_correct", "task_rows", "mint_loss", "told_rows"),
    *("code_matches", "code_bits"),
)


def train_step(
    model: nn.Module, batch: Batch, objective: Objective, update: Update
) -> torch.Tensor:
    """One update of M⁺ = (w, θ) on one joint batch.

    Args:
        model: `AuditedModel`, sharded or not, or DDP around one.
        batch: this rank's rows; none behind `n_task` where λ₂ = 0.
        objective: weighs the two losses.
        update: optimiser, precision and the like.

    Returns:
        (7,) float64, the sums of all ranks in the order of `SUMS`; to be summed over steps and
        divided once.
    """
    parts = split(batch, update.accumulate)
    if objective.wants_first_losses:
        objective.start(_mean_losses(_measure(model, parts, update)))
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=batch.images.device)
    for part in parts:
        with ranks_meet(model, last=part is parts[-1]):
            with update.autocast():
                loss, part_sums = forward(model, part, objective)
            update.backward(loss)
        sums += part_sums
    squares = objective.recorded(sums)
    update.step()
    total, _ = sum_over_ranks(torch.cat([sums, squares]))
    sums, squares = total[: len(SUMS)], total[len(SUMS) :]
    objective.update(_mean_losses(sums), squares)
    return sums


def forward(
    model: nn.Module, batch: Batch, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss to differentiate, and this rank's `SUMS`.

    D and E pass the shared trunk in one concatenated pass. Two passes would let BatchNorm tell the
    network which of the two it sees, and rows of E have no business behind the last tap.
    """
    logits, membership = model(
        batch.images,
        labels=batch.labels,
        n_task=batch.n_task,
        head_from=batch.head_from,
        mint=objective.uses_mint,
    )
    labels = batch.labels[: batch.n_task]
    task_sum = F.cross_entropy(logits.float(), labels, reduction="sum")
    task_loss = task_sum / batch.task_per_worker
    none = task_sum.new_zeros(())
    mint_loss, told, matches, bits = None, none, none, none
    if membership is not None:
        mint_loss, told, matches, bits = _mint_loss(membership.float(), batch)
    correct = (logits.argmax(1) == labels).sum()
    rows = task_sum.new_full((), batch.n_task)
    mint_sum = none if mint_loss is None else mint_loss * (batch.told_per_worker or 1.0)
    sums = [x.detach().double() for x in (task_sum, correct, rows, mint_sum, told, matches, bits)]
    return objective(task_loss, mint_loss), torch.stack(sums)


def _mint_loss(said: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, ...]:
    """L_MINT: cross-entropy of membership, of each bit of the code, or the sum of the two.

    Weights, not indexing: picking rows by a mask would make the host wait for a GPU.

    Args:
        said: (n,) membership logits, or (n, membership + bits).
        batch: says what they should be.

    Returns:
        This rank's share of the mean over the global batch; rows that were told of membership or,
        where nothing else is learned, of codes; bits that were right, and bits.
    """
    if batch.code is None:
        weight = batch.told.float()
        summed = F.binary_cross_entropy_with_logits(
            said, batch.membership.float(), weight=weight, reduction="sum"
        )
        none = summed.new_zeros(())
        return summed / (batch.told_per_worker or 1.0), weight.sum(), none, none
    assert batch.coded is not None
    bits = batch.code.shape[1]
    code, coded = said[:, said.shape[1] - bits :], batch.coded.float()
    target = batch.code.float()
    each_bit = F.binary_cross_entropy_with_logits(code, target, reduction="none")
    loss = (each_bit.mean(1) * coded).sum() / (batch.coded_per_worker or 1.0)
    matches = (((code > 0) == (target > 0)).sum(1) * coded).sum()
    told = batch.told.float().sum()
    if said.shape[1] > bits:
        without = replace(batch, code=None)
        loss = loss + _mint_loss(said[:, 0], without)[0]
    return loss, told, matches, coded.sum() * bits


def split(batch: Batch, parts: int) -> list[Batch]:
    """Micro-batches whose losses add up to the batch's: the divisors stay the same.

    Part i takes the rows i, i + parts, … of those that train the task, and likewise of the others,
    so that D and E are mixed alike in all.
    """
    if parts == 1:
        return [batch]

    def part(values: torch.Tensor, i: int, n_task: int) -> torch.Tensor:
        """Slices, not lists of rows: those would have to travel to a GPU first."""
        return torch.cat([values[i:n_task:parts], values[n_task + i :: parts]])

    read = 0 if batch.head_from else batch.n_task
    ids, n = batch.sample_id, batch.n_task
    return [
        replace(
            batch,
            images=part(batch.images, i, n),
            labels=part(batch.labels, i, n),
            n_task=len(range(i, n, parts)),
            head_from=len(range(i, n, parts)) if batch.head_from else 0,
            membership=part(batch.membership, i, read),
            told=part(batch.told, i, read),
            code=None if batch.code is None else part(batch.code, i, read),
            coded=None if batch.coded is None else part(batch.coded, i, read),
            sample_id=np.concatenate([ids[i:n:parts], ids[n + i :: parts]]),
        )
        for i in range(parts)
    ]


def _measure(model: nn.Module, parts: Sequence[Batch], update: Update) -> torch.Tensor:
    """All ranks' sums of the batch as it will be seen in a moment, leaving no trace."""
    device = parts[0].images.device
    random = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    traceless = (random, frozen_statistics(model), uncompiled())
    with contextlib.ExitStack() as stack, torch.no_grad(), update.autocast():
        for context in traceless:
            stack.enter_context(context)
        sums = torch.stack([forward(model, part, Objective())[1] for part in parts]).sum(0)
    return sum_over_ranks(sums)[0]


def _mean_losses(sums: torch.Tensor) -> torch.Tensor:
    """(2,) mean task and MINT loss."""
    task_loss, _, task_rows, mint_loss, told_rows, *_ = sums
    rows = torch.stack([task_rows, told_rows]).clamp_min(1)  # none is left where all were lost
    return (torch.stack([task_loss, mint_loss]) / rows).float()
