"""Passive MINT: a head trained afterwards, on the activations of a model that no longer changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from amint_ray.attacks.evidence import Evidence
from amint_ray.attacks.method import Method
from amint_ray.config.schema import Config
from amint_ray.contracts import Batch, RunError, Streams
from amint_ray.evaluation.outputs import Scores
from amint_ray.model.joint import AuditedModel
from amint_ray.model.mint_head import MintHead
from amint_ray.train.finite import Step, check_finite
from amint_ray.train.loop import epoch_metrics
from amint_ray.train.objective import Objective
from amint_ray.train.step import SUMS, train_step
from amint_ray.train.update import create_update

_ANOTHER_SEED = 0x9A55  # the head must not start from the weights that the model's own started from


def train_head(
    model: AuditedModel,
    streams: Streams,
    config: Config,
    device: torch.device,
    *,
    progress: Callable[[Mapping[str, Any]], None],
) -> AuditedModel:
    """A fresh head of the same kind and placement, on frozen activations in evaluation mode.

    It is told what a jointly trained head is told, `member` as 1 and `external` as 0, never
    `withheld`; it sees as many epochs, in the same order, under the same optimiser and schedule.

    Args:
        model: the audited one; left as it is.
        streams: of a configuration with λ₂ > 0, or there is no external image in a batch.
        config: the run's.
        device: where to train.
        progress: told of each step, as `RunContext.progress` is.

    Returns:
        A copy of the model with the new head in its own one's place, in evaluation mode.

    Raises:
        RunError: the streams bring no external image.
        FloatingPointError: a loss is no longer finite.
    """
    spec = model.architecture
    passive = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.train.seed ^ _ANOTHER_SEED)
        # Of a head that says codes, what it is without them: it is told of membership alone.
        plain = replace(spec, head=replace(spec.head, membership=True, bits=0), features=0)
        passive.architecture = plain
        passive.head = MintHead(plain.head, plain.taps, plain.num_classes)
    passive.to(device).eval()
    passive.backbone.requires_grad_(False)
    update = create_update(passive, config.train, streams.steps_per_epoch)
    objective = Objective(lambda_task=0.0)
    before: Step | None = None
    steps = config.train.epochs * streams.steps_per_epoch
    for epoch in range(config.train.epochs):
        totals = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        for number, batch in enumerate(streams.train_batches(epoch), start=1):
            read = _what_the_head_reads(batch)
            if before is None:
                _check_external(read)
            step = Step(epoch * streams.steps_per_epoch + number, epoch + 1, read)
            sums = train_step(passive, read.to(device), objective, update)
            step.done(sums)
            totals += sums
            check_finite(before, config)  # one step later, as in training
            before = step
            progress(
                {
                    "phase": "train",
                    "epoch": step.epoch,
                    "epochs": config.train.epochs,
                    "step": step.number,
                    "steps": steps,
                    "lost": len(streams.lost),
                }
            )
        check_finite(before, config)
        progress({"phase": "epoch", "epoch": epoch + 1, **epoch_metrics(totals)})
    return passive


def _what_the_head_reads(batch: Batch) -> Batch:
    """The batch without rows that only the task reads; those of D stay the first `n_task`."""
    start = batch.head_from
    return replace(
        batch,
        images=batch.images[start:],
        labels=batch.labels[start:],
        sample_id=batch.sample_id[start:],
        head_from=0,
    )


def _check_external(batch: Batch) -> None:
    if not (batch.membership == 0).any():
        raise RunError(
            "a MINT head cannot be trained afterwards: no image of `external` is in the batches; "
            "they must be made with loss.lambda_mint above 0"
        )


def _score(evidence: Evidence, edit: str) -> Scores:
    assert evidence.passive_logit is not None
    return np.asarray(evidence.passive_logit[edit], np.float64)


PASSIVE_MINT = Method(
    name="passive_mint",
    title="head trained afterwards (passive MINT)",
    source="DeAlcala et al.: Is My Data in Your AI? Membership Inference Test (MINT) Applied to "
    "Face Biometrics, arXiv 2402.09225",
    score=_score,
    needs=frozenset({"passive"}),
)
