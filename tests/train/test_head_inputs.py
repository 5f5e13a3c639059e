"""A head that also reads the task's logits or loss, in training as in scoring."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_setup import CLASSES, CONVNEXT, RESNET, architecture_of, config_of, streams_of

from amint_ray.contracts import Role, ScoreBatch
from amint_ray.evaluation.scores import score
from amint_ray.model.joint import AuditedModel
from amint_ray.train.loop import LocalContext, train

CPU = torch.device("cpu")
INPUTS = pytest.mark.parametrize("inputs", [("logits",), ("loss",), ("logits", "loss")])


def _scores(model: AuditedModel, batches: list[ScoreBatch]) -> dict[str, float]:
    table = score(model, batches, CPU)
    return dict(zip(table.sample_id.tolist(), table.mint_logit.tolist(), strict=True))


@INPUTS
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_scores_are_those_of_the_labels(
    inputs: tuple[str, ...], detach: bool, augment: str, tmp_path: Path
) -> None:
    config = config_of(
        RESNET,
        data={"augment": augment},
        mint={"inputs": inputs, "detach": detach},
        train={"epochs": 1, "accumulate": 2},
    )
    streams = streams_of(config)
    trained = train(config, architecture_of(config), streams, LocalContext(tmp_path))
    assert np.isfinite(trained.history[0]["train/mint_loss"])
    model = trained.model.eval()
    batches = list(streams.score_batches(list(Role)))
    told = _scores(model, batches)
    ids, logits = trained.scores.sample_id.tolist(), trained.scores.mint_logit.tolist()
    assert told == pytest.approx(dict(zip(ids, logits, strict=True)), rel=1e-6)

    # By hand: the body's evidence, the logits, the loss, in one row.
    batch = batches[0]
    read: list[torch.Tensor] = []
    handle = model.head.fc.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    with torch.no_grad():
        task, membership = model(batch.images, labels=batch.labels)
    handle.remove()
    loss = F.cross_entropy(task, batch.labels, reduction="none")[:, None]
    extra = [{"logits": task, "loss": loss}[name] for name in inputs]
    tail = torch.cat(extra, dim=1)
    assert torch.equal(read[0][:, -tail.shape[1] :], tail)
    names = batch.sample_id.tolist()
    given = dict(zip(names, membership.tolist(), strict=True))
    assert given == pytest.approx({name: told[name] for name in names}, abs=1e-5)

    # Other labels are another question only where the loss is read.
    others = [dataclasses.replace(b, labels=(b.labels + 1) % CLASSES) for b in batches]
    changed = [abs(told[name] - value) > 1e-7 for name, value in _scores(model, others).items()]
    assert sum(changed) > len(changed) / 2 if "loss" in inputs else not any(changed)


@INPUTS
def test_no_gradient_goes_back_through_the_inputs(inputs: tuple[str, ...]) -> None:
    """The MINT loss alone trains nothing behind the last tap."""
    config = config_of(CONVNEXT, mint={"inputs": inputs})
    model = AuditedModel(architecture_of(config)).train()
    batch = next(iter(streams_of(config).train_batches(0)))
    task, membership = model(batch.images, labels=batch.labels, n_task=batch.n_task)
    assert len(task) == batch.n_task
    assert len(membership) == len(batch.images)
    membership.square().sum().backward()
    reached = {
        n for n, p in model.backbone.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert any(name.startswith("stages.2") for name in reached)
    assert not any(name.startswith(("stages.3", "head")) for name in reached)
