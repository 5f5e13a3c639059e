"""Scoring on all workers together: what an epoch is watched by, and every sample at the end."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed, nn

from amint_ray.config.schema import Evaluation
from amint_ray.contracts import Role, RunContext, ScoreTable, Streams
from amint_ray.evaluation.scores import concatenate, score
from amint_ray.train.parallel import in_step
from amint_ray.train.reduce import gather_lists, sum_over_ranks


def monitor(
    model: nn.Module,
    streams: Streams,
    context: RunContext,
    *,
    select: Evaluation | None = None,
    head_trained: bool = True,
) -> dict[str, float]:
    """Means over `calibration`, to watch; `test` is looked at once, at the end.

    Args:
        model: of this rank.
        streams: this rank's data.
        context: this rank's world.
        select: wanted is also what a search selects by (`evaluation/selection.py`), measured so.
        head_trained: False where λ₂ = 0.

    Returns:
        The same on every rank. A score that is not finite makes a value that is not.
    """
    watched = score_roles(model, streams, context, [Role.CALIBRATION])
    shown = concatenate([])
    if select is not None:
        # In batches of their own, so that what is watched is the same to the last bit.
        shown = score_roles(
            model, streams, context, [Role.MEMBER, Role.WITHHELD], most=select.select_images
        )
    sums = torch.tensor(
        [
            watched.task_loss.sum(),
            (watched.prediction == watched.label).sum(),
            _mint(watched, head_trained).sum(),
            len(watched),
            (~np.isfinite(shown.task_loss + _mint(shown, head_trained))).sum(),
        ],
        dtype=torch.float64,
        device=context.device,
    )
    (loss, correct, mint, rows, broken), _ = sum_over_ranks(sums)
    means = {
        "calibration/task_loss": float(loss / rows),
        "calibration/task_accuracy": float(correct / rows),
        **({"calibration/mint_logit": float(mint / rows)} if head_trained else {}),
    }
    if select is None or not all(math.isfinite(value) for value in means.values()):
        return means
    if broken:
        return means | {"selection: scores of images of D": math.nan}
    table = gather(concatenate([watched, shown]), context)
    figures: dict[str, float] = {}
    if context.rank == 0:
        # It needs SciPy, whose import most runs' workers need not wait for.
        from amint_ray.evaluation.selection import selection_metrics

        figures = selection_metrics(table, select, head_trained=head_trained)
    return means | dict(gather_lists(list(figures.items())))


def _mint(table: ScoreTable, head_trained: bool) -> npt.NDArray[np.float64]:
    """(n,) scores of the head; 0 where it was not trained, whose scores say nothing."""
    return table.mint_logit if head_trained else np.zeros(len(table))


def score_roles(
    model: nn.Module,
    streams: Streams,
    context: RunContext,
    roles: Collection[Role],
    *,
    most: int | None = None,
) -> ScoreTable:
    """This rank's part of the samples with these roles; every rank calls this.

    Args:
        model: of this rank.
        streams: this rank's data.
        context: this rank's world.
        roles: whose samples.
        most: of each role, over all ranks.
    """
    batches = in_step(streams.score_batches(roles, most), model, context)
    return score(model, batches, context.device)


def gather(part: ScoreTable, context: RunContext) -> ScoreTable:
    """All ranks' rows, on rank 0; nothing elsewhere."""
    if context.world_size == 1:
        return part
    parts: list[Any] | None = [None] * context.world_size if context.rank == 0 else None
    distributed.gather_object(part, parts)
    return concatenate(parts or [])
