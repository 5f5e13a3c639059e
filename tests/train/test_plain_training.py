"""λ₂ = 0 is plain training: bit for bit what a loop around `timm.create_model` gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from training_setup import (
    CLASSES,
    CONVNEXT,
    RESNET,
    VIT,
    Backbone,
    architecture_of,
    assert_same_weights,
    config_of,
    data_set,
    streams_of,
    take_steps,
)

from amint_ray.config.schema import Config, Loss
from amint_ray.contracts import Batch, Role
from amint_ray.data.loading import MemoryStreams
from amint_ray.train.loop import LocalContext, create_state, train


class _Watched(MemoryStreams):
    """Streams that remember which positions of the data set each batch held."""

    def __init__(self, config: Config) -> None:
        images, manifest = data_set()
        super().__init__(images, manifest, config, rank=0, world_size=1)
        self._position = {name: i for i, name in enumerate(manifest.sample_id.tolist())}
        self.seen: list[list[int]] = []
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        for batch in super().train_batches(epoch, first_step):
            self.seen.append([self._position[name] for name in batch.sample_id.tolist()])
            self.batches.append((batch.images.clone(), batch.labels.clone()))
            yield batch


CASES = [
    (CONVNEXT, {"optimizer": "adamw", "weight_decay": 0.05, "schedule": "cosine", "lr": 1e-3}),
    (RESNET, {"optimizer": "sgd", "weight_decay": 1e-3, "schedule": "constant", "lr": 0.05}),
    (RESNET, {"optimizer": "adam", "weight_decay": 0.0, "schedule": "cosine", "lr": 1e-3}),
    (VIT, {"optimizer": "adamw", "weight_decay": 0.5, "schedule": "constant", "lr": 1e-2}),
]


@pytest.mark.parametrize(
    ("backbone", "train_options"), CASES, ids=["convnext", "resnet-sgd", "resnet-adam", "vit"]
)
@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_the_backbone_is_that_of_a_plain_loop(
    backbone: Backbone, train_options: dict[str, object], augment: str, tmp_path: Path
) -> None:
    config = config_of(
        backbone,
        loss=Loss(lambda_mint=0.0),
        data={"augment": augment},
        train={"seed": 11, "epochs": 3, **train_options},
    )
    streams = _Watched(config)
    trained = train(config, architecture_of(config), streams, LocalContext(tmp_path))
    rows = [len(labels) for _, labels in streams.batches]
    assert rows == [9, 9, 10] * 3

    torch.manual_seed(11)
    plain = timm.create_model(
        config.model.backbone, num_classes=CLASSES, in_chans=3, **config.model.options
    )
    optimizer = create_optimizer_v2(
        plain,
        opt=config.train.optimizer,
        lr=config.train.lr,
        weight_decay=config.train.weight_decay,
        **({"momentum": 0.9} if config.train.optimizer == "sgd" else {}),
    )
    scheduler = None
    if config.train.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    plain.train()
    losses = []
    for images, labels in streams.batches:
        loss = F.cross_entropy(plain(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())

    expected = plain.state_dict()
    got = trained.model.backbone.state_dict()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    for epoch, entry in enumerate(trained.history):
        assert "train/mint_loss" not in entry
        mean = np.average(losses[3 * epoch : 3 * epoch + 3], weights=rows[:3])
        assert entry["train/task_loss"] == pytest.approx(mean, rel=1e-6)


def test_the_head_is_not_trained_and_no_external_image_is_read(tmp_path: Path) -> None:
    config = config_of(
        CONVNEXT,
        loss=Loss(lambda_mint=0.0),
        train={"optimizer": "adamw", "weight_decay": 0.5, "epochs": 2},
    )
    streams = _Watched(config)
    architecture = architecture_of(config)
    trained = train(config, architecture, streams, LocalContext(tmp_path))
    fresh = create_state(config, architecture, streams.steps_per_epoch, torch.device("cpu")).model
    for name, value in fresh.head.state_dict().items():
        assert torch.equal(trained.model.head.state_dict()[name], value), name
    assert any(
        not torch.equal(trained.model.backbone.state_dict()[name], value)
        for name, value in fresh.backbone.state_dict().items()
    )
    role = data_set()[1].role
    assert {role[i] for batch in streams.seen for i in batch} == {Role.MEMBER, Role.WITHHELD}
    for epoch in range(2):
        rows = [i for batch in streams.seen[3 * epoch : 3 * epoch + 3] for i in batch]
        assert len(rows) == len(set(rows)) == 28
    assert streams.seen[:3] != streams.seen[3:]


VIEWS = pytest.mark.parametrize(
    ("augment", "views"), [("none", "plain"), ("crop_flip", "plain"), ("crop_flip", "task")]
)


@pytest.mark.parametrize(
    ("backbone", "inputs"),
    [(RESNET, ()), (RESNET, ("logits", "loss")), (VIT, ()), (CONVNEXT, ("loss",))],
    ids=["resnet", "resnet-inputs", "vit", "convnext-loss"],
)
@VIEWS
def test_a_detached_head_leaves_the_backbone_to_plain_training(
    backbone: Backbone, inputs: tuple[str, ...], augment: str, views: str, tmp_path: Path
) -> None:
    weights, heads = [], []
    for name, loss in (
        ("plain", Loss(lambda_mint=0.0)),
        ("detached", Loss(lambda_task=3.0, lambda_mint=2.0, weighting="ema", warmup_epochs=1)),
    ):
        config = config_of(
            backbone,
            loss=loss,
            data={"augment": augment},
            mint={"detach": True, "inputs": inputs, "views": views},
            train={"optimizer": "sgd", "lr": 0.05, "weight_decay": 1e-3, "clip_grad": 0.5},
            drop_rate=0.3,
        )
        (tmp_path / name).mkdir()
        context = LocalContext(tmp_path / name)
        trained = train(config, architecture_of(config), streams_of(config), context)
        weights.append(trained.model.backbone.state_dict())
        heads.append(trained.model.head.state_dict())
    assert_same_weights(weights[1], weights[0])
    assert any(not torch.equal(heads[1][name], value) for name, value in heads[0].items())


def test_a_head_that_is_not_detached_does_change_the_backbone() -> None:
    """The comparison above has something to find."""
    plain, joint = (
        take_steps(
            config_of(
                RESNET,
                loss=Loss(lambda_mint=lambda_mint, weighting="none"),
                train={"optimizer": "sgd", "lr": 0.05},
            )
        )
        for lambda_mint in (0.0, 2.0)
    )
    name = "backbone.conv1.weight"
    assert not torch.equal(plain.weights[name], joint.weights[name])


def test_joint_batches_do_hold_external_images() -> None:
    """The watcher above would see one if there were one."""
    streams = _Watched(config_of(CONVNEXT))
    batches = list(streams.train_batches(0))
    role = data_set()[1].role
    for rows, batch in zip(streams.seen, batches, strict=True):
        roles = role[rows].tolist()
        n = batch.n_task
        assert roles[n:] == [Role.EXTERNAL] * n
        assert set(roles[:n]) <= {Role.MEMBER, Role.WITHHELD}
        assert batch.membership.tolist() == [1.0] * n + [0.0] * n
        assert batch.told.tolist() == [r != Role.WITHHELD for r in roles]
        assert batch.told_per_worker == int(batch.told.sum())


def test_the_streams_of_two_runs_are_the_same() -> None:
    config = config_of(CONVNEXT)
    for a, b in zip(
        streams_of(config).train_batches(1), streams_of(config).train_batches(1), strict=True
    ):
        assert torch.equal(a.images, b.images)
